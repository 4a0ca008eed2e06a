//! File system view of a confined program: visible paths and writable paths.

use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use super::Unit;

/// A directory that every machine has. A private file system there exposes the programs, because
/// the program's user may not be able to reach their original paths.
const PLACE: &str = "/mnt";
/// Devices that remain with `PrivateDevices=`.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
const NONE: Option<&str> = None;

/// Private mounts of this process, which expose the programs to execute.
pub(super) struct Places {
    programs: [PathBuf; 2],
}

impl Places {
    /// Creates private mounts for this process, with two programs that every user may execute.
    pub(super) fn new(programs: &[&Path; 2]) -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS).context("No mounts of its own: run as root")?;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(NONE, "/", NONE, private, NONE).context("Mounts cannot be made private")?;
        let mode = Some("mode=0755");
        mount(NONE, PLACE, Some("tmpfs"), MsFlags::empty(), mode)?;
        let mut places = [PathBuf::new(), PathBuf::new()];
        for (number, (program, place)) in programs.iter().zip(&mut places).enumerate() {
            let name = program.file_name().context("A program has no name")?;
            // Some programs check their own name, so each program keeps its name in a directory of
            // its own.
            let directory = Path::new(PLACE).join(number.to_string());
            fs::create_dir(&directory)?;
            *place = directory.join(name);
            File::create(&*place)?;
            bind(program, place)?;
        }
        Ok(Self { programs: places })
    }

    /// Returns the paths of the programs.
    pub(super) fn programs(&self) -> &[PathBuf; 2] {
        &self.programs
    }

    /// Writes a file that every user may read. Returns the path.
    pub(super) fn write(&self, name: &str, content: &[u8]) -> Result<PathBuf> {
        let path = Path::new(PLACE).join(name);
        fs::write(&path, content)?;
        Ok(path)
    }
}

/// Applies the file system settings of a unit.
pub(super) fn restrict(unit: &Unit, writable: &[PathBuf]) -> Result<()> {
    let read_only = unit.words("ReadOnlyPaths");
    let tunables = unit.is_set("ProtectKernelTunables");
    if unit.is_set("PrivateDevices") {
        private_devices()?;
    }
    let hidden = unit.last("ProtectProc");
    let subset = unit.last("ProcSubset").filter(|subset| *subset == "pid");
    if hidden.is_some() || subset.is_some() {
        let hidden = hidden.map(|value| format!("hidepid={value}"));
        let subset = subset.map(|value| format!("subset={value}"));
        let options: Vec<String> = hidden.into_iter().chain(subset).collect();
        let options = options.join(",");
        mount(
            NONE,
            "/proc",
            Some("proc"),
            MsFlags::empty(),
            Some(&*options),
        )
        .context("No /proc of its own")?;
    }
    if unit.last("ProtectSystem") == Some("strict") {
        let is_api = |path: &Path| {
            ["/proc", "/dev", "/sys"]
                .iter()
                .any(|api| path.starts_with(api))
        };
        for path in mount_points()?.iter().filter(|path| !is_api(path)) {
            make_read_only(path)?;
        }
    }
    if tunables || read_only.contains(&"/sys") {
        let points = mount_points()?;
        for path in points.iter().filter(|path| path.starts_with("/sys")) {
            make_read_only(path)?;
        }
    }
    let tunable = Path::new("/proc/sys");
    if tunable.exists() && (tunables || read_only.contains(&"/proc/sys")) {
        bind(tunable, tunable)?;
        make_read_only(tunable)?;
    }
    // In units a dash means that the path may be missing; here any path may be missing.
    let of_unit = unit.words("ReadWritePaths").into_iter();
    let of_unit = of_unit.map(|path| PathBuf::from(path.trim_start_matches('-')));
    for path in of_unit.chain(writable.iter().cloned()) {
        if path.exists() {
            bind(&path, &path)?;
            let again = MsFlags::MS_REMOUNT | MsFlags::MS_BIND;
            mount(NONE, &path, NONE, again, NONE)
                .with_context(|| format!("{} cannot be made writable", path.display()))?;
        }
    }
    Ok(())
}

fn private_devices() -> Result<()> {
    let new = Path::new(PLACE).join("dev");
    fs::create_dir(&new)?;
    let mode = Some("mode=0755");
    mount(NONE, &new, Some("tmpfs"), MsFlags::empty(), mode)?;
    for device in DEVICES {
        let place = new.join(device);
        File::create(&place)?;
        bind(&Path::new("/dev").join(device), &place)?;
    }
    mount(Some(&new), "/dev", NONE, MsFlags::MS_MOVE, NONE).context("No /dev of its own")
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(from), to, NONE, flags, NONE)
        .with_context(|| format!("{} cannot be mounted on {}", from.display(), to.display()))
}

fn make_read_only(path: &Path) -> Result<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    match mount(NONE, path, NONE, flags, NONE) {
        Ok(()) => Ok(()),
        // Another mount hides this mount point, so the program cannot see it either.
        Err(_) if path != Path::new("/") => Ok(()),
        Err(error) => Err(error).context("The file system cannot be made read-only"),
    }
}

/// Returns all mount points.
fn mount_points() -> Result<Vec<PathBuf>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("Mounts cannot be listed")?;
    let fields = text.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(fields.map(unescaped).collect())
}

/// Decodes a path from `/proc`, where a backslash and three octal digits stand for some characters.
fn unescaped(text: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).filter(|_| *first == b'\\');
        let value = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match value {
            Some(value) => {
                bytes.push(value);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escaped_paths_are_read() {
        assert_eq!(unescaped("/a\\040b\\134"), Path::new("/a b\\"));
        assert_eq!(unescaped("/x\\9"), Path::new("/x\\9"));
    }
}
