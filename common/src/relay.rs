//! The unicast relay: the rewrite of a multicast packet to a datagram of the same size, and back.
//!
//! ```text
//!            source, source port           relay address, relay port         source, source port
//!  Sender -------------------------> relay -------------------------> agent -------------------> VM
//!            multicast address, port       agent address, agent port         multicast address, port
//! ```
//!
//! Only headers change. The ports of a relayed flow are chosen so that addresses and ports have the
//! same one's complement sum on both paths ([`agent_port`]). A full UDP checksum therefore stays
//! valid without a change, and a wrong one stays wrong. A partial checksum covers only the
//! addresses and needs an update ([`to_agent`], [`to_multicast`]).
//!
//! [`restore`] and [`send_to`] are the rewrites. [`fingerprint`] and [`count_copy`] find copies of
//! one packet while two origins are active.

mod copies;

use crate::group;
use crate::maps::{Address, RelayFlow, StreamKey, Subscriber};
use crate::wire::checksum;
use crate::wire::datagram::Rewrite;

pub use copies::{COPY_LIFETIME_NS, count_copy, fingerprint};

/// First port of the agent's range for relayed flows; the last is 65535.
pub const FIRST_PORT: u16 = 49_152;

/// First port of the relay's range; the last is 65535. With a smaller range at both ends, half of
/// all flows would have no pair of ports with the right sum.
pub const FIRST_RELAY_PORT: u16 = 1024;

/// Ethernet source of restored packets, locally administered and unused by any device. `leak` drops
/// frames with this source on every path out of this host, and `uplink` never takes them for native
/// packets. The address never appears on a wire.
pub const RESTORED_MAC: [u8; 6] = *b"\x02rcast";

/// Hop limit of restored packets, so that no router forwards them.
pub const RESTORED_HOP_LIMIT: u8 = 1;

/// Hop limit of the copies that a relay sends.
pub const RELAYED_HOP_LIMIT: u8 = 64;

/// Addresses and ports of a relayed flow; ports in host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoints {
    /// Address of the relay, which sends.
    pub relay_address: Address,
    /// UDP port of the relay.
    pub relay_port: u16,
    /// Address of the agent, which receives.
    pub agent_address: Address,
    /// UDP port of the agent.
    pub agent_port: u16,
}

/// Returns the agent's port that makes the sums equal, never 0. For a port below [`FIRST_PORT`] the
/// caller tries another `relay_port`; [`port_pairs`] lists the valid pairs.
pub fn agent_port(
    stream: &StreamKey,
    relay_address: &Address,
    agent_address: &Address,
    relay_port: u16,
) -> u16 {
    other_port(wanted(stream, relay_address, agent_address), relay_port)
}

/// Lists all pairs (relay's port, agent's port) in both ranges that make the sums equal: at least
/// 15,000 for any addresses.
pub fn port_pairs(
    stream: &StreamKey,
    relay_address: &Address,
    agent_address: &Address,
) -> impl Iterator<Item = (u16, u16)> + use<> {
    let wanted = wanted(stream, relay_address, agent_address);
    (FIRST_PORT..=u16::MAX)
        .map(move |agent_port| (other_port(wanted, agent_port), agent_port))
        .filter(|(relay_port, _)| *relay_port >= FIRST_RELAY_PORT)
}

/// Returns the required sum of both ports.
fn wanted(stream: &StreamKey, relay_address: &Address, agent_address: &Address) -> u32 {
    let stream = sum(&[&stream.multicast_address, &stream.source])
        + u32::from(stream.source_port)
        + u32::from(stream.destination_port);
    let given = sum(&[relay_address, agent_address]);
    (stream % ONES + ONES - given % ONES) % ONES
}

fn other_port(wanted: u32, port: u16) -> u16 {
    match (wanted + ONES - u32::from(port)) % ONES {
        // One's complement has two zeros; only 0xffff is a valid port.
        0 => u16::MAX,
        other => other as u16,
    }
}

/// Whether the flow and its relayed form have the same sum, so that checksums stay valid.
pub fn is_neutral(stream: &StreamKey, endpoints: &Endpoints) -> bool {
    let (stream, endpoints) = (Sums::of_stream(stream), Sums::of_endpoints(endpoints));
    (difference(stream.address, endpoints.address) + difference(stream.port, endpoints.port))
        .is_multiple_of(ONES)
}

