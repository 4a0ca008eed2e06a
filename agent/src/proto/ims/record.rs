//! The form in which a node is stored: CBOR with numbered fields, so fields may be appended.

use common::mat::message::Moa;
use common::signal::Address;
use minicbor::{Decode, Encode};

/// What is stored of a HoA.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Record {
    /// Of its key.
    #[n(0)]
    pub generation: u32,
    /// Of the last update.
    #[n(1)]
    pub sequence: u64,
    /// How long the mapping was to live when it came, seconds.
    #[n(2)]
    pub lifetime_s: u32,
    /// When it ends, milliseconds since 1970.
    #[n(3)]
    pub until_ms: u64,
    /// The mapping; empty for none.
    #[n(4)]
    pub moas: Vec<Moa>,
    /// Addresses in quarantine.
    #[n(5)]
    pub freed: Vec<FreedMoa>,
}

/// An address that the node no longer has, and nobody else may have yet.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct FreedMoa {
    /// The address.
    #[n(0)]
    pub address: Address,
    /// When it is free, milliseconds since 1970.
    #[n(1)]
    pub until_ms: u64,
}

/// Bytes in the store are no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("A record in the store is not understood; was it written by a newer version?")]
pub struct RecordError;

impl Record {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        // Writing to a `Vec` cannot fail, and none of these types has an error of its own to raise.
        minicbor::to_vec(self).unwrap_or_default()
    }

    /// From its bytes.
    ///
    /// # Errors
    ///
    /// [`RecordError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        minicbor::decode(bytes).map_err(|_| RecordError)
    }
}
