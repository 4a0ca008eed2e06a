//! What goes into the protocol and what comes out of it.

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

/// Milliseconds of a duration, as messages carry them.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Ethernet address.
pub type Mac = [u8; 6];

/// An Ethernet address for a person: `52:54:00:00:00:01`.
pub fn mac_text(mac: &Mac) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// A libvirt domain as the protocol needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its UUID.
    pub uuid: DomainUuid,
    /// Its name.
    pub name: String,
    /// Whether its CPUs run on this host now.
    pub running: bool,
    /// Its bridged NICs.
    pub interfaces: Vec<DomainInterface>,
}

/// One bridged NIC of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainInterface {
    /// The TAP on this host (`vnet0`); empty while the domain has none.
    pub target_dev: String,
    /// The guest's MAC.
    pub mac: Mac,
    /// Whether the kernel reads the TAP (vhost-net) instead of the hypervisor.
    pub vhost: bool,
}

/// A TAP that is a port of the managed bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its interface index.
    pub ifindex: u32,
    /// Its name (`vnet0`).
    pub name: String,
    /// Its own MAC. libvirt gives a TAP the guest's MAC with the first byte `fe`.
    pub mac: Mac,
}

/// Change of the set of ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortEvent {
    /// A TAP joined the bridge; the programs are attached to it.
    Added(Port),
    /// It left the bridge, or is gone.
    Removed {
        /// Its interface index.
        ifindex: u32,
    },
}

/// What the peer connections report. A peer is named by its certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerEvent {
    /// The connection is up (again).
    Up {
        /// The address that the peer dialed from; `None` where this end dialed.
        from: Option<IpAddr>,
    },
    /// It is down, or the connection asked for could not be made.
    Down {
        /// One sentence for a person, naming the peer.
        reason: String,
    },
    /// One frame ([`common::signal::PeerMessage`]).
    Frame(Bytes),
}

/// What the kernel programs and the bridge report.
#[derive(Clone, Debug, PartialEq)]
pub enum DatapathEvent {
    /// A listener was reported or left.
    Listener {
        /// What happened.
        change: Change,
        /// The listener.
        key: ListenerKey,
        /// Its state after that.
        value: Listener,
    },
    /// A source was listed or taken off.
    Source {
        /// What happened.
        change: Change,
        /// The source.
        key: SourceKey,
        /// Its state after that.
        value: Source,
    },
    /// First packet of a flow and origin since its address was watched.
    FirstPacket {
        /// The flow.
        key: StreamKey,
        /// Which way it came.
        origin: Origin,
        /// When it came.
        at: Timestamp,
    },
    /// An MLD General Query came in by the uplink.
    Query {
        /// Where.
        key: QuerierKey,
        /// What it said.
        value: Querier,
    },
    /// All maps, read as a whole: at the start and whenever events were lost.
    Snapshot {
        /// `LISTENERS`.
        listeners: Vec<(ListenerKey, Listener)>,
        /// `LISTENER_SOURCES`.
        sources: Vec<(SourceKey, Source)>,
        /// `QUERIER`.
        queriers: Vec<(QuerierKey, Querier)>,
    },
    /// Usage of one port, read regularly; answers [`Output::ReadUsage`].
    Usage {
        /// The port.
        ifindex: u32,
        /// Its `PORT_USAGE`.
        usage: PortUsage,
    },
    /// Flows of the addresses asked for; answers [`Output::ReadStreams`].
    Streams {
        /// The token of the request.
        token: u64,
        /// Flows with at least one packet.
        streams: Vec<(StreamKey, Stream)>,
    },
    /// A VM has reported more in one Report than it may. It was too long for the kernel program, so the
    /// bridge has all of it.
    Refused {
        /// Listeners that there was no room for.
        listeners: Vec<ListenerKey>,
        /// Sources likewise, of listeners that there are.
        sources: Vec<SourceKey>,
    },
    /// A join, an MDB entry or a map write asked for could not be made.
    Failed {
        /// The address it was for.
        key: ManagedKey,
        /// One sentence for a person.
        reason: String,
    },
}