/// Returns the difference that the relay's address rewrite adds to a checksum, for a
/// [`Subscriber`]: as `bpf_csum_diff` returns it and `bpf_l4_csum_replace` takes it (with `from`
/// 0).
pub fn to_agent(stream: &StreamKey, endpoints: &Endpoints) -> u32 {
    difference(
        Sums::of_stream(stream).address,
        Sums::of_endpoints(endpoints).address,
    )
}

/// Returns the difference that the agent's address rewrite adds to a checksum, for a [`RelayFlow`].
pub fn to_multicast(stream: &StreamKey, endpoints: &Endpoints) -> u32 {
    difference(
        Sums::of_endpoints(endpoints).address,
        Sums::of_stream(stream).address,
    )
}

/// Returns the difference that a new hop limit adds to `skb->csum`, the sum over the whole packet
/// (`CHECKSUM_COMPLETE`).
#[inline(always)]
pub fn hop_limit_difference(from: u8, to: u8) -> u32 {
    u32::from(u16::from_ne_bytes([0, to])) + u32::from(!u16::from_ne_bytes([0, from]))
}

/// Whether the Ethernet addresses are those of a packet that this host restored.
#[inline(always)]
pub fn is_restored(destination_mac: [u8; 6], source_mac: [u8; 6]) -> bool {
    // Compares single bytes, because most frames differ in the first one.
    let ([d0, d1, ..], [s0, s1, s2, s3, s4, s5]) = (destination_mac, source_mac);
    let [r0, r1, r2, r3, r4, r5] = RESTORED_MAC;
    s0 == r0 && s1 == r1 && s2 == r2 && s3 == r3 && s4 == r4 && s5 == r5 && d0 == 0x33 && d1 == 0x33
}

/// Rewrites a relayed datagram to its multicast packet. The caller updates a partial checksum.
#[inline(always)]
pub fn restore<H: Rewrite>(header: &mut H, flow: &RelayFlow) {
    let stream = &flow.stream;
    let mac = group::mac(&stream.multicast_address);
    header.set_macs(mac, RESTORED_MAC);
    header.set_hop_limit(RESTORED_HOP_LIMIT);
    header.set_addresses(&stream.source, &stream.multicast_address);
    header.set_ports(stream.source_port, stream.destination_port);
}

/// Rewrites a multicast packet to the datagram for a subscriber. The caller updates a partial
/// checksum. `macs` are destination and source MAC of the route.
#[inline(always)]
pub fn send_to<H: Rewrite>(header: &mut H, subscriber: &Subscriber, macs: [[u8; 6]; 2]) {
    let [destination_mac, source_mac] = macs;
    header.set_macs(destination_mac, source_mac);
    header.set_hop_limit(RELAYED_HOP_LIMIT);
    header.set_addresses(&subscriber.relay_address, &subscriber.agent_address);
    header.set_ports(subscriber.relay_port, subscriber.agent_port);
}

/// Modulus of 16-bit one's complement arithmetic.
const ONES: u32 = 0xffff;

/// Sums of 16-bit words in host byte order, as the kernel computes them.
#[derive(Clone, Copy)]
struct Sums {
    address: u16,
    port: u16,
}

impl Sums {
    fn of_stream(stream: &StreamKey) -> Self {
        Self::new(
            [&stream.source, &stream.multicast_address],
            [stream.source_port, stream.destination_port],
        )
    }

    fn of_endpoints(endpoints: &Endpoints) -> Self {
        Self::new(
            [&endpoints.relay_address, &endpoints.agent_address],
            [endpoints.relay_port, endpoints.agent_port],
        )
    }

    fn new(addresses: [&Address; 2], ports: [u16; 2]) -> Self {
        // In one's complement, the sum of swapped words is the swapped sum.
        let address = checksum::fold(u64::from(sum(&addresses)));
        let port = checksum::fold(ports.into_iter().map(u64::from).sum());
        Self {
            address: address.to_be(),
            port: port.to_be(),
        }
    }
}

fn difference(from: u16, to: u16) -> u32 {
    u32::from(to) + u32::from(!from)
}

/// Sum of the 16-bit words of the addresses, network order.
fn sum(addresses: &[&Address]) -> u32 {
    addresses
        .iter()
        .flat_map(|address| address.as_chunks::<2>().0)
        .map(|word| u32::from(u16::from_be_bytes(*word)))
        .sum()
}

#[cfg(test)]
mod tests;
