//! Inputs and outputs of the protocol state machine.
//!
//! Events and commands go in, [`Output`]s come out. The types carry no sockets and no file descriptors,
//! so tests and fuzzers drive the protocol without a kernel.

use std::net::{IpAddr, Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use bytes::Bytes;
use common::event::Change;
use common::maps::{
    Address, FilterMode, Listener, ListenerKey, ManagedKey, Origin, Origins, PortUsage, Querier,
    QuerierKey, RelayFlow, RelayFlowKey, Source, SourceKey, StreamKey,
};
use common::signal::NicCut;

pub use super::addresses::{
    AddressCommand, AddressEvent, ForwardCommand, Leave, Said, TranslateCommand,
};
use super::handover::{ClockOffset, HoldReport, UnreadReport};
use super::{DomainUuid, Stream};
pub use crate::value::Timestamp;

/// Returns the milliseconds of a duration, the unit of times in messages.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// MAC of an Ethernet interface, in wire order.
pub type Mac = [u8; 6];

/// Formats an Ethernet address for a person: `52:54:00:00:00:01`.
pub fn mac_text(mac: &Mac) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// A libvirt domain, reduced to what the protocol needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// UUID that libvirt assigned; a migration keeps it.
    pub uuid: DomainUuid,
    /// libvirt's name for the domain, for operators and policy rules.
    pub name: String,
    /// Whether the domain's CPUs run on this host now.
    pub running: bool,
    /// Bridged NICs of the domain.
    pub interfaces: Vec<DomainInterface>,
}

/// One bridged NIC of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainInterface {
    /// TAP on this host (`vnet0`); empty while the NIC has none.
    pub target_dev: String,
    /// MAC of the guest's NIC.
    pub mac: Mac,
    /// Whether the kernel reads the TAP (vhost-net) instead of the hypervisor.
    pub vhost: bool,
}

/// A TAP that is a port of the managed bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Interface index of the TAP.
    pub ifindex: u32,
    /// Interface name (`vnet0`).
    pub name: String,
    /// MAC of the TAP itself. libvirt gives a TAP the guest's MAC with the first byte `fe`.
    pub mac: Mac,
}

/// Change of the set of bridge ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortEvent {
    /// A TAP joined the bridge and the eBPF programs are attached to the TAP.
    Added(Port),
    /// A TAP left the bridge or was deleted.
    Removed {
        /// Interface index of the TAP.
        ifindex: u32,
    },
}

/// Event of a peer connection. The peer's certificate gives the peer's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerEvent {
    /// The connection is up, for the first time or again.
    Up {
        /// The address that the peer dialed from; `None` if this end dialed.
        from: Option<IpAddr>,
    },
    /// The connection is down, or an attempt to connect failed.
    Down {
        /// One sentence for a person, naming the peer.
        reason: String,
    },
    /// One received frame ([`common::signal::PeerMessage`]).
    Frame(Bytes),
}

/// Event of the eBPF programs or of the bridge.
#[derive(Clone, Debug, PartialEq)]
pub enum DatapathEvent {
    /// A listener was reported or removed.
    Listener {
        /// `Updated` or `Removed`.
        change: Change,
        /// Port, VLAN and multicast address.
        key: ListenerKey,
        /// State of the listener after the change.
        value: Listener,
    },
    /// A source was added to or removed from a listener's source list.
    Source {
        /// `Updated` or `Removed`.
        change: Change,
        /// Port, VLAN, multicast address and source.
        key: SourceKey,
        /// State of the source after the change.
        value: Source,
    },
    /// First packet of a flow from one origin since the flow's address became managed.
    FirstPacket {
        /// Source, multicast address, ports and VLAN of the flow.
        key: StreamKey,
        /// Path of the packet: native or relayed.
        origin: Origin,
        /// Arrival time of the packet.
        at: Timestamp,
    },
    /// The uplink received an MLD General Query.
    Query {
        /// VLAN of the Query.
        key: QuerierKey,
        /// Timer values from the Query.
        value: Querier,
    },
    /// Content of all maps, read at the start and whenever events were lost.
    Snapshot {
        /// All entries of `LISTENERS`.
        listeners: Vec<(ListenerKey, Listener)>,
        /// All entries of `LISTENER_SOURCES`.
        sources: Vec<(SourceKey, Source)>,
        /// All entries of `QUERIER`.
        queriers: Vec<(QuerierKey, Querier)>,
    },
    /// Usage of one port, in answer to [`Output::ReadUsage`].
    Usage {
        /// Interface index of the TAP.
        ifindex: u32,
        /// `PORT_USAGE` of the port.
        usage: PortUsage,
    },
    /// Flows of the requested addresses, in answer to [`Output::ReadStreams`].
    Streams {
        /// Token from the request.
        token: u64,
        /// Flows with at least one packet.
        streams: Vec<(StreamKey, Stream)>,
    },
    /// A VM's Report exceeded the limits of the VM's port. The Report was too long for the eBPF program
    /// to drop, so the bridge accepted the whole Report.
    Refused {
        /// Listeners that the port had no room for.
        listeners: Vec<ListenerKey>,
        /// Sources of known listeners that the port had no room for.
        sources: Vec<SourceKey>,
    },
    /// A join, an MDB entry or a map write failed.
    Failed {
        /// Address of the failed operation.
        key: ManagedKey,
        /// Cause of the failure; one sentence for a person.
        reason: String,
    },
}

