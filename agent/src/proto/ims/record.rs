//! Stored form of a node: CBOR with numbered fields, so new fields may be appended.

use common::mat::message::Moa;
use common::signal::Address;
use minicbor::{Decode, Encode};

/// Version of a HoA's state: generation first, then sequence. Every writer of a store raises the
/// version, so the greater one is the newer state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Generation of the node's key.
    pub generation: u32,
    /// Sequence of the last update in this generation.
    pub sequence: u64,
}

/// Stored state of a HoA.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Record {
    /// Generation of the node's key.
    #[n(0)]
    pub generation: u32,
    /// Sequence of the last update.
    #[n(1)]
    pub sequence: u64,
    /// Lifetime of the mapping at its registration, seconds.
    #[n(2)]
    pub lifetime_s: u32,
    /// End of the mapping, milliseconds since 1970.
    #[n(3)]
    pub until_ms: u64,
    /// MoAs of the mapping; empty for none.
    #[n(4)]
    pub moas: Vec<Moa>,
    /// Addresses in quarantine.
    #[n(5)]
    pub freed: Vec<FreedMoa>,
}

/// An address in quarantine: the node no longer has the address, and no other node may register it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct FreedMoa {
    /// Former MoA of the node.
    #[n(0)]
    pub address: Address,
    /// End of the quarantine, milliseconds since 1970.
    #[n(1)]
    pub until_ms: u64,
}

/// Error of stored bytes that are not a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("A record in the store is not understood; was it written by a newer version?")]
pub struct RecordError;

impl Record {
    /// Returns the version of the state.
    pub fn version(&self) -> Version {
        Version {
            generation: self.generation,
            sequence: self.sequence,
        }
    }

    /// Encodes the record as CBOR.
    pub fn encode(&self) -> Vec<u8> {
        // Writing to a `Vec` cannot fail, and none of these types raises an error of its own.
        minicbor::to_vec(self).unwrap_or_default()
    }

    /// Decodes a record from CBOR.
    ///
    /// # Errors
    ///
    /// [`RecordError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        minicbor::decode(bytes).map_err(|_| RecordError)
    }
}
