//! Layouts of the unicast relay: at the agent, where relayed datagrams become multicast again, and
//! at the relay, where multicast becomes datagrams.

use super::{Address, StreamKey, StreamUsage};

/// Which way a packet came.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// As multicast.
    Native = 1,
    /// From a relay.
    Relay = 2,
}

impl Origin {
    /// Decodes [`crate::event::FirstPacketEvent::origin`].
    pub fn from_u32(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::Native),
            2 => Some(Self::Relay),
            _ => None,
        }
    }

    /// The bit of [`super::Managed::origins`] that lets its packets pass.
    #[inline(always)]
    pub fn pass_bit(self) -> u8 {
        match self {
            Self::Native => Origins::PASS_NATIVE,
            Self::Relay => Origins::PASS_RELAY,
        }
    }
}

/// Which copies of an address's packets pass at the uplink ([`super::Managed::origins`]).
///
/// A change of origin goes through states in which fingerprints tell copies of one packet apart,
/// so that each packet passes once, whichever way is faster:
///
/// ```text
///          relay is asked for              native is silent
///  Native -------------------> Both ----------------------------> Relay
///    ^                          ^ |                                 | a native packet
///    |      paths' difference   | | native is stable                v
///    +---- NativeAfterRelay <---|-+                            RelayRecorded
///                               +--------- paths' difference -------+
/// ```
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Origins {
    /// Native packets pass; relayed ones are dropped.
    #[default]
    Native = Self::PASS_NATIVE,
    /// Relayed packets pass; native ones are dropped, and the first of them after
    /// [`super::Managed::watch_since_ns`] raises an event.
    Relay = Self::PASS_RELAY,
    /// As `Relay`, and fingerprints are kept.
    RelayRecorded = Self::PASS_RELAY | Self::FINGERPRINT,
    /// The first copy of each packet passes.
    Both = Self::PASS_NATIVE | Self::PASS_RELAY | Self::FINGERPRINT,
    /// Native packets pass unless a relayed copy has passed; relayed ones are dropped.
    NativeAfterRelay = Self::PASS_NATIVE | Self::FINGERPRINT,
}

impl Origins {
    /// Bit: native packets pass.
    pub const PASS_NATIVE: u8 = 1;
    /// Bit: relayed packets pass.
    pub const PASS_RELAY: u8 = 2;
    /// Bit: fingerprints are kept, and a second copy is dropped.
    pub const FINGERPRINT: u8 = 4;

    /// Decodes [`super::Managed::origins`].
    pub fn from_u8(byte: u8) -> Option<Self> {
        [
            Self::Native,
            Self::Relay,
            Self::RelayRecorded,
            Self::Both,
            Self::NativeAfterRelay,
        ]
        .into_iter()
        .find(|origins| *origins as u8 == byte)
    }

    /// Whether relayed packets pass.
    pub fn passes_relay(self) -> bool {
        self as u8 & Self::PASS_RELAY != 0
    }
}

/// Key of `RELAY_FLOWS`: 20 bytes, align 2. What the datagrams of one relayed flow look like.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelayFlowKey {
    /// The relay, their source address.
    pub relay_address: Address,
    /// Their UDP source port, host order.
    pub relay_port: u16,
    /// Their UDP destination port, host order.
    pub agent_port: u16,
}

/// Value of `RELAY_FLOWS`: 120 bytes, align 8. What they become, and how many came: here, because one
/// look-up more would cost each packet as much as its rewrite.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayFlowEntry {
    /// Written by the agent only.
    pub flow: RelayFlow,
    /// What came by it. Written by the kernel.
    pub usage: StreamUsage,
}

/// What the datagrams of one relayed flow become: 72 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayFlow {
    /// Transaction of the session with the relay.
    pub session: u64,
    /// The flow that is restored; its VLAN is 0.
    pub stream: StreamKey,
    /// Destination address of the datagrams: this host.
    pub agent_address: Address,
    /// What the rewrite of both addresses adds to a checksum, as `bpf_csum_diff` gives it.
    pub address_difference: u32,
    /// Always zero.
    pub pad: u32,
}

