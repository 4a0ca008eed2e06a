//! `roamcast trace`: prints the eBPF programs' decisions about packets.

use std::io::Write;
use std::net::Ipv6Addr;

use clap::Args;
use clap::builder::PossibleValuesParser;
use common::trace::Program;

use super::SocketArgs;
use crate::control::follow;
use crate::control::trace::{DEFAULT_RATE, MAX_RATE, TraceRequest};

/// Arguments of `roamcast trace`. A decision is shown if all conditions hold.
#[derive(Clone, Debug, Args)]
pub struct TraceArgs {
    /// Only decisions at this port.
    #[arg(long, value_name = "INTERFACE")]
    pub port: Option<String>,
    /// Only packets from or to this address, for instance a multicast address.
    #[arg(long)]
    pub address: Option<Ipv6Addr>,
    /// Only decisions of this program; may be repeated.
    #[arg(
        long = "program",
        value_name = "NAME",
        value_parser = PossibleValuesParser::new(Program::ALL.iter().map(|program| program.as_str()))
    )]
    pub programs: Vec<String>,
    /// Highest number of lines per second; further lines are dropped and counted.
    #[arg(
        long,
        value_name = "LINES",
        default_value_t = DEFAULT_RATE,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_RATE))
    )]
    pub rate: u32,
    /// Print JSON, one object per line.
    #[arg(long)]
    pub json: bool,
    /// Which socket to ask.
    #[command(flatten)]
    pub socket: SocketArgs,
}

/// Sends the trace request and prints the decisions until Ctrl-C.
pub(super) fn run(args: TraceArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let request = TraceRequest {
        programs: args.programs,
        port: args.port,
        address: args.address,
        rate: args.rate,
    };
    follow::follow(&args.socket.socket, request, args.json, out)?;
    Ok(())
}
