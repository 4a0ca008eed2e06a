//! Bodies of the signalling messages; the table of [`super`] lists kinds and fields.

use alloc::string::String;
use alloc::vec::Vec;

use minicbor::bytes::ByteArray;
use minicbor::{Decode, Encode};

use super::bounded::{list, optional_text, text, texts};
use super::{Code, MAX_FLOWS, MAX_LISTENERS, MAX_NAMED, MAX_NICS, MAX_SOURCES, Reason};
use crate::mat::MAX_MOAS;

/// IPv6 address in network order, 16 bytes.
pub type Address = ByteArray<16>;
/// Ethernet address, 6 bytes.
pub type Mac = ByteArray<6>;

/// `AgentSearch`: a VM searches the agent of its host.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AgentSearch {}

/// `AgentSearchReply`: the agent whose TAP received the search answers.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AgentSearchReply {
    /// Name of the agent, as in its certificate.
    #[cbor(n(0), decode_with = "text")]
    pub agent: String,
    /// Name of the VM's libvirt domain.
    #[cbor(n(1), decode_with = "text")]
    pub domain: String,
    /// Destinations to which the policy allows the VM to move.
    #[cbor(n(2), decode_with = "texts::<_, MAX_NAMED>")]
    pub destinations: Vec<String>,
}

/// `MigrationRequest`: the VM requests its migration.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MigrationRequest {
    /// Name of the destination's agent.
    #[cbor(n(0), decode_with = "text")]
    pub destination: String,
    /// Domain name that the caller expects; the agent refuses another name.
    #[cbor(n(1), default, decode_with = "optional_text")]
    pub domain: Option<String>,
}

/// `MigrationResponse`: the destination is ready.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MigrationResponse {
    /// Prefix of the destination network, host bits zero.
    #[n(0)]
    pub prefix: Address,
    /// Length of the prefix in bits, 0 to 128.
    #[n(1)]
    pub prefix_length: u8,
    /// Address of DstAgent in that prefix.
    #[n(2)]
    pub agent_address: Address,
}

/// One active flow of a listener, as the source observes it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Flow {
    /// Source address of the flow, network order.
    #[n(0)]
    pub source: Address,
    /// UDP source port, 0 without UDP.
    #[n(1)]
    pub source_port: u16,
    /// UDP destination port, 0 without UDP.
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
    /// Multicast address, network order.
    #[n(1)]
    pub multicast_address: Address,
    /// [`crate::maps::FilterMode`] as a number.
    #[n(2)]
    pub filter_mode: u8,
    /// Sources of the filter.
    #[cbor(n(3), decode_with = "list::<_, _, MAX_SOURCES>")]
    pub sources: Vec<Address>,
    /// MLD version of the VM: 1 or 2.
    #[n(4)]
    pub mld_version: u8,
    /// MAC of the VM's listening NIC.
    #[n(5)]
    pub mac: Mac,
    /// Active flows of the address at the source.
    #[cbor(n(6), decode_with = "list::<_, _, MAX_FLOWS>")]
    pub flows: Vec<Flow>,
}

/// `AgentRequest`: SrcAgent asks DstAgent to receive for the arriving VM.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AgentRequest {
    /// UUID of the libvirt domain.
    #[n(0)]
    pub domain_uuid: ByteArray<16>,
    /// Name of the libvirt domain.
    #[cbor(n(1), decode_with = "text")]
    pub domain_name: String,
    /// MACs of all NICs of the domain, by which the destination identifies the TAPs.
    #[cbor(n(2), decode_with = "list::<_, _, MAX_NICS>")]
    pub macs: Vec<Mac>,
    /// Multicast addresses that the VM listens to.
    #[cbor(n(3), decode_with = "list::<_, _, MAX_LISTENERS>")]
    pub listeners: Vec<Listener>,
    /// Transaction that `migkick` keeps using at the destination; null for a migration by an
    /// operator.
    #[n(4)]
    pub vm_transaction: Option<u64>,
}

/// `ArrivalNotice`: libvirt migrates a domain from the receiver to the sender, and the sender has
/// no request to prepare. The answer is [`AgentRequest`], with the same transaction unless the
/// receiver is migrating that domain already, or [`MigrationAbort`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ArrivalNotice {
    /// UUID of the libvirt domain.
    #[n(0)]
    pub domain_uuid: ByteArray<16>,
    /// Name of the libvirt domain, for sentences.
    #[cbor(n(1), decode_with = "text")]
    pub domain_name: String,
}

/// How the destination receives one multicast address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum ReceptionMode {
    /// A packet arrived natively.
    #[n(1)]
    Native,
    /// DstAgent has joined. The address is silent at the source too, so the probe proves nothing.
    /// DstAgent keeps watching.
    #[n(2)]
    Idle,
    /// DstAgent has joined; no packet arrived before the probe's deadline. DstAgent keeps watching.
    #[n(3)]
    Unreachable,
    /// DstAgent has not joined, because of the policy or a limit.
    #[n(4)]
    Refused,
    /// A relay sends the streams of the address.
    #[n(5)]
    Relay,
}

/// Result of one probe.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Reception {
    /// VLAN identifier, 0 for untagged.
    #[n(0)]
    pub vlan: u16,
    /// Multicast address, network order.
    #[n(1)]
    pub multicast_address: Address,
    /// How DstAgent receives the address.
    #[n(2)]
    pub mode: ReceptionMode,
    /// Time from the join to the result, milliseconds.
    #[n(3)]
    pub waited_ms: u64,
}

