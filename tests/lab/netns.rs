//! Network namespaces and links between them.
//!
//! The namespaces are named namespaces of `ip netns`, so an operator can inspect a running lab with
//! ordinary tools. Links are created directly in their namespaces, so none ever appears among the
//! machine's own interfaces.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sched::{CloneFlags, setns};

use crate::signal;

/// Directory in which `ip netns` keeps its handles.
const DIRECTORY: &str = "/run/netns";

/// Returns the path of the handle of a named namespace.
#[must_use]
pub fn path(namespace: &str) -> PathBuf {
    PathBuf::from(DIRECTORY).join(namespace)
}

/// Returns the inode that identifies a namespace in `/proc/PID/ns/net`; `None` if the namespace
/// does not exist.
#[must_use]
pub fn inode(namespace: &str) -> Option<u64> {
    fs::metadata(path(namespace)).ok().map(|meta| meta.ino())
}

/// Returns all named namespaces whose name starts with `prefix`.
#[must_use]
pub fn list(prefix: &str) -> Vec<String> {
    let mut found: Vec<String> = fs::read_dir(DIRECTORY)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with(prefix))
        .collect();
    found.sort();
    found
}

/// Creates a namespace with its loopback up, without DAD and without router advertisements.
///
/// Duplicate Address Detection would keep every address tentative for more than a second, and the
/// lab never assigns an address twice.
///
/// # Errors
///
/// When `ip netns add` fails or a setting is refused.
pub fn add(namespace: &str) -> Result<()> {
    ensure!(
        !signal::interrupted(),
        "Interrupted before namespace {namespace} was made"
    );
    run(Command::new("ip").args(["netns", "add", namespace]))?;
    within(namespace, || -> Result<()> {
        for (key, value) in [
            ("net/ipv6/conf/all/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
            ("net/ipv6/conf/all/accept_ra", "0"),
            ("net/ipv6/conf/default/accept_ra", "0"),
        ] {
            sysctl(key, value)?;
        }
        Ok(())
    })??;
    ip(namespace, "link set lo up\n")
}

/// Deletes a namespace, or does nothing if the namespace does not exist.
///
/// # Errors
///
/// When `ip netns del` fails.
pub fn delete(namespace: &str) -> Result<()> {
    if inode(namespace).is_none() {
        return Ok(());
    }
    run(Command::new("ip").args(["netns", "del", namespace]))
}

/// Runs `action` on a thread inside a namespace and returns its value.
///
/// Sockets created by `action` stay in that namespace, and any thread may use them.
///
/// # Errors
///
/// When the namespace does not exist or can't be entered, or when `action` panics.
pub fn within<T: Send>(namespace: &str, action: impl FnOnce() -> T + Send) -> Result<T> {
    let handle = path(namespace);
    thread::scope(|scope| {
        let worker = scope.spawn(move || -> Result<T> {
            let file = File::open(&handle)
                .with_context(|| format!("Failed to open namespace {}", handle.display()))?;
            setns(file, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("Failed to enter namespace {}", handle.display()))?;
            Ok(action())
        });
        worker
            .join()
            .map_err(|_| anyhow!("The action inside namespace {namespace} panicked"))?
    })
}

/// Writes a sysctl of the calling thread's namespace, such as `net/ipv6/conf/all/forwarding`.
///
/// # Errors
///
/// When the kernel refuses the value.
pub fn sysctl(key: &str, value: &str) -> Result<()> {
    fs::write(format!("/proc/sys/{key}"), value)
        .with_context(|| format!("Failed to set {key} to {value}"))
}

/// Runs `ip` commands, one per line, inside a namespace.
///
/// # Errors
///
/// When a command fails; the text is the error message of `ip`.
pub fn ip(namespace: &str, batch: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(["-n", namespace, "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("Failed to run ip: install iproute2")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(batch.as_bytes())
            .context("Failed to send commands to ip")?;
    }
    let output = child.wait_with_output().context("Failed to wait for ip")?;
    if !output.status.success() {
        bail!(
            "ip failed in {namespace}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Runs a command to its end. An exit code other than 0 becomes an error with the command's
/// standard error.
///
/// # Errors
///
/// When the command can't be started or its exit code is not 0.
pub fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("Failed to run {name}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} failed with {}: {}", output.status, said.trim());
    }
    Ok(())
}
