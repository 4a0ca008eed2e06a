//! Signalling messages and their encoding.
//!
//! VM and agent exchange datagrams ([`VmMessage`], UDP port [`PORT`], IPv6 link-local); two agents
//! exchange frames ([`PeerMessage`], TCP port [`PORT`], TLS 1.3, each frame behind its length as a
//! big-endian `u32`). The names are those of the paper's Table 1.
//!
//! ```text
//!      VM                      SrcAgent                     DstAgent
//!       | AgentSearch (ff02::1)    |                            |
//!       |------------------------->|                            |
//!       |<------- AgentSearchReply |                            |
//!       | MigrationRequest         |                            |
//!       |------------------------->| AgentRequest               |
//!       |                          |--------------------------->| join by proxy, probe
//!       |                          |<------------- AgentResponse|
//!       |<------ MigrationResponse |                            |
//!       | (prepares its idle NIC)  |                            |
//!       | MigrationReady           |                            |
//!       |------------------------->| AddressClaim               |
//!       |                          |--------------------------->| duplicate address detection
//!       |                          | START MIGRATION (libvirt)  |
//!       |<------ MigrationProgress | MigrationProgress          |
//!       |                          |--------------------------->|
//!       |                          | HandoverCut                |
//!       |                          |--------------------------->| replay
//!       |============ the VM runs at the destination ==========>|
//!       | MigrationReady (again)                                |
//!       |------------------------------------------------------>|
//!       |<---------------------- MigrationProgress (Completed)  |
//! ```
//!
//! Either side ends a migration with `MigrationAbort`: a code for programs and a sentence for people.
//! While DstAgent has no capacity for another domain, it answers `AgentRequest` with `MigrationProgress`
//! (Preparing); SrcAgent repeats the request every two seconds.
//!
//! A migration that somebody starts in libvirt begins at the destination, whose libvirt notifies
//! DstAgent:
//!
//! ```text
//!   libvirt                    DstAgent                     SrcAgent
//!       | `roamcast hook`          | ArrivalNotice              |
//!       |------------------------->|--------------------------->|
//!       |                          |<--------------AgentRequest |
//!       |        (goes on) <-------| AgentResponse              |
//!       |                          |--------------------------->| follows libvirt's migration
//! ```
//!
//! # Wire format
//!
//! A message is the CBOR array `[version, transaction, kind, body]`: the protocol [`VERSION`], a
//! 64-bit number that the answer repeats, the number of the message, and an array of numbered
//! fields. Receivers ignore unknown fields, so a version may append fields. A list or text above
//! its limit ([`MAX_LISTENERS`] and the other limits) makes a message malformed; the decoder
//! refuses the message before it stores anything. The receiver answers an unknown kind or version,
//! and a text that is not plain ([`crate::text`]), with [`PeerMessage::Error`] or
//! [`VmMessage::MigrationAbort`].
//!
//! The agent's module `role` says which role may send which message to whom.
//!
//! | kind | message | fields (number: name, unit) |
//! |---|---|---|
//! | 1 | `AgentSearch` | none |
//! | 2 | `AgentSearchReply` | 0: agent name, 1: domain name, 2: destination names |
//! | 3 | `MigrationRequest` | 0: destination name, 1: domain name or null |
//! | 4 | `MigrationResponse` | 0: prefix, 1: prefix length (bits), 2: address of DstAgent |
//! | 5 | `AgentRequest` | 0: domain UUID, 1: domain name, 2: MACs, 3: listeners, 4: transaction of the VM or null |
//! | 6 | `AgentResponse` | 0: prefix, 1: prefix length (bits), 2: address of DstAgent, 3 and 4: never read (they were URIs), 5: receptions |
//! | 7 | `RelayRequest` | 0: multicast address, 1: filter mode, 2: sources, 3: address of the agent, 4: known flows |
//! | 8 | `RelayResponse` | 0: address of the relay, 1: lease (ms), 2: flows with their two ports |
//! | 9 | `MigrationReady` | 0: address set on the idle NIC or null, 1: its MAC or null, 2: addresses left, 3: how long to forward for them (s), 4: whether to translate |
//! | 10 | `MigrationProgress` | 0: phase, 1: bytes processed, 2: bytes in all, 3: elapsed (ms), 4: VM pause (ms) or null, 5: clock (ns) or null |
//! | 11 | `MigrationAbort` | 0: reason, 1: code ([`Code`]) |
//! | 12 | `HandoverCut` | 0: clock (ns), 1: NICs with their delivered packets of each flow |
//! | 13 | `RelayRelease` | 0: reason, 1: code |
//! | 14 | `Error` | 0: reason, 1: code |
//! | 15 | `Register` | 0: role, 1: address, 2: site, 3: multicast addresses served |
//! | 16 | `Registered` | 0: lease (ms) |
//! | 17 | `RelaySearch` | 0: multicast address, 1: site |
//! | 18 | `RelaySearchReply` | 0: names and addresses of relays |
//! | 19 | `ArrivalNotice` | 0: domain UUID, 1: domain name |
//! | 20 | `AddressClaim` | 0: transaction of the migration, 1: address, 2: MAC, 3: quarantine (s), 4: addresses left, 5: how long to translate from them (s) |
//! | 21 | `AddressClaimReply` | 0: address, 1: state, 2: reason, 3: code |

