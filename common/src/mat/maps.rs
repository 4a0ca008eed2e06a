//! Keys and values of the BPF maps of a node, under `/sys/fs/bpf/migkick/`.
//!
//! | map | key | value |
//! |---|---|---|
//! | `NODE` | slot, 0 or 1 | [`Node`]; `NODE_SLOT` says which of the two is in use |
//! | `PEERS` | HoA of a peer | [`Peer`]: where packets to it go |
//! | `PEER_MOAS` | MoA of a peer | [`PeerMoa`]: whose packets come from there |
//! | `OWN_MOAS` | MoA of this node | [`OwnMoa`]: packets to it are for the HoA, as those to the active one |
//! | `HELD` | | ring buffer of [`Held`]: frames to peers that are not known yet |
//! | `MAT_COUNTERS` | [`super::counter::Counter`] | packets, per CPU |
//!
//! The rules are those of [`crate::maps`]: `#[repr(C)]` without implicit padding, addresses in
//! network order, other numbers in host order, times in `CLOCK_MONOTONIC` nanoseconds. Addresses in
//! values are words and MACs half words of memory ([`super::translate::words`]), because that is how
//! the programs copy them.
//!
//! A *difference* is what the one's complement sum over a packet gains when one address takes the
//! place of another ([`super::neutral::difference`]). It is 0 where the two are neutral.

use super::translate::{Mac, Words};

/// Version of all layouts in this module, part of the pin path.
pub const LAYOUT_VERSION: u32 = 2;
/// Slots of `NODE`.
pub const NODE_SLOTS: u32 = 2;
/// Longest frame that `HELD` takes, bytes.
pub const HELD_FRAME_BYTES: usize = 2048;

/// Value of `NODE`: 112 bytes, align 8. Written by the daemon only, and only to the slot that is
/// not in use, so that a program never sees half of a change.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Own HoA.
    pub hoa: Words,
    /// MoA that packets are sent from.
    pub moa: Words,
    /// Home prefix, the address bits beyond its length zero.
    pub home: Words,
    /// Ones for the bits of the home prefix.
    pub home_mask: Words,
    /// Link-local address of the multicast NIC; `::` if it has none.
    pub multicast_source: Words,
    /// When `moa` takes the place of `hoa`.
    pub difference: u32,
    /// When `hoa` takes the place of `moa`.
    pub difference_back: u32,
    /// Active NIC; 0 for none.
    pub ifindex: u32,
    /// NIC that MLD goes out by and multicast is taken from; 0 for none.
    pub multicast_ifindex: u32,
    /// `mat0`.
    pub mat0_ifindex: u32,
    /// Ethernet address of the multicast NIC.
    pub multicast_mac: Mac,
    /// Ethernet address of `mat0`.
    pub mat0_mac: Mac,
}

/// Value of `PEERS`: 72 bytes, align 8. Numbers and next hop are written by the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// MoA that packets go to.
    pub moa: Words,
    /// Packets that went there, or tried to.
    pub packets: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes: u64,
    /// When the last of them went.
    pub last_used_ns: u64,
    /// When `moa` takes the place of the HoA.
    pub difference: u32,
    /// NIC that `next_hop` is by, 0 for none.
    pub next_hop_ifindex: u32,
    /// Where packets to `moa` go first, as the routes say.
    pub next_hop: Words,
    /// When they are to be asked again.
    pub next_hop_until_ns: u64,
}

/// Routing table with the routes of the NIC with index 0; those of the others follow.
pub const FIRST_TABLE: u32 = 74_000;

/// How long a next hop is taken for granted, nanoseconds: a look-up for each packet would cost more
/// than its translation.
pub const NEXT_HOP_LIFETIME_NS: u64 = 100_000_000;

/// Value of `PEER_MOAS`: 32 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerMoa {
    /// HoA of the peer.
    pub hoa: Words,
    /// When a packet last came from there.
    pub last_used_ns: u64,
    /// When the HoA takes the place of the MoA.
    pub difference: u32,
    /// Always zero.
    pub pad: u32,
}

/// Value of `OWN_MOAS`: 4 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnMoa {
    /// When the HoA takes the place of the MoA.
    pub difference: u32,
}

/// Record of `HELD`: 2072 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// HoA that the frame is for.
    pub peer: Words,
    /// Bytes of the frame; 0 for one that was too long to be held and is lost.
    pub length: u32,
    /// Always zero.
    pub pad: u32,
    /// The frame, from the Ethernet header on. Its checksum may be unfinished.
    pub frame: [u8; HELD_FRAME_BYTES],
}

const _: () = {
    assert!(size_of::<Node>() == 112 && align_of::<Node>() == 8);
    assert!(size_of::<Peer>() == 72 && align_of::<Peer>() == 8);
    assert!(size_of::<PeerMoa>() == 32 && align_of::<PeerMoa>() == 8);
    assert!(size_of::<OwnMoa>() == 4);
    assert!(size_of::<Held>() == 24 + HELD_FRAME_BYTES && align_of::<Held>() == 8);
};

#[cfg(feature = "pod")]
#[allow(
    unsafe_code,
    reason = "aya's marker for types that may be copied to and from the kernel"
)]
mod pod {
    use super::*;

    macro_rules! pod {
        ($($type:ty),*) => {
            // SAFETY: `#[repr(C)]`, `Copy`, no padding (asserted above), every bit pattern valid.
            $(unsafe impl aya::Pod for $type {})*
        };
    }
    pod!(Node, Peer, PeerMoa, OwnMoa, Held);
}
