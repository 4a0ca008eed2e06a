//! Rows of the operator's tables, as `--json` shows them.
//!
//! Durations are milliseconds with the suffix `_ms`, sizes bytes with `_bytes`, ages are counted
//! back from the moment of the answer. A value that is not known is absent.

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

/// `roamcast status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the agent.
    pub agent: String,
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Since its start.
    pub uptime_ms: u64,
    /// The longest time since then for which its loop took in nothing, because it had something to do.
    #[serde(default)]
    pub longest_stall_ms: u64,
    /// How often that was 50 ms or more.
    #[serde(default)]
    pub stalls: u64,
    /// The managed bridge.
    pub bridge: String,
    /// Prefix that arriving VMs take addresses from, with its length.
    pub prefix: Option<String>,
    /// This host's address in it.
    pub address: Option<Ipv6Addr>,
    /// Directory of the pinned maps and links.
    pub pin_path: String,
    /// Physical ports of the bridge.
    pub uplinks: Vec<UplinkRow>,
    /// MLD queriers seen.
    pub queriers: Vec<QuerierRow>,
    /// Agents of other hosts.
    pub peers: Vec<PeerRow>,
    /// The hypervisor.
    pub hypervisor: HypervisorStatus,
    /// TAPs of the bridge.
    pub ports: Vec<PortRow>,
    /// One sentence for each port whose programs are not all attached.
    pub port_problems: Vec<String>,
    /// Multicast addresses that this host has joined for VMs that arrive or have arrived.
    pub receptions: Vec<JoinRow>,
    /// How many watched addresses are received how; empty where no relay is configured.
    pub modes: BTreeMap<String, u32>,
    /// Relays, and what is asked of them.
    pub relays: Vec<RelayRow>,
    /// One sentence for each place where relays cannot be looked for.
    pub relay_problems: Vec<String>,
    /// For how many days the certificate of the signalling is still good, if for fewer than 30.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_ends_in_days: Option<i64>,
    /// One sentence for each way, out and in, on which the memory of VMs is not encrypted because QEMU has
    /// no certificate here.
    #[serde(default)]
    pub memory_problems: Vec<String>,
    /// Migrations that are not over, both ways.
    pub migrations: Vec<MigrationRow>,
    /// Domains that wait until others have arrived, in the order of their turns.
    #[serde(default)]
    pub waiting: Vec<WaitingRow>,
    /// Counters that are not zero.
    pub counters: BTreeMap<String, u64>,
}

/// A domain that waits for a place on this host (`policy.arrivals_at_once`, `arrivals_per_peer`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingRow {
    /// Its name.
    pub domain: String,
    /// Agent of the host where it is.
    pub source: String,
    /// For how long.
    pub waited_ms: u64,
}

/// An MLD querier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QuerierRow {
    /// Interface that its Queries come in by.
    pub interface: String,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Its link-local address.
    pub address: Ipv6Addr,
    /// MLD version of its Queries.
    pub mld_version: u8,
    /// Since its last General Query.
    pub age_ms: u64,
    /// Query Interval.
    pub query_interval_ms: u64,
    /// Query Response Interval.
    pub query_response_interval_ms: u64,
    /// Robustness Variable.
    pub robustness: u8,
}

impl QuerierRow {
    /// The row of an entry of `QUERIER`.
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
    /// It is up.
    Up,
    /// It is being made.
    Connecting,
    /// It is down.
    Down,
}

/// An agent of another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerRow {
    /// Its name.
    pub name: String,
    /// Its configured address; absent for a peer that is only admitted.
    pub address: Option<String>,
    /// State of the connection. It is made when needed, so `down` alone is no fault.
    pub state: LinkState,
    /// Why the last attempt failed.
    pub reason: Option<String>,
}

/// The hypervisor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervisorStatus {
    /// libvirt URI.
    pub uri: String,
    /// State of the connection.
    pub state: LinkState,
    /// Why it is down.
    pub reason: Option<String>,
    /// Domains known.
    pub domains: u32,
}