/// An entry of the bridge's multicast database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MdbEntry {
    /// The TAP.
    pub ifindex: u32,
    /// The address.
    pub key: ManagedKey,
    /// One of its sources; `None` for the address as a whole, with all its sources.
    pub source: Option<Address>,
}

impl MdbEntry {
    /// The entry of an address as a whole.
    pub fn of_all_sources(ifindex: u32, key: ManagedKey) -> Self {
        Self {
            ifindex,
            key,
            source: None,
        }
    }
}

/// What the gate of a TAP is to do; see [`super::handover`].
#[derive(Clone, Debug, PartialEq)]
pub enum GateCommand {
    /// Record what enters the TAP of a departing domain, and watch its queue; anew if it is recorded
    /// already.
    Record {
        /// The TAP.
        ifindex: u32,
        /// The guest's MAC.
        mac: Mac,
        /// Whether the kernel reads the TAP.
        vhost: bool,
    },
    /// The domain stands still: find out what it has had, and send on what it has not read of the
    /// packets for addresses that it leaves. Answered by [`GateEvent::Cut`] and, where there were such
    /// packets, [`GateEvent::SentOn`].
    Cut {
        /// The TAP.
        ifindex: u32,
        /// Number of the migration's record, to be repeated in the answer.
        migration: u64,
        /// When the domain was said to have stopped.
        stopped: Timestamp,
    },
    /// Hold what comes for an arriving domain. In force when the next output is performed.
    Hold {
        /// The TAP.
        ifindex: u32,
    },
    /// Replay from the cut on, and open. Answered by [`GateEvent::Opened`].
    Replay {
        /// The TAP.
        ifindex: u32,
        /// What the domain had at its source.
        cut: NicCut,
        /// When the source said so, nanoseconds of its clock.
        clock_ns: u64,
        /// What is known of that clock.
        clock: ClockOffset,
    },
    /// Replay everything that came from a moment on, and open. Answered by [`GateEvent::Opened`].
    ReplayBlind {
        /// The TAP.
        ifindex: u32,
        /// The moment.
        since: Timestamp,
    },
    /// Forget what was recorded or held, and open at once.
    Clear {
        /// The TAP.
        ifindex: u32,
    },
}

/// What becomes of gates.
#[derive(Clone, Debug, PartialEq)]
pub enum GateEvent {
    /// What a domain has had that stands still.
    Cut {
        /// The TAP.
        ifindex: u32,
        /// What it has had.
        cut: NicCut,
    },
    /// Everything is replayed, and frames go into the TAP by themselves.
    Opened {
        /// The TAP.
        ifindex: u32,
        /// How it went.
        report: HoldReport,
    },
    /// A domain that had stopped runs on here.
    RunsOn {
        /// Number of the migration's record.
        migration: u64,
        /// Frames at most that the hypervisor has read of the TAP meanwhile and thrown away.
        thrown_away_at_most: u64,
    },
    /// Packets that a domain had not read when it stopped have been sent on.
    SentOn {
        /// Number of the migration's record.
        migration: u64,
        /// What has become of packets since the last such event.
        report: UnreadReport,
    },
    /// [`GateCommand::Record`] failed.
    NotRecorded {
        /// The TAP.
        ifindex: u32,
    },
    /// [`GateCommand::Hold`] failed.
    NotHeld {
        /// The TAP.
        ifindex: u32,
    },
}

