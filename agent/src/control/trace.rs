//! `roamcast trace`: the operator's request, and the lines of the answer.
//!
//! ```text
//! {"request":"trace","port":"vnet0","rate":1000}   {"reply":"tracing"}
//!                                                  {"reply":"trace","data":{..}}
//!                                                  {"reply":"trace","data":{"left_out":123}}
//! ```
//!
//! The trace ends when the operator closes the connection or sends another byte. The agent drops
//! lines when the operator reads too slowly, and counts the dropped lines (`left_out`).

use std::net::Ipv6Addr;

use common::trace::{Decision, Program, Reason, Record};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Lines per second if the operator names no rate.
pub const DEFAULT_RATE: u32 = 1000;
/// Highest rate that the operator may name, lines per second.
pub const MAX_RATE: u32 = 1_000_000;

/// Filter of the decisions to show. A decision is shown if all conditions hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRequest {
    /// Names of programs; empty: all programs.
    #[serde(default)]
    pub programs: Vec<String>,
    /// Name of a port; `None`: any port.
    pub port: Option<String>,
    /// Source or destination address of the packet; `None`: any address.
    pub address: Option<Ipv6Addr>,
    /// Highest rate, lines per second, 1 to [`MAX_RATE`].
    pub rate: u32,
}

/// One line of the output: a decision or a gap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TraceLine {
    /// A gap: decisions above the rate, or lines that the operator read too slowly.
    LeftOut {
        /// Number of decisions in the gap.
        left_out: u64,
    },
    /// What one kernel program did with one frame.
    Decision(Box<TraceRow>),
}

/// A decision about a frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRow {
    /// Time of the decision, RFC 3339 in UTC.
    pub time: String,
    /// Name of the kernel program, as in `common::trace::Program`.
    pub program: String,
    /// Name of the port to which the program is attached.
    pub port: String,
    /// The decision, as in `common::trace::Decision`.
    pub decision: String,
    /// Reason of the decision; absent where the program names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Number that the gate gave the frame, or index of the relay's subscriber.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u64>,
    /// Length of the frame, bytes.
    pub length_bytes: u32,
    /// VLAN identifier; 0 for an untagged frame.
    pub vlan: u16,
    /// IPv6 source address. This field and all fields below are absent for other frames.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Ipv6Addr>,
    /// Source port; 0 if neither UDP nor TCP follows the IPv6 header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_port: Option<u16>,
    /// IPv6 destination address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<Ipv6Addr>,
    /// Destination port; 0 if neither UDP nor TCP follows the IPv6 header.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<u16>,
}

impl TraceRow {
    /// Converts a record. Returns `None` for a program or decision that this version does not know.
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

#[cfg(test)]
mod tests;
