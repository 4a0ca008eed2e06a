//! Rows about the relays that an agent asks.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use super::LinkState;

/// One of `roamcast relays`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayRow {
    /// Its name and address; absent for sessions whose relay is not found again yet after a
    /// restart of the agent.
    pub relay: Option<String>,
    /// How it was found.
    pub found_by: Option<String>,
    /// State of the connection.
    pub state: LinkState,
    /// Why it was of no use last.
    pub reason: Option<String>,
    /// What is asked of it.
    pub sessions: Vec<RelaySessionRow>,
}

/// What is asked of a relay: one multicast address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelaySessionRow {
    /// Multicast address.
    pub multicast_address: Ipv6Addr,
    /// Where the session stands.
    pub state: RelaySessionState,
    /// Source address of its datagrams, once known.
    pub address: Option<Ipv6Addr>,
    /// Flows that the relay has announced.
    pub flows: u32,
    /// Packets that relays have sent of these flows.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Until the relay stops unless it is asked again.
    pub lease_left_ms: u64,
    /// Why it is asked.
    pub why: String,
}

/// Where a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RelaySessionState {
    /// Not answered yet.
    Asked,
    /// The relay sends what it has.
    Serving,
    /// Ready to take over from another relay.
    Standby,
}

impl RelaySessionState {
    /// A word for a person.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Asked => "asked",
            Self::Serving => "serving",
            Self::Standby => "standby",
        }
    }
}
