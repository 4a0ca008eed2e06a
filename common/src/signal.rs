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
//!       |------------------------->| START MIGRATION (libvirt)  |
//!       |<------ MigrationProgress | MigrationProgress          |
//!       |                          |--------------------------->|
//!       |============ the VM runs at the destination ==========>|
//!       | MigrationReady (again)                                |
//!       |------------------------------------------------------>|
//!       |<---------------------- MigrationProgress (Completed)  |
//! ```
//!
//! Either side ends it with `MigrationAbort` and a sentence for a person.
//!
//! # Wire format
//!
//! A message is the CBOR array `[version, transaction, kind, body]`: the protocol [`VERSION`], a
//! 64-bit number that an answer repeats, the number of the message, and an array of numbered
//! fields. Unknown fields are ignored, so fields may be appended within a version. An unknown
//! kind or version is answered with [`PeerMessage::Error`] or [`VmMessage::MigrationAbort`].
//!
//! | kind | message | fields (number: name, unit) |
//! |---|---|---|
//! | 1 | `AgentSearch` | none |
//! | 2 | `AgentSearchReply` | 0: agent name, 1: domain name, 2: destination names |
//! | 3 | `MigrationRequest` | 0: destination name, 1: domain name or null |
//! | 4 | `MigrationResponse` | 0: prefix, 1: prefix length (bits), 2: address of DstAgent |
//! | 5 | `AgentRequest` | 0: domain UUID, 1: domain name, 2: MACs, 3: listeners, 4: transaction of the VM or null |
//! | 6 | `AgentResponse` | 0: prefix, 1: prefix length (bits), 2: address of DstAgent, 3: libvirt URI, 4: migration URI, 5: receptions |
//! | 9 | `MigrationReady` | 0: address set on the idle NIC or null |
//! | 10 | `MigrationProgress` | 0: phase, 1: bytes processed, 2: bytes in all, 3: elapsed (ms), 4: VM pause (ms) or null |
//! | 11 | `MigrationAbort` | 0: reason |
//! | 14 | `Error` | 0: reason |
//!
//! Kinds 7, 8, 12 and 13 belong to `RelayRequest`, `RelayResponse`, `HandoverCut` and
//! `RelayRelease`, which this version does not speak.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use minicbor::bytes::ByteArray;
use minicbor::{Decode, Decoder, Encode};

/// UDP and TCP port of all signalling.
pub const PORT: u16 = 47411;
/// Version of the signalling protocol, the first field of every message.
pub const VERSION: u16 = 1;
/// Longest datagram between VM and agent, bytes: one unfragmented packet on any IPv6 link.
pub const MAX_DATAGRAM_BYTES: usize = 1232;
/// Longest frame between agents, bytes.
pub const MAX_FRAME_BYTES: usize = 8 * 1024 * 1024;
/// Longest name or sentence in a message, bytes.
pub const MAX_TEXT_BYTES: usize = 255;

/// IPv6 address in network order.
pub type Address = ByteArray<16>;
/// Ethernet address.
pub type Mac = ByteArray<6>;

/// `AgentSearch`: a VM asks which agent houses it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AgentSearch {}

/// `AgentSearchReply`: the agent behind whose TAP the search came in.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AgentSearchReply {
    /// Name of the agent, as its peers know it.
    #[n(0)]
    pub agent: String,
    /// Name of the VM's libvirt domain.
    #[n(1)]
    pub domain: String,
    /// Destinations that the policy allows this VM.
    #[n(2)]
    pub destinations: Vec<String>,
}

/// `MigrationRequest`: the VM asks to be moved.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MigrationRequest {
    /// Name of the destination's agent.
    #[n(0)]
    pub destination: String,
    /// Domain that the caller believes to be; refused unless it is.
    #[n(1)]
    pub domain: Option<String>,
}