/// `AgentResponse`: DstAgent has joined and probed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AgentResponse {
    /// Prefix of the destination network, host bits zero.
    #[n(0)]
    pub prefix: Address,
    /// Length of the prefix in bits, 0 to 128.
    #[n(1)]
    pub prefix_length: u8,
    /// Address of DstAgent in that prefix.
    #[n(2)]
    pub agent_address: Address,
    /// One result per listener of the request. Indices 3 and 4 were URIs of the destination. The
    /// source takes the URIs from its own configuration, because libvirt executes commands in some
    /// forms of URI.
    #[cbor(n(5), decode_with = "list::<_, _, MAX_LISTENERS>")]
    pub receptions: Vec<Reception>,
    /// Whether the destination's QEMU has a certificate for a memory copy over TLS.
    #[cbor(n(6), default)]
    pub copy_tls: bool,
}

/// `MigrationReady`: the idle NIC is configured. The VM repeats the message until the migration
/// ends; the message then also asks for progress.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct MigrationReady {
    /// MoA at the destination, configured on the idle NIC; null for a VM without MAT.
    #[n(0)]
    pub address: Option<Address>,
    /// MAC of the idle NIC.
    #[n(1)]
    pub mac: Option<Mac>,
    /// MoAs that the VM leaves: the agent forwards their packets to `address`.
    #[cbor(n(2), default, decode_with = "list::<_, _, MAX_MOAS>")]
    pub forward: Vec<Address>,
    /// Duration of forwarding after the switch, seconds; the agent may limit it.
    #[cbor(n(3), default)]
    pub forward_s: u32,
    /// Whether all correspondents of the VM know `address`. Only then may the agent translate
    /// packets that the VM still sends from the MoAs it leaves: a correspondent that does not know
    /// `address` would reset the session. Once true, the value holds for that address.
    #[cbor(n(4), default)]
    pub translate: bool,
}

/// `AddressClaim`: the arriving VM will have an address on the destination's link. The claim has
/// its own transaction, so an `Error` from a peer that does not know the message ends no migration.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AddressClaim {
    /// Transaction of the migration.
    #[n(0)]
    pub migration: u64,
    /// Claimed address, network order.
    #[n(1)]
    pub address: Address,
    /// MAC of the VM's NIC that will have the address.
    #[n(2)]
    pub mac: Mac,
    /// Time after the VM has left the address during which nobody else receives it, seconds.
    #[n(3)]
    pub quarantine_s: u32,
    /// MoAs that the VM leaves: the agent translates packets from them to come from `address`.
    /// Empty until all correspondents know `address`.
    #[cbor(n(4), default, decode_with = "list::<_, _, MAX_MOAS>")]
    pub translate: Vec<Address>,
    /// Duration of translation after the switch, seconds; the agent may limit it.
    #[cbor(n(5), default)]
    pub translate_s: u32,
}

/// State of a claimed address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum ClaimState {
    /// No node on the link has answered for the address.
    #[n(1)]
    Unique,
    /// The VM cannot have the address.
    #[n(2)]
    Refused,
    /// A node answered for the address after the VM had switched to it.
    #[n(3)]
    Disputed,
}

/// `AddressClaimReply`: the state of the claim, sent again after every change.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AddressClaimReply {
    /// Claimed address, network order.
    #[n(0)]
    pub address: Address,
    /// State of the address on the link.
    #[n(1)]
    pub state: ClaimState,
    /// One sentence for a person; empty for a unique address.
    #[cbor(n(2), decode_with = "text")]
    pub reason: String,
    /// Code of the reason; unspecified for a unique address.
    #[cbor(n(3), default)]
    pub code: Code,
}

/// Phase of a migration; later phases are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
#[cbor(index_only)]
pub enum Phase {
    /// DstAgent joins and probes.
    #[n(1)]
    Preparing,
    /// SrcAgent waits for the VM's `MigrationReady`.
    #[n(2)]
    Ready,
    /// libvirt copies the memory.
    #[n(3)]
    Copying,
    /// libvirt has paused the VM for the switch.
    #[n(4)]
    Switching,
    /// The VM runs at the destination.
    #[n(5)]
    Completed,
}

impl Phase {
    /// All phases in their order.
    pub const ALL: [Self; 5] = [
        Self::Preparing,
        Self::Ready,
        Self::Copying,
        Self::Switching,
        Self::Completed,
    ];
}

/// `MigrationProgress`: the phase and the job statistics of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MigrationProgress {
    /// Current phase.
    #[n(0)]
    pub phase: Phase,
    /// Memory copied so far, bytes.
    #[n(1)]
    pub processed_bytes: u64,
    /// Total memory, bytes.
    #[n(2)]
    pub total_bytes: u64,
    /// Time since the request, milliseconds.
    #[n(3)]
    pub elapsed_ms: u64,
    /// Pause of the VM, milliseconds; null until known.
    #[n(4)]
    pub vm_pause_ms: Option<u64>,
    /// Send time between agents, nanoseconds of the sender's clock. The smallest difference to the
    /// receiver's clock gives the offset between both clocks.
    #[n(5)]
    pub clock_ns: Option<u64>,
}

/// `MigrationAbort`: the migration ends, or the agent refuses it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(transparent)]
pub struct MigrationAbort(#[n(0)] pub Reason);

/// `Error`: the sender did not understand the last message.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(transparent)]
pub struct ErrorMessage(#[n(0)] pub Reason);
