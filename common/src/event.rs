//! Records of the `EVENTS` ring buffer, kernel to agent.
//!
//! Every record starts with [`Kind`] as a `u32` in host order and has the size of its type, so a
//! reader knows the type from the first four bytes. Events are hints: the maps are the truth, and
//! a record that found the ring full is counted (`EventsLost`), upon which the agent reads the
//! maps again.

use crate::maps::{Listener, ListenerKey, Querier, QuerierKey, Source, SourceKey, StreamKey};

/// First field of every record.
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

/// What happened to a listener or a source.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is new, its filter mode or list changed, or it answered a Query. The events of a
    /// record's sources come before that of its listener, whose generation says which are current.
    Updated = 1,
    /// It left; the value is the last one it had.
    Removed = 2,
}

/// A listener was reported or left: 72 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerEvent {
    /// [`Kind::Listener`].
    pub kind: u32,
    /// [`Change`].
    pub change: u32,
    /// The listener.
    pub key: ListenerKey,
    /// Its state after the change.
    pub value: Listener,
}

/// A source was added to or removed from a listener's list: 64 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceEvent {
    /// [`Kind::Source`].
    pub kind: u32,
    /// [`Change`].
    pub change: u32,
    /// The source.
    pub key: SourceKey,
    /// Its state after the change.
    pub value: Source,
}

/// The first packet of a flow and origin since its address was watched: 64 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FirstPacketEvent {
    /// [`Kind::FirstPacket`].
    pub kind: u32,
    /// The uplink it came in by.
    pub ifindex: u32,
    /// When it came.
    pub at_ns: u64,
    /// The flow.
    pub key: StreamKey,
    /// [`crate::maps::Origin`].
    pub origin: u32,
    /// Always zero.
    pub pad: u32,
}

/// An MLD General Query came in: 56 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryEvent {
    /// [`Kind::Query`].
    pub kind: u32,
    /// Always zero.
    pub pad: u32,
    /// Where it came in.
    pub key: QuerierKey,
    /// What it said.
    pub value: Querier,
}

/// Longest frame that [`UnfinishedEvent`] carries, bytes.
pub const UNFINISHED_FRAME_BYTES: usize = 4096;

/// A valid Report that the program could not finish: 2,072 bytes, align 8. Userspace applies it
/// with the same rules ([`crate::snoop`]).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UnfinishedEvent {
    /// [`Kind::Unfinished`].
    pub kind: u32,
    /// The TAP it came in by.
    pub ifindex: u32,
    /// When it came.
    pub at_ns: u64,
    /// VLAN identifier taken from the frame's metadata, 0 for none.
    pub vlan_metadata: u16,
    /// Always zero.
    pub pad: u16,
    /// Bytes of `frame` that are used.
    pub length: u32,
    /// The frame from its Ethernet header on.
    pub frame: [u8; UNFINISHED_FRAME_BYTES],
}

const _: () = {
    assert!(size_of::<ListenerEvent>() == 72);
    assert!(size_of::<SourceEvent>() == 64);
    assert!(size_of::<FirstPacketEvent>() == 64);
    assert!(size_of::<QueryEvent>() == 56);
    assert!(size_of::<UnfinishedEvent>() == 24 + UNFINISHED_FRAME_BYTES);
};
