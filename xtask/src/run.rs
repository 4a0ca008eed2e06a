//! Runs the steps of a verb: prints the title of each step, shows its output, stops at the first
//! failure.
//!
//! In the host machine everything is already built, so a build does nothing.

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

/// Returns a cargo command for all packages except the kernel programs, which `agent/build.rs`
/// builds for their own target. The selection is always the same: another selection would have
/// other features and rebuild every dependency.
pub(crate) fn workspace(verb: &str) -> Command {
    cargo([verb, "--workspace", "--exclude", "agent-ebpf"])
}

/// Builds every program that the lab runs.
///
/// # Errors
///
/// cargo failed.
pub(crate) fn build() -> Result<()> {
    if machine::inside() {
        return Ok(());
    }
    step("build", &mut workspace("build"))
}

/// Builds every program that the lab runs in release mode, as delivered.
///
/// # Errors
///
/// cargo failed.
pub(crate) fn release_build() -> Result<()> {
    if machine::inside() {
        return Ok(());
    }
    step("release build", workspace("build").arg("--release"))
}

/// Replaces this process by the release build of this program. A bench measures programs in the
/// folder of its own executable, which are then release builds too.
///
/// # Errors
///
/// cargo failed, or the release build does not start.
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
    // `exec` returns only if it fails.
    let error = Command::new(&program)
        .args(std::env::args_os().skip(1))
        .exec();
    Err(error).with_context(|| format!("Failed to start {}", program.display()))
}

/// Runs one step: prints its title and shows its output.
///
/// # Errors
///
/// The step does not start, or its exit code is not 0.
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
