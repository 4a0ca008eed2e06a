//! The command line of `roamcast`.
//!
//! Commands write data to standard output and diagnostics to standard error. Exit codes: 0 success,
//! 1 failure (one sentence gives the reason), 2 wrong usage.

#[cfg(feature = "agent")]
mod hook;
#[cfg(feature = "ims")]
mod ims;
#[cfg(feature = "agent")]
mod migrate;
mod pki;
mod role;
#[cfg(feature = "programs")]
mod trace;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::control::client::{ClientError, CommandError};
use crate::control::command;
#[cfg(feature = "programs")]
use crate::control::request::Table;
#[cfg(feature = "programs")]
use crate::datapath::{self, DEFAULT_PIN_ROOT};
#[cfg(feature = "agent")]
pub use hook::HookCommand;
#[cfg(feature = "ims")]
pub use ims::{EnrollArgs, ImsArgs, ImsCommand, ServerArgs};
#[cfg(feature = "agent")]
pub use migrate::{AbortArgs, MigrateArgs};
pub use pki::PkiCommand;
pub use role::RoleArgs;
#[cfg(feature = "programs")]
pub use trace::TraceArgs;

/// Keeps multicast flowing to a virtual machine that is live-migrated to another subnet.
#[derive(Debug, Parser)]
#[command(name = "roamcast", version, max_term_width = 100)]
pub struct Cli {
    /// The subcommand.
    #[command(subcommand)]
    pub command: Command,
}

/// Subcommands of `roamcast`.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent of this host.
    #[cfg(feature = "agent")]
    Agent(RoleArgs),
    /// Run a relay: receive multicast and send it by unicast to agents that ask for it.
    #[cfg(feature = "relay")]
    Relay(RoleArgs),
    /// Run a migration control server: tell agents which relays exist.
    #[cfg(feature = "mcs")]
    Mcs(RoleArgs),
    /// Run a mapping server, which tells nodes where other nodes are, or enroll nodes at the
    /// server.
    #[cfg(feature = "ims")]
    Ims(ImsArgs),
    /// Show the state of the agent, or of the server behind the given socket: programs, queriers,
    /// peers, ports, counters.
    Status(QueryArgs),
    /// Show the multicast addresses to which the VMs listen.
    #[cfg(feature = "agent")]
    Listeners(QueryArgs),
    /// Show the flows of these multicast addresses.
    #[cfg(feature = "programs")]
    Streams(QueryArgs),
    /// Show the relays that the agent may ask, and the agent's sessions with them.
    #[cfg(feature = "agent")]
    Relays(QueryArgs),
    /// Show the kernel programs' decisions about packets as they happen, until Ctrl-C.
    #[cfg(feature = "programs")]
    Trace(TraceArgs),
    /// Show migrations, past and present.
    #[cfg(feature = "agent")]
    Migrations(QueryArgs),
    /// Migrate a domain to another host.
    #[cfg(feature = "agent")]
    Migrate(MigrateArgs),
    /// Stop the migration of a domain. The domain keeps running on its current host.
    #[cfg(feature = "agent")]
    Abort(AbortArgs),
    /// Remove the programs, maps, filters and qdiscs that a stopped agent or relay left in the
    /// kernel. Refuses while the agent or relay runs.
    #[cfg(feature = "programs")]
    Cleanup {
        /// Directory of the pinned maps (`pin_root`).
        #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_PIN_ROOT)]
        pin_root: PathBuf,
    },
    /// Install libvirt's hook, which tells the agent of migrations that others start.
    #[cfg(feature = "agent")]
    Hook {
        /// The subcommand.
        #[command(subcommand)]
        command: HookCommand,
    },
    /// Make certificates for agents, relays and migration control servers.
    Pki {
        /// The subcommand.
        #[command(subcommand)]
        command: PkiCommand,
    },
    /// Print a completion script for a shell.
    Completions {
        /// Shell to complete for.
        shell: Shell,
    },
    /// Write the manual pages into a directory.
    Man {
        /// Directory for the pages; created if missing.
        directory: PathBuf,
    },
}

