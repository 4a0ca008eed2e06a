//! Layouts of forwarding: what `uplink` does with packets for an address that its VM leaves or has
//! left, and `snoop` with those that an arrived VM still sends from it.
//!
//! Until the VM stands still an entry of `FORWARDS` makes `gate` keep copies of what enters the TAP
//! for the address: what the VM has not read when it stops is sent on by the agent, before `uplink`
//! sends on what comes later ([`Forward::unread_until_ns`]).
//!
//! | map | key | value | written by |
//! |---|---|---|---|
//! | `FORWARDS` | [`ForwardKey`] | [`Forward`] | agent; the counts by the kernel |
//! | `TRANSLATIONS` | [`TranslationKey`] | [`Translation`] | agent; the counts by the kernel |
//! | `FORWARDING` | 0 | number of entries of both | agent |

use super::Address;

/// Key of `FORWARDS`: 20 bytes, align 2.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ForwardKey {
    /// The address that was left.
    pub address: Address,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Always zero.
    pub pad: u16,
}

/// Value of `FORWARDS`: 88 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forward {
    /// Packets pass unchanged from this moment on; 0 while the VM still has the address.
    pub until_ns: u64,
    /// Until this moment packets pass to the TAP as long as the agent has not sent on what waits
    /// before them: while [`super::GateUsage::held`] of the TAP is not [`super::Gate::replayed`].
    pub unread_until_ns: u64,
    /// Packets forwarded.
    pub packets: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes: u64,
    /// Packets that could not be forwarded; `COUNTERS` has the reasons.
    pub dropped: u64,
    /// Where they go.
    pub destination: Address,
    /// What the other destination adds to a checksum, as `bpf_csum_diff` gives it; 0 where the two
    /// addresses have the same sum, so that checksums stay.
    pub difference: u32,
    /// The bridge whose ports packets come in by: one that the route sends to it goes back by its
    /// own port where nothing can be sent to a bridge, as at XDP.
    pub bridge: u32,
    /// The VM's TAP, by which `gate` keeps copies; 0 for none.
    pub ifindex: u32,
    /// Always zero.
    pub pad: u32,
    /// UUID of the domain that has left the address.
    pub domain_uuid: [u8; 16],
}

/// Key of `TRANSLATIONS`: 24 bytes, align 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TranslationKey {
    /// The address that the VM has left, and still sends from.
    pub address: Address,
    /// The TAP that its packets come in by.
    pub ifindex: u32,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Always zero.
    pub pad: u16,
}

/// Value of `TRANSLATIONS`: 72 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Translation {
    /// Packets pass unchanged from this moment on.
    pub until_ns: u64,
    /// Packets translated.
    pub packets: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes: u64,
    /// Packets that could not be sent; `COUNTERS` has the reasons.
    pub dropped: u64,
    /// What their source becomes.
    pub source: Address,
    /// As in [`Forward`].
    pub difference: u32,
    /// Always zero.
    pub pad: u32,
    /// UUID of the domain.
    pub domain_uuid: [u8; 16],
}

const _: () = {
    assert!(size_of::<TranslationKey>() == 24 && align_of::<TranslationKey>() == 4);
    assert!(size_of::<Translation>() == 72 && align_of::<Translation>() == 8);
    assert!(size_of::<ForwardKey>() == 20 && align_of::<ForwardKey>() == 2);
    assert!(size_of::<Forward>() == 88 && align_of::<Forward>() == 8);
};
