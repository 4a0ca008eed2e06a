//! `roamcast hook`: installs, removes and runs libvirt's hook for migrations that others start.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Context;
use clap::Subcommand;

use super::SocketArgs;
use crate::hook;

/// Subcommands of `roamcast hook`.
#[derive(Clone, Debug, Subcommand)]
pub enum HookCommand {
    /// Install the hook.
    Install {
        /// libvirt's directory of hooks.
        #[arg(long, default_value = hook::install::DEFAULT_DIRECTORY)]
        directory: PathBuf,
        /// Socket that the hook will use.
        #[command(flatten)]
        socket: SocketArgs,
    },
    /// Remove the hook.
    Uninstall {
        /// libvirt's directory of hooks.
        #[arg(long, default_value = hook::install::DEFAULT_DIRECTORY)]
        directory: PathBuf,
    },
    /// The command that libvirt runs. Never fails, prints nothing, ends within 5 s.
    Run {
        /// Which socket to ask.
        #[command(flatten)]
        socket: SocketArgs,
        /// libvirt's arguments: name, operation, sub-operation, extra.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

/// Runs a subcommand of `roamcast hook`.
pub(super) fn run(command: HookCommand, out: &mut impl Write) -> anyhow::Result<()> {
    match command {
        HookCommand::Install { directory, socket } => {
            let binary = std::env::current_exe().context("Cannot find out this program's path")?;
            let path = hook::install::install(&directory, &binary, &socket.socket)?;
            writeln!(
                out,
                "Installed {}. If libvirtd had no hook for QEMU when it started, have it look again: \
                 systemctl reload libvirtd (or virtqemud)",
                path.display()
            )?;
        }
        HookCommand::Uninstall { directory } => {
            let path = hook::install::uninstall(&directory)?;
            writeln!(out, "Removed {}", path.display())?;
        }
        HookCommand::Run { socket, arguments } => {
            if hook::run::concerns(&arguments)
                && let Err(error) = hook::run::run(io::stdin(), socket.socket, hook::BOUND)
            {
                hook::run::report(&error);
            }
        }
    }
    Ok(())
}
