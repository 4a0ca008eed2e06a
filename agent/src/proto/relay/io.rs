//! What goes into the relay's protocol and what comes out of it.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{FilterMode, ManagedKey, RelayStream, StreamKey, Subscriber, SubscriberKey};

use super::policy::Rule;
use crate::proto::{Membership, Timestamp};

/// Configuration of a [`super::RelayServer`].
#[derive(Clone, Debug)]
pub struct RelayConfig {
    /// Name of this relay, as its certificate has it.
    pub name: String,
    /// Source address of the copies.
    pub address: Ipv6Addr,
    /// Who may ask for what; what no rule allows is refused.
    pub policy: Vec<Rule>,
    /// Bounds.
    pub limits: RelayLimits,
    /// How long a session goes on without another request.
    pub lease: Duration,
    /// A flow that is silent for longer is given up.
    pub flow_silence: Duration,
    /// Time between two readings of `STREAMS`.
    pub measure_interval: Duration,
}

/// Bounds of what agents and senders can make the relay do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayLimits {
    /// Sessions, over all agents.
    pub sessions: usize,
    /// Sessions of one agent.
    pub sessions_per_agent: usize,
    /// Flows of one session; further ones are not relayed, and counted.
    pub flows_per_session: usize,
    /// Sources in one filter.
    pub sources: usize,
    /// Bits per second of all copies above which no new session is taken.
    pub bits_per_second: u64,
    /// The same for the copies to one agent.
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

/// What a relay before this one has left in the kernel.
#[derive(Clone, Debug, Default)]
pub struct Adopted {
    /// `RELAY_STREAMS`.
    pub streams: Vec<(StreamKey, RelayStream)>,
    /// `RELAY_SUBSCRIBERS`.
    pub subscribers: Vec<(SubscriberKey, Subscriber)>,
    /// `MANAGED`.
    pub managed: Vec<ManagedKey>,
    /// Addresses that the kernel is still joined to, from any source.
    pub joined: Vec<ManagedKey>,
}

/// What the caller is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum RelayOutput {
    /// Send a frame to a connected agent.
    Frame {
        /// Its name.
        peer: String,
        /// [`common::signal::PeerMessage`], encoded.
        bytes: Vec<u8>,
    },
    /// Take a membership, or replace the one held for that address. A failure is told by
    /// [`crate::proto::DatapathEvent::Failed`].
    Join(Membership),
    /// Drop a membership, one of an earlier relay included.
    Leave(ManagedKey),
    /// Watch an address for packets after a moment. May fail likewise.
    Manage {
        /// The address.
        key: ManagedKey,
        /// First packets after this moment raise events.
        since: Timestamp,
    },
    /// Watch it no longer.
    Unmanage(ManagedKey),
    /// Write an entry of `RELAY_STREAMS`. May fail likewise.
    StreamSet {
        /// The flow.
        key: StreamKey,
        /// Its number and subscribers.
        value: RelayStream,
    },
    /// Remove one.
    StreamRemove(StreamKey),
    /// Write an entry of `RELAY_SUBSCRIBERS`. May fail likewise.
    SubscriberSet {
        /// The flow that it belongs to, for the failure.
        stream: StreamKey,
        /// Number of the flow, and index.
        key: SubscriberKey,
        /// Where copies go.
        value: Subscriber,
        /// The index is given to another subscriber: what `RELAY_USAGE` counted is another's.
        reset_usage: bool,
    },
    /// Remove one, and what was counted for it.
    SubscriberRemove(SubscriberKey),
    /// Have the kernel know the link address on the way to an agent, and keep it; answered by
    /// [`super::RelayServer::handle_neighbour`], also where it is known already.
    Resolve {
        /// Address of the agent.
        agent_address: Ipv6Addr,
    },
    /// It need not be kept any more.
    Forget {
        /// Address of the agent.
        agent_address: Ipv6Addr,
    },
    /// Read the flows of addresses; answered by [`crate::proto::DatapathEvent::Streams`].
    ReadStreams {
        /// The addresses.
        keys: Vec<ManagedKey>,
    },
}

/// A session, for the operator.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionView<'a> {
    /// The agent; none for a session of an earlier relay that was not renewed yet.
    pub agent: Option<&'a str>,
    /// Its transaction, if known.
    pub transaction: Option<u64>,
    /// Multicast address.
    pub multicast_address: Ipv6Addr,
    /// Filter mode.
    pub filter_mode: FilterMode,
    /// Sources of the filter.
    pub sources: &'a BTreeSet<Ipv6Addr>,
    /// Destination address of the copies.
    pub agent_address: Ipv6Addr,
    /// When it began, or was adopted.
    pub since: Timestamp,
    /// When it ends unless it is renewed.
    pub lease_end: Timestamp,
    /// What is sent.
    pub flows: Vec<FlowView>,
}

/// A flow of a session, for the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowView {
    /// The flow.
    pub stream: StreamKey,
    /// UDP source port of the copies.
    pub relay_port: u16,
    /// UDP destination port of the copies.
    pub agent_port: u16,
    /// Its entry in `RELAY_SUBSCRIBERS` and `RELAY_USAGE`.
    pub key: SubscriberKey,
    /// Rate of the stream when last measured.
    pub bits_per_second: u64,
}

/// What was not done, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RelayCounters {
    /// Frames of agents that are no message, or none that a relay takes.
    pub malformed_frames: u64,
    /// Requests refused.
    pub refused_requests: u64,
    /// Sessions whose lease ended.
    pub expired_sessions: u64,
    /// Flows that a session had no room for.
    pub refused_flows: u64,
}
