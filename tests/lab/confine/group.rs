//! `MemoryMax=` and `TasksMax=`: a control group with these limits, for the service.

use std::fs::{self, DirBuilder};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Unit;

/// Time limit for the kernel to end the remaining processes of a group.
const EMPTY_DEADLINE: Duration = Duration::from_secs(10);
/// File in each group of a cgroup v2 hierarchy.
const CONTROLLERS: &str = "cgroup.controllers";
/// File with the members of a group, in both versions of cgroups.
const MEMBERS: &str = "cgroup.procs";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A cgroup controller and its file names in both versions.
struct Controller {
    name: &'static str,
    /// File of the limit in v2.
    limit: &'static str,
    /// File of the limit in v1.
    limit_v1: &'static str,
    /// Counter in v2 of how often the limit was met: a file and a key in it, or `None` if the file
    /// holds only the number.
    met: (&'static str, Option<&'static str>),
    /// The same counter in v1.
    met_v1: (&'static str, Option<&'static str>),
}

const MEMORY: Controller = Controller {
    name: "memory",
    limit: "memory.max",
    limit_v1: "memory.limit_in_bytes",
    met: ("memory.events", Some("max")),
    met_v1: ("memory.failcnt", None),
};
const TASKS: Controller = Controller {
    name: "pids",
    limit: "pids.max",
    limit_v1: "pids.max",
    met: ("pids.events", Some("max")),
    met_v1: ("pids.events", Some("max")),
};

/// A limit of a group.
#[derive(Debug)]
struct Limit {
    /// Directory of the group: in v2 the same for both limits, in v1 one for each limit.
    directory: PathBuf,
    met: (&'static str, Option<&'static str>),
}

/// A control group below the topmost group. Dropping the value kills the processes in the group and
/// removes the group.
#[derive(Debug)]
pub struct ControlGroup {
    limits: Vec<Limit>,
}

impl ControlGroup {
    /// Creates a group with the limits of a unit, which must have both limits.
    ///
    /// # Errors
    ///
    /// When the unit lacks a limit, or the kernel refuses the group or a limit.
    pub fn new(unit: &Unit) -> Result<Self> {
        let limits = [(MEMORY, "MemoryMax"), (TASKS, "TasksMax")];
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("roamcast-{}-{number}", std::process::id());
        let mut group = Self { limits: Vec::new() };
        for (controller, key) in limits {
            let limit = bytes(unit.last(key).with_context(|| format!("No {key}="))?)?;
            group.add(&controller, &name, limit)?;
        }
        Ok(group)
    }

    fn add(&mut self, controller: &Controller, name: &str, limit: u64) -> Result<()> {
        let root = hierarchy(controller.name)?;
        let is_v2 = root.join(CONTROLLERS).exists();
        if is_v2 {
            // systemd, where it runs, has already enabled the controller.
            let enabled = format!("+{}", controller.name);
            fs::write(root.join("cgroup.subtree_control"), enabled)
                .with_context(|| format!("No groups below {}", root.display()))?;
        }
        let directory = root.join(name);
        DirBuilder::new()
            .recursive(true)
            .create(&directory)
            .with_context(|| format!("Cannot make the group {}", directory.display()))?;
        let (file, met) = if is_v2 {
            (controller.limit, controller.met)
        } else {
            (controller.limit_v1, controller.met_v1)
        };
        // The directory is recorded now, so that a drop removes the group even if a later step
        // fails.
        self.limits.push(Limit {
            directory: directory.clone(),
            met,
        });
        fs::write(directory.join(file), limit.to_string())
            .with_context(|| format!("Cannot set {file} to {limit}"))?;
        // With swap, a service beyond its limit would continue slowly instead of ending.
        let swap = directory.join("memory.swap.max");
        if is_v2 && controller.name == MEMORY.name && swap.exists() {
            fs::write(swap, "0").context("Cannot forbid swap")?;
        }
        Ok(())
    }

