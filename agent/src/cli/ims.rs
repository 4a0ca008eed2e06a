//! `roamcast ims`: runs the mapping server, or one of its operator's commands.

use std::io::Write;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::role::{self, RoleArgs};
use crate::config::ImsConfig;
use crate::control::{command, table};
use crate::runtime::ims::operator::{self, Enrollment};
use crate::runtime::ims::secret;
use crate::value::Prefix;

/// Arguments of `roamcast ims`.
#[derive(Clone, Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct ImsArgs {
    /// The subcommand; without one the role runs.
    #[command(subcommand)]
    pub command: Option<ImsCommand>,
    /// Arguments of the role.
    #[command(flatten)]
    pub role: Option<RoleArgs>,
}

/// Subcommands for the operator of a mapping server.
#[derive(Clone, Debug, Subcommand)]
pub enum ImsCommand {
    /// Make the secret from which the keys of all nodes are derived.
    Init {
        /// The server's configuration.
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Enroll a node and make its key file. A node that was enrolled before gets a new key; its old
    /// key and its registration become invalid.
    Enroll(EnrollArgs),
    /// Show the nodes that the server knows.
    List {
        /// The server's configuration.
        #[command(flatten)]
        server: ServerArgs,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
}

/// The server's configuration.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    /// Configuration file of the server.
    #[arg(long, value_name = "FILE", env = "ROAMCAST_CONFIG")]
    pub config: PathBuf,
}

/// Arguments of `roamcast ims enroll`.
#[derive(Clone, Debug, Args)]
pub struct EnrollArgs {
    /// Permanent address of the node, in the home prefix.
    pub hoa: Ipv6Addr,
    /// The server's configuration.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Write the key file here (mode 0600) instead of to standard output.
    #[arg(long, value_name = "KEYFILE")]
    pub output: Option<PathBuf>,
    /// Home prefix that the node learns, a part of the server's home prefix.
    #[arg(long, value_name = "PREFIX", value_parser = parse_prefix)]
    pub home: Option<Prefix>,
    /// Servers that the node learns instead of the servers in the configuration.
    #[arg(long, value_name = "[ADDRESS]:PORT", value_delimiter = ',', num_args = 1..)]
    pub servers: Vec<SocketAddrV6>,
    /// Generation of the key, instead of the next one. At a replica: the generation that another
    /// server gave. At any server: the current generation, to make the same key file again.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub generation: Option<u32>,
}

fn parse_prefix(text: &str) -> Result<Prefix, String> {
    Prefix::try_from(text.to_owned()).map_err(|error| error.to_string())
}

/// Runs the role, or the operator's subcommand if one is given.
pub(super) fn run(args: ImsArgs, out: &mut impl Write) -> anyhow::Result<()> {
    match (args.command, args.role) {
        (Some(command), _) => operate(command, out),
        (None, Some(args)) => role::ims(&args, out),
        // The parser requires a subcommand or a configuration file.
        (None, None) => Ok(()),
    }
}

fn operate(command: ImsCommand, out: &mut impl Write) -> anyhow::Result<()> {
    match command {
        ImsCommand::Init { server } => {
            let config = ImsConfig::load(&server.config)?;
            let path = &config.ims.secret;
            secret::init(path)?;
            writeln!(
                out,
                "Made {}. Copy it, mode 0600, to each other server of {}. Then enroll nodes: \
                 roamcast ims enroll HOA --config {} --output KEYFILE",
                path.display(),
                config.ims.home,
                server.config.display()
            )?;
        }
        ImsCommand::Enroll(args) => {
            let config = ImsConfig::load(&args.server.config)?;
            let request = Enrollment {
                hoa: args.hoa,
                home: args.home,
                servers: args.servers,
                generation: args.generation,
                output: args.output.clone(),
            };
            let file = operator::enroll(&config, request)?;
            match args.output {
                None => write!(out, "{file}")?,
                Some(path) => writeln!(
                    out,
                    "Enrolled {} in generation {}. Move {} to the node and start `migkick node`",
                    file.hoa,
                    file.generation,
                    path.display()
                )?,
            }
        }
        ImsCommand::List { server, json } => {
            let config = ImsConfig::load(&server.config)?;
            let rows = operator::nodes(&config)?;
            command::print(out, &rows, json, |rows| table::nodes(rows))?;
        }
    }
    Ok(())
}
