//! Bodies of the messages between an agent and a relay.

use alloc::vec::Vec;

use minicbor::{Decode, Encode};

use super::bounded::list;
use super::{Address, MAX_RELAY_FLOWS, MAX_SOURCES, Reason};

/// One flow that the agent knows at the time of a `RelayRequest`; the relay can announce the flow
/// before its first packet.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KnownFlow {
    /// Source address of the flow, network order.
    #[n(0)]
    pub source: Address,
    /// UDP source port.
    #[n(1)]
    pub source_port: u16,
    /// UDP destination port.
    #[n(2)]
    pub destination_port: u16,
}

/// `RelayRequest`: an agent subscribes to one multicast address at a relay. The transaction
/// identifies the session; a repeated request renews the lease and changes the filter.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RelayRequest {
    /// Multicast address to subscribe to, network order.
    #[n(0)]
    pub multicast_address: Address,
    /// [`crate::maps::FilterMode`] as a number.
    #[n(1)]
    pub filter_mode: u8,
    /// Sources of the filter.
    #[cbor(n(2), decode_with = "list::<_, _, MAX_SOURCES>")]
    pub sources: Vec<Address>,
    /// Destination address of the datagrams.
    #[n(3)]
    pub agent_address: Address,
    /// Flows of the address that the agent knows.
    #[cbor(n(4), decode_with = "list::<_, _, MAX_RELAY_FLOWS>")]
    pub flows: Vec<KnownFlow>,
}

/// One flow that the relay sends. (relay address, relay port, agent address, agent port) has the
/// same one's complement sum as (source, source port, multicast address, destination port), so the
/// UDP checksum stays valid.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AnnouncedFlow {
    /// Source address of the stream.
    #[n(0)]
    pub source: Address,
    /// UDP source port of the stream.
    #[n(1)]
    pub source_port: u16,
    /// UDP destination port of the stream.
    #[n(2)]
    pub destination_port: u16,
    /// UDP source port of the datagrams.
    #[n(3)]
    pub relay_port: u16,
    /// UDP destination port of the datagrams.
    #[n(4)]
    pub agent_port: u16,
}

/// `RelayResponse`: the relay has joined and sends. Answers every `RelayRequest`, and follows
/// unsolicited when a new source or port appears.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RelayResponse {
    /// Source address of the datagrams.
    #[n(0)]
    pub relay_address: Address,
    /// Duration of the subscription without another request, milliseconds.
    #[n(1)]
    pub lease_ms: u64,
    /// All flows of the session.
    #[cbor(n(2), decode_with = "list::<_, _, MAX_RELAY_FLOWS>")]
    pub flows: Vec<AnnouncedFlow>,
}

/// `RelayRelease`: either side ends the session, or the relay refuses it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(transparent)]
pub struct RelayRelease(#[n(0)] pub Reason);
