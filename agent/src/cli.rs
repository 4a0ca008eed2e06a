//! The command line of `roamcast`.
//!
//! Commands write data to standard output, diagnostics to standard error. Exit codes: 0 success, 1
//! failure (one sentence says why), 2 wrong usage.

mod ims;
mod trace;

use std::ffi::OsString;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::config::{Config, ConfigError, ImsConfig, Log, McsConfig, RelayConfig};
use crate::control::command::{self, CommandError};
use crate::control::{Request, client::ClientError};
use crate::datapath::{self, DEFAULT_PIN_ROOT};
use crate::hypervisor::trust;
use crate::role::Role;
use crate::telemetry;
use crate::{hook, pki};
pub use ims::{EnrollArgs, ImsArgs, ImsCommand, ServerArgs};
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
    Agent(AgentArgs),
    /// Run a relay: receive multicast and send it by unicast to agents that ask for it.
    Relay(AgentArgs),
    /// Run a migration control server: tell agents which relays exist.
    Mcs(AgentArgs),
    /// Run a mapping server: tell nodes where other nodes are. Or enroll nodes at the server.
    Ims(ImsArgs),
    /// Show the state of the agent, or of the server whose socket is named: programs, queriers,
    /// peers, ports, counters.
    Status(QueryArgs),
    /// Show the multicast addresses to which the VMs listen.
    Listeners(QueryArgs),
    /// Show the flows of these multicast addresses.
    Streams(QueryArgs),
    /// Show the relays that the agent may ask, and the agent's sessions with them.
    Relays(QueryArgs),
    /// Show the decisions of the kernel programs about packets, as they happen, until Ctrl-C.
    Trace(TraceArgs),
    /// Show migrations, past and present.
    Migrations(QueryArgs),
    /// Migrate a domain to another host.
    Migrate(MigrateArgs),
    /// Stop the migration of a domain. The domain goes on running where it is.
    Abort(AbortArgs),
    /// Remove the programs, maps, filters and qdiscs that a stopped agent or relay has left in the
    /// kernel. Refuses while the agent or relay runs.
    Cleanup {
        /// Directory of the pinned maps (`pin_root`).
        #[arg(long, value_name = "DIRECTORY", default_value = DEFAULT_PIN_ROOT)]
        pin_root: PathBuf,
    },
    /// Install libvirt's hook: libvirt then tells the agent of migrations that others start.
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
        /// Where to write the pages.
        directory: PathBuf,
    },
}

/// Arguments of the roles: `roamcast agent`, `relay`, `mcs` and `ims`.
#[derive(Clone, Debug, Args)]
pub struct AgentArgs {
    /// Configuration file.
    #[arg(long, value_name = "FILE", env = "ROAMCAST_CONFIG")]
    pub config: PathBuf,
    /// Check the configuration file, print OK or the error, and exit.
    #[arg(long)]
    pub check: bool,
}

/// Socket of the agent or of another role.
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

/// Arguments of the commands that show a table.
#[derive(Clone, Debug, Args)]
pub struct QueryArgs {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    /// Which socket to ask.
    #[command(flatten)]
    pub socket: SocketArgs,
}

/// Arguments of `roamcast migrate`.
#[derive(Clone, Debug, Args)]
pub struct MigrateArgs {
    /// Name or UUID of the domain.
    pub domain: String,
    /// Name of the destination's agent.
    pub destination: String,
    /// Print the migration's record as JSON.
    #[arg(long)]
    pub json: bool,
    /// Which socket to ask.
    #[command(flatten)]
    pub socket: SocketArgs,
}

/// Arguments of `roamcast abort`.
#[derive(Clone, Debug, Args)]
pub struct AbortArgs {
    /// Name or UUID of the domain.
    pub domain: String,
    /// Which socket to ask.
    #[command(flatten)]
    pub socket: SocketArgs,
}

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

/// Subcommands of `roamcast pki`.
#[derive(Clone, Debug, Subcommand)]
pub enum PkiCommand {
    /// Make three small CAs, of the signalling, of libvirt and of QEMU; or only the missing CA of
    /// QEMU.
    Init {
        /// Directory of the CAs.
        directory: PathBuf,
        /// Name of the CAs; each CA adds its purpose.
        #[arg(long, default_value = "Roamcast CA")]
        name: String,
        /// Validity of the CAs, days.
        #[arg(long, default_value_t = pki::CA_DAYS, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
    },
    /// Issue certificates for one host: for its role in the signalling, and with the role agent
    /// also for its libvirtd and QEMU.
    Issue {
        /// Directory of the CAs.
        directory: PathBuf,
        /// Name of the agent, relay or migration control server.
        name: String,
        /// Role in the signalling.
        #[arg(long, value_enum, default_value_t = Role::Agent)]
        role: Role,
        /// Address of the host; may be repeated.
        #[arg(long = "address", value_name = "ADDRESS")]
        addresses: Vec<IpAddr>,
        /// Validity of the certificates, days.
        #[arg(long, default_value_t = pki::CERTIFICATE_DAYS, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
    },
    /// Replace certificates that expire by new ones with new keys.
    Renew {
        /// Directory of the CAs.
        directory: PathBuf,
        /// Name of existing certificates.
        name: String,
        /// Validity of the new certificates, days.
        #[arg(long, default_value_t = pki::CERTIFICATE_DAYS, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
    },
    /// Revoke the certificates of one host, relay or server.
    Revoke {
        /// Directory of the CAs.
        directory: PathBuf,
        /// Name of existing certificates.
        name: String,
    },
}

