//! Reasons why a session is refused or ends; each reason is one sentence for a person.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::{Code, Reason};
use thiserror::Error;

use crate::proto::refusal::bounded;

/// Reason why an agent does not get a stream, or no longer gets the stream.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum Refusal {
    #[error("The request has a field that is out of range: {field}")]
    BadField { field: &'static str },
    #[error("{address} is no multicast address of more than link scope")]
    NotRoutable { address: Ipv6Addr },
    #[error("{address} is source-specific; ask for it with the sources wanted (INCLUDE)")]
    SourceSpecific { address: Ipv6Addr },
    #[error("The request for {address} wants no source")]
    NoSources { address: Ipv6Addr },
    #[error("The request names {sources} sources; relay {relay} takes {limit} in one request")]
    TooManySources {
        relay: String,
        sources: usize,
        limit: usize,
    },
    #[error("The policy of relay {relay} does not let agent {agent} have {address}")]
    Policy {
        relay: String,
        agent: String,
        address: Ipv6Addr,
    },
    #[error(
        "The policy of relay {relay} does not let agent {agent} have streams sent to {address}; connect from there, or name its prefix in `agent_addresses`"
    )]
    Destination {
        relay: String,
        agent: String,
        address: Ipv6Addr,
    },
    #[error("Relay {relay} sends to {address} for another agent already")]
    OtherAgent { relay: String, address: Ipv6Addr },
    #[error("Relay {relay} sends to {address} for the agent that connects from there")]
    Displaced { relay: String, address: Ipv6Addr },
    #[error("Relay {relay} has {limit} sessions already; release one, or use another relay")]
    TooManySessions { relay: String, limit: usize },
    #[error("Agent {agent} has {limit} sessions with relay {relay} already; release one")]
    TooManyOfAgent {
        relay: String,
        agent: String,
        limit: usize,
    },
    #[error(
        "Relay {relay} may send {} Mbit/s in all, and {} are in use; use another relay",
        megabits(*limit),
        megabits(*used)
    )]
    Bandwidth {
        relay: String,
        used: u64,
        limit: u64,
    },
    #[error(
        "Relay {relay} may send {} Mbit/s to agent {agent}, and {} are in use; release a session",
        megabits(*limit),
        megabits(*used)
    )]
    BandwidthOfAgent {
        relay: String,
        agent: String,
        used: u64,
        limit: u64,
    },
    #[error("Relay {relay} cannot reach {address}: {reason}")]
    Unreachable {
        relay: String,
        address: Ipv6Addr,
        reason: String,
    },
    #[error("Relay {relay} cannot serve {address}: {reason}")]
    Failed {
        relay: String,
        address: Ipv6Addr,
        reason: String,
    },
    #[error("The session was not renewed for {} s", .lease.as_secs())]
    Expired { lease: Duration },
}

impl Refusal {
    /// Returns the code for programs and the sentence for people, as a message may carry them.
    pub(super) fn reason(&self) -> Reason {
        Reason::new(self.code(), bounded(&self.to_string()))
    }

    fn code(&self) -> Code {
        match self {
            Self::BadField { .. } => Code::MALFORMED,
            Self::NotRoutable { .. } | Self::SourceSpecific { .. } | Self::NoSources { .. } => {
                Code::NOT_RELAYED
            }
            Self::TooManySources { .. }
            | Self::TooManySessions { .. }
            | Self::TooManyOfAgent { .. }
            | Self::Bandwidth { .. }
            | Self::BandwidthOfAgent { .. } => Code::LIMIT,
            Self::Policy { .. } | Self::Destination { .. } => Code::NOT_PERMITTED,
            Self::OtherAgent { .. } | Self::Displaced { .. } => Code::ADDRESS_TAKEN,
            Self::Unreachable { .. } => Code::UNREACHABLE,
            Self::Failed { .. } => Code::FAILED,
            Self::Expired { .. } => Code::TIMED_OUT,
        }
    }
}

fn megabits(bits: u64) -> String {
    let tenths = bits / 100_000;
    format!("{}.{}", tenths / 10, tenths % 10)
}
