//! Bodies of the signalling messages; the table of [`super`] lists them with their numbers.

use alloc::string::String;
use alloc::vec::Vec;

use minicbor::bytes::ByteArray;
use minicbor::{Decode, Encode};

use super::bounded::{list, optional_text, text, texts};
use super::{MAX_FLOWS, MAX_LISTENERS, MAX_NAMED, MAX_NICS, MAX_SOURCES};
use crate::mat::MAX_MOAS;

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
    #[cbor(n(0), decode_with = "text")]
    pub agent: String,
    /// Name of the VM's libvirt domain.
    #[cbor(n(1), decode_with = "text")]
    pub domain: String,
    /// Destinations that the policy allows this VM.
    #[cbor(n(2), decode_with = "texts::<_, MAX_NAMED>")]
    pub destinations: Vec<String>,
}

/// `MigrationRequest`: the VM asks to be moved.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MigrationRequest {
    /// Name of the destination's agent.
    #[cbor(n(0), decode_with = "text")]
    pub destination: String,
    /// Domain that the caller believes to be; refused unless it is.
    #[cbor(n(1), default, decode_with = "optional_text")]
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
    #[cbor(n(3), decode_with = "list::<_, _, MAX_SOURCES>")]
    pub sources: Vec<Address>,
    /// MLD version that the VM speaks.
    #[n(4)]
    pub mld_version: u8,
    /// MAC of the VM's NIC that listens.
    #[n(5)]
    pub mac: Mac,
    /// Flows of the address that the source knows.
    #[cbor(n(6), decode_with = "list::<_, _, MAX_FLOWS>")]
    pub flows: Vec<Flow>,
}

/// `AgentRequest`: what the arriving VM needs.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AgentRequest {
    /// UUID of the libvirt domain.
    #[n(0)]
    pub domain_uuid: ByteArray<16>,
    /// Name of the libvirt domain.
    #[cbor(n(1), decode_with = "text")]
    pub domain_name: String,
    /// MACs of all its NICs, by which the destination knows its TAPs.
    #[cbor(n(2), decode_with = "list::<_, _, MAX_NICS>")]
    pub macs: Vec<Mac>,
    /// What it listens to.
    #[cbor(n(3), decode_with = "list::<_, _, MAX_LISTENERS>")]
    pub listeners: Vec<Listener>,
    /// Transaction that `migkick` will go on using at the destination; null for an operator's move.
    #[n(4)]
    pub vm_transaction: Option<u64>,
}

/// `ArrivalNotice`: libvirt brings a domain of the receiver to the sender, and the sender was not
/// asked to prepare. Answered by [`AgentRequest`], with the same transaction unless the receiver
/// moves that domain already, or by [`MigrationAbort`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ArrivalNotice {
    /// UUID of the libvirt domain.
    #[n(0)]
    pub domain_uuid: ByteArray<16>,
    /// Its name, for a sentence about it.
    #[cbor(n(1), decode_with = "text")]
    pub domain_name: String,
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
    /// A relay sends it.
    #[n(5)]
    Relay,
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
    /// One verdict for each listener of the request. Indices 3 and 4 were URIs of the destination:
    /// the source has those from its own configuration, for libvirt executes what some forms name.
    #[cbor(n(5), decode_with = "list::<_, _, MAX_LISTENERS>")]
    pub receptions: Vec<Reception>,
    /// Whether QEMU there has a certificate for a copy of memory by TLS.
    #[cbor(n(6), default)]
    pub copy_tls: bool,
}

/// `MigrationReady`: the idle NIC is configured. Sent again until the migration is over, which
/// makes it the VM's question for progress too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct MigrationReady {
    /// Address set on the idle NIC, its MoA at the destination; null where the VM has none.
    #[n(0)]
    pub address: Option<Address>,
    /// MAC of the idle NIC.
    #[n(1)]
    pub mac: Option<Mac>,
    /// MoAs that the VM leaves: what still comes for them is forwarded to `address`.
    #[cbor(n(2), default, decode_with = "list::<_, _, MAX_MOAS>")]
    pub forward: Vec<Address>,
    /// For how long after the switch, seconds; the agent may bound it.
    #[cbor(n(3), default)]
    pub forward_s: u32,
    /// Whether all correspondents of the VM know `address`, so that what it still sends from an
    /// address that it leaves may be translated to come from there. One that does not know it would
    /// end a session by a reset. Once said it holds for that address.
    #[cbor(n(4), default)]
    pub translate: bool,
}

/// `AddressClaim`: the arriving VM is going to have an address on the destination's link. Its
/// transaction is its own, so that a peer that does not know it ends no migration by its `Error`.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AddressClaim {
    /// Transaction of the migration.
    #[n(0)]
    pub migration: u64,
    /// The address.
    #[n(1)]
    pub address: Address,
    /// MAC of the VM's NIC that will have it.
    #[n(2)]
    pub mac: Mac,
    /// How long nobody else is to get it once the VM has left it, seconds.
    #[n(3)]
    pub quarantine_s: u32,
    /// MoAs that the VM leaves: what it still sends from them is translated to come from `address`.
    /// None as long as not all correspondents know `address`.
    #[cbor(n(4), default, decode_with = "list::<_, _, MAX_MOAS>")]
    pub translate: Vec<Address>,
    /// For how long after the switch, seconds; the agent may bound it.
    #[cbor(n(5), default)]
    pub translate_s: u32,
}

/// What has become of a claimed address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum ClaimState {
    /// Nobody on the link has answered for it.
    #[n(1)]
    Unique,
    /// It cannot be had.
    #[n(2)]
    Refused,
    /// Somebody answered for it after the VM had switched to it.
    #[n(3)]
    Disputed,
}

/// `AddressClaimReply`: what the destination has found out; sent again when that changes.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AddressClaimReply {
    /// The address.
    #[n(0)]
    pub address: Address,
    /// What has become of it.
    #[n(1)]
    pub state: ClaimState,
    /// One sentence for a person; empty for one that is unique.
    #[cbor(n(2), decode_with = "text")]
    pub reason: String,
}

/// Where a migration stands; later phases are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
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

impl Phase {
    /// All of them, in their order.
    pub const ALL: [Self; 5] = [
        Self::Preparing,
        Self::Ready,
        Self::Copying,
        Self::Switching,
        Self::Completed,
    ];
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
    /// Between agents: when this was sent, nanoseconds of the sender's clock. The least difference
    /// to the receiver's clock brings the two together.
    #[n(5)]
    pub clock_ns: Option<u64>,
}

/// `MigrationAbort`: the migration is off, or is refused.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MigrationAbort {
    /// One sentence for a person.
    #[cbor(n(0), decode_with = "text")]
    pub reason: String,
}

/// `Error`: the last message was not understood.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ErrorMessage {
    /// One sentence for a person.
    #[cbor(n(0), decode_with = "text")]
    pub reason: String,
}
