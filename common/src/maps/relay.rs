//! Layouts of the unicast relay. The agent turns relayed datagrams into multicast packets; the
//! relay turns multicast packets into datagrams.

use super::{Address, StreamKey, StreamUsage};

/// The path that a packet took.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// Native multicast.
    Native = 1,
    /// Unicast from a relay.
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

    /// Bit of [`super::Managed::origins`] that lets packets of this origin pass.
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
/// A change of origin passes through states in which fingerprints identify copies of one packet, so
/// that each packet passes once, on whichever path it arrives first:
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
    /// As `Relay`; the uplink also records fingerprints.
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
    /// Bit: the uplink records fingerprints and drops second copies.
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

/// Key of `RELAY_FLOWS`: 20 bytes, align 2. Identifies the datagrams of one relayed flow. The key
/// names no bridge: datagrams go to an address of the host, and [`RelayFlow::stream`] names the
/// bridge of the restored packets.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelayFlowKey {
    /// Source address of the datagrams: the relay, network order.
    pub relay_address: Address,
    /// UDP source port of the datagrams, host order.
    pub relay_port: u16,
    /// UDP destination port of the datagrams, host order.
    pub agent_port: u16,
}

/// Value of `RELAY_FLOWS`: 120 bytes, align 8. Flow and usage share one value, because a second
/// look-up would cost each packet as much as its rewrite.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayFlowEntry {
    /// Rewrite of the datagrams. Only the agent writes it.
    pub flow: RelayFlow,
    /// Usage of the flow. Only the kernel writes it.
    pub usage: StreamUsage,
}

/// Rewrite of the datagrams of one relayed flow to multicast: 72 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayFlow {
    /// Transaction of the session with the relay.
    pub session: u64,
    /// Flow of the restored packets, with their bridge; the VLAN is 0.
    pub stream: StreamKey,
    /// Destination address of the datagrams: an address of this host.
    pub agent_address: Address,
    /// Difference that the rewrite of both addresses adds to a checksum, as `bpf_csum_diff` returns
    /// it.
    pub address_difference: u32,
    /// Padding, always zero.
    pub pad: u32,
}

/// Key of `RELAYS`: 32 bytes, align 1. A relay, and the address of this host that the relay sends
/// to; both belong to no bridge. The value is the number of flows between both, a `u32`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelayKey {
    /// Address of the relay, network order.
    pub relay_address: Address,
    /// Address of this host, network order.
    pub agent_address: Address,
}

/// Value of `RELAY_STREAMS` with key [`StreamKey`]: 8 bytes, align 4. A flow that the relay serves.
/// Only the relay writes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayStream {
    /// Number of the flow, the first part of a [`SubscriberKey`].
    pub flow: u32,
    /// Number of subscriber indices: 0 to `subscribers` - 1.
    pub subscribers: u32,
}

/// Limit of subscribers of one flow.
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

/// Value of `RELAY_SUBSCRIBERS`: 48 bytes, align 8. Destination of one copy of each packet. Only
/// the relay writes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subscriber {
    /// End of the lease: no copies from this time on. 0 for an unused index.
    pub lease_end_ns: u64,
    /// Source address of the copies.
    pub relay_address: Address,
    /// Destination address of the copies.
    pub agent_address: Address,
    /// UDP source port of the copies, host order.
    pub relay_port: u16,
    /// UDP destination port of the copies, host order.
    pub agent_port: u16,
    /// Difference that the rewrite of both addresses adds to a checksum, as `bpf_csum_diff` returns
    /// it.
    pub address_difference: u32,
}

/// Value of `RELAY_USAGE`: 24 bytes, align 8. The kernel writes the value; the relay resets it when
/// another subscriber takes the index.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SubscriberUsage {
    /// Copies sent.
    pub packets: u64,
    /// Bytes of these copies, from the Ethernet header on.
    pub bytes: u64,
    /// Copies that could not be sent: no route, no neighbour, or larger than the path MTU.
    pub dropped: u64,
}

/// Value of `FINGERPRINTS`: 16 bytes, align 8. The key is the fingerprint, a `u64`. Counts the
/// copies of one packet by path, and the copies that passed; see [`crate::relay::count_copy`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copies {
    /// Arrival of the last copy. An old entry counts as none.
    pub last_ns: u64,
    /// The counts in one word, which CPUs update atomically.
    pub counts: CopyCounts,
}

/// Part of [`Copies`]: 8 bytes, align 2. The counts wrap and compare as serial numbers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyCounts {
    /// Copies that arrived natively.
    pub native: u16,
    /// Copies that arrived from a relay.
    pub relayed: u16,
    /// Copies that passed.
    pub passed: u16,
    /// Padding, always zero.
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
