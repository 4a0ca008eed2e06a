//! The guest's kernel: a packaged Debian cloud kernel, unpacked into the cache and not installed.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

/// An unpacked kernel package.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Kernel release, e.g. `6.12.95+deb12-cloud-amd64`.
    pub release: String,
    /// The compressed kernel image.
    pub image: PathBuf,
    modules: PathBuf,
}

/// A decompressed kernel module.
#[derive(Clone, Debug)]
pub struct Module {
    /// File name without directory, e.g. `virtio_net.ko`.
    pub file_name: String,
    /// The ELF file.
    pub contents: Vec<u8>,
}

/// Returns the newest cloud kernel the package lists offer, downloading it into `cache` if needed.
///
/// A kernel that was unpacked before is taken as it is, without asking for a newer one.
///
/// # Errors
///
/// No package list has a cloud kernel, or download or unpacking fails.
pub fn ensure(cache: &Path) -> Result<Kernel> {
    let unpacked = cache.join("kernel");
    if let Some(kernel) = find(&unpacked)? {
        return Ok(kernel);
    }
    fs::create_dir_all(cache).with_context(|| format!("Cannot create {}", cache.display()))?;
    let package = newest_package()?;
    let download = tempfile::tempdir_in(cache)?;
    run(Command::new("apt-get")
        .args(["--quiet", "--quiet", "download", &package])
        // Otherwise apt warns that its own user cannot write here.
        .args(["-o", "APT::Sandbox::User=root"])
        .current_dir(download.path()))?;
    let archive = fs::read_dir(download.path())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .with_context(|| format!("apt-get download {package} left no package behind"))?;
    let tree = download.path().join("tree");
    run(Command::new("dpkg").arg("-x").arg(&archive).arg(&tree))?;
    ensure!(
        find(&tree)?.is_some(),
        "Package {package} holds no kernel image"
    );
    // Renamed as the last step, so that an interrupted download is never taken for a whole one.
    fs::rename(&tree, &unpacked)?;
    find(&unpacked)?.context("The unpacked kernel disappeared")
}

impl Kernel {
    /// Returns the named modules and everything they depend on, in the order to load them.
    ///
    /// A name that is built into this kernel, or that it does not have, gives nothing.
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

fn newest_package() -> Result<String> {
    let output = Command::new("apt-cache")
        .args([
            "search",
            "--names-only",
            "^linux-image-[0-9][^ ]*-cloud-amd64$",
        ])
        .output()
        .context("Cannot run apt-cache; the guest kernel comes from a Debian package")?;
    let names = String::from_utf8_lossy(&output.stdout);
    names
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .max_by_key(|name| version_key(name))
        .map(str::to_owned)
        .context("No linux-image-*-cloud-amd64 in the package lists; run apt-get update")
}

/// Numbers of a package name, for comparing releases: `6.12.95+deb12` is newer than `6.9.10`.
fn version_key(name: &str) -> Vec<u64> {
    let release = name.trim_end_matches("-cloud-amd64");
    release
        .split(|character: char| !character.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
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

/// `.../virtio_net.ko.xz` is the module `virtio_net`.
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

    #[test]
    fn releases_compare_by_number() {
        let newer = version_key("linux-image-6.12.95+deb12-cloud-amd64");
        assert!(newer > version_key("linux-image-6.9.10+bpo-cloud-amd64"));
        assert!(newer < version_key("linux-image-6.12.95+deb12.1-cloud-amd64"));
    }

    #[test]
    fn dependencies_come_from_modinfo() {
        let module = b"\x7fELF\0license=GPL\0depends=failover,net-failover\0name=x\0";
        assert_eq!(dependencies(module), ["failover", "net_failover"]);
        assert_eq!(dependencies(b"depends=\0"), Vec::<String>::new());
    }
}
