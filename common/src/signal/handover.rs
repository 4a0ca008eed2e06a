//! `HandoverCut`: how far the VM has received at the source.

use alloc::vec::Vec;

use minicbor::bytes::ByteVec;
use minicbor::{Decode, Encode};

use super::bounded::{bytes, list};
use super::{Address, MAX_CUT_FLOWS, MAX_FINGERPRINT_BYTES, MAX_NICS, Mac};
use crate::maps::StreamKey;

/// `HandoverCut`: the VM has stopped at the source; what it has had by then.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct HandoverCut {
    /// When this was sent, nanoseconds of the source's clock ([`super::MigrationProgress`] has the
    /// same).
    #[n(0)]
    pub clock_ns: u64,
    /// One for each of its NICs whose reception was recorded.
    #[cbor(n(1), decode_with = "list::<_, _, MAX_NICS>")]
    pub nics: Vec<NicCut>,
}

/// What one NIC has had.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct NicCut {
    /// The guest's MAC.
    #[n(0)]
    pub mac: Mac,
    /// How the source knows.
    #[n(1)]
    pub basis: CutBasis,
    /// One for each flow.
    #[cbor(n(2), decode_with = "list::<_, _, MAX_CUT_FLOWS>")]
    pub flows: Vec<FlowCut>,
    /// Frames that found the queue of the source's TAP full since the recording began.
    #[n(3)]
    pub tap_full: Option<u64>,
}

/// How the source knows what the VM has had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum CutBasis {
    /// By the number of frames that were taken from the TAP.
    #[n(1)]
    Count,
    /// The same, but the TAP has overflowed: the VM may have had somewhat more.
    #[n(2)]
    Overflow,
    /// By the moment of the stop: the VM may have had somewhat more or less.
    #[n(3)]
    Time,
}

/// What the VM has had of one flow.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct FlowCut {
    /// VLAN identifier, 0 for untagged.
    #[n(0)]
    pub vlan: u16,
    /// Multicast address.
    #[n(1)]
    pub multicast_address: Address,
    /// Source address.
    #[n(2)]
    pub source: Address,
    /// UDP source port, 0 where there is none.
    #[n(3)]
    pub source_port: u16,
    /// UDP destination port, 0 where there is none.
    #[n(4)]
    pub destination_port: u16,
    /// Packets that it had since the recording began.
    #[n(5)]
    pub delivered: u64,
    /// When the last of them came, nanoseconds of the source's clock.
    #[n(6)]
    pub last_ns: u64,
    /// [`crate::handover::fingerprint`]s of the last of them, oldest first, 8 bytes each,
    /// little-endian.
    #[cbor(n(7), decode_with = "bytes::<_, MAX_FINGERPRINT_BYTES>")]
    pub fingerprints: ByteVec,
}

impl FlowCut {
    /// The flow.
    pub fn stream(&self) -> StreamKey {
        StreamKey {
            multicast_address: *self.multicast_address,
            source: *self.source,
            source_port: self.source_port,
            destination_port: self.destination_port,
            vlan: self.vlan,
            pad: 0,
        }
    }
}
