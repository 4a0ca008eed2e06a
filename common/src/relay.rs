//! The unicast relay: how a multicast packet becomes a datagram of the same size, and a multicast
//! packet again.
//!
//! ```text
//!            source, source port           relay address, relay port         source, source port
//!  Sender -------------------------> relay -------------------------> agent -------------------> VM
//!            multicast address, port       agent address, agent port         multicast address, port
//! ```
//!
//! Only headers change. The two ports of a relayed flow are chosen so that addresses and ports sum
//! to the same in one's complement ([`agent_port`]); a finished UDP checksum is then right on both
//! ways without being touched, and a wrong one stays wrong. The checksum of a packet whose sender
//! has left the sum to the hardware covers only the addresses yet, and has to follow them
//! ([`to_agent`], [`to_multicast`]).
//!
//! [`restore`] and [`send_to`] are the rewrites; [`fingerprint`] and [`count_copy`] tell copies of
//! one packet apart while two origins are live.

mod copies;

use crate::maps::{Address, RelayFlow, StreamKey, Subscriber};
use crate::wire::checksum;
use crate::wire::datagram::{self, Rewrite};

pub use copies::{COPY_LIFETIME_NS, count_copy, fingerprint};

/// The agent's ports of relayed flows are from here on, up to 65535.
pub const FIRST_PORT: u16 = 49_152;

/// The relay's ports are from here on, up to 65535. With a smaller range at both ends, half of all
/// flows would have no pair of ports that makes the sums agree.
pub const FIRST_RELAY_PORT: u16 = 1024;

/// Ethernet source of restored packets: locally administered, and of nobody. By it they are known
/// on every way out of this host, where they are dropped, and are never taken for native ones. It
/// never appears on a wire.
pub const RESTORED_MAC: [u8; 6] = *b"\x02rcast";

/// Hop limit of restored packets: link-local delivery only, no router passes them on.
pub const RESTORED_HOP_LIMIT: u8 = 1;

/// Hop limit of the copies that a relay sends.
pub const RELAYED_HOP_LIMIT: u8 = 64;

/// The two ends of a relayed flow; ports in host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoints {
    /// The relay, which sends.
    pub relay_address: Address,
    /// Its UDP port.
    pub relay_port: u16,
    /// The agent, which receives.
    pub agent_address: Address,
    /// Its UDP port.
    pub agent_port: u16,
}

/// The agent's port that makes the sums agree. Never 0; it may be below [`FIRST_PORT`], then
/// another `relay_port` is to be tried. [`port_pairs`] gives the pairs that fit.
pub fn agent_port(
    stream: &StreamKey,
    relay_address: &Address,
    agent_address: &Address,
    relay_port: u16,
) -> u16 {
    other_port(wanted(stream, relay_address, agent_address), relay_port)
}

/// All pairs of the relay's and the agent's port that make the sums agree, in the ranges that they
/// have to be in: at least 15,000, whatever the addresses are.
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

/// What the two ports have to sum to.
fn wanted(stream: &StreamKey, relay_address: &Address, agent_address: &Address) -> u32 {
    let stream = sum(&[&stream.multicast_address, &stream.source])
        + u32::from(stream.source_port)
        + u32::from(stream.destination_port);
    let given = sum(&[relay_address, agent_address]);
    (stream % ONES + ONES - given % ONES) % ONES
}

fn other_port(wanted: u32, port: u16) -> u16 {
    match (wanted + ONES - u32::from(port)) % ONES {
        // Both zeros of one's complement count as one; only 0xffff is a port.
        0 => u16::MAX,
        other => other as u16,
    }
}

/// Whether the flow and its relayed form have the same sum, so that checksums stay right.
pub fn is_neutral(stream: &StreamKey, endpoints: &Endpoints) -> bool {
    let (stream, endpoints) = (Sums::of_stream(stream), Sums::of_endpoints(endpoints));
    (difference(stream.address, endpoints.address) + difference(stream.port, endpoints.port))
        .is_multiple_of(ONES)
}

/// What the addresses of the relay's rewrite add to a sum, for a [`Subscriber`]: as `bpf_csum_diff`
/// gives it and `bpf_l4_csum_replace` takes it (with `from` 0).
pub fn to_agent(stream: &StreamKey, endpoints: &Endpoints) -> u32 {
    difference(
        Sums::of_stream(stream).address,
        Sums::of_endpoints(endpoints).address,
    )
}

/// The same of the agent's rewrite, for a [`RelayFlow`].
pub fn to_multicast(stream: &StreamKey, endpoints: &Endpoints) -> u32 {
    difference(
        Sums::of_endpoints(endpoints).address,
        Sums::of_stream(stream).address,
    )
}

/// What another hop limit adds to the sum over a whole packet, which some cards deliver with it.
#[inline(always)]
pub fn hop_limit_difference(from: u8, to: u8) -> u32 {
    u32::from(u16::from_ne_bytes([0, to])) + u32::from(!u16::from_ne_bytes([0, from]))
}

/// Whether a frame with these Ethernet addresses was restored on this host.
#[inline(always)]
pub fn is_restored(destination_mac: [u8; 6], source_mac: [u8; 6]) -> bool {
    // Byte by byte, because most frames differ in the first one.
    let ([d0, d1, ..], [s0, s1, s2, s3, s4, s5]) = (destination_mac, source_mac);
    let [r0, r1, r2, r3, r4, r5] = RESTORED_MAC;
    s0 == r0 && s1 == r1 && s2 == r2 && s3 == r3 && s4 == r4 && s5 == r5 && d0 == 0x33 && d1 == 0x33
}

/// Makes a relayed datagram the multicast packet that it was, apart from the checksum of one that
/// is not finished.
#[inline(always)]
pub fn restore<H: Rewrite>(header: &mut H, flow: &RelayFlow) {
    let stream = &flow.stream;
    let mac = datagram::multicast_mac(&stream.multicast_address);
    header.set_macs(mac, RESTORED_MAC);
    header.set_hop_limit(RESTORED_HOP_LIMIT);
    header.set_addresses(&stream.source, &stream.multicast_address);
    header.set_ports(stream.source_port, stream.destination_port);
}

/// Makes a multicast packet the datagram for a subscriber, apart from the checksum of one that is
/// not finished. The MACs, destination first, are those of the route.
#[inline(always)]
pub fn send_to<H: Rewrite>(header: &mut H, subscriber: &Subscriber, macs: [[u8; 6]; 2]) {
    let [destination_mac, source_mac] = macs;
    header.set_macs(destination_mac, source_mac);
    header.set_hop_limit(RELAYED_HOP_LIMIT);
    header.set_addresses(&subscriber.relay_address, &subscriber.agent_address);
    header.set_ports(subscriber.relay_port, subscriber.agent_port);
}

/// Modulus of one's complement arithmetic in 16 bits.
const ONES: u32 = 0xffff;

/// Sums of 16-bit words in the byte order of this machine, as the kernel's are.
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
        // In one's complement a sum of swapped words is the sum, swapped.
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

/// Sum of the 16-bit words of some addresses, in network order.
fn sum(addresses: &[&Address]) -> u32 {
    addresses
        .iter()
        .flat_map(|address| address.as_chunks::<2>().0)
        .map(|word| u32::from(u16::from_be_bytes(*word)))
        .sum()
}

#[cfg(test)]
mod tests;