/// Key of `RELAYS`: 32 bytes, align 1. A relay and the address of this host that it sends to; the
/// value is the number of flows between the two, a `u32`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelayKey {
    /// The relay.
    pub relay_address: Address,
    /// This host.
    pub agent_address: Address,
}

/// Value of `RELAY_STREAMS`, key [`StreamKey`]: 8 bytes, align 4. A flow that the relay serves.
/// Written by the relay only.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayStream {
    /// Its number, the first part of a [`SubscriberKey`].
    pub flow: u32,
    /// Subscribers have the indices 0 to this, exclusive.
    pub subscribers: u32,
}

/// Most subscribers of one flow.
pub const MAX_SUBSCRIBERS: u32 = 1024;

/// Key of `RELAY_SUBSCRIBERS` and `RELAY_USAGE`: 8 bytes, align 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubscriberKey {
    /// [`RelayStream::flow`].
    pub flow: u32,
    /// Index among the flow's subscribers.
    pub index: u32,
}

/// Value of `RELAY_SUBSCRIBERS`: 48 bytes, align 8. Where a copy of each packet goes. Written by
/// the relay only.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subscriber {
    /// Nothing is sent from this moment on; 0 for an index that is not in use.
    pub lease_end_ns: u64,
    /// Source address of the copies.
    pub relay_address: Address,
    /// Destination address of the copies.
    pub agent_address: Address,
    /// UDP source port of the copies, host order.
    pub relay_port: u16,
    /// UDP destination port of the copies, host order.
    pub agent_port: u16,
    /// What the rewrite of both addresses adds to a checksum, as `bpf_csum_diff` gives it.
    pub address_difference: u32,
}

/// Value of `RELAY_USAGE`: 24 bytes, align 8. Written by the kernel only, and by the relay when an
/// index is given to another subscriber.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SubscriberUsage {
    /// Copies sent.
    pub packets: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes: u64,
    /// Copies not sent: no route, no neighbour, packet too large for the path.
    pub dropped: u64,
}

/// Value of `FINGERPRINTS`, whose key is the fingerprint (`u64`): 16 bytes, align 8. How often a
/// packet of this content came each way, and how often it passed; see [`crate::relay::count_copy`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copies {
    /// When the last copy came; an old entry counts as none.
    pub last_ns: u64,
    /// The three counts in one word, which CPUs change in one step.
    pub counts: CopyCounts,
}

/// Part of [`Copies`]: 8 bytes, align 2. The counts wrap, and are compared as serial numbers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyCounts {
    /// Native copies.
    pub native: u16,
    /// Relayed copies.
    pub relayed: u16,
    /// Copies that passed.
    pub passed: u16,
    /// Always zero.
    pub pad: u16,
}

const _: () = {
    assert!(size_of::<RelayFlowKey>() == 20 && align_of::<RelayFlowKey>() == 2);
    assert!(size_of::<RelayFlow>() == 72 && align_of::<RelayFlow>() == 8);
    assert!(size_of::<RelayFlowEntry>() == 120 && align_of::<RelayFlowEntry>() == 8);
    assert!(size_of::<RelayKey>() == 32 && align_of::<RelayKey>() == 1);
    assert!(size_of::<CopyCounts>() == 8 && align_of::<CopyCounts>() == 2);
    assert!(size_of::<RelayStream>() == 8 && align_of::<RelayStream>() == 4);
    assert!(size_of::<SubscriberKey>() == 8 && align_of::<SubscriberKey>() == 4);
    assert!(size_of::<Subscriber>() == 48 && align_of::<Subscriber>() == 8);
    assert!(size_of::<SubscriberUsage>() == 24 && align_of::<SubscriberUsage>() == 8);
    assert!(size_of::<Copies>() == 16 && align_of::<Copies>() == 8);
};
