//! Rows of a relay: `roamcast status`.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use common::maps::SubscriberUsage;

use super::{FilterMode, UplinkRow, age_ms, milliseconds};
use crate::proto::relay::{FlowView, SessionView};
use crate::proto::{Membership, Timestamp};

/// Answer of a relay to `roamcast status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RelayStatus {
    /// Name of the relay, as in its certificate.
    pub relay: String,
    /// Version of the relay's program.
    pub version: String,
    /// Process identifier of the relay.
    pub pid: u32,
    /// Time since the relay started.
    pub uptime_ms: u64,
    /// Source address of the relay's copies.
    pub address: Ipv6Addr,
    /// Lifetime of a session that its agent does not renew.
    pub lease_ms: u64,
    /// Directory of the pinned maps and links.
    pub pin_path: String,
    /// Interfaces on which the relay receives multicast.
    pub interfaces: Vec<UplinkRow>,
    /// Names of the connected agents.
    pub agents: Vec<String>,
    /// Multicast addresses that the relay has joined.
    pub memberships: Vec<MembershipRow>,
    /// One row for each agent and multicast address.
    pub sessions: Vec<SessionRow>,
    /// Counters above 0, by name.
    pub counters: BTreeMap<String, u64>,
}

/// A multicast address that a relay has joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MembershipRow {
    /// The joined address.
    pub multicast_address: Ipv6Addr,
    /// Filter mode that covers all sessions of the address.
    pub filter_mode: FilterMode,
    /// Sources of the filter.
    pub sources: Vec<Ipv6Addr>,
    /// Who holds the membership.
    pub holder: Holder,
}

impl MembershipRow {
    /// Converts a membership.
    pub fn new(membership: &Membership, holder: Holder) -> Self {
        Self {
            multicast_address: membership.key.multicast_address.into(),
            filter_mode: membership.filter_mode.into(),
            sources: membership.sources.clone(),
            holder,
        }
    }
}

/// Holder of a membership.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Holder {
    /// The kernel: the membership outlives the relay's process.
    Kernel,
    /// A socket of the process. The membership outlives the process if systemd stores the socket.
    Socket,
}

/// A session: one multicast address that the relay sends to one agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionRow {
    /// Name of the agent; absent after a restart of the relay until the agent asks again.
    pub agent: Option<String>,
    /// Transaction number of the agent's request.
    pub transaction: Option<u64>,
    /// Address that the agent asked for.
    pub multicast_address: Ipv6Addr,
    /// Filter mode of the agent's request.
    pub filter_mode: FilterMode,
    /// Sources of the filter.
    pub sources: Vec<Ipv6Addr>,
    /// Address to which the relay sends the copies.
    pub agent_address: Ipv6Addr,
    /// Time since the session began, or since the relay adopted it after a restart.
    pub age_ms: u64,
    /// Time until the session ends if the agent does not renew it.
    pub lease_left_ms: u64,
    /// Flows that the relay copies for this session.
    pub flows: Vec<RelayedFlowRow>,
}

impl SessionRow {
    /// Converts a session; `usage` returns the kernel's counters of a flow.
    pub fn new(
        session: &SessionView<'_>,
        usage: impl Fn(&FlowView) -> SubscriberUsage,
        now: Timestamp,
    ) -> Self {
        Self {
            agent: session.agent.map(str::to_owned),
            transaction: session.transaction,
            multicast_address: session.multicast_address,
            filter_mode: session.filter_mode.into(),
            sources: session.sources.iter().copied().collect(),
            agent_address: session.agent_address,
            age_ms: age_ms(now, session.since.0),
            lease_left_ms: milliseconds(session.lease_end.since(now)),
            flows: session
                .flows
                .iter()
                .map(|flow| RelayedFlowRow::new(flow, &usage(flow)))
                .collect(),
        }
    }
}

/// One flow of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayedFlowRow {
    /// Source address of the stream.
    pub source: Ipv6Addr,
    /// UDP source port of the stream.
    pub source_port: u16,
    /// UDP destination port of the stream.
    pub destination_port: u16,
    /// UDP source port of the copies.
    pub relay_port: u16,
    /// UDP destination port of the copies.
    pub agent_port: u16,
    /// Last measured rate of the stream.
    pub bits_per_second: u64,
    /// Copies sent.
    pub packets: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Copies that the kernel could not send.
    pub dropped: u64,
}

impl RelayedFlowRow {
    fn new(flow: &FlowView, usage: &SubscriberUsage) -> Self {
        Self {
            source: flow.stream.source.into(),
            source_port: flow.stream.source_port,
            destination_port: flow.stream.destination_port,
            relay_port: flow.relay_port,
            agent_port: flow.agent_port,
            bits_per_second: flow.bits_per_second,
            packets: usage.packets,
            bytes: usage.bytes,
            dropped: usage.dropped,
        }
    }
}
