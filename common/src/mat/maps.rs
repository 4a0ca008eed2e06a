//! Keys and values of a node's BPF maps, under `/sys/fs/bpf/migkick/`.
//!
//! | map | key | value |
//! |---|---|---|
//! | `NODE` | slot, 0 or 1 | [`Node`]; `NODE_SLOT` holds the slot in use |
//! | `PEERS` | HoA of a peer | [`Peer`]: where to send packets |
//! | `PEER_MOAS` | MoA of a peer | [`PeerMoa`]: the HoA of the sender |
//! | `OWN_MOAS` | MoA of this node | [`OwnMoa`]: a MoA besides the active one, whose packets are for the HoA |
//! | `HELD` | | ring buffer of [`Held`]: frames to peers without an entry |
//! | `MAT_COUNTERS` | [`super::counter::Counter`] | packets, per CPU |
//!
//! The rules of [`crate::maps`] apply: `#[repr(C)]` without implicit padding, addresses in network
//! order, other numbers in host order, times in `CLOCK_MONOTONIC` nanoseconds. Values hold
//! addresses as words and MACs as half words of memory ([`super::translate::words`]), because the
//! programs copy words.
//!
//! A *difference* is the change of the one's complement sum of a packet when one address replaces
//! another ([`super::neutral::difference`]); 0 for neutral addresses.

use super::translate::{Mac, Words};

/// Version of all layouts in this module, part of the pin path.
pub const LAYOUT_VERSION: u32 = 2;
/// Slots of `NODE`: one in use, one to write.
pub const NODE_SLOTS: u32 = 2;
/// Longest frame that `HELD` takes, bytes.
pub const HELD_FRAME_BYTES: usize = 2048;

/// Value of `NODE`: 112 bytes, align 8. Only the daemon writes the value, and only to the slot not
/// in use, so no program reads half of a change.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// HoA of this node.
    pub hoa: Words,
    /// Active MoA, the source of sent packets.
    pub moa: Words,
    /// Home prefix; the bits beyond its length are zero.
    pub home: Words,
    /// Mask of the home prefix.
    pub home_mask: Words,
    /// Link-local address of the multicast NIC; `::` for none.
    pub multicast_source: Words,
    /// Difference when `moa` replaces `hoa`.
    pub difference: u32,
    /// Difference when `hoa` replaces `moa`.
    pub difference_back: u32,
    /// Active NIC; 0 for none.
    pub ifindex: u32,
    /// NIC that sends MLD and receives multicast; 0 for none.
    pub multicast_ifindex: u32,
    /// Interface index of `mat0`.
    pub mat0_ifindex: u32,
    /// Ethernet address of the multicast NIC.
    pub multicast_mac: Mac,
    /// Ethernet address of `mat0`.
    pub mat0_mac: Mac,
}

/// Value of `PEERS`: 72 bytes, align 8. The programs write counters, time of use and next hop; the
/// daemon writes the rest.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// MoA that packets are sent to.
    pub moa: Words,
    /// Packets to the peer, including those that could not be sent.
    pub packets: u64,
    /// Bytes of these packets, from the Ethernet header on.
    pub bytes: u64,
    /// Time of the last packet.
    pub last_used_ns: u64,
    /// Difference when `moa` replaces the HoA.
    pub difference: u32,
    /// NIC of `next_hop`, 0 for none.
    pub next_hop_ifindex: u32,
    /// Cached next hop on the route to `moa`.
    pub next_hop: Words,
    /// Expiry of the cached next hop.
    pub next_hop_until_ns: u64,
}

/// First routing table of the NICs: NIC `ifindex` has table `FIRST_TABLE + ifindex`.
pub const FIRST_TABLE: u32 = 74_000;

/// Lifetime of a cached next hop, nanoseconds: a look-up per packet would cost more than the
/// translation.
pub const NEXT_HOP_LIFETIME_NS: u64 = 100_000_000;

/// Value of `PEER_MOAS`: 32 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerMoa {
    /// HoA of the peer.
    pub hoa: Words,
    /// Time of the last packet from the MoA.
    pub last_used_ns: u64,
    /// Difference when the HoA replaces the MoA.
    pub difference: u32,
    /// Padding, always zero.
    pub pad: u32,
}

/// Value of `OWN_MOAS`: 4 bytes, align 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OwnMoa {
    /// Difference when the HoA replaces the MoA.
    pub difference: u32,
}

/// Record of `HELD`: 2072 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Held {
    /// HoA of the frame's destination.
    pub peer: Words,
    /// Length of the frame, bytes; 0 for a lost frame that was too long.
    pub length: u32,
    /// Padding, always zero.
    pub pad: u32,
    /// Frame from its Ethernet header on. Its checksum may be partial.
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
