//! `migkick node`: the daemon of a MAT node, in a VM or on any correspondent.
//!
//! | module | contents |
//! |---|---|
//! | [`core`] | protocol, without I/O |
//! | [`daemon`], `moving`, `nics` | I/O of the core: sockets, clock, kernel, data path |
//! | [`config`], `state` | key file, and state that survives restarts |
//! | `links`, `sockets`, `probe` | rtnetlink, UDP, probe of DstAgent |
//! | [`control`], `server`, `report` | control socket and status |
//!
//! The daemon may end and restart at any time: the data path keeps working, and the next daemon
//! adopts it. Only `migkick node stop` removes the data path.

mod config;
pub(crate) mod control;
mod core;
mod daemon;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod links;
mod moving;
mod nics;
mod probe;
mod report;
mod server;
mod sockets;
mod state;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};

use config::Config;
use control::{Answer, ControlError, Request, SOCKET};

/// Arguments of `migkick node`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct NodeArgs {
    /// Key file that `roamcast ims enroll` has written.
    #[arg(long, value_name = "FILE", default_value = "/etc/migkick/node.toml")]
    config: PathBuf,
    /// Remove the data path at the end, instead of leaving it at work.
    #[arg(long)]
    detach: bool,
    #[command(subcommand)]
    command: Option<NodeCommand>,
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// Show where the node is, its servers and its peers.
    Status {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// End the node and remove its data path.
    Stop,
}

/// Runs the daemon, or a command for the running daemon.
pub(crate) fn run(args: &NodeArgs) -> anyhow::Result<()> {
    match &args.command {
        None => daemon::run(Config::read(&args.config)?, Path::new(SOCKET), args.detach),
        Some(NodeCommand::Stop) => Ok(control::ask(Path::new(SOCKET), &Request::Stop).map(drop)?),
        Some(NodeCommand::Status { json }) => {
            let answer = control::ask(Path::new(SOCKET), &Request::Status)?;
            let Answer::Status(status) = answer else {
                return Err(ControlError::Answer.into());
            };
            let mut out = io::stdout().lock();
            if *json {
                serde_json::to_writer(&mut out, &status)?;
                writeln!(out)?;
            } else {
                for (label, value) in status.rows() {
                    writeln!(out, "{label:<18} {value}")?;
                }
            }
            Ok(out.flush()?)
        }
    }
}