    /// Returns the directories in which a process joins the group.
    pub(super) fn directories(&self) -> impl Iterator<Item = &Path> {
        self.limits.iter().map(|limit| limit.directory.as_path())
    }

    /// Returns how often processes of the group have met a limit.
    ///
    /// # Errors
    ///
    /// When a counter can't be read.
    pub fn times_met(&self) -> Result<u64> {
        self.limits.iter().map(Limit::times_met).sum()
    }

    /// Returns the processes in the group.
    #[must_use]
    pub fn members(&self) -> Vec<Pid> {
        let texts = self
            .directories()
            .filter_map(|directory| fs::read_to_string(directory.join(MEMBERS)).ok());
        let mut members: Vec<Pid> = texts
            .flat_map(|text| {
                let numbers = text.lines().filter_map(|line| line.parse().ok());
                numbers.map(Pid::from_raw).collect::<Vec<_>>()
            })
            .collect();
        members.sort();
        members.dedup();
        members
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        let end = Instant::now() + EMPTY_DEADLINE;
        while !self.members().is_empty() && Instant::now() < end {
            for member in self.members() {
                let _ = kill(member, Signal::SIGKILL);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        for directory in self.directories() {
            // Both limits may share a directory, which then no longer exists the second time.
            let _ = fs::remove_dir(directory);
        }
    }
}

impl Limit {
    fn times_met(&self) -> Result<u64> {
        let (file, word) = self.met;
        let text = fs::read_to_string(self.directory.join(file))
            .with_context(|| format!("Cannot read {file}"))?;
        let number = match word {
            None => text.trim(),
            Some(word) => text
                .lines()
                .find_map(|line| line.strip_prefix(word)?.strip_prefix(' '))
                .with_context(|| format!("{file} has no {word}"))?,
        };
        Ok(number.parse()?)
    }
}

/// Moves this process, and thereby its future children, into a group.
pub(super) fn join(directory: &Path) -> Result<()> {
    fs::write(directory.join(MEMBERS), "0")
        .with_context(|| format!("Cannot join the group {}", directory.display()))
}

/// Returns the topmost group of the hierarchy that has a controller.
fn hierarchy(controller: &str) -> Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("Mounts cannot be listed")?;
    for line in text.lines() {
        // Fields: ID, parent, device, root, mount point, options, optional fields, a dash, type,
        // source, options of the file system.
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let place = left.split(' ').nth(4).map(Path::new);
        let mut right = right.split(' ');
        let (kind, options) = (right.next(), right.nth(1));
        let (Some(place), Some(kind), Some(options)) = (place, kind, options) else {
            continue;
        };
        let is_there = match kind {
            "cgroup" => options.split(',').any(|option| option == controller),
            "cgroup2" => fs::read_to_string(place.join(CONTROLLERS))
                .is_ok_and(|text| text.split_whitespace().any(|word| word == controller)),
            _ => false,
        };
        if is_there {
            return Ok(place.to_owned());
        }
    }
    bail!("No hierarchy of control groups has {controller}: mount cgroup2 on /sys/fs/cgroup")
}

/// Parses a size or number of a unit: digits, and optionally a letter for a power of 1024.
fn bytes(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(char::is_alphabetic);
    let shift = match text.get(digits.len()..) {
        Some("") => 0,
        Some("K") => 10,
        Some("M") => 20,
        Some("G") => 30,
        _ => bail!("{text} is no limit"),
    };
    let number: u64 = digits
        .parse()
        .with_context(|| format!("{text} is no limit"))?;
    ensure!(
        number.leading_zeros() > shift,
        "{text} is more than there can be"
    );
    Ok(number << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_have_powers_of_1024() {
        assert_eq!(bytes("16").unwrap(), 16);
        assert_eq!(bytes("512M").unwrap(), 512 << 20);
        assert_eq!(bytes("4G").unwrap(), 4 << 30);
        for none in ["", "infinity", "4X", "50%", "99999999999999G"] {
            assert!(bytes(none).is_err(), "{none}");
        }
    }
}
