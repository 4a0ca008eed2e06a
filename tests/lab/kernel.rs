//! Debian's packaged kernels, unpacked into the cache but not installed.
//!
//! Guests boot the cloud kernel, the host machine boots a generic kernel.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

/// Common prefix of the names of all kernel packages.
const PREFIX: &str = "linux-image-";

/// An unpacked kernel package.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Kernel release, e.g. `6.12.95+deb12-cloud-amd64`.
    pub release: String,
    /// The compressed kernel image.
    pub image: PathBuf,
    /// Modules of the kernel: the content of `/lib/modules/RELEASE`.
    pub modules: PathBuf,
}

/// A decompressed kernel module.
#[derive(Clone, Debug)]
pub struct Module {
    /// File name without directory, e.g. `virtio_net.ko`.
    pub file_name: String,
    /// The ELF file.
    pub contents: Vec<u8>,
}

/// Flavours of Debian's kernels for amd64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// For physical machines, such as a host.
    Generic,
    /// For virtual machines: smaller, with few drivers.
    Cloud,
}

/// Returns the newest cloud kernel that the package lists offer. Downloads the kernel into `cache`
/// if needed.
///
/// A kernel that was unpacked before is used without a check for a newer one.
///
/// # Errors
///
/// No package list has a cloud kernel, or download or unpacking fails.
pub fn newest_cloud(cache: &Path) -> Result<Kernel> {
    let unpacked = cache.join("kernel");
    if let Some(kernel) = find(&unpacked)? {
        return Ok(kernel);
    }
    let package = offered(Flavour::Cloud, &[])?
        .pop()
        .context("No linux-image-*-cloud-amd64 in the package lists: run apt-get update")?;
    unpack(cache, &package, &unpacked)
}

/// Returns the kernel of `choice`. Downloads the kernel into a directory of its own in `cache` if
/// needed.
///
/// `choice` is the name of a package, or a version or its beginning. A version selects the newest
/// generic kernel with that version in the package lists.
///
/// # Errors
///
/// No package fits, or download or unpacking fails.
pub fn chosen(cache: &Path, choice: &str) -> Result<Kernel> {
    let package = if choice.starts_with(PREFIX) {
        choice.to_owned()
    } else {
        let wanted = numbers(choice.trim_end_matches("-amd64"));
        ensure!(
            !wanted.is_empty() && choice.starts_with(|first: char| first.is_ascii_digit()),
            "{choice:?} is no kernel: name a version such as 6.1, or a package such as {PREFIX}6.1.0-57-amd64"
        );
        offered(Flavour::Generic, &wanted)?.pop().with_context(|| {
            format!(
                "No package list has a generic kernel {choice} for amd64: \
                 `apt-cache search '^{PREFIX}[0-9].*-amd64$'` shows what there is"
            )
        })?
    };
    let unpacked = cache.join(&package);
    if let Some(kernel) = find(&unpacked)? {
        return Ok(kernel);
    }
    unpack(cache, &package, &unpacked)
}

impl Kernel {
    /// Returns the named modules and all modules that they depend on, in the order of loading.
    ///
    /// A name yields no module if the module is built into this kernel or does not exist.
    ///
    /// # Errors
    ///
    /// A module cannot be decompressed.
    pub fn modules(&self, names: &[&str]) -> Result<Vec<Module>> {
        let mut files = Vec::new();
        collect_modules(&self.modules.join("kernel"), &mut files)?;
        let mut seen = BTreeSet::new();
        let mut modules = Vec::new();
        for name in names {
            self.add_module(name, &files, &mut seen, &mut modules)?;
        }
        Ok(modules)
    }

    fn add_module(
        &self,
        name: &str,
        files: &[PathBuf],
        seen: &mut BTreeSet<String>,
        modules: &mut Vec<Module>,
    ) -> Result<()> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = files
            .iter()
            .find(|path| module_name(path).as_deref() == Some(name))
        else {
            return Ok(());
        };
        let contents = decompress(path)?;
        for dependency in dependencies(&contents) {
            self.add_module(&dependency, files, seen, modules)?;
        }
        modules.push(Module {
            file_name: format!("{name}.ko"),
            contents,
        });
        Ok(())
    }
}

