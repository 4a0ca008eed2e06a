//! Runs a program under the restrictions of a systemd unit, without systemd: user, capabilities,
//! system call filters, file system view, and limits of memory and tasks.
//!
//! ```text
//! confined outer UNIT WRITABLE GROUPS PROGRAM ...    control group, mounts of its own, file mode mask
//!   '- setpriv                                       user, capabilities, no new privileges
//!        '- confined inner PROGRAM ...               filters of system calls
//!             '- PROGRAM ...
//! ```
//!
//! Each program replaces its predecessor by `exec`, so all of them are one process. A filtered
//! system call kills the process, whatever `SystemCallErrorNumber=` says, so that no refusal goes
//! unnoticed; a few dispensable calls return an error. Not implemented: `PrivateUsers=`,
//! `PrivateTmp=`, `TemporaryFileSystem=`.

mod calls;
mod filter;
mod group;
mod mounts;
mod unit;

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use nix::sys::stat::{Mode, umask};

pub use group::ControlGroup;
pub use unit::Unit;

use crate::binaries;

/// User id and group id that stand in for the ids of `DynamicUser=`.
pub const DYNAMIC_USER: u32 = 64_321;

/// Returns true if `systemd-analyze` exists; the evaluation of units needs it.
#[must_use]
pub fn is_possible() -> bool {
    Command::new("systemd-analyze")
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
}

/// Returns a command that runs a program under the restrictions of a unit, in a control group with
/// the unit's limits. The program may also write to `writable`, as a service may write to its
/// runtime directory.
///
/// # Errors
///
/// When the lab's program `confined` is not built.
pub fn command(
    unit: &Path,
    group: &ControlGroup,
    writable: &[&Path],
    program: &Path,
) -> Result<Command> {
    let mut command = Command::new(binaries::path("confined")?);
    let writable = std::env::join_paths(writable).context("A path has a colon")?;
    let groups = std::env::join_paths(group.directories()).context("A path has a colon")?;
    command.arg("outer").arg(unit).arg(writable).arg(groups);
    command.arg(program);
    Ok(command)
}

/// Runs the program `confined`. Returns only on an error.
///
/// # Errors
///
/// When a restriction can't be applied or the program can't be executed.
pub fn run(arguments: impl Iterator<Item = OsString>) -> Result<()> {
    let mut arguments = arguments.skip(1);
    let stage = arguments.next().unwrap_or_default();
    match stage.to_str() {
        Some("outer") => outer(arguments),
        Some("inner") => inner(arguments),
        _ => bail!("Usage: confined outer UNIT WRITABLE GROUPS PROGRAM ..."),
    }
}

fn outer(mut arguments: impl Iterator<Item = OsString>) -> Result<()> {
    let mut next = || arguments.next().context("An argument is missing");
    let (path, writable, groups, program) = (next()?, next()?, next()?, next()?);
    // The groups come first, because the mounts hide them.
    for directory in std::env::split_paths(&groups) {
        group::join(&directory)?;
    }
    let unit = Unit::read(Path::new(&path))?;
    let filter = filter::Filter::of(&unit)?;
    let writable: Vec<PathBuf> = std::env::split_paths(&writable)
        .filter(|path| !path.as_os_str().is_empty())
        .collect();
    let own = std::env::current_exe().context("Cannot find the running program's own path")?;
    let places = mounts::Places::new(&[&own, Path::new(&program)])?;
    let filter_path = places.write("filter", &serde_json::to_vec(&filter)?)?;
    mounts::restrict(&unit, &writable)?;
    if let Some(mask) = unit.last("UMask") {
        let mask = u32::from_str_radix(mask, 8).context("UMask= is no octal number")?;
        umask(Mode::from_bits_truncate(mask));
    }
    let [own, program] = places.programs();
    let error = Command::new("setpriv")
        .args(privileges(&unit))
        .arg(own)
        .arg("inner")
        .arg(filter_path)
        .arg(program)
        .args(arguments)
        .exec();
    Err(error).context("Cannot run setpriv: install util-linux")
}

fn inner(mut arguments: impl Iterator<Item = OsString>) -> Result<()> {
    let mut next = || arguments.next().context("An argument is missing");
    let (filter, program) = (next()?, next()?);
    let filter = std::fs::read(filter).context("Cannot read the filter")?;
    let filter: filter::Filter = serde_json::from_slice(&filter)?;
    filter.apply()?;
    let error = Command::new(&program).args(arguments).exec();
    Err(error).with_context(|| format!("Cannot run {}", program.display()))
}

/// Returns the arguments of `setpriv` for user, capabilities and privileges.
fn privileges(unit: &Unit) -> Vec<String> {
    let set = |key: &str| {
        let names = unit.words(key).into_iter().map(|name| {
            let name = name.to_lowercase();
            format!(",+{}", name.trim_start_matches("cap_"))
        });
        format!("-all{}", names.collect::<String>())
    };
    let (bounding, ambient) = (set("CapabilityBoundingSet"), set("AmbientCapabilities"));
    let mut arguments = vec![
        format!("--bounding-set={bounding}"),
        format!("--inh-caps={ambient}"),
        format!("--ambient-caps={ambient}"),
    ];
    if unit.is_set("NoNewPrivileges") {
        arguments.push("--no-new-privs".to_owned());
    }
    if unit.is_set("DynamicUser") {
        arguments.extend([
            format!("--reuid={DYNAMIC_USER}"),
            format!("--regid={DYNAMIC_USER}"),
            "--clear-groups".to_owned(),
        ]);
    }
    arguments
}