/// `MigrationResponse`: the destination is ready.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MigrationResponse {
    /// Prefix of the destination network, host bits zero.
    #[n(0)]
    pub prefix: Address,
    /// Its length in bits, 0 to 128.
    #[n(1)]
    pub prefix_length: u8,
    /// Address of DstAgent in that prefix.
    #[n(2)]
    pub agent_address: Address,
}

/// One active flow of a listener, as the source sees it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Flow {
    /// Source address.
    #[n(0)]
    pub source: Address,
    /// UDP source port, 0 where there is none.
    #[n(1)]
    pub source_port: u16,
    /// UDP destination port, 0 where there is none.
    #[n(2)]
    pub destination_port: u16,
    /// Packets per 1000 seconds.
    #[n(3)]
    pub rate_mpps: u64,
    /// Time since the last packet, milliseconds.
    #[n(4)]
    pub silent_ms: u64,
}

/// One multicast address that the VM listens to.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Listener {
    /// VLAN identifier, 0 for untagged.
    #[n(0)]
    pub vlan: u16,
    /// Multicast address.
    #[n(1)]
    pub multicast_address: Address,
    /// [`crate::maps::FilterMode`] as a number.
    #[n(2)]
    pub filter_mode: u8,
    /// Sources of the filter.
    #[n(3)]
    pub sources: Vec<Address>,
    /// MLD version that the VM speaks.
    #[n(4)]
    pub mld_version: u8,
    /// MAC of the VM's NIC that listens.
    #[n(5)]
    pub mac: Mac,
    /// Flows of the address that the source knows.
    #[n(6)]
    pub flows: Vec<Flow>,
}

/// `AgentRequest`: what the arriving VM needs.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AgentRequest {
    /// UUID of the libvirt domain.
    #[n(0)]
    pub domain_uuid: ByteArray<16>,
    /// Name of the libvirt domain.
    #[n(1)]
    pub domain_name: String,
    /// MACs of all its NICs, by which the destination knows its TAPs.
    #[n(2)]
    pub macs: Vec<Mac>,
    /// What it listens to.
    #[n(3)]
    pub listeners: Vec<Listener>,
    /// Transaction that `migkick` will go on using at the destination; null for an operator's move.
    #[n(4)]
    pub vm_transaction: Option<u64>,
}

/// How the destination receives one multicast address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum ReceptionMode {
    /// A packet has come natively.
    #[n(1)]
    Native,
    /// Joined; silent at the source too, so nothing can be proven. Watched.
    #[n(2)]
    Idle,
    /// Joined; nothing came within the probe's deadline. Watched.
    #[n(3)]
    Unreachable,
    /// Not joined: refused by policy or limits.
    #[n(4)]
    Refused,
}

/// Verdict of one probe.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Reception {
    /// VLAN identifier, 0 for untagged.
    #[n(0)]
    pub vlan: u16,
    /// Multicast address.
    #[n(1)]
    pub multicast_address: Address,
    /// How it is received.
    #[n(2)]
    pub mode: ReceptionMode,
    /// From the join to the verdict, milliseconds.
    #[n(3)]
    pub waited_ms: u64,
}

/// `AgentResponse`: the destination has joined and probed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AgentResponse {
    /// Prefix of the destination network, host bits zero.
    #[n(0)]
    pub prefix: Address,
    /// Its length in bits, 0 to 128.
    #[n(1)]
    pub prefix_length: u8,
    /// Address of DstAgent in that prefix.
    #[n(2)]
    pub agent_address: Address,
    /// libvirt URI of the destination, for the source's libvirtd.
    #[n(3)]
    pub connect_uri: String,
    /// URI that QEMU sends memory to; empty to let libvirt choose.
    #[n(4)]
    pub migrate_uri: String,
    /// One verdict for each listener of the request.
    #[n(5)]
    pub receptions: Vec<Reception>,
}

/// `MigrationReady`: the idle NIC is configured. Sent again until the migration is over, which
/// makes it the VM's question for progress too.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MigrationReady {
    /// Address set on the idle NIC; null where the VM has none.
    #[n(0)]
    pub address: Option<Address>,
}