/// An entry of the bridge's multicast database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MdbEntry {
    /// Interface index of the TAP.
    pub ifindex: u32,
    /// VLAN and multicast address.
    pub key: ManagedKey,
    /// One source of the address; `None` for the entry that covers all sources.
    pub source: Option<Address>,
}

impl MdbEntry {
    /// Returns the entry that covers all sources of an address.
    pub fn of_all_sources(ifindex: u32, key: ManagedKey) -> Self {
        Self {
            ifindex,
            key,
            source: None,
        }
    }
}

/// Command to the gate of a TAP; see [`super::handover`].
#[derive(Clone, Debug, PartialEq)]
pub enum GateCommand {
    /// Record the frames that enter the TAP of a departing domain, and watch the TAP's queue. A
    /// repeated command restarts the recording.
    Record {
        /// Interface index of the TAP.
        ifindex: u32,
        /// MAC of the guest's NIC.
        mac: Mac,
        /// Whether the kernel reads the TAP (vhost-net) instead of the hypervisor.
        vhost: bool,
    },
    /// The domain stopped: determine what the domain received, and forward the unread packets for
    /// addresses that the domain leaves. [`GateEvent::Cut`] answers, and [`GateEvent::SentOn`] if there
    /// were such packets.
    Cut {
        /// Interface index of the TAP.
        ifindex: u32,
        /// Number of the migration's record, repeated in the answer.
        migration: u64,
        /// Time of libvirt's event that the domain stopped.
        stopped: Timestamp,
    },
    /// Hold the frames for an arriving domain. The gate is closed before the next output is performed.
    Hold {
        /// Interface index of the TAP.
        ifindex: u32,
    },
    /// Replay the held frames from the cut on, then open. [`GateEvent::Opened`] answers.
    Replay {
        /// Interface index of the TAP.
        ifindex: u32,
        /// What the domain received at the source host.
        cut: NicCut,
        /// Time of the source host's message, nanoseconds of the source host's clock.
        clock_ns: u64,
        /// Known bounds of the difference to that clock.
        clock: ClockOffset,
    },
    /// Replay all frames held since a time, then open. [`GateEvent::Opened`] answers.
    ReplayBlind {
        /// Interface index of the TAP.
        ifindex: u32,
        /// Arrival time of the first frame to replay.
        since: Timestamp,
    },
    /// Discard what was recorded or held, and open at once.
    Clear {
        /// Interface index of the TAP.
        ifindex: u32,
    },
}

/// Result of a [`GateCommand`], or a later report about a gate.
#[derive(Clone, Debug, PartialEq)]
pub enum GateEvent {
    /// The cut of a stopped domain: what the domain received.
    Cut {
        /// Interface index of the TAP.
        ifindex: u32,
        /// Counts and fingerprints of the received packets, per flow.
        cut: NicCut,
    },
    /// All held frames are replayed, and frames enter the TAP without delay again.
    Opened {
        /// Interface index of the TAP.
        ifindex: u32,
        /// Counts and placements of the handover.
        report: HoldReport,
    },
    /// A stopped domain resumed on this host.
    RunsOn {
        /// Number of the migration's record.
        migration: u64,
        /// Upper bound of the frames that the hypervisor read from the TAP and discarded during the
        /// stop.
        thrown_away_at_most: u64,
    },
    /// Packets that a domain had not read when the domain stopped were forwarded.
    SentOn {
        /// Number of the migration's record.
        migration: u64,
        /// Packets forwarded and dropped since the last such event.
        report: UnreadReport,
    },
    /// [`GateCommand::Record`] failed.
    NotRecorded {
        /// Interface index of the TAP.
        ifindex: u32,
    },
    /// [`GateCommand::Hold`] failed.
    NotHeld {
        /// Interface index of the TAP.
        ifindex: u32,
    },
}

