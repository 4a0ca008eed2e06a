//! Messages of MAT (draft-inayat-mat-00 §4.2, 4.3, in this project's encoding).
//!
//! A message is encoded as those of [`crate::signal`] are, and always travels sealed
//! ([`super::seal`]). The transaction is a random number that the answer repeats.
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

/// One address of a node, at which its peers can reach it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Moa {
    /// The address.
    #[n(0)]
    pub address: Address,
    /// 1 is where data goes; a higher number stands by.
    #[n(1)]
    pub priority: u8,
}

/// `UpdateRequest`: where a node is. An empty list says that it is nowhere.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct UpdateRequest {
    /// Grows with every change, over restarts of the node too.
    #[n(0)]
    pub sequence: u64,
    /// Time of the node, milliseconds since 1970.
    #[n(1)]
    pub time_ms: u64,
    /// How long it is to be known, seconds.
    #[n(2)]
    pub lifetime_s: u32,
    /// Its addresses, at most [`super::MAX_MOAS`].
    #[n(3)]
    pub moas: Vec<Moa>,
}

/// What a server made of an update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Outcome {
    /// It is stored, and survives a crash of the server.
    Accepted = 0,
    /// The server knows a sequence that is not older; the node goes on from there.
    OldSequence = 1,
    /// The time is too far from the server's; the node asks again with the server's time.
    WrongTime = 2,
    /// The addresses are too many, double or not unicast, not one of them has priority 1, or another
    /// node has one of them, or had it until a while ago.
    BadAddresses = 3,
    /// The server cannot store it now.
    Failed = 4,
}

impl Outcome {
    /// The outcome with that number.
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

/// `UpdateReply`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct UpdateReply {
    /// [`Outcome`] as a number.
    #[n(0)]
    pub outcome: u8,
    /// Sequence that the server has.
    #[n(1)]
    pub sequence: u64,
    /// Time of the server, milliseconds since 1970.
    #[n(2)]
    pub time_ms: u64,
    /// How long the mapping is kept, seconds; 0 unless accepted.
    #[n(3)]
    pub lifetime_s: u32,
}

/// `LookupRequest`: where is that node?
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct LookupRequest {
    /// HoA of the peer.
    #[n(0)]
    pub hoa: Address,
}

/// Where a node is.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Mapping {
    /// Sequence of the update.
    #[n(0)]
    pub sequence: u64,
    /// Its addresses.
    #[n(1)]
    pub moas: Vec<Moa>,
}

/// `LookupReply`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct LookupReply {
    /// HoA that was asked for.
    #[n(0)]
    pub hoa: Address,
    /// Where it is; null if no mapping lives.
    #[n(1)]
    pub mapping: Option<Mapping>,
    /// Key between the two nodes.
    #[n(2)]
    pub pair_key: ByteArray<KEY_BYTES>,
    /// How long this answer may be used, seconds, that of "no mapping" too.
    #[n(3)]
    pub lifetime_s: u32,
}

/// `Alert`: the sender's mapping is new to the receiver, or has changed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Alert {
    /// Sequence of the mapping that the IMS has.
    #[n(0)]
    pub sequence: u64,
}

/// `AlertAck`: the receiver sends to, and takes from, the addresses of that mapping.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AlertAck {
    /// Sequence of the mapping in use.
    #[n(0)]
    pub sequence: u64,
}

/// `Echo`: is the sender of the alert at this address? Its transaction is the challenge.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Echo {}

/// `EchoReply`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct EchoReply {}

messages! {
    /// What nodes and mapping servers say to each other.
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