/// A TAP of the bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortRow {
    /// Its name (`vnet0`).
    pub name: String,
    /// Its interface index.
    pub ifindex: u32,
    /// Domain that it belongs to.
    pub domain: Option<String>,
    /// Programs on it.
    pub hooks: Vec<Hook>,
    /// Listeners now.
    pub listeners: u32,
    /// Most listeners that it may have.
    pub max_listeners: u32,
    /// Sources now.
    pub sources: u32,
    /// Most sources that it may have.
    pub max_sources: u32,
    /// Reports and Dones taken in.
    pub reports: u64,
    /// Reports dropped because there were too many in a second.
    pub refused_reports: u64,
    /// Records dropped for want of room.
    pub refused_listeners: u64,
    /// Sources dropped for want of room.
    pub refused_sources: u64,
    /// MLD frames that break a rule.
    pub malformed: u64,
    /// Datagrams to the agent.
    pub datagrams: u64,
    /// Datagrams to the agent dropped because there were too many in a second.
    pub refused_datagrams: u64,
    /// Datagrams dropped that would have been taken for an agent's.
    pub forged_datagrams: u64,
    /// Signalling that others sent to the VM; dropped.
    pub withheld_datagrams: u64,
    /// Frames of any kind that found its queue full since it was made: the VM did not read.
    #[serde(default)]
    pub tap_full: u64,
}

impl PortRow {
    /// The row of a TAP from its limits and its usage, expired entries taken off.
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

/// One of `roamcast listeners`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerRow {
    /// Domain that listens.
    pub domain: Option<String>,
    /// Its TAP.
    pub port: String,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Multicast address.
    pub multicast_address: Ipv6Addr,
    /// Filter mode.
    pub filter_mode: FilterMode,
    /// Sources of the filter.
    pub sources: Vec<Ipv6Addr>,
    /// MLD version of the last Report.
    pub mld_version: u8,
    /// Since the last Report.
    pub age_ms: u64,
    /// Since the first Report.
    pub first_report_age_ms: u64,
    /// Ethernet source of the last Report. The guest chooses it.
    pub guest_mac: Mac,
}

impl ListenerRow {
    /// The row of an entry of `LISTENERS` with the sources of its generation.
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

/// One of `roamcast streams`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamRow {
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Multicast address.
    pub multicast_address: Ipv6Addr,
    /// Source address.
    pub source: Ipv6Addr,
    /// UDP source port, 0 where there is none.
    pub source_port: u16,
    /// UDP destination port, 0 where there is none.
    pub destination_port: u16,
    /// How its address is received (`native`, `relay`, `both`, `probing`, `idle`); absent where
    /// it is not watched.
    pub mode: Option<String>,
    /// Packets that came, by both ways.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets that came natively.
    pub native_packets: u64,
    /// Their bytes.
    pub native_bytes: u64,
    /// Packets that came from a relay.
    pub relay_packets: u64,
    /// Their bytes.
    pub relay_bytes: u64,
    /// Packets that did not pass: second copies, and those of the way that is not used.
    pub dropped: u64,
    /// Packets each second, from the moving average of their distance on the way that the last one
    /// came by; 0 when silent.
    pub packets_per_second: f64,
    /// Since the last packet.
    pub age_ms: u64,
    /// Whether the address is watched now.
    pub managed: bool,
}

impl StreamRow {
    /// The row of a flow; `mode` where its address is watched.
    pub fn new(key: &maps::StreamKey, value: &Stream, mode: Option<&str>, now: Timestamp) -> Self {
        let interarrival_ns = value.latest().interarrival_ns;
        let silent = now.since(Timestamp(value.latest().last_ns));
        // An average says nothing any more once the flow has paused for many of its own distances.
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

/// Milliseconds from `then_ns` to `now`; 0 for the future.
pub fn age_ms(now: Timestamp, then_ns: u64) -> u64 {
    milliseconds(now.since(Timestamp(then_ns)))
}

/// Whole milliseconds of a duration, as the rows show it.
pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