/// Event from libvirt: the connection, a domain or a migration.
#[derive(Clone, Debug, PartialEq)]
pub enum HypervisorEvent {
    /// The connection is up. Before this event, every domain is reported as
    /// [`HypervisorEvent::Domain`]. After a lost connection, vanished domains are reported as
    /// [`HypervisorEvent::Gone`], also before this event.
    Connected,
    /// The connection is lost. Domains continue to run.
    Disconnected {
        /// Cause of the loss; one sentence for a person.
        reason: String,
    },
    /// A domain appeared, or changed its TAPs or whether the domain runs.
    Domain(Domain),
    /// A domain is migrating to this host, whoever started the migration. [`HypervisorEvent::Domain`]
    /// follows when the domain arrives, [`HypervisorEvent::Gone`] if the migration fails.
    Arriving {
        /// UUID of the domain.
        uuid: DomainUuid,
        /// libvirt's name for the domain.
        name: String,
    },
    /// A domain left this host, or its migration to this host failed.
    Gone(DomainUuid),
    /// The domain's CPUs stopped for the switch to the destination host.
    Suspended {
        /// UUID of the domain.
        uuid: DomainUuid,
        /// Time of libvirt's event.
        at: Timestamp,
    },
    /// The domain's CPUs run on this host.
    Resumed {
        /// UUID of the domain.
        uuid: DomainUuid,
        /// Whether the domain arrived by a migration just now.
        migrated: bool,
        /// Time of libvirt's event.
        at: Timestamp,
    },
    /// Progress of an outgoing migration.
    Progress {
        /// UUID of the domain.
        uuid: DomainUuid,
        /// Latest statistics of the job.
        stats: JobStats,
    },
    /// A migration of the domain to another host runs that this agent did not start: an earlier agent
    /// or somebody else started the migration ([`Output::FollowMigration`]).
    /// [`HypervisorEvent::MigrationEnded`] follows here too.
    Departing {
        /// UUID of the domain.
        uuid: DomainUuid,
    },
    /// A migration started by [`Output::StartMigration`], or followed, ended.
    MigrationEnded {
        /// UUID of the domain.
        uuid: DomainUuid,
        /// Final statistics, or one sentence for a person with the cause of the failure.
        result: Result<JobStats, String>,
    },
}

/// Statistics of a migration job, from libvirt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobStats {
    /// Bytes of memory copied so far.
    pub processed_bytes: u64,
    /// Bytes of guest memory in total.
    pub total_bytes: u64,
    /// Number of passes over guest memory, including the current pass.
    pub iteration: u64,
    /// Duration of the CPUs' stop; `None` until libvirt reports the duration.
    pub downtime: Option<Duration>,
}

/// Command of an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// `roamcast migrate DOMAIN DESTINATION`.
    Migrate {
        /// Name or UUID of the domain to migrate.
        domain: String,
        /// Name of the destination host's agent.
        destination: String,
    },
    /// Aborts a running migration.
    Abort {
        /// Name or UUID of the migrating domain.
        domain: String,
    },
    /// libvirt's hook: prepares this host for a domain that somebody else migrates here. Completes once
    /// the source host's agent has an answer.
    Prepare {
        /// UUID of the domain.
        uuid: DomainUuid,
        /// libvirt's name for the domain.
        domain: String,
        /// Name of the source host's agent.
        source: String,
    },
}

/// Reply to an operator. The last reply to a command is `Done` or `Failed`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandReply {
    /// Intermediate state of the migration.
    Progress {
        /// Current phase of the migration.
        phase: common::signal::Phase,
        /// Bytes of memory copied.
        processed_bytes: u64,
        /// Bytes of guest memory in total.
        total_bytes: u64,
    },
    /// The command succeeded; the migration's record has details.
    Done {
        /// Number of the migration's record.
        migration: u64,
    },
    /// The command failed; one sentence for a person.
    Failed(String),
}

/// A relay from discovery, available for requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayCandidate {
    /// Name of the peer connection to the relay, unique among all peers.
    pub name: String,
    /// Address or DNS name of the relay, with a port.
    pub address: String,
    /// Source of the discovery, for the operator (`servers`, `dns relays.example`).
    pub found_by: String,
}

/// A membership of the host on the bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// VLAN and multicast address.
    pub key: ManagedKey,
    /// INCLUDE or EXCLUDE (RFC 9777 §4.2).
    pub filter_mode: FilterMode,
    /// Source list of the filter.
    pub sources: Vec<Ipv6Addr>,
}

