//! Layouts of forwarding and translation. `uplink` and `snoop` forward packets for an address that
//! a VM leaves or has left. `snoop` translates packets that an arrived VM still sends from such an
//! address.
//!
//! Until the VM stops, an entry of `FORWARDS` makes `gate` copy the frames for the address that
//! enter the TAP. The agent forwards the frames that the VM has not read; only then does `uplink`
//! forward later packets ([`Forward::unread_until_ns`]).
//!
//! | map | key | value | written by |
//! |---|---|---|---|
//! | `FORWARDS` | [`ForwardKey`] | [`Forward`] | agent; kernel the counters |
//! | `TRANSLATIONS` | [`TranslationKey`] | [`Translation`] | agent; kernel the counters |
//! | `FORWARDING` | 0 | number of entries of both | agent |

use super::{Address, BridgeNumber};

/// Key of `FORWARDS`: 20 bytes, align 2.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForwardKey {
    /// Address that the VM has left, network order.
    pub address: Address,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Bridge whose programs forward the packets: that of the address's link.
    pub bridge: BridgeNumber,
}

/// Value of `FORWARDS`: 88 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forward {
    /// End of forwarding: packets pass unchanged from this time on. 0 while the VM still has the
    /// address.
    pub until_ns: u64,
    /// Until this time packets pass to the TAP while the agent still has to forward the frames
    /// before them: while [`super::GateUsage::held`] of the TAP differs from
    /// [`super::Gate::replayed`].
    pub unread_until_ns: u64,
    /// Packets forwarded.
    pub packets: u64,
    /// Bytes of these packets, from the Ethernet header on.
    pub bytes: u64,
    /// Packets that could not be forwarded; `COUNTERS` has the reasons.
    pub dropped: u64,
    /// New destination of the packets, network order.
    pub destination: Address,
    /// Difference that the new destination adds to a checksum, as `bpf_csum_diff` returns it; 0
    /// when both addresses have the same sum and checksums stay.
    pub difference: u32,
    /// Bridge of the ingress port. XDP cannot redirect to a bridge, so a packet that the route
    /// sends to this bridge leaves by its ingress port.
    pub bridge: u32,
    /// TAP of the VM, where `gate` copies frames; 0 for none.
    pub ifindex: u32,
    /// Padding, always zero.
    pub pad: u32,
    /// UUID of the domain that has left the address, 16 bytes.
    pub domain_uuid: [u8; 16],
}

/// Key of `TRANSLATIONS`: 24 bytes, align 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TranslationKey {
    /// Address that the VM has left and still sends from, network order.
    pub address: Address,
    /// TAP of the VM.
    pub ifindex: u32,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Bridge of the TAP.
    pub bridge: BridgeNumber,
}

/// Value of `TRANSLATIONS`: 72 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Translation {
    /// End of translation: packets pass unchanged from this time on.
    pub until_ns: u64,
    /// Packets translated.
    pub packets: u64,
    /// Bytes of these packets, from the Ethernet header on.
    pub bytes: u64,
    /// Packets that could not be sent; `COUNTERS` has the reasons.
    pub dropped: u64,
    /// New source of the packets, network order.
    pub source: Address,
    /// Difference as in [`Forward::difference`].
    pub difference: u32,
    /// Padding, always zero.
    pub pad: u32,
    /// UUID of the domain that sends, 16 bytes.
    pub domain_uuid: [u8; 16],
}

const _: () = {
    assert!(size_of::<TranslationKey>() == 24 && align_of::<TranslationKey>() == 4);
    assert!(size_of::<Translation>() == 72 && align_of::<Translation>() == 8);
    assert!(size_of::<ForwardKey>() == 20 && align_of::<ForwardKey>() == 2);
    assert!(size_of::<Forward>() == 88 && align_of::<Forward>() == 8);
};
