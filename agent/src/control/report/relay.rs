//! Rows of a relay's `roamcast status`.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use common::maps::SubscriberUsage;

use super::{FilterMode, UplinkRow, age_ms, milliseconds};
use crate::proto::relay::{FlowView, SessionView};
use crate::proto::{Membership, Timestamp};

/// `roamcast status` of a relay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RelayStatus {
    /// Name of the relay.
    pub relay: String,
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Since its start.
    pub uptime_ms: u64,
    /// Source address of what is sent.
    pub address: Ipv6Addr,
    /// How long a session goes on without another request.
    pub lease_ms: u64,
    /// Directory of the pinned maps and links.
    pub pin_path: String,
    /// Interfaces that receive multicast.
    pub interfaces: Vec<UplinkRow>,
    /// Agents that are connected.
    pub agents: Vec<String>,
    /// Addresses joined.
    pub memberships: Vec<MembershipRow>,
    /// Sessions.
    pub sessions: Vec<SessionRow>,
    /// Counters that are not zero.
    pub counters: BTreeMap<String, u64>,
}

/// What a relay has joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MembershipRow {
    /// Multicast address.
    pub multicast_address: Ipv6Addr,
    /// Filter mode of all sessions together.
    pub filter_mode: FilterMode,
    /// Sources of the filter.
    pub sources: Vec<Ipv6Addr>,
    /// Who holds it.
    pub holder: Holder,
}

impl MembershipRow {
    /// The row of a membership.
    pub fn new(membership: &Membership, holder: Holder) -> Self {
        Self {
            multicast_address: membership.key.multicast_address.into(),
            filter_mode: membership.filter_mode.into(),
            sources: membership.sources.clone(),
            holder,
        }
    }
}

/// Who holds a join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Holder {
    /// The kernel: it outlives the relay's process.
    Kernel,
    /// A socket of the process; it outlives it where systemd keeps the socket.
    Socket,
}

/// One multicast address that is sent to one agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SessionRow {
    /// The agent; absent until it has asked again after a restart of the relay.
    pub agent: Option<String>,
    /// Its transaction.
    pub transaction: Option<u64>,
    /// Multicast address.
    pub multicast_address: Ipv6Addr,
    /// Filter mode.
    pub filter_mode: FilterMode,
    /// Sources of the filter.
    pub sources: Vec<Ipv6Addr>,
    /// Where it is sent.
    pub agent_address: Ipv6Addr,
    /// Since it began, or was adopted.
    pub age_ms: u64,
    /// Until it ends unless it is renewed.
    pub lease_left_ms: u64,
    /// Its flows.
    pub flows: Vec<RelayedFlowRow>,
}

impl SessionRow {
    /// The row of a session, with what the kernel has counted for each flow.
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
    /// Rate of the stream when last measured.
    pub bits_per_second: u64,
    /// Copies sent.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Copies not sent.
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