/// Choice of the control socket, for commands that ask a running role.
#[derive(Clone, Debug, Args)]
pub struct SocketArgs {
    /// Socket of the agent, or of another role: /run/roamcast-ROLE/ROLE.sock.
    #[arg(
        long,
        value_name = "PATH",
        env = "ROAMCAST_SOCKET",
        default_value = crate::config::DEFAULT_CONTROL_SOCKET
    )]
    pub socket: PathBuf,
}

/// Arguments of the commands that print a table.
#[derive(Clone, Debug, Args)]
pub struct QueryArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Which socket to ask.
    #[command(flatten)]
    pub socket: SocketArgs,
}

impl Cli {
    /// Runs the subcommand and returns the exit code of the process.
    pub fn run(self) -> ExitCode {
        let mut out = io::BufWriter::new(io::stdout().lock());
        let result = self.command.run(&mut out);
        exit(result.and_then(|()| out.flush().map_err(Into::into)))
    }
}

impl Command {
    fn run(self, out: &mut impl Write) -> anyhow::Result<()> {
        match self {
            #[cfg(feature = "agent")]
            Self::Agent(args) => role::agent(&args, out),
            #[cfg(feature = "relay")]
            Self::Relay(args) => role::relay(&args, out),
            #[cfg(feature = "mcs")]
            Self::Mcs(args) => role::mcs(&args, out),
            #[cfg(feature = "ims")]
            Self::Ims(args) => ims::run(args, out),
            Self::Status(args) => status(&args, out),
            #[cfg(feature = "agent")]
            Self::Listeners(args) => show(&args, Table::Listeners, out),
            #[cfg(feature = "programs")]
            Self::Streams(args) => show(&args, Table::Streams, out),
            #[cfg(feature = "agent")]
            Self::Relays(args) => show(&args, Table::Relays, out),
            #[cfg(feature = "programs")]
            Self::Trace(args) => trace::run(args, out),
            #[cfg(feature = "agent")]
            Self::Migrations(args) => show(&args, Table::Migrations, out),
            #[cfg(feature = "agent")]
            Self::Migrate(args) => migrate::migrate(&args, out),
            #[cfg(feature = "agent")]
            Self::Abort(args) => migrate::abort(&args),
            #[cfg(feature = "programs")]
            Self::Cleanup { pin_root } => cleanup(&pin_root, out),
            #[cfg(feature = "agent")]
            Self::Hook { command } => hook::run(command, out),
            Self::Pki { command } => pki::run(command, out),
            Self::Completions { shell } => {
                completions(shell, out);
                Ok(())
            }
            Self::Man { directory } => manual(&directory),
        }
    }
}

fn exit(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader closed the pipe, as in `roamcast listeners | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be closed.
            let _ = writeln!(io::stderr(), "{}", describe(&error));
            ExitCode::FAILURE
        }
    }
}

/// Returns the error with its causes. An agent's refusal is a complete sentence and is printed
/// alone.
fn describe(error: &anyhow::Error) -> String {
    match error.downcast_ref() {
        Some(CommandError::Client(ClientError::Refused(reason))) => reason.clone(),
        _ => format!("{error:#}"),
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<io::Error>()
            .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    }) && !error
        .chain()
        .any(<dyn std::error::Error>::is::<ClientError>)
}

fn status(args: &QueryArgs, out: &mut impl Write) -> anyhow::Result<()> {
    command::status(&args.socket.socket, args.json, out)?;
    Ok(())
}

#[cfg(feature = "programs")]
fn show(args: &QueryArgs, table: Table, out: &mut impl Write) -> anyhow::Result<()> {
    command::show(&args.socket.socket, table, args.json, out)?;
    Ok(())
}

#[cfg(feature = "programs")]
fn cleanup(pin_root: &Path, out: &mut impl Write) -> anyhow::Result<()> {
    let filters = datapath::cleanup::cleanup(pin_root)?;
    writeln!(
        out,
        "Removed what was pinned under {}, and {filters} filters of qdiscs",
        pin_root.display()
    )?;
    Ok(())
}

fn completions(shell: Shell, out: &mut impl Write) {
    clap_complete::generate(shell, &mut Cli::command(), "roamcast", out);
}

fn manual(directory: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), directory))
        .with_context(|| format!("Cannot write the manual pages into {}", directory.display()))
}

#[cfg(test)]
mod tests;
