//! Inputs and outputs of the relay's protocol.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{FilterMode, ManagedKey, RelayStream, StreamKey, Subscriber, SubscriberKey};

use super::policy::Rule;
use crate::proto::{Membership, Timestamp};

/// Configuration of a [`super::RelayServer`].
#[derive(Clone, Debug)]
pub struct RelayConfig {
    /// Name of this relay, from its certificate.
    pub name: String,
    /// Source address of the copies.
    pub address: Ipv6Addr,
    /// Permissions of agents; the relay refuses requests that no rule allows.
    pub policy: Vec<Rule>,
    /// Limits of sessions, flows, sources and rates.
    pub limits: RelayLimits,
    /// Lifetime of a session without renewal.
    pub lease: Duration,
    /// Silence after which a flow is dropped.
    pub flow_silence: Duration,
    /// Interval between two readings of `STREAMS`.
    pub measure_interval: Duration,
}

/// Limits of the load that agents and senders can cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayLimits {
    /// Sessions of all agents together.
    pub sessions: usize,
    /// Sessions that one agent may hold at a time.
    pub sessions_per_agent: usize,
    /// Flows of one session; further flows are counted but not relayed.
    pub flows_per_session: usize,
    /// Sources in one filter.
    pub sources: usize,
    /// Rate of all copies above which the relay refuses new sessions, bits per second.
    pub bits_per_second: u64,
    /// Rate of the copies to one agent above which the relay refuses the agent's new sessions, bits per
    /// second.
    pub bits_per_second_per_agent: u64,
}

impl Default for RelayLimits {
    fn default() -> Self {
        Self {
            sessions: 4096,
            sessions_per_agent: 256,
            flows_per_session: 64,
            sources: 64,
            bits_per_second: u64::MAX,
            bits_per_second_per_agent: u64::MAX,
        }
    }
}

/// Kernel state that an earlier relay left.
#[derive(Clone, Debug, Default)]
pub struct Adopted {
    /// All entries of `RELAY_STREAMS`.
    pub streams: Vec<(StreamKey, RelayStream)>,
    /// All entries of `RELAY_SUBSCRIBERS`.
    pub subscribers: Vec<(SubscriberKey, Subscriber)>,
    /// All keys of `MANAGED`.
    pub managed: Vec<ManagedKey>,
    /// Addresses with a kernel membership for any source.
    pub joined: Vec<ManagedKey>,
}

/// Action for the caller.
#[derive(Clone, Debug, PartialEq)]
pub enum RelayOutput {
    /// Send a frame to a connected agent.
    Frame {
        /// Name of the agent.
        peer: String,
        /// [`common::signal::PeerMessage`], encoded.
        bytes: Vec<u8>,
    },
    /// Take a membership, or replace the membership of that address.
    /// [`crate::proto::DatapathEvent::Failed`] reports a failure.
    Join(Membership),
    /// Drop a membership, including one of an earlier relay.
    Leave(ManagedKey),
    /// Manage an address. [`crate::proto::DatapathEvent::Failed`] reports a failure.
    Manage {
        /// VLAN 0 and the multicast address.
        key: ManagedKey,
        /// First packets of flows after this time raise events.
        since: Timestamp,
    },
    /// Stop managing an address.
    Unmanage(ManagedKey),
    /// Write an entry of `RELAY_STREAMS`. [`crate::proto::DatapathEvent::Failed`] reports a failure.
    StreamSet {
        /// Flow to relay.
        key: StreamKey,
        /// Number of the flow, and number of its subscriber slots.
        value: RelayStream,
    },
    /// Remove an entry from `RELAY_STREAMS`.
    StreamRemove(StreamKey),
    /// Write an entry of `RELAY_SUBSCRIBERS`. [`crate::proto::DatapathEvent::Failed`] reports a
    /// failure.
    SubscriberSet {
        /// Flow of the subscriber, for the report of a failure.
        stream: StreamKey,
        /// Number of the flow, and the subscriber's index.
        key: SubscriberKey,
        /// Addresses and ports of the copies, and the end of the lease.
        value: Subscriber,
        /// True if the index moves to another subscriber: `RELAY_USAGE` holds counts of the former
        /// subscriber.
        reset_usage: bool,
    },
    /// Remove an entry from `RELAY_SUBSCRIBERS` and its counts.
    SubscriberRemove(SubscriberKey),
    /// Resolve the next hop to an agent, and keep the result current.
    /// [`super::RelayServer::handle_neighbour`] takes the answer, even for a known next hop.
    Resolve {
        /// Unicast address from the agent's request.
        agent_address: Ipv6Addr,
    },
    /// Stop resolving the next hop to an agent.
    Forget {
        /// Unicast address from the agent's request.
        agent_address: Ipv6Addr,
    },
    /// Read the flows of addresses; [`crate::proto::DatapathEvent::Streams`] answers.
    ReadStreams {
        /// Addresses to read.
        keys: Vec<ManagedKey>,
    },
}

/// A session, for the operator.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionView<'a> {
    /// Name of the agent; `None` for an adopted session before its renewal.
    pub agent: Option<&'a str>,
    /// Transaction of the agent's request; `None` for an adopted session before its renewal.
    pub transaction: Option<u64>,
    /// Requested group; scope is wider than the link.
    pub multicast_address: Ipv6Addr,
    /// INCLUDE or EXCLUDE (RFC 9777 §4.2).
    pub filter_mode: FilterMode,
    /// Source list of the filter.
    pub sources: &'a BTreeSet<Ipv6Addr>,
    /// Destination address of the copies.
    pub agent_address: Ipv6Addr,
    /// Start of the session, or time of its adoption.
    pub since: Timestamp,
    /// End of the session without renewal.
    pub lease_end: Timestamp,
    /// Flows that the relay sends to the agent.
    pub flows: Vec<FlowView>,
}

/// A flow of a session, for the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowView {
    /// Original addresses and ports of the flow.
    pub stream: StreamKey,
    /// UDP source port of the copies.
    pub relay_port: u16,
    /// UDP destination port of the copies.
    pub agent_port: u16,
    /// Entry of the flow in `RELAY_SUBSCRIBERS` and `RELAY_USAGE`.
    pub key: SubscriberKey,
    /// Rate of the flow at the last measurement.
    pub bits_per_second: u64,
}

/// Counts of refused, malformed and expired input, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelayCounters {
    /// Frames from agents that cannot be decoded, or carry a message that no relay accepts.
    pub malformed_frames: u64,
    /// Requests answered with a `RelayRelease`, whatever the reason.
    pub refused_requests: u64,
    /// Sessions whose lease ended without renewal.
    pub expired_sessions: u64,
    /// Flows beyond a limit, or without a free port pair.
    pub refused_flows: u64,
}