mod bounded;
mod directory;
mod handover;
mod message;
mod reason;
mod relay;

use alloc::string::ToString;
use alloc::vec::Vec;
use core::fmt;

use minicbor::data::Type;
use minicbor::{Decode, Decoder, Encode};

pub use directory::*;
pub use handover::*;
pub use message::*;
pub use reason::*;
pub use relay::*;

use crate::text::is_plain_text;

pub use crate::wire::signalling::PORT;

/// Version of the signalling protocol, the first field of every message.
pub const VERSION: u16 = 1;
/// Longest datagram between VM and agent, bytes: one unfragmented packet on any IPv6 link.
pub const MAX_DATAGRAM_BYTES: usize = 1232;
/// Longest frame between agents, bytes: a `HandoverCut` of six NICs with the maximum of flows.
pub const MAX_FRAME_BYTES: usize = 4 * 1024 * 1024;
/// Longest name or sentence in a message, bytes.
pub const MAX_TEXT_BYTES: usize = 255;
/// Limit of a domain's NICs.
pub const MAX_NICS: usize = 64;
/// Limit of multicast addresses that one domain listens to, over all NICs.
pub const MAX_LISTENERS: usize = 16_384;
/// Limit of sources in one filter.
pub const MAX_SOURCES: usize = 4096;
/// Limit of flows in a message about one multicast address.
pub const MAX_FLOWS: usize = 16;
/// Limit of flows of one NIC in a `HandoverCut`.
pub const MAX_CUT_FLOWS: usize = 4096;
/// Limit of fingerprints of one flow in a `HandoverCut`, bytes.
pub const MAX_FINGERPRINT_BYTES: usize = 16 * 1024;
/// Limit of flows of one relay session.
pub const MAX_RELAY_FLOWS: usize = 4096;
/// Limit of destinations, relays or address ranges in one datagram.
pub const MAX_NAMED: usize = 256;

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The bytes are not CBOR, do not have the form of the message, or have trailing bytes.
    Malformed,
    /// The message exceeds the limit of its transport.
    TooLong {
        /// Length of the message, bytes.
        length: usize,
    },
    /// A text is not plain ([`crate::text`]).
    Text {
        /// Transaction of the message, for the answer.
        transaction: u64,
    },
    /// The message has another protocol version.
    Version {
        /// Version in the message.
        theirs: u16,
        /// Transaction of the message, for the answer.
        transaction: u64,
    },
    /// This version does not know the kind.
    UnknownKind {
        /// Number of the kind.
        kind: u16,
        /// Transaction of the message, for the answer.
        transaction: u64,
    },
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed => f.write_str("Malformed message"),
            Self::TooLong { length } => write!(f, "Message of {length} bytes is too long"),
            Self::Version { theirs, .. } => {
                write!(f, "Protocol version {theirs} is not ours ({VERSION})")
            }
            Self::Text { .. } => f.write_str(
                "A name or sentence in the message has line breaks or other characters that cannot be shown",
            ),
            Self::UnknownKind { kind, .. } => write!(f, "Unknown message kind {kind}"),
        }
    }
}

impl core::error::Error for DecodeError {}

/// The reason of an answer to a message that is not understood.
impl From<&DecodeError> for Reason {
    fn from(error: &DecodeError) -> Self {
        let code = match error {
            DecodeError::Malformed | DecodeError::TooLong { .. } | DecodeError::Text { .. } => {
                Code::MALFORMED
            }
            DecodeError::Version { .. } | DecodeError::UnknownKind { .. } => Code::UNSUPPORTED,
        };
        Self::new(code, error.to_string())
    }
}

