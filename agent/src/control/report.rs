//! Rows of the operator's tables, as `--json` shows them.
//!
//! The suffix `_ms` marks a duration in milliseconds, `_bytes` a size in bytes. An age counts back
//! from the moment of the answer. An unknown value is absent.

mod handover;
mod hook;
mod ims;
mod mcs;
mod migration;
mod relay;
mod relays;
mod unicast;

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv6Addr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use common::maps;

#[cfg(feature = "programs")]
use crate::datapath::Limits;
use crate::proto::{Stream, Timestamp};

pub use handover::{HandoverRow, NicRow, Placement, UngatedReason, UngatedRow};
pub use hook::{Hook, UplinkRow};
pub use ims::{ImsStatus, MoaRow, NodeRow};
pub use mcs::{McsStatus, RegistrationRow, Role};
pub use migration::{
    ClearReason, Direction, JoinRow, MemoryWay, MigrationPhase, MigrationRow, Outcome, Reception,
    ReceptionRow,
};
pub use relay::{Holder, MembershipRow, RelayStatus, RelayedFlowRow, SessionRow};
pub use relays::{RelayRow, RelaySessionRow, RelaySessionState};
pub use unicast::{ClaimState, ForwardRow, TranslationRow, UnicastRow, UnreadRow};

/// Ethernet address, `52:54:00:12:34:56` in JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes: Option<Vec<u8>> = text
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).ok())
            .collect();
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| de::Error::custom(format!("\"{text}\" is no Ethernet address")))
    }
}

/// Filter mode of a listener (RFC 9777 §4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FilterMode {
    /// Only from the listed sources.
    Include,
    /// From all but the listed sources.
    Exclude,
}

impl From<maps::FilterMode> for FilterMode {
    fn from(mode: maps::FilterMode) -> Self {
        match mode {
            maps::FilterMode::Include => Self::Include,
            maps::FilterMode::Exclude => Self::Exclude,
        }
    }
}

/// Answer of an agent to `roamcast status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the agent, as in its certificate.
    pub agent: String,
    /// Version of the agent's program.
    pub version: String,
    /// Process identifier of the agent.
    pub pid: u32,
    /// Time since the agent started.
    pub uptime_ms: u64,
    /// The longest time since then for which its loop took in nothing, because it had something to do.
    #[serde(default)]
    pub longest_stall_ms: u64,
    /// How often that was 50 ms or more.
    #[serde(default)]
    pub stalls: u64,
    /// The managed bridge.
    pub bridge: String,
    /// Prefix from which arriving VMs take addresses, with its length.
    pub prefix: Option<String>,
    /// This host's address in `prefix`.
    pub address: Option<Ipv6Addr>,
    /// Directory of the pinned maps and links.
    pub pin_path: String,
    /// Physical ports of the bridge.
    pub uplinks: Vec<UplinkRow>,
    /// MLD queriers on the bridge, one for each interface and VLAN.
    pub queriers: Vec<QuerierRow>,
    /// Agents of other hosts.
    pub peers: Vec<PeerRow>,
    /// Connection to libvirt.
    pub hypervisor: HypervisorStatus,
    /// TAPs of the bridge.
    pub ports: Vec<PortRow>,
    /// One sentence for each port whose programs are not all attached.
    pub port_problems: Vec<String>,
    /// Multicast addresses that this host has joined for VMs that arrive or have arrived.
    pub receptions: Vec<JoinRow>,
    /// Number of watched addresses for each kind of reception; empty if no relay is configured.
    pub modes: BTreeMap<String, u32>,
    /// Relays, and the agent's sessions with each relay.
    pub relays: Vec<RelayRow>,
    /// One sentence for each place where the agent cannot look for relays.
    pub relay_problems: Vec<String>,
    /// Days until the signalling certificate expires; absent for 30 days and more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_ends_in_days: Option<i64>,
    /// One sentence for each direction (out, in) in which the memory of VMs goes unencrypted
    /// because QEMU has no certificate on this host.
    #[serde(default)]
    pub memory_problems: Vec<String>,
    /// Migrations in progress, in both directions.
    pub migrations: Vec<MigrationRow>,
    /// Domains that wait for other arrivals to finish, in the order of their turns.
    #[serde(default)]
    pub waiting: Vec<WaitingRow>,
    /// Counters above 0, by name.
    pub counters: BTreeMap<String, u64>,
}

/// A domain that waits for a place on this host (`policy.arrivals_at_once`, `arrivals_per_peer`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingRow {
    /// Name of the domain.
    pub domain: String,
    /// Agent of the domain's current host.
    pub source: String,
    /// Time since the domain began to wait.
    pub waited_ms: u64,
}