fn find(tree: &Path) -> Result<Option<Kernel>> {
    let Ok(entries) = fs::read_dir(tree.join("boot")) else {
        return Ok(None);
    };
    for entry in entries {
        let name = entry?.file_name();
        if let Some(release) = name.to_str().and_then(|name| name.strip_prefix("vmlinuz-")) {
            let modules = [tree.join("lib/modules"), tree.join("usr/lib/modules")]
                .into_iter()
                .map(|directory| directory.join(release))
                .find(|directory| directory.is_dir())
                .with_context(|| format!("Kernel {release} has no modules"))?;
            let image = tree.join("boot").join(&name);
            return Ok(Some(Kernel {
                release: release.to_owned(),
                image,
                modules,
            }));
        }
    }
    Ok(None)
}

/// Returns the packages of a flavour whose version begins with `wanted`, oldest first.
///
/// If the lists have no such package, they are read anew: a machine that was just set up has no
/// lists.
fn offered(flavour: Flavour, wanted: &[u64]) -> Result<Vec<String>> {
    let packages = listed(flavour, wanted)?;
    if !packages.is_empty() {
        return Ok(packages);
    }
    refresh()?;
    listed(flavour, wanted)
}

fn listed(flavour: Flavour, wanted: &[u64]) -> Result<Vec<String>> {
    let output = Command::new("apt-cache")
        .args(["search", "--names-only", "^linux-image-[0-9][^ ]*-amd64$"])
        .output()
        .context("Cannot run apt-cache; kernels come from Debian's packages")?;
    let names = String::from_utf8_lossy(&output.stdout);
    let names = names
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    Ok(fitting(names, flavour, wanted))
}

/// Returns the names of a flavour whose version begins with `wanted`, oldest first.
fn fitting<'a>(
    names: impl Iterator<Item = &'a str>,
    flavour: Flavour,
    wanted: &[u64],
) -> Vec<String> {
    let mut found: Vec<_> = names
        .filter_map(|name| {
            let release = name.strip_prefix(PREFIX)?.strip_suffix("-amd64")?;
            let version = match flavour {
                Flavour::Cloud => release.strip_suffix("-cloud")?,
                Flavour::Generic => release,
            };
            let numbers = numbers(version);
            // A version with only two numbers or with a further word belongs to a meta-package or
            // another flavour.
            let is_kernel =
                numbers.len() > 2 && !version.ends_with(|last: char| last.is_ascii_alphabetic());
            (is_kernel && numbers.starts_with(wanted)).then(|| (numbers, name.to_owned()))
        })
        .collect();
    found.sort();
    found.into_iter().map(|(_, name)| name).collect()
}

