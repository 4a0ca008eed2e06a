//! Body of `HandoverCut`: which packets the VM had received at the source when it stopped.

use alloc::vec::Vec;

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};

use super::bounded::{bytes, list};
use super::{Address, MAX_CUT_FLOWS, MAX_FINGERPRINT_BYTES, MAX_NICS, Mac};
use crate::maps::{NO_BRIDGE, StreamKey};

/// `HandoverCut`: the VM has stopped at the source; lists the packets that it received there.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct HandoverCut {
    /// Send time, nanoseconds of the source's clock, as in [`super::MigrationProgress`].
    #[n(0)]
    pub clock_ns: u64,
    /// One entry per NIC whose reception the source recorded.
    #[cbor(n(1), decode_with = "list::<_, _, MAX_NICS>")]
    pub nics: Vec<NicCut>,
}

/// Received packets of one NIC.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct NicCut {
    /// MAC of the guest's NIC.
    #[n(0)]
    pub mac: Mac,
    /// How the source determined the received packets.
    #[n(1)]
    pub basis: CutBasis,
    /// One entry per flow.
    #[cbor(n(2), decode_with = "list::<_, _, MAX_CUT_FLOWS>")]
    pub flows: Vec<FlowCut>,
    /// Frames lost to a full queue of the source's TAP since the start of the recording.
    #[n(3)]
    pub tap_full: Option<u64>,
}

/// How the source determines the received packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum CutBasis {
    /// By the number of frames that the hypervisor read from the TAP.
    #[n(1)]
    Count,
    /// As `Count`, but the TAP overflowed: the VM may have received slightly more.
    #[n(2)]
    Overflow,
    /// By the time of the stop: the VM may have received slightly more or less.
    #[n(3)]
    Time,
}

/// Received packets of one flow.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct FlowCut {
    /// VLAN identifier, 0 for untagged.
    #[n(0)]
    pub vlan: u16,
    /// Multicast address of the flow, network order.
    #[n(1)]
    pub multicast_address: Address,
    /// Source address of the flow, network order.
    #[n(2)]
    pub source: Address,
    /// UDP source port, 0 without UDP.
    #[n(3)]
    pub source_port: u16,
    /// UDP destination port, 0 without UDP.
    #[n(4)]
    pub destination_port: u16,
    /// Packets received since the start of the recording.
    #[n(5)]
    pub delivered: u64,
    /// Arrival of the last packet, nanoseconds of the source's clock.
    #[n(6)]
    pub last_ns: u64,
    /// [`crate::handover::fingerprint`]s of the last packets, oldest first; 8 bytes each,
    /// little-endian.
    #[cbor(n(7), decode_with = "bytes::<_, MAX_FINGERPRINT_BYTES>")]
    pub fingerprints: ByteVec,
}

impl FlowCut {
    /// Key of the flow, without a bridge: the other host has other numbers.
    pub fn stream(&self) -> StreamKey {
        StreamKey {
            multicast_address: *self.multicast_address,
            source: *self.source,
            source_port: self.source_port,
            destination_port: self.destination_port,
            vlan: self.vlan,
            bridge: NO_BRIDGE,
        }
    }
}
