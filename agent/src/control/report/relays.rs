//! Rows about relays: `roamcast relays`.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use super::LinkState;

/// A row of `roamcast relays`: one relay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayRow {
    /// Name and address; absent for the sessions of a relay that a restarted agent has not found
    /// again yet.
    pub relay: Option<String>,
    /// Where the agent found the relay.
    pub found_by: Option<String>,
    /// State of the connection.
    pub state: LinkState,
    /// Why the agent could not use the relay the last time.
    pub reason: Option<String>,
    /// The agent's sessions with the relay.
    pub sessions: Vec<RelaySessionRow>,
}

/// A session with a relay: one multicast address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelaySessionRow {
    /// Address that the agent asked for.
    pub multicast_address: Ipv6Addr,
    /// Stage of the session.
    pub state: RelaySessionState,
    /// Source address of the relay's datagrams; absent until known.
    pub address: Option<Ipv6Addr>,
    /// Flows that the relay has announced.
    pub flows: u32,
    /// Packets of these flows that relays have sent.
    pub packets: u64,
    /// Bytes of these packets.
    pub bytes: u64,
    /// Time until the relay stops if the agent does not renew the session.
    pub lease_left_ms: u64,
    /// Why the agent asks the relay.
    pub why: String,
}

/// Stage of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RelaySessionState {
    /// The relay has not answered yet.
    Asked,
    /// The relay sends the packets that it receives.
    Serving,
    /// The relay is ready to take over from another one.
    Standby,
}

impl RelaySessionState {
    /// Returns the word that tables show.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Asked => "asked",
            Self::Serving => "serving",
            Self::Standby => "standby",
        }
    }
}
