//! Registry of the existing labs, by which any later process can remove them.
//!
//! A lab called `NAME` consists of
//!
//! - the namespaces `rcNAME-*`,
//! - the processes whose network namespace is one of these,
//! - the directory `/run/roamcast-lab/NAME`.
//!
//! The mounts of a VMS are in a mount namespace that ends with the last process of the VMS. A lab
//! can therefore be removed completely without any knowledge of the process that built it.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::node::prefix;
use crate::topology::LabConfig;
use crate::{netns, wait};

/// Directory of all labs.
const ROOT: &str = "/run/roamcast-lab";

/// Longest name of a lab. The name is part of the names of namespaces and of the paths of Unix
/// sockets, which are at most 107 bytes long.
const NAME_MAX: usize = 16;

/// Record of a lab, stored as `lab.json` in the lab's directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// Configuration of the lab.
    pub config: LabConfig,
    /// Id of the process that built the lab.
    pub owner: i32,
    /// Start time of the owner in clock ticks since boot, which distinguishes the owner from a
    /// later process with the same id.
    pub owner_started: u64,
    /// True if the lab outlives its owner (`cargo xtask lab up`).
    pub kept: bool,
    /// True once the whole lab is up.
    pub ready: bool,
}

/// A process that runs in a lab.
#[derive(Debug, Clone, Serialize)]
pub struct LabProcess {
    /// Name of the network namespace.
    pub namespace: String,
    /// Process id.
    pub pid: i32,
    /// Command line, arguments separated by spaces.
    pub command: String,
}

/// Returns the directory of a lab.
#[must_use]
pub fn directory(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

/// Returns the names of all labs of which any part exists.
#[must_use]
pub fn names() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(ROOT)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Reads the record of a lab.
///
/// # Errors
///
/// When the lab does not exist or its record can't be read.
pub fn read(name: &str) -> Result<Record> {
    let path = record_path(name);
    let text = fs::read(&path)
        .with_context(|| format!("There is no lab called {name}: {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("Failed to read {}", path.display()))
}

/// Takes the lock for building and removing labs; dropping the value releases it.
pub(crate) fn lock() -> Result<Flock<File>> {
    fs::create_dir_all(ROOT).with_context(|| format!("Failed to create {ROOT}: are you root?"))?;
    let path = Path::new(ROOT).join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("Failed to open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("Failed to lock {}", path.display()))
}

/// Checks that a name is usable for a lab.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let good = !name.is_empty()
        && name.len() <= NAME_MAX
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit());
    ensure!(
        good,
        "The lab name {name:?} is not usable: take 1 to {NAME_MAX} letters a-z and digits"
    );
    Ok(())
}

/// Checks that no other running process owns a lab with this name.
pub(crate) fn check_free(name: &str) -> Result<()> {
    let Ok(record) = read(name) else {
        return Ok(());
    };
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    ensure!(
        record.kept || record.owner == own || !owner_alive(&record),
        "The lab {name} belongs to process {}, which still runs: end that first, or take another \
         name",
        record.owner
    );
    Ok(())
}

pub(crate) fn write(record: &Record) -> Result<()> {
    let name = &record.config.name;
    let path = record_path(name);
    fs::create_dir_all(directory(name))
        .with_context(|| format!("Failed to create {}", directory(name).display()))?;
    let temporary = path.with_extension("new");
    fs::write(&temporary, serde_json::to_vec_pretty(record)?)
        .and_then(|()| fs::rename(&temporary, &path))
        .with_context(|| format!("Failed to write {}", path.display()))
}

fn record_path(name: &str) -> PathBuf {
    directory(name).join("lab.json")
}

/// Returns true while the process that built a lab runs.
#[must_use]
pub fn owner_alive(record: &Record) -> bool {
    started(record.owner) == Some(record.owner_started)
}

/// Returns the start time of a process in clock ticks since boot.
pub(crate) fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name in parentheses, may contain spaces, so the fields are counted from
    // its end.
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()
}

/// Removes every lab whose owner no longer runs, except complete labs that are kept. Returns the
/// names of the removed labs.
///
/// # Errors
///
/// When a lab can't be removed.
pub(crate) fn sweep() -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for name in names() {
        let left_behind = match read(&name) {
            Ok(record) if record.kept && record.ready => false,
            Ok(record) => !owner_alive(&record),
            Err(_) => true,
        };
        if left_behind {
            remove(&name)?;
            removed.push(name);
        }
    }
    Ok(removed)
}

/// Returns the processes that run in a lab.
#[must_use]
pub fn processes(name: &str) -> Vec<LabProcess> {
    processes_of(&netns::list(&prefix(name)))
}

/// Returns every process in one of these network namespaces.
pub(crate) fn processes_of(namespaces: &[String]) -> Vec<LabProcess> {
    let namespaces: Vec<(u64, &String)> = namespaces
        .iter()
        .filter_map(|namespace| Some((netns::inode(namespace)?, namespace)))
        .collect();
    let mut found = Vec::new();
    for (pid, inode) in pids() {
        if let Some((_, namespace)) = namespaces.iter().find(|(wanted, _)| *wanted == inode) {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            let command = command.trim_end().to_owned();
            found.push(LabProcess {
                namespace: (*namespace).clone(),
                pid,
                command,
            });
        }
    }
    found
}

/// Returns every process with the inode of its network namespace.
fn pids() -> Vec<(i32, u64)> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| Some((pid, fs::metadata(format!("/proc/{pid}/ns/net")).ok()?.ino())))
        .collect()
}

/// Removes a lab: its processes, namespaces and directory. Does nothing if the lab does not exist.
///
/// # Errors
///
/// When a process survives SIGKILL or a namespace or directory can't be removed.
pub fn down(name: &str) -> Result<()> {
    let _lock = lock()?;
    remove(name)
}

/// Like [`down`], for a caller that already holds the lock.
pub(crate) fn remove(name: &str) -> Result<()> {
    check_name(name)?;
    let namespaces = netns::list(&prefix(name));
    let inodes: HashSet<u64> = namespaces
        .iter()
        .filter_map(|ns| netns::inode(ns))
        .collect();
    let own = i32::try_from(std::process::id()).unwrap_or_default();
    wait::always_until(
        "the lab's processes to end",
        Duration::from_secs(10),
        || {
            let mut left = false;
            for (pid, inode) in pids() {
                if pid != own && inodes.contains(&inode) {
                    // A zombie has no namespace any more, so every process found here still runs.
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                    left = true;
                }
            }
            (!left).then_some(())
        },
    )?;
    for namespace in &namespaces {
        netns::delete(namespace)?;
    }
    let directory = directory(name);
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("Failed to remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}
