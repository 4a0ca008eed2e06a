//! Inputs: what the bridge, the peers, the kernel, the hypervisor and the operator say.

use std::net::IpAddr;
use std::time::Duration;

use bytes::Bytes;
use common::event::Change;
use common::maps::{
    Listener, ListenerKey, ManagedKey, Origin, PortUsage, Querier, QuerierKey, Source, SourceKey,
    StreamKey,
};
use common::signal::NicCut;

use super::{Domain, Port};
#[cfg(doc)]
use super::{GateCommand, Output};
use crate::proto::handover::{HoldReport, UnreadReport};
use crate::proto::{DomainUuid, Stream, Timestamp};

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
