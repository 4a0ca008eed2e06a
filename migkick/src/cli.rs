//! Command line of `migkick`.

use std::io;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::identifier::Scheme;
use crate::{node, session};

/// Asks Roamcast, from inside the virtual machine, for a live migration.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Find the agent of the host that this VM runs on.
    Search {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Move this VM to another host and wait until it runs there.
    Go(GoArgs),
    /// Keep this machine's permanent address reachable wherever it is.
    Node(node::NodeArgs),
}

/// Arguments of `migkick go`, as clap parses them.
#[derive(Debug, Args)]
pub(crate) struct GoArgs {
    /// Name of the destination's agent.
    pub(crate) destination: String,
    /// Refuse to move unless this VM is that libvirt domain.
    #[arg(long, value_name = "NAME")]
    pub(crate) domain: Option<String>,
    /// NIC to prepare for the destination [default: the one that is not active].
    #[arg(long, value_name = "INTERFACE")]
    pub(crate) idle_interface: Option<String>,
    /// Leave all NICs as they are.
    #[arg(long, conflicts_with = "idle_interface")]
    pub(crate) no_configure: bool,
    /// How the interface identifier of the new address is made.
    #[arg(long, value_enum, default_value_t = Scheme::StablePrivacy)]
    pub(crate) interface_identifier: Scheme,
    /// Secret for stable-privacy, 32 hexadecimal digits [default: that of the machine].
    #[arg(
        long,
        value_name = "HEX",
        env = "MIGKICK_SECRET",
        hide_env_values = true
    )]
    pub(crate) secret: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Parses the command line and runs the command.
pub fn run() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Search { json } => session::search(json),
        Command::Go(args) => session::go(&args),
        Command::Node(args) => node::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the command failed only because the reader of the output is gone.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn wrong_usage_has_exit_code_2() {
        for line in [
            "migkick",
            "migkick go",
            "migkick go a --no-configure --idle-interface eth1",
            "migkick go a --interface-identifier random",
            "migkick node --detach status",
        ] {
            let error = Cli::try_parse_from(line.split_whitespace()).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
