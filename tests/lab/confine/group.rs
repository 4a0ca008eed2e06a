//! `MemoryMax=` and `TasksMax=`: a control group with these limits, in which the service runs.

use std::fs::{self, DirBuilder};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Unit;

/// How long the kernel may take to end what is left in a group.
const EMPTY_DEADLINE: Duration = Duration::from_secs(10);
/// The hierarchy of cgroup v2 has this file in each group.
const CONTROLLERS: &str = "cgroup.controllers";
/// The members of a group, in both versions.
const MEMBERS: &str = "cgroup.procs";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A controller of cgroups, and how both versions call its files.
struct Controller {
    name: &'static str,
    /// The limit in v2.
    limit: &'static str,
    /// The limit in v1.
    limit_v1: &'static str,
    /// How often the limit was met: a file, and a word in it or none for all of it.
    met: (&'static str, Option<&'static str>),
    /// The same in v1.
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

/// A limit that a group has.
#[derive(Debug)]
struct Limit {
    /// The group's directory: one for both limits in v2, one each in v1.
    directory: PathBuf,
    met: (&'static str, Option<&'static str>),
}

/// A control group of our own below the topmost one. On drop all that is in the group ends, and then the
/// group.
#[derive(Debug)]
pub struct ControlGroup {
    limits: Vec<Limit>,
}

impl ControlGroup {
    /// A group with the limits of a unit, which has to have both.
    ///
    /// # Errors
    ///
    /// When the unit has no limit, or the kernel has no such group.
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
            // As systemd has done where it runs.
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
        // Known first, so that the group goes whatever follows.
        self.limits.push(Limit {
            directory: directory.clone(),
            met,
        });
        fs::write(directory.join(file), limit.to_string())
            .with_context(|| format!("Cannot set {file} to {limit}"))?;
        // A machine with swap would otherwise go on, slowly, where ours end.
        let swap = directory.join("memory.swap.max");
        if is_v2 && controller.name == MEMORY.name && swap.exists() {
            fs::write(swap, "0").context("Cannot forbid swap")?;
        }
        Ok(())
    }

    /// Where a process joins the group.
    pub(super) fn directories(&self) -> impl Iterator<Item = &Path> {
        self.limits.iter().map(|limit| limit.directory.as_path())
    }

    /// How often a service has met a limit.
    ///
    /// # Errors
    ///
    /// When the kernel does not say.
    pub fn times_met(&self) -> Result<u64> {
        self.limits.iter().map(Limit::times_met).sum()
    }

    /// The processes in the group.
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
            // Both limits may have one directory, which is gone then.
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

/// Has this process, and all that it starts, in a group.
pub(super) fn join(directory: &Path) -> Result<()> {
    fs::write(directory.join(MEMBERS), "0")
        .with_context(|| format!("Cannot join the group {}", directory.display()))
}

/// The topmost group of the hierarchy that has a controller.
fn hierarchy(controller: &str) -> Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("Mounts cannot be listed")?;
    for line in text.lines() {
        // ID, parent, device, root, place, options and more, a dash, type, source, options of the type.
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

/// A size or number as units have them: digits, and a letter for a power of 1024.
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