macro_rules! messages {
    ($(#[$doc:meta])* $name:ident, $limit:expr, { $($kind:literal => $variant:ident($body:ty)),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[allow(missing_docs, reason = "each variant is named after its documented body")]
        pub enum $name {
            $($variant($body)),*
        }

        impl $name {
            /// Number and name of each message.
            pub const KINDS: &'static [(u16, &'static str)] = &[$(($kind, stringify!($variant))),*];

            /// Encodes the message as part of a transaction.
            pub fn encode(&self, transaction: u64) -> alloc::vec::Vec<u8> {
                match self {
                    $(Self::$variant(body) => $crate::signal::encode(transaction, $kind, body)),*
                }
            }

            /// Decodes a message; returns its transaction and the message.
            ///
            /// # Errors
            ///
            /// See [`DecodeError`](crate::signal::DecodeError).
            pub fn decode(bytes: &[u8]) -> Result<(u64, Self), $crate::signal::DecodeError> {
                use $crate::signal::{DecodeError, body, has_plain_texts, header};
                if bytes.len() > $limit {
                    return Err(DecodeError::TooLong { length: bytes.len() });
                }
                let (transaction, kind, mut decoder) = header(bytes)?;
                if !has_plain_texts(decoder.clone()) {
                    return Err(DecodeError::Text { transaction });
                }
                let message = match kind {
                    $($kind => Self::$variant(body(&mut decoder)?)),*,
                    _ => return Err(DecodeError::UnknownKind { kind, transaction }),
                };
                if decoder.position() != bytes.len() {
                    return Err(DecodeError::Malformed);
                }
                Ok((transaction, message))
            }
        }

        $(impl From<$body> for $name {
            fn from(body: $body) -> Self {
                Self::$variant(body)
            }
        })*
    };
}
pub(crate) use messages;

messages! {
    /// Messages between a VM and its agent.
    VmMessage, MAX_DATAGRAM_BYTES, {
        1 => AgentSearch(AgentSearch),
        2 => AgentSearchReply(AgentSearchReply),
        3 => MigrationRequest(MigrationRequest),
        4 => MigrationResponse(MigrationResponse),
        9 => MigrationReady(MigrationReady),
        10 => MigrationProgress(MigrationProgress),
        11 => MigrationAbort(MigrationAbort),
    }
}

messages! {
    /// Messages between two agents, and between agent and relay.
    PeerMessage, MAX_FRAME_BYTES, {
        5 => AgentRequest(AgentRequest),
        6 => AgentResponse(AgentResponse),
        7 => RelayRequest(RelayRequest),
        8 => RelayResponse(RelayResponse),
        10 => MigrationProgress(MigrationProgress),
        11 => MigrationAbort(MigrationAbort),
        12 => HandoverCut(HandoverCut),
        13 => RelayRelease(RelayRelease),
        14 => Error(ErrorMessage),
        19 => ArrivalNotice(ArrivalNotice),
        20 => AddressClaim(AddressClaim),
        21 => AddressClaimReply(AddressClaimReply),
    }
}

messages! {
    /// Messages between a migration control server and its agents and relays.
    DirectoryMessage, MAX_DATAGRAM_BYTES, {
        14 => Error(ErrorMessage),
        15 => Register(Register),
        16 => Registered(Registered),
        17 => RelaySearch(RelaySearch),
        18 => RelaySearchReply(RelaySearchReply),
    }
}

/// Returns the kind of an encoded message without decoding the body; `None` when this version
/// cannot read the header.
pub fn kind(bytes: &[u8]) -> Option<u16> {
    header(bytes).ok().map(|(_, kind, _)| kind)
}

pub(crate) fn encode<T: Encode<()>>(transaction: u64, kind: u16, body: &T) -> Vec<u8> {
    // Writing to a `Vec` never fails, and no type of ours raises an error of its own.
    minicbor::to_vec((VERSION, transaction, kind, body)).unwrap_or_default()
}

pub(crate) fn header(bytes: &[u8]) -> Result<(u64, u16, Decoder<'_>), DecodeError> {
    let mut decoder = Decoder::new(bytes);
    let malformed = |_| DecodeError::Malformed;
    if decoder.array().map_err(malformed)? != Some(4) {
        return Err(DecodeError::Malformed);
    }
    let version = decoder.u16().map_err(malformed)?;
    let transaction = decoder.u64().map_err(malformed)?;
    if version != VERSION {
        return Err(DecodeError::Version {
            theirs: version,
            transaction,
        });
    }
    let kind = decoder.u16().map_err(malformed)?;
    Ok((transaction, kind, decoder))
}

/// Whether all texts of a body are plain. [`body`] reports malformed CBOR.
pub(crate) fn has_plain_texts(mut decoder: Decoder<'_>) -> bool {
    while decoder.position() < decoder.input().len() {
        let step = match decoder.datatype() {
            Ok(Type::String) => match decoder.str() {
                Ok(text) if !is_plain_text(text) => return false,
                text => text.map(drop),
            },
            // The loop visits the elements next.
            Ok(Type::Array | Type::ArrayIndef) => decoder.array().map(drop),
            Ok(Type::Map | Type::MapIndef) => decoder.map().map(drop),
            Ok(Type::Tag) => decoder.tag().map(drop),
            Ok(Type::Break) => {
                decoder.set_position(decoder.position() + 1);
                Ok(())
            }
            Ok(_) => decoder.skip(),
            Err(error) => Err(error),
        };
        if step.is_err() {
            return true;
        }
    }
    true
}

pub(crate) fn body<'b, T: Decode<'b, ()>>(decoder: &mut Decoder<'b>) -> Result<T, DecodeError> {
    decoder.decode().map_err(|_| DecodeError::Malformed)
}

#[cfg(test)]
mod tests;