/// Action for the caller.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Send a datagram to a VM, out of the bridge.
    Datagram {
        /// The VM's link-local address and port, as received.
        to: SocketAddrV6,
        /// [`common::signal::VmMessage`], encoded.
        bytes: Vec<u8>,
    },
    /// Connect to a peer from the configuration; [`PeerEvent::Up`] or `Down` answers.
    Connect {
        /// Name of the peer.
        peer: String,
    },
    /// Send a frame to a connected peer.
    Frame {
        /// Name of the peer.
        peer: String,
        /// [`common::signal::PeerMessage`], encoded.
        bytes: Vec<u8>,
    },
    /// Take or replace the host's membership of an address, through kernel sockets on the bridge.
    Join(Membership),
    /// Drop the host's membership of an address.
    Leave(ManagedKey),
    /// Join and leave at once, so that the querier asks for remaining listeners.
    Prune(ManagedKey),
    /// Manage the streams of an address (`MANAGED`): the first packet of every flow from `since` on
    /// raises an event.
    Manage {
        /// VLAN and multicast address.
        key: ManagedKey,
        /// Earliest arrival time of a packet that raises an event.
        since: Timestamp,
        /// Which copies of the flows' packets pass.
        origins: Origins,
    },
    /// Stop managing an address.
    Unmanage(ManagedKey),
    /// Rebuild the original packets of a relayed flow from the relay's datagrams (`RELAY_FLOWS`).
    RelayFlowSet {
        /// Addresses and ports of the relay's datagrams.
        key: RelayFlowKey,
        /// Header of the rebuilt packets.
        value: RelayFlow,
    },
    /// Stop rebuilding a relayed flow.
    RelayFlowRemove(RelayFlowKey),
    /// Add a temporary MDB entry to the bridge, or renew the entry. The TAP then receives before its VM
    /// reports. The command is repeated until the VM reports, so a failure needs no recovery.
    MdbAdd {
        /// Interface index of the TAP.
        ifindex: u32,
        /// Address and filter that the TAP receives.
        membership: Membership,
    },
    /// Remove an MDB entry of a TAP, whoever added the entry.
    MdbDelete(MdbEntry),
    /// Remove a listener and its sources from the maps unless a Report arrived after `last_report_ns`;
    /// count the listener as expired.
    ExpireListener {
        /// Port, VLAN and multicast address.
        key: ListenerKey,
        /// Time of the last Report that the protocol knows.
        last_report_ns: u64,
    },
    /// Remove a source from its map unless a Report arrived after `last_report_ns`.
    ExpireSource {
        /// Port, VLAN, multicast address and source.
        key: SourceKey,
        /// Time of the last Report that the protocol knows.
        last_report_ns: u64,
    },
    /// Read entries again. For each entry, one [`DatapathEvent::Listener`] or [`DatapathEvent::Source`]
    /// answers, with [`Change::Removed`] and an arbitrary value for a missing entry.
    ReadListeners {
        /// Keys of `LISTENERS`.
        listeners: Vec<ListenerKey>,
        /// Keys of `LISTENER_SOURCES`.
        sources: Vec<SourceKey>,
    },
    /// Read the flows of addresses; [`DatapathEvent::Streams`] answers.
    ReadStreams {
        /// Token for the answer.
        token: u64,
        /// Addresses to read.
        keys: Vec<ManagedKey>,
    },
    /// Read `PORT_USAGE` of every port; [`DatapathEvent::Usage`] answers.
    ReadUsage,
    /// Command the gate of a TAP.
    Gate(GateCommand),
    /// Handle a unicast address of this link.
    Address(AddressCommand),
    /// Handle packets for an address that its VM leaves.
    Forward(ForwardCommand),
    /// Handle packets that a VM sends from an address that the VM left.
    Translate(TranslateCommand),
    /// Start a live migration of a domain.
    StartMigration {
        /// UUID of the domain.
        uuid: DomainUuid,
        /// libvirt URI of the destination host.
        connect_uri: String,
        /// Target URI of QEMU's memory copy; empty to let libvirt choose.
        migrate_uri: String,
        /// Whether QEMU encrypts the memory copy.
        tls: bool,
    },
    /// Follow a migration that somebody else started or is about to start.
    /// [`HypervisorEvent::Departing`] reports its start. [`HypervisorEvent::MigrationEnded`] always
    /// follows, also if no migration starts within a bound.
    FollowMigration {
        /// UUID of the domain.
        uuid: DomainUuid,
    },
    /// Cancel the migration of a domain.
    AbortMigration {
        /// UUID of the domain.
        uuid: DomainUuid,
    },
    /// Answer an operator's command.
    Reply {
        /// Number that the caller gave the command.
        command: u64,
        /// Progress or result.
        reply: CommandReply,
    },
}
