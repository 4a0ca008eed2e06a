//! Runs the steps of a verb: says what runs, shows what it prints, stops at the first failure.
//!
//! In the host machine everything is built already, and a build does nothing.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use lab::machine;

/// Root of the workspace.
pub(crate) fn root() -> PathBuf {
    // The manifest directory is `xtask/`, which always has a parent.
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map_or_else(PathBuf::new, Into::into)
}

/// Returns a cargo command in the workspace, for the toolchain that runs this program.
pub(crate) fn cargo<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(arguments);
    command
}

/// Returns a cargo command for all packages but the kernel programs, which `agent/build.rs` builds
/// for their own target. Always the same selection: another one would have other features, and
/// build every dependency again.
pub(crate) fn workspace(verb: &str) -> Command {
    cargo([verb, "--workspace", "--exclude", "agent-ebpf"])
}

/// Builds every program that the lab runs.
///
/// # Errors
///
/// When cargo fails.
pub(crate) fn build() -> Result<()> {
    if machine::inside() {
        return Ok(());
    }
    step("build", &mut workspace("build"))
}

/// The same as they are delivered.
///
/// # Errors
///
/// When cargo fails.
pub(crate) fn release_build() -> Result<()> {
    if machine::inside() {
        return Ok(());
    }
    step("release build", workspace("build").arg("--release"))
}

/// Has this program go on in its delivered form, for what is measured with programs that it starts:
/// they are those that lie beside it.
///
/// # Errors
///
/// When cargo fails, or the other form cannot be started.
pub(crate) fn go_on_delivered() -> Result<()> {
    release_build()?;
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let program = std::env::current_exe().context("Failed to find this program's own path")?;
    let program = program
        .ancestors()
        .nth(2)
        .context("This program is not in a folder of a profile")?
        .join("release/xtask");
    // It returns only if it fails.
    let error = Command::new(&program)
        .args(std::env::args_os().skip(1))
        .exec();
    Err(error).with_context(|| format!("Failed to start {}", program.display()))
}

/// Runs one step and shows what it prints.
///
/// # Errors
///
/// When it can't be started or exits with anything but 0.
pub(crate) fn step(title: &str, command: &mut Command) -> Result<()> {
    eprintln!("==> {title}");
    let started = Instant::now();
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("Failed to start {command:?}"))?;
    ensure!(
        status.success(),
        "{title} failed: {command:?} ended with {status}"
    );
    eprintln!("    {title}: {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}