/// What the hypervisor reports.
#[derive(Clone, Debug, PartialEq)]
pub enum HypervisorEvent {
    /// The connection is up. Before this comes every domain as [`HypervisorEvent::Domain`] and,
    /// after a connection that was lost, [`HypervisorEvent::Gone`] for those no longer there.
    Connected,
    /// The connection is lost. Domains go on running.
    Disconnected {
        /// One sentence for a person.
        reason: String,
    },
    /// A domain is there, or changed: its TAPs, or whether it runs.
    Domain(Domain),
    /// A domain is on its way here, moved by whomever. It is told as [`HypervisorEvent::Domain`] when
    /// it has arrived, and as [`HypervisorEvent::Gone`] if it does not.
    Arriving {
        /// The domain.
        uuid: DomainUuid,
        /// Its name.
        name: String,
    },
    /// A domain is no longer on this host, or does not arrive.
    Gone(DomainUuid),
    /// The domain's CPUs stopped for the switch to the destination.
    Suspended {
        /// The domain.
        uuid: DomainUuid,
        /// When libvirt said so.
        at: Timestamp,
    },
    /// The domain's CPUs run here; `migrated` when it has just arrived from another host.
    Resumed {
        /// The domain.
        uuid: DomainUuid,
        /// Whether a migration brought it.
        migrated: bool,
        /// When libvirt said so.
        at: Timestamp,
    },
    /// Progress of an outgoing migration.
    Progress {
        /// The domain.
        uuid: DomainUuid,
        /// Where it stands.
        stats: JobStats,
    },
    /// A migration of the domain to another host runs that this agent has not started: an agent
    /// before it has, or somebody else ([`Output::FollowMigration`]). Ends with
    /// [`HypervisorEvent::MigrationEnded`] too.
    Departing {
        /// The domain.
        uuid: DomainUuid,
    },
    /// The migration started by [`Output::StartMigration`], or followed, is over.
    MigrationEnded {
        /// The domain.
        uuid: DomainUuid,
        /// Last statistics, or one sentence for a person saying why it failed.
        result: Result<JobStats, String>,
    },
}

/// Statistics of a migration job, from libvirt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JobStats {
    /// Bytes of memory copied so far.
    pub processed_bytes: u64,
    /// Bytes of memory in all.
    pub total_bytes: u64,
    /// Passes over memory that have begun.
    pub iteration: u64,
    /// How long the CPUs were stopped, once known.
    pub downtime: Option<Duration>,
}

/// What an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// `roamcast migrate DOMAIN DESTINATION`.
    Migrate {
        /// Name or UUID of the domain.
        domain: String,
        /// Name of the destination's agent.
        destination: String,
    },
    /// Stops a migration in progress.
    Abort {
        /// Name or UUID of the domain.
        domain: String,
    },
    /// libvirt's hook: prepares for a domain that somebody else moves to this host. Done when the
    /// source has been answered.
    Prepare {
        /// The domain.
        uuid: DomainUuid,
        /// Its name.
        domain: String,
        /// Name of the agent where it runs.
        source: String,
    },
}

/// What the operator is told; the last one for a command is `Done` or `Failed`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandReply {
    /// How far it is.
    Progress {
        /// Where the migration stands.
        phase: common::signal::Phase,
        /// Bytes of memory copied.
        processed_bytes: u64,
        /// Bytes of memory in all.
        total_bytes: u64,
    },
    /// It is done; details are in the migration's record.
    Done {
        /// Number of the migration's record.
        migration: u64,
    },
    /// One sentence for a person.
    Failed(String),
}

/// A relay that may be asked, as discovery has found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayCandidate {
    /// Name of the peer connection to it, unique among all peers.
    pub name: String,
    /// Where it listens: an address or a DNS name, with a port.
    pub address: String,
    /// How it was found, for the operator (`servers`, `dns relays.example`).
    pub found_by: String,
}

/// A membership held by the host on the bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// VLAN and multicast address.
    pub key: ManagedKey,
    /// Filter mode.
    pub filter_mode: FilterMode,
    /// Sources of the filter.
    pub sources: Vec<Ipv6Addr>,
}

