//! Outputs: what the driver carries out.

use std::net::Ipv6Addr;

use common::maps::{
    Address, BridgeNumber, FilterMode, ListenerKey, ManagedKey, Origins, RelayFlow, RelayFlowKey,
    SourceKey,
};

use common::signal::NicCut;

#[cfg(doc)]
use super::{DatapathEvent, GateEvent, HypervisorEvent, PeerEvent};
use super::{Mac, VmAddress};
use crate::proto::addresses::{AddressCommand, ForwardCommand, TranslateCommand};
use crate::proto::handover::ClockOffset;
use crate::proto::{DomainUuid, Timestamp};

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

/// Command to the gate of a TAP; see [`crate::proto::handover`].
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
    /// Send a datagram to a VM, out of the VM's bridge.
    Datagram {
        /// The VM's address, as received.
        to: VmAddress,
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
    /// answers, with [`Change::Removed`](common::event::Change::Removed) and an arbitrary value for a missing entry.
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
    /// Handle a unicast address on the link of a bridge.
    Address(BridgeNumber, AddressCommand),
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
