//! `roamcast trace`: what an operator asks for, and the lines that come.
//!
//! ```text
//! {"request":"trace","port":"vnet0","rate":1000}   {"reply":"tracing"}
//!                                                  {"reply":"trace","data":{..}}
//!                                                  {"reply":"trace","data":{"left_out":123}}
//! ```
//!
//! The lines end when the operator closes the connection, or sends anything. A connection that is
//! read more slowly than lines come loses some, which are counted.

use std::io::{self, Write};
use std::net::Ipv6Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::trace::{Decision, Program, Reason, Record};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::client::Client;
use super::command::CommandError;
use super::{Reply, Request};
use crate::shutdown::Shutdown;

/// Lines a second unless another number is asked for.
pub const DEFAULT_RATE: u32 = 1000;
/// Most lines a second.
pub const MAX_RATE: u32 = 1_000_000;

/// Which decisions are told. All conditions hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRequest {
    /// Names of the programs; none for all of them.
    #[serde(default)]
    pub programs: Vec<String>,
    /// Name of the port; none for any.
    pub port: Option<String>,
    /// Source or destination of the packets; none for any.
    pub address: Option<Ipv6Addr>,
    /// Lines a second.
    pub rate: u32,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TraceLine {
    /// Decisions that were not told.
    LeftOut {
        /// How many.
        left_out: u64,
    },
    /// A decision.
    Decision(Box<TraceRow>),
}

/// A decision about a frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRow {
    /// When, RFC 3339 in UTC.
    pub time: String,
    /// The program.
    pub program: String,
    /// Name of the port that it is attached to.
    pub port: String,
    /// What becomes of the frame.
    pub decision: String,
    /// Why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The gate's number of the frame, or the index of the relay's subscriber.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u64>,
    /// Length of the frame.
    pub length_bytes: u32,
    /// VLAN; 0 for none.
    pub vlan: u16,
    /// Source address; none where the frame is not IPv6, as for all that follows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Ipv6Addr>,
    /// Source port; 0 where neither UDP nor TCP follows the IPv6 header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_port: Option<u16>,
    /// Destination address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<Ipv6Addr>,
    /// Destination port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<u16>,
}

impl TraceRow {
    /// The line of a record; `None` for one that this version does not know.
    pub fn new(record: &Record, port: String, at: OffsetDateTime) -> Option<Self> {
        let program = Program::from_number(record.program)?;
        let decision = Decision::from_number(record.decision)?;
        let flow = record.flow();
        let has_number = match program {
            Program::Gate | Program::Agent => record.number != 0,
            Program::Replicate => matches!(decision, Decision::Copied | Decision::NotCopied),
            Program::Snoop | Program::Uplink | Program::Leak => false,
        };
        Some(Self {
            time: at.format(&Rfc3339).unwrap_or_default(),
            program: program.as_str().to_owned(),
            port,
            decision: decision.as_str().to_owned(),
            reason: Reason::from_number(record.reason)
                .as_str()
                .map(str::to_owned),
            number: has_number.then_some(record.number),
            length_bytes: record.length,
            vlan: flow.map_or(record.vlan, |flow| flow.vlan),
            source: flow.map(|flow| flow.source.into()),
            source_port: flow.map(|flow| flow.source_port),
            destination: flow.map(|flow| flow.destination.into()),
            destination_port: flow.map(|flow| flow.destination_port),
        })
    }
}

/// Shows decisions as they happen, until SIGINT, SIGTERM, or the end of the agent.
///
/// # Errors
///
/// [`CommandError`]; [`super::client::ClientError::Refused`] carries the agent's reason.
pub fn follow(
    socket: &Path,
    request: TraceRequest,
    json: bool,
    out: &mut impl Write,
) -> Result<(), CommandError> {
    let mut client = Client::connect(socket)?;
    let stopped = Arc::new(AtomicBool::new(false));
    stop_by_signal(&client, &stopped)?;
    let followed = client.follow(&Request::Trace(request), |reply| {
        match reply {
            Reply::Tracing if json => {}
            Reply::Tracing => writeln!(out, "{}", super::table::trace_header())?,
            Reply::Trace(line) if json => {
                serde_json::to_writer(&mut *out, &line).map_err(io::Error::from)?;
                out.write_all(b"\n")?;
            }
            Reply::Trace(line) => writeln!(out, "{}", super::table::trace_line(&line))?,
            _ => return Err(CommandError::Unexpected),
        }
        Ok(out.flush()?)
    });
    match followed {
        Err(CommandError::Client(_)) if stopped.load(Ordering::Relaxed) => Ok(()),
        followed => followed,
    }
}

/// Has a signal end the connection, and so the answer.
fn stop_by_signal(client: &Client, stopped: &Arc<AtomicBool>) -> Result<(), CommandError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut shutdown = {
        let _context = runtime.enter();
        Shutdown::new()?
    };
    let connection = client.handle()?;
    let stopped = Arc::clone(stopped);
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            runtime.block_on(shutdown.recv());
            stopped.store(true, Ordering::Relaxed);
            // Fails when the connection has ended already.
            let _ = connection.shutdown(std::net::Shutdown::Both);
        })?;
    Ok(())
}

#[cfg(test)]
mod tests;