/// Returns the numbers of a version, for comparison: `6.12.95+deb12` is newer than `6.9.10`.
fn numbers(version: &str) -> Vec<u64> {
    version
        .split(|character: char| !character.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

fn refresh() -> Result<()> {
    run(Command::new("apt-get").args(["--quiet", "--quiet", "update"]))
}

/// Downloads a package and unpacks it as the directory `unpacked`.
fn unpack(cache: &Path, package: &str, unpacked: &Path) -> Result<Kernel> {
    fs::create_dir_all(cache).with_context(|| format!("Cannot create {}", cache.display()))?;
    let download = tempfile::tempdir_in(cache)?;
    let fetch = || {
        run(Command::new("apt-get")
            .args(["--quiet", "--quiet", "download", package])
            // Without this option apt warns that its own user cannot write here.
            .args(["-o", "APT::Sandbox::User=root"])
            .current_dir(download.path()))
    };
    // The archive keeps only the newest packages, so an old list may name a package that no longer
    // exists.
    fetch().or_else(|_| refresh().and_then(|()| fetch()))?;
    let archive = fs::read_dir(download.path())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get download {package} left no package behind"))?;
    let tree = download.path().join("tree");
    run(Command::new("dpkg").arg("-x").arg(&archive).arg(&tree))?;
    let kernel = find(&tree)?.with_context(|| {
        format!(
            "Package {package} holds no kernel image (from 6.19 on Debian keeps it in other \
             packages): choose an older kernel"
        )
    })?;
    // The package contains no index of the modules; installing it would create one.
    let base = kernel.modules.ancestors().nth(3).unwrap_or(&tree);
    run(Command::new("depmod")
        .arg("--basedir")
        .arg(base)
        .arg(&kernel.release))?;
    // The rename is the last step, so an interrupted download never passes for a complete one.
    fs::rename(&tree, unpacked).with_context(|| {
        format!(
            "Cannot rename the unpacked {package} to {}",
            unpacked.display()
        )
    })?;
    find(unpacked)?.context("The unpacked kernel disappeared")
}

fn collect_modules(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(directory)
        .with_context(|| format!("Cannot list modules in {}", directory.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect_modules(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Returns the name of the module in a file: `virtio_net` for `.../virtio_net.ko.xz`.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (stem, _suffix) = name.split_once(".ko")?;
    Some(stem.replace('-', "_"))
}

fn decompress(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => return Ok(fs::read(path)?),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => bail!("Module {} has an unknown compression", path.display()),
    };
    let output = Command::new(tool)
        .args(["--decompress", "--stdout"])
        .arg(path)
        .output()
        .with_context(|| format!("Cannot run {tool} on {}", path.display()))?;
    ensure!(
        output.status.success(),
        "{tool} cannot decompress {}",
        path.display()
    );
    Ok(output.stdout)
}

/// Reads `depends=` of the section `.modinfo`, which holds NUL-terminated `key=value` strings.
fn dependencies(module: &[u8]) -> Vec<String> {
    module
        .split(|byte| *byte == 0)
        .find_map(|string| string.strip_prefix(b"depends="))
        .map(|names| String::from_utf8_lossy(names).into_owned())
        .unwrap_or_default()
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("Cannot run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 9] = [
        "linux-image-6.1.0-9-amd64",
        "linux-image-6.1.0-57-amd64",
        "linux-image-6.1.0-58-cloud-amd64",
        "linux-image-6.1.0-58-rt-amd64",
        "linux-image-6.12-amd64",
        "linux-image-6.12.95+deb12-amd64",
        "linux-image-6.12.117+deb12-amd64",
        "linux-image-6.12.117+deb12-cloud-amd64",
        "linux-image-6.12.100+deb12.1-amd64",
    ];

    fn newest(flavour: Flavour, wanted: &str) -> Option<String> {
        fitting(NAMES.into_iter(), flavour, &numbers(wanted)).pop()
    }

    #[test]
    fn newest_generic_kernel_of_a_version_is_chosen_by_number() {
        let newest = |wanted| newest(Flavour::Generic, wanted);
        assert_eq!(newest("6.1").as_deref(), Some("linux-image-6.1.0-57-amd64"));
        assert_eq!(
            newest("6.12").as_deref(),
            Some("linux-image-6.12.117+deb12-amd64")
        );
        assert_eq!(newest("6.9"), None);
    }

    #[test]
    fn whole_version_chooses_that_kernel() {
        let newest = |wanted| newest(Flavour::Generic, wanted);
        assert_eq!(
            newest("6.1.0-9").as_deref(),
            Some("linux-image-6.1.0-9-amd64")
        );
        assert_eq!(
            newest("6.12.95+deb12").as_deref(),
            Some("linux-image-6.12.95+deb12-amd64")
        );
        assert_eq!(newest("6.1.0-5"), None);
    }

    #[test]
    fn cloud_kernels_are_a_flavour_of_their_own() {
        assert_eq!(
            newest(Flavour::Cloud, "").as_deref(),
            Some("linux-image-6.12.117+deb12-cloud-amd64")
        );
    }

    #[test]
    fn what_is_no_version_and_no_package_is_refused_with_an_example() {
        for choice in ["", "newest", "v6.1", "-"] {
            let error = chosen(Path::new("/nonexistent"), choice).unwrap_err();
            assert!(format!("{error:#}").contains("6.1.0-57-amd64"), "{error:#}");
        }
    }

    #[test]
    fn dependencies_come_from_modinfo() {
        let module = b"\x7fELF\0license=GPL\0depends=failover,net-failover\0name=x\0";
        assert_eq!(dependencies(module), ["failover", "net_failover"]);
        assert_eq!(dependencies(b"depends=\0"), Vec::<String>::new());
    }
}