/// An MLD querier (RFC 9777 §7.1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuerierRow {
    /// Interface on which its Queries arrive.
    pub interface: String,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Link-local source address of its Queries.
    pub address: Ipv6Addr,
    /// MLD version of its Queries, 1 or 2.
    pub mld_version: u8,
    /// Time since its last General Query.
    pub age_ms: u64,
    /// Querier's Query Interval (RFC 9777 §9.2).
    pub query_interval_ms: u64,
    /// Query Response Interval (RFC 9777 §9.3).
    pub query_response_interval_ms: u64,
    /// Robustness Variable (RFC 9777 §9.1).
    pub robustness: u8,
}

impl QuerierRow {
    /// Converts an entry of the map `QUERIER`.
    pub fn new(
        interface: String,
        key: &maps::QuerierKey,
        value: &maps::Querier,
        now: Timestamp,
    ) -> Self {
        Self {
            interface,
            vlan: key.vlan,
            address: value.address.into(),
            mld_version: value.mld_version,
            age_ms: age_ms(now, value.last_query_ns),
            query_interval_ms: value.query_interval_ms.into(),
            query_response_interval_ms: value.query_response_interval_ms.into(),
            robustness: value.robustness,
        }
    }
}

/// State of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LinkState {
    /// The connection works.
    Up,
    /// The agent is opening the connection.
    Connecting,
    /// There is no connection.
    Down,
}

/// An agent of another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRow {
    /// Name of the agent, as in its certificate.
    pub name: String,
    /// Configured address; absent for a peer that the agent only admits.
    pub address: Option<String>,
    /// State of the connection. The agent connects when needed, so `down` alone is no fault.
    pub state: LinkState,
    /// Why the last attempt failed.
    pub reason: Option<String>,
}

/// Connection to libvirt, and the number of domains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervisorStatus {
    /// libvirt URI.
    pub uri: String,
    /// State of the connection.
    pub state: LinkState,
    /// Why the connection is down.
    pub reason: Option<String>,
    /// Number of domains that the agent knows.
    pub domains: u32,
}

/// A TAP of the bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRow {
    /// Name of the interface (`vnet0`).
    pub name: String,
    /// Interface index.
    pub ifindex: u32,
    /// Domain to which the TAP belongs; absent while unknown.
    pub domain: Option<String>,
    /// Programs attached to the TAP.
    pub hooks: Vec<Hook>,
    /// Current number of listeners.
    pub listeners: u32,
    /// Limit for `listeners`.
    pub max_listeners: u32,
    /// Current number of sources.
    pub sources: u32,
    /// Limit for `sources`.
    pub max_sources: u32,
    /// MLD Reports and Dones processed.
    pub reports: u64,
    /// Reports dropped by the rate limit.
    pub refused_reports: u64,
    /// Records dropped because `max_listeners` or the map was full.
    pub refused_listeners: u64,
    /// Sources dropped because `max_sources` or the map was full.
    pub refused_sources: u64,
    /// MLD frames that violate RFC 9777.
    pub malformed: u64,
    /// Datagrams from the VM to the agent.
    pub datagrams: u64,
    /// Datagrams from the VM to the agent dropped by the rate limit.
    pub refused_datagrams: u64,
    /// Datagrams dropped because they pretended to come from an agent.
    pub forged_datagrams: u64,
    /// Signalling datagrams from other hosts to the VM, which are dropped.
    pub withheld_datagrams: u64,
    /// Frames that found the TAP's queue full since the TAP was created: the VM did not read.
    #[serde(default)]
    pub tap_full: u64,
}

#[cfg(feature = "programs")]
impl PortRow {
    /// Converts the limits and the usage of a TAP. The caller has subtracted expired entries from
    /// `usage`.
    pub fn new(
        name: String,
        ifindex: u32,
        domain: Option<String>,
        hooks: Vec<Hook>,
        limits: &Limits,
        usage: &maps::PortUsage,
    ) -> Self {
        Self {
            name,
            ifindex,
            domain,
            hooks,
            listeners: usage.listeners,
            max_listeners: limits.listeners,
            sources: usage.sources,
            max_sources: limits.sources,
            reports: usage.reports,
            refused_reports: usage.refused_reports,
            refused_listeners: usage.refused_listeners,
            refused_sources: usage.refused_sources,
            malformed: usage.malformed,
            datagrams: usage.datagrams,
            refused_datagrams: usage.refused_datagrams,
            forged_datagrams: usage.forged_datagrams,
            withheld_datagrams: usage.withheld_datagrams,
            tap_full: 0,
        }
    }
}