/// The roles of the program. Each function runs until a signal stops it; the log is set up before.
pub trait Roles {
    /// Runs the agent of a VM host.
    ///
    /// # Errors
    ///
    /// The role cannot start or continue; the same holds for all roles.
    fn agent(&self, config: Config) -> anyhow::Result<()>;
    /// Runs a relay.
    ///
    /// # Errors
    ///
    /// As for the agent.
    fn relay(&self, config: RelayConfig) -> anyhow::Result<()>;
    /// Runs a migration control server.
    ///
    /// # Errors
    ///
    /// As for the agent.
    fn mcs(&self, config: McsConfig) -> anyhow::Result<()>;
    /// Runs a mapping server.
    ///
    /// # Errors
    ///
    /// As for the agent.
    fn ims(&self, config: ImsConfig) -> anyhow::Result<()>;
    /// Makes certificates and prints the next steps.
    ///
    /// # Errors
    ///
    /// Making a certificate failed.
    fn pki(&self, command: PkiCommand) -> anyhow::Result<()>;
}

impl Cli {
    /// Runs the subcommand.
    pub fn run(self, roles: &impl Roles) -> ExitCode {
        let mut out = io::BufWriter::new(io::stdout().lock());
        let result = match self.command {
            Command::Agent(args) => run_role(
                &args,
                Config::load,
                |config| &config.log,
                |config| trust::advice(Path::new("/"), &config.tls.ca),
                |config| roles.agent(config),
                &mut out,
            ),
            Command::Relay(args) => run_role(
                &args,
                RelayConfig::load,
                |config| &config.log,
                |_| Vec::new(),
                |config| roles.relay(config),
                &mut out,
            ),
            Command::Mcs(args) => run_role(
                &args,
                McsConfig::load,
                |config| &config.log,
                |_| Vec::new(),
                |config| roles.mcs(config),
                &mut out,
            ),
            Command::Ims(ImsArgs {
                command: Some(command),
                ..
            }) => ims::run(command, &mut out),
            Command::Ims(ImsArgs {
                role: Some(args), ..
            }) => run_role(
                &args,
                ImsConfig::load,
                |config| &config.log,
                |_| Vec::new(),
                |config| roles.ims(config),
                &mut out,
            ),
            // The parser requires a subcommand or a configuration file.
            Command::Ims(_) => Ok(()),
            Command::Status(args) => show(&args, &Request::Status, &mut out),
            Command::Listeners(args) => show(&args, &Request::Listeners, &mut out),
            Command::Streams(args) => show(&args, &Request::Streams, &mut out),
            Command::Relays(args) => show(&args, &Request::Relays, &mut out),
            Command::Trace(args) => trace::run(args, &mut out),
            Command::Migrations(args) => show(&args, &Request::Migrations, &mut out),
            Command::Migrate(args) => {
                let (domain, destination) = (&args.domain, &args.destination);
                let socket = &args.socket.socket;
                command::migrate(socket, domain, destination, args.json, &mut out)
                    .map_err(Into::into)
            }
            Command::Abort(args) => {
                command::abort(&args.socket.socket, &args.domain).map_err(Into::into)
            }
            Command::Cleanup { pin_root } => cleanup(&pin_root, &mut out),
            Command::Hook { command } => hook(command, &mut out),
            Command::Pki { command } => {
                // The command prints to standard output by itself.
                drop(out);
                return exit(roles.pki(command));
            }
            Command::Completions { shell } => {
                completions(shell, &mut out);
                Ok(())
            }
            Command::Man { directory } => manual(&directory),
        };
        exit(result.and_then(|()| out.flush().map_err(Into::into)))
    }
}

fn exit(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of the pipe has closed it, as in `roamcast listeners | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Standard error may be closed.
            let _ = writeln!(io::stderr(), "{}", describe(&error));
            ExitCode::FAILURE
        }
    }
}

/// Returns the error with its causes. An agent's refusal is a sentence already and stays alone.
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

/// Reads the configuration, sets up the log and runs a role. With `--check`: prints OK and advice
/// for the operator instead.
fn run_role<C>(
    args: &AgentArgs,
    load: impl FnOnce(&Path) -> Result<C, ConfigError>,
    log: impl FnOnce(&C) -> &Log,
    advise: impl FnOnce(&C) -> Vec<String>,
    run: impl FnOnce(C) -> anyhow::Result<()>,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let config = load(&args.config)?;
    let log = log(&config);
    telemetry::check(log)?;
    if args.check {
        for advice in advise(&config) {
            // Standard error may be closed.
            let _ = writeln!(io::stderr(), "Warning: {advice}");
        }
        writeln!(out, "OK")?;
        return Ok(());
    }
    let logs = telemetry::init(log)?;
    let result = run(config);
    // The log's last lines come before the error sentence.
    drop(logs);
    result
}

fn show(args: &QueryArgs, request: &Request, out: &mut impl Write) -> anyhow::Result<()> {
    command::show(&args.socket.socket, request, args.json, out)?;
    Ok(())
}

fn cleanup(pin_root: &Path, out: &mut impl Write) -> anyhow::Result<()> {
    let filters = datapath::cleanup::cleanup(pin_root)?;
    writeln!(
        out,
        "Removed what was pinned under {}, and {filters} filters of qdiscs",
        pin_root.display()
    )?;
    Ok(())
}

fn hook(command: HookCommand, out: &mut impl Write) -> anyhow::Result<()> {
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
