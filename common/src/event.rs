//! Records of the `EVENTS` ring buffer, kernel to agent.
//!
//! Every record starts with [`Kind`] as a `u32` in host order and has the size of its type, so the
//! first four bytes tell the type. Events are hints; the maps are the truth. The program counts an
//! event that a full ring buffer refuses (`EventsLost`), and the agent then reads the maps again.

use crate::maps::{
    BridgeNumber, Listener, ListenerKey, Querier, QuerierKey, Source, SourceKey, StreamKey,
};

/// Type of a record, its first field.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`ListenerEvent`].
    Listener = 1,
    /// [`SourceEvent`].
    Source = 2,
    /// [`FirstPacketEvent`].
    FirstPacket = 3,
    /// [`QueryEvent`].
    Query = 4,
    /// [`UnfinishedEvent`].
    Unfinished = 5,
}

/// Change of a listener or a source.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The entry is new, its filter mode or list changed, or it answered a Query. The events of a
    /// record's sources precede the event of its listener, whose generation tells which sources are
    /// current.
    Updated = 1,
    /// The entry was removed; the event carries its last value.
    Removed = 2,
}

/// Event of a listener: 72 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerEvent {
    /// [`Kind::Listener`].
    pub kind: u32,
    /// Number of a [`Change`].
    pub change: u32,
    /// Key of the listener.
    pub key: ListenerKey,
    /// Value of the listener after the change.
    pub value: Listener,
}

/// Event of a source in a listener's list: 64 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceEvent {
    /// [`Kind::Source`].
    pub kind: u32,
    /// Number of a [`Change`].
    pub change: u32,
    /// Key of the source.
    pub key: SourceKey,
    /// Value of the source after the change.
    pub value: Source,
}

/// The first packet of a flow and origin since [`crate::maps::Managed::watch_since_ns`]: 64 bytes,
/// align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstPacketEvent {
    /// [`Kind::FirstPacket`].
    pub kind: u32,
    /// Uplink that received the packet.
    pub ifindex: u32,
    /// Arrival of the packet.
    pub at_ns: u64,
    /// Key of the flow.
    pub key: StreamKey,
    /// Number of a [`crate::maps::Origin`].
    pub origin: u32,
    /// Padding, always zero.
    pub pad: u32,
}

/// Event of an MLD General Query: 56 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryEvent {
    /// [`Kind::Query`].
    pub kind: u32,
    /// Padding, always zero.
    pub pad: u32,
    /// Uplink and VLAN that received the Query.
    pub key: QuerierKey,
    /// Parameters of the Query.
    pub value: Querier,
}

/// Longest frame that [`UnfinishedEvent`] carries, bytes.
pub const UNFINISHED_FRAME_BYTES: usize = 4096;

/// A valid Report that exceeds the program's limits: 4,120 bytes, align 8. The agent applies the
/// Report by the same rules ([`crate::snoop`]).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UnfinishedEvent {
    /// [`Kind::Unfinished`].
    pub kind: u32,
    /// TAP that received the Report.
    pub ifindex: u32,
    /// Arrival of the Report.
    pub at_ns: u64,
    /// VLAN identifier in the skb metadata, 0 for none.
    pub vlan_metadata: u16,
    /// Bridge of the TAP.
    pub bridge: BridgeNumber,
    /// Used bytes of `frame`.
    pub length: u32,
    /// Frame from its Ethernet header on.
    pub frame: [u8; UNFINISHED_FRAME_BYTES],
}

const _: () = {
    assert!(size_of::<ListenerEvent>() == 72);
    assert!(size_of::<SourceEvent>() == 64);
    assert!(size_of::<FirstPacketEvent>() == 64);
    assert!(size_of::<QueryEvent>() == 56);
    assert!(size_of::<UnfinishedEvent>() == 24 + UNFINISHED_FRAME_BYTES);
};