/// Where a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Phase {
    /// The destination joins and probes.
    #[n(1)]
    Preparing,
    /// Waiting for the VM's `MigrationReady`.
    #[n(2)]
    Ready,
    /// libvirt copies memory.
    #[n(3)]
    Copying,
    /// The VM is paused for the switch.
    #[n(4)]
    Switching,
    /// The VM runs at the destination.
    #[n(5)]
    Completed,
}

/// `MigrationProgress`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MigrationProgress {
    /// Where it stands.
    #[n(0)]
    pub phase: Phase,
    /// Memory copied so far, bytes.
    #[n(1)]
    pub processed_bytes: u64,
    /// Memory in all, bytes.
    #[n(2)]
    pub total_bytes: u64,
    /// Since the request, milliseconds.
    #[n(3)]
    pub elapsed_ms: u64,
    /// How long the VM was paused, milliseconds; once known.
    #[n(4)]
    pub vm_pause_ms: Option<u64>,
}

/// `MigrationAbort`: the migration is off, or is refused.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MigrationAbort {
    /// One sentence for a person.
    #[n(0)]
    pub reason: String,
}

/// `Error`: the last message was not understood.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ErrorMessage {
    /// One sentence for a person.
    #[n(0)]
    pub reason: String,
}

/// Why bytes are not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// Not CBOR, not of the message's form, or with bytes left over.
    Malformed,
    /// Longer than the limit of its transport.
    TooLong {
        /// Its length, bytes.
        length: usize,
    },
    /// Of another protocol version.
    Version {
        /// The version it names.
        theirs: u16,
        /// Its transaction.
        transaction: u64,
    },
    /// Of a kind that this version does not know.
    UnknownKind {
        /// Its number.
        kind: u16,
        /// Its transaction.
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
            Self::UnknownKind { kind, .. } => write!(f, "Unknown message kind {kind}"),
        }
    }
}

impl core::error::Error for DecodeError {}

macro_rules! messages {
    ($(#[$doc:meta])* $name:ident, $limit:expr, { $($kind:literal => $variant:ident($body:ty)),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[allow(missing_docs, reason = "each variant is named after its documented body")]
        pub enum $name {
            $($variant($body)),*
        }

        impl $name {
            /// Encodes the message with the transaction it belongs to.
            pub fn encode(&self, transaction: u64) -> Vec<u8> {
                match self {
                    $(Self::$variant(body) => encode(transaction, $kind, body)),*
                }
            }

            /// Decodes a message and its transaction.
            ///
            /// # Errors
            ///
            /// See [`DecodeError`].
            pub fn decode(bytes: &[u8]) -> Result<(u64, Self), DecodeError> {
                if bytes.len() > $limit {
                    return Err(DecodeError::TooLong { length: bytes.len() });
                }
                let (transaction, kind, mut decoder) = header(bytes)?;
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

messages! {
    /// What VM and agent say to each other.
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
    /// What two agents say to each other.
    PeerMessage, MAX_FRAME_BYTES, {
        5 => AgentRequest(AgentRequest),
        6 => AgentResponse(AgentResponse),
        10 => MigrationProgress(MigrationProgress),
        11 => MigrationAbort(MigrationAbort),
        14 => Error(ErrorMessage),
    }
}

fn encode<T: Encode<()>>(transaction: u64, kind: u16, body: &T) -> Vec<u8> {
    // Writing to a `Vec` cannot fail, and none of our types has an error of its own to raise.
    minicbor::to_vec((VERSION, transaction, kind, body)).unwrap_or_default()
}

fn header(bytes: &[u8]) -> Result<(u64, u16, Decoder<'_>), DecodeError> {
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

fn body<'b, T: Decode<'b, ()>>(decoder: &mut Decoder<'b>) -> Result<T, DecodeError> {
    decoder.decode().map_err(|_| DecodeError::Malformed)
}

#[cfg(test)]
mod tests;