/// A row of `roamcast listeners`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerRow {
    /// Domain of the listener; absent while unknown.
    pub domain: Option<String>,
    /// TAP of the listener.
    pub port: String,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Multicast address to which the VM listens.
    pub multicast_address: Ipv6Addr,
    /// Filter mode of the last Report.
    pub filter_mode: FilterMode,
    /// Sources of the filter.
    pub sources: Vec<Ipv6Addr>,
    /// MLD version of the last Report.
    pub mld_version: u8,
    /// Time since the last Report.
    pub age_ms: u64,
    /// Time since the first Report.
    pub first_report_age_ms: u64,
    /// Ethernet source of the last Report. The guest chooses it.
    pub guest_mac: Mac,
}

impl ListenerRow {
    /// Converts an entry of the map `LISTENERS` and the sources of its generation.
    pub fn new(
        domain: Option<String>,
        port: String,
        key: &maps::ListenerKey,
        value: &maps::Listener,
        sources: Vec<Ipv6Addr>,
        now: Timestamp,
    ) -> Self {
        let mode = maps::FilterMode::from_u8(value.filter_mode);
        Self {
            domain,
            port,
            vlan: key.vlan,
            multicast_address: key.multicast_address.into(),
            filter_mode: mode.unwrap_or(maps::FilterMode::Exclude).into(),
            sources,
            mld_version: value.mld_version,
            age_ms: age_ms(now, value.last_report_ns),
            first_report_age_ms: age_ms(now, value.first_report_ns),
            guest_mac: Mac(value.guest_mac),
        }
    }
}

/// A row of `roamcast streams`: one flow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamRow {
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Destination address of the flow.
    pub multicast_address: Ipv6Addr,
    /// Source address of the flow.
    pub source: Ipv6Addr,
    /// UDP source port; 0 if the packets are not UDP.
    pub source_port: u16,
    /// UDP destination port; 0 if the packets are not UDP.
    pub destination_port: u16,
    /// How the host receives the multicast address (`native`, `relay`, `both`, `probing`, `idle`);
    /// absent if the agent does not watch the address.
    pub mode: Option<String>,
    /// Packets received on both paths.
    pub packets: u64,
    /// Bytes received on both paths.
    pub bytes: u64,
    /// Packets received natively.
    pub native_packets: u64,
    /// Bytes received natively.
    pub native_bytes: u64,
    /// Packets received from a relay.
    pub relay_packets: u64,
    /// Bytes received from a relay.
    pub relay_bytes: u64,
    /// Packets dropped: second copies, and packets of the path not in use.
    pub dropped: u64,
    /// Packets per second, from the moving average of the inter-arrival time on the path of the
    /// last packet; 0 if the flow is silent.
    pub packets_per_second: f64,
    /// Time since the last packet.
    pub age_ms: u64,
    /// True while the agent watches the address.
    pub managed: bool,
}

impl StreamRow {
    /// Converts a flow. The caller passes `mode` if the agent watches the address.
    pub fn new(key: &maps::StreamKey, value: &Stream, mode: Option<&str>, now: Timestamp) -> Self {
        let interarrival_ns = value.latest().interarrival_ns;
        let silent = now.since(Timestamp(value.latest().last_ns));
        // The average says nothing about a flow that has paused for many inter-arrival times.
        let threshold = Duration::from_nanos(interarrival_ns).saturating_mul(16);
        let flows = interarrival_ns > 0 && silent <= threshold.max(Duration::from_secs(1));
        Self {
            vlan: key.vlan,
            multicast_address: key.multicast_address.into(),
            source: key.source.into(),
            source_port: key.source_port,
            destination_port: key.destination_port,
            mode: mode.map(str::to_owned),
            packets: value.native.packets.saturating_add(value.relay.packets),
            bytes: value.native.bytes.saturating_add(value.relay.bytes),
            native_packets: value.native.packets,
            native_bytes: value.native.bytes,
            relay_packets: value.relay.packets,
            relay_bytes: value.relay.bytes,
            dropped: value.dropped(),
            packets_per_second: if flows {
                1e9 / interarrival_ns as f64
            } else {
                0.0
            },
            age_ms: milliseconds(silent),
            managed: mode.is_some(),
        }
    }
}

/// Returns the milliseconds from `then_ns` to `now`; 0 if `then_ns` is in the future.
pub fn age_ms(now: Timestamp, then_ns: u64) -> u64 {
    milliseconds(now.since(Timestamp(then_ns)))
}

/// Returns the whole milliseconds of a duration, as the rows show them.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
