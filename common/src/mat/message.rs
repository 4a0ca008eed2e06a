//! Messages of MAT (draft-inayat-mat-00 §4.2, 4.3, in this project's encoding).
//!
//! The encoding is that of [`crate::signal`]. Messages always travel encrypted ([`super::seal`]).
//! The transaction is a random number that the answer repeats.
//!
//! | kind | message | from, to | fields (number: name, unit) |
//! |---|---|---|---|
//! | 20 | `UpdateRequest` | node, IMS | 0: sequence, 1: time (ms), 2: lifetime (s), 3: MoAs |
//! | 21 | `UpdateReply` | IMS, node | 0: outcome, 1: sequence, 2: time (ms), 3: lifetime (s) |
//! | 22 | `LookupRequest` | node, IMS | 0: HoA |
//! | 23 | `LookupReply` | IMS, node | 0: HoA, 1: mapping or null, 2: key of the pair, 3: lifetime (s) |
//! | 24 | `Alert` | node, node | 0: sequence |
//! | 25 | `AlertAck` | node, node | 0: sequence |
//! | 26 | `Echo` | node, node | none |
//! | 27 | `EchoReply` | node, node | none |

use alloc::vec::Vec;

use minicbor::bytes::ByteArray;
use minicbor::{Decode, Encode};

use super::key::KEY_BYTES;
use crate::signal::{Address, MAX_DATAGRAM_BYTES, messages};

/// One address of a node for its peers.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Moa {
    /// MoA of the node, network order.
    #[n(0)]
    pub address: Address,
    /// Priority: 1 for the address that receives data; larger numbers for standby addresses.
    #[n(1)]
    pub priority: u8,
}

/// `UpdateRequest`: a node registers its mapping. An empty list withdraws the mapping.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct UpdateRequest {
    /// Sequence number of the mapping, which grows with every change, also across restarts of the
    /// node.
    #[n(0)]
    pub sequence: u64,
    /// Clock of the node, milliseconds since 1970.
    #[n(1)]
    pub time_ms: u64,
    /// Lifetime of the mapping, seconds.
    #[n(2)]
    pub lifetime_s: u32,
    /// MoAs of the node, at most [`super::MAX_MOAS`].
    #[n(3)]
    pub moas: Vec<Moa>,
}

/// Result of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// The server has stored the mapping durably.
    Accepted = 0,
    /// The server has the same or a later sequence number; the node continues from that number.
    OldSequence = 1,
    /// The node's clock is too far from the server's; the node repeats the request with the
    /// server's time.
    WrongTime = 2,
    /// The addresses are too many, not unicast or repeated; or none has priority 1; or another node
    /// has one of the addresses, or had it recently.
    BadAddresses = 3,
    /// The server cannot store the mapping at the moment.
    Failed = 4,
}

impl Outcome {
    /// Decodes [`UpdateReply::outcome`]; `None` for unknown numbers.
    pub fn from_number(number: u8) -> Option<Self> {
        [
            Self::Accepted,
            Self::OldSequence,
            Self::WrongTime,
            Self::BadAddresses,
            Self::Failed,
        ]
        .into_iter()
        .find(|it| *it as u8 == number)
    }
}

/// `UpdateReply`: answers `UpdateRequest`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct UpdateReply {
    /// Number of an [`Outcome`].
    #[n(0)]
    pub outcome: u8,
    /// Sequence number of the stored mapping.
    #[n(1)]
    pub sequence: u64,
    /// Clock of the server, milliseconds since 1970.
    #[n(2)]
    pub time_ms: u64,
    /// Lifetime of the stored mapping, seconds; 0 unless accepted.
    #[n(3)]
    pub lifetime_s: u32,
}

/// `LookupRequest`: a node requests the mapping of a peer.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct LookupRequest {
    /// HoA of the peer.
    #[n(0)]
    pub hoa: Address,
}

/// Addresses of a node.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Mapping {
    /// Sequence number of the update.
    #[n(0)]
    pub sequence: u64,
    /// MoAs of the node.
    #[n(1)]
    pub moas: Vec<Moa>,
}

/// `LookupReply`: answers `LookupRequest`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct LookupReply {
    /// HoA from the request.
    #[n(0)]
    pub hoa: Address,
    /// Mapping of the peer; null for none.
    #[n(1)]
    pub mapping: Option<Mapping>,
    /// Key between the two nodes.
    #[n(2)]
    pub pair_key: ByteArray<KEY_BYTES>,
    /// Lifetime of this answer, seconds; also of the answer "no mapping".
    #[n(3)]
    pub lifetime_s: u32,
}

/// `Alert`: the sender has a mapping that the receiver does not know or that has changed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Alert {
    /// Sequence number of the mapping at the IMS.
    #[n(0)]
    pub sequence: u64,
}

/// `AlertAck`: the receiver of the alert uses the addresses of the mapping.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AlertAck {
    /// Sequence of the mapping in use.
    #[n(0)]
    pub sequence: u64,
}

/// `Echo`: checks that the sender of an alert receives at a MoA. The transaction is the challenge.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Echo {}

/// `EchoReply`: answers `Echo`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct EchoReply {}

messages! {
    /// Messages between nodes, and between nodes and mapping servers.
    MatMessage, MAX_DATAGRAM_BYTES, {
        20 => UpdateRequest(UpdateRequest),
        21 => UpdateReply(UpdateReply),
        22 => LookupRequest(LookupRequest),
        23 => LookupReply(LookupReply),
        24 => Alert(Alert),
        25 => AlertAck(AlertAck),
        26 => Echo(Echo),
        27 => EchoReply(EchoReply),
    }
}