/// What the caller is to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Send a datagram to a VM, out of the bridge.
    Datagram {
        /// The VM's link-local address and port, as received.
        to: SocketAddrV6,
        /// [`common::signal::VmMessage`], encoded.
        bytes: Vec<u8>,
    },
    /// Connect to a peer named in the config; answered by [`PeerEvent::Up`] or `Down`.
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
    /// Take or replace the host's membership of an address, by kernel sockets on the bridge.
    Join(Membership),
    /// Drop it.
    Leave(ManagedKey),
    /// Join and leave at once, so that the querier asks whether anyone is left.
    Prune(ManagedKey),
    /// Watch the streams of an address (`MANAGED`): every flow's first packet from `since` on
    /// raises an event.
    Manage {
        /// The address.
        key: ManagedKey,
        /// From when on.
        since: Timestamp,
        /// Which copies of their packets pass.
        origins: Origins,
    },
    /// Stop watching it.
    Unmanage(ManagedKey),
    /// Restore the datagrams of a relayed flow (`RELAY_FLOWS`).
    RelayFlowSet {
        /// What its datagrams look like.
        key: RelayFlowKey,
        /// What they become.
        value: RelayFlow,
    },
    /// Stop restoring them.
    RelayFlowRemove(RelayFlowKey),
    /// Add a temporary bridge MDB entry, so that a TAP receives before its VM has reported; renew
    /// it if it is there. Repeated until the VM has reported, so a failure ends by itself.
    MdbAdd {
        /// The TAP.
        ifindex: u32,
        /// What it receives.
        membership: Membership,
    },
    /// Remove an entry of a TAP, whoever made it.
    MdbDelete(MdbEntry),
    /// Remove a listener from the map unless it was reported after `last_report_ns`, with its
    /// sources, and count it as expired.
    ExpireListener {
        /// The listener.
        key: ListenerKey,
        /// The last report the protocol knows.
        last_report_ns: u64,
    },
    /// Remove a source likewise.
    ExpireSource {
        /// The source.
        key: SourceKey,
        /// The last report the protocol knows.
        last_report_ns: u64,
    },
    /// Read entries again; answered by one [`DatapathEvent::Listener`] or
    /// [`DatapathEvent::Source`] for each, with [`Change::Removed`] (and any value) for one that
    /// is no longer there.
    ReadListeners {
        /// Keys of `LISTENERS`.
        listeners: Vec<ListenerKey>,
        /// Keys of `LISTENER_SOURCES`.
        sources: Vec<SourceKey>,
    },
    /// Read the flows of addresses; answered by [`DatapathEvent::Streams`].
    ReadStreams {
        /// To be repeated in the answer.
        token: u64,
        /// The addresses.
        keys: Vec<ManagedKey>,
    },
    /// Read `PORT_USAGE` of every port; answered by [`DatapathEvent::Usage`].
    ReadUsage,
    /// Have the gate of a TAP do something.
    Gate(GateCommand),
    /// Do something about a unicast address of this link.
    Address(AddressCommand),
    /// Do something about packets for an address that its VM leaves.
    Forward(ForwardCommand),
    /// Do something about packets that a VM sends from an address that it has left.
    Translate(TranslateCommand),
    /// Start a live migration.
    StartMigration {
        /// The domain.
        uuid: DomainUuid,
        /// libvirt URI of the destination.
        connect_uri: String,
        /// Where QEMU sends memory to; empty to let libvirt choose.
        migrate_uri: String,
        /// Whether QEMU is to encrypt it.
        tls: bool,
    },
    /// Follow a live migration that somebody else has begun, or is about to begin. Told by
    /// [`HypervisorEvent::Departing`] as soon as there is one; ends with
    /// [`HypervisorEvent::MigrationEnded`], always, also where none begins within a bound.
    FollowMigration {
        /// The domain.
        uuid: DomainUuid,
    },
    /// Cancel it.
    AbortMigration {
        /// The domain.
        uuid: DomainUuid,
    },
    /// Answer an operator's command.
    Reply {
        /// Number of the command.
        command: u64,
        /// The answer.
        reply: CommandReply,
    },
}
