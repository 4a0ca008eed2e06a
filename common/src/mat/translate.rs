//! Translation: the decision about a packet that leaves by `mat0` or arrives by a NIC.
//!
//! ```text
//!  mat0 --> MLD? --> multicast NIC, from its link-local address
//!       '-> PEERS? --no--> held for the daemon
//!             '--> HoA a -> HoA b  becomes  MoA a -> MoA b --> active NIC
//!
//!  NIC --> multicast? --> a copy for mat0 if it is the multicast NIC; goes on
//!      '-> PEER_MOAS and OWN_MOAS? --> MoA b -> MoA a  becomes  HoA b -> HoA a --> mat0
//!             '--no--> ICMPv6 error about such a packet? --> likewise --> mat0
//!                            '--no--> of the home prefix? --> dropped
//!                                           '--no--> goes on as it is: plain traffic
//! ```
//!
//! For neutral HoA and MoA the translation writes 32 bytes and no checksum changes, so extension
//! headers, fragments, offloaded packets and unknown protocols stay valid. For other addresses it
//! finds the checksum of TCP, UDP, DCCP or ICMPv6 behind at most [`MAX_HEADERS`] extension headers
//! and adds the difference of the addresses (RFC 1624). A later fragment has no checksum.
//!
//! An ICMPv6 error (RFC 4443 §2.1: type below 128) quotes a packet. The translation covers the
//! quoted addresses too, so that the wire never carries a HoA, and an application recognizes its
//! own packet. The source of the error may be any router and stays, unless it is the MoA of a peer.
//! Deviation: the checksum in the quoted packet does not change for addresses that are not neutral;
//! the quote is truncated, and no receiver verifies the checksum.
//!
//! Neighbor Discovery between peers on one link uses MoAs and passes unchanged, like all ICMPv6
//! except errors and echoes. Datagrams of the daemons and of the IMS use MoAs themselves and pass
//! unchanged: they verify whether a MoA is reachable.

mod bytes;
mod checksum;
#[cfg(any(test, fuzzing))]
pub(crate) mod end;
mod multicast;

use super::counter::Counter;
use super::maps::Node;
use super::{IMS_PORT, NODE_PORT};
use crate::maps::Address;
use crate::packet::PacketRead;
use crate::wire::{ethernet, udp};

pub use bytes::Bytes;

use checksum::change_checksum;
use multicast::{MLD_QUERY, mld_type, multicast_in, multicast_out};

/// Offset of the outer addresses in the frame, bytes.
pub const ADDRESSES: usize = 22;
/// Offset of the payload after the IPv6 header, bytes.
pub const PAYLOAD: usize = 54;
/// Offset of the packet that an ICMPv6 error quotes, bytes.
pub const QUOTED: usize = 62;
/// Offset of the quoted addresses, bytes.
pub const QUOTED_ADDRESSES: usize = 70;
/// Offset of the payload of the quoted packet, bytes.
pub const QUOTED_PAYLOAD: usize = 102;
/// Limit of extension headers that the search for a checksum skips.
pub const MAX_HEADERS: usize = 4;

const ICMPV6: u8 = 58;
/// Echo Request, the first ICMPv6 type that is not an error.
const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;
/// An address as two words of memory.
pub type Words = [u64; 2];

/// A MAC as half words of memory.
pub type Mac = [u16; 3];

/// Converts a MAC to half words.
#[inline(always)]
pub fn mac([a, b, c, d, e, f]: [u8; 6]) -> Mac {
    [
        u16::from_ne_bytes([a, b]),
        u16::from_ne_bytes([c, d]),
        u16::from_ne_bytes([e, f]),
    ]
}

/// Converts an address to words.
#[inline(always)]
pub fn words(address: Address) -> Words {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address;
    [
        u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
        u64::from_ne_bytes([i, j, k, l, m, n, o, p]),
    ]
}

/// Converts words to an address.
#[inline(always)]
pub fn address([first, second]: Words) -> Address {
    let [a, b, c, d, e, f, g, h] = first.to_ne_bytes();
    let [i, j, k, l, m, n, o, p] = second.to_ne_bytes();
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

/// Fields of an IPv6 header, outer or quoted.
#[derive(Clone, Copy)]
pub struct Head {
    /// First 8 bytes, in memory order.
    pub start: u64,
    /// Source address as words.
    pub source: Words,
    /// Destination address as words.
    pub destination: Words,
}

impl Head {
    #[inline(always)]
    fn version(&self) -> u8 {
        let [first, ..] = self.start.to_ne_bytes();
        first >> 4
    }

    #[inline(always)]
    fn next_header(&self) -> u8 {
        let [.., next_header, _] = self.start.to_ne_bytes();
        next_header
    }
}

/// A packet to translate. A method that writes requires an earlier call of the method that reads
/// the same field.
pub trait Packet: PacketRead {
    /// Reads the EtherType in network order and the IPv6 header; `None` for a shorter frame.
    fn head(&self) -> Option<(u16, Head)>;
    /// Reads the first 8 bytes after the IPv6 header.
    fn payload(&self) -> Option<[u8; 8]>;
    /// Reads the IPv6 header of the packet that an ICMPv6 error quotes.
    fn quoted(&self) -> Option<Head>;
    /// Writes source and destination. `false` when the kernel refuses the write.
    fn set_addresses(&mut self, source: Words, destination: Words) -> bool;
    /// Writes source and destination of the quoted packet. `false` when the kernel refuses the
    /// write.
    fn set_quoted_addresses(&mut self, source: Words, destination: Words) -> bool;
    /// Writes the Ethernet destination.
    fn set_destination_mac(&mut self, mac: Mac) -> bool;
    /// Writes the Ethernet source.
    fn set_source_mac(&mut self, mac: Mac) -> bool;
    /// Adds the difference to a checksum directly after the IPv6 header that is certainly full,
    /// which is faster than [`Packet::update_checksum`]. `false` when the checksum may be partial.
    fn update_full_checksum(&mut self, next_header: u8, difference: u32) -> bool;
    /// Adds the difference to the checksum at `offset`. A partial checksum covers the addresses
    /// only. `may_be_none`: the value 0 means no checksum and is never a result.
    fn update_checksum(&mut self, offset: usize, difference: u32, may_be_none: bool) -> bool;
}

/// The address that replaces another, and the difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translated {
    /// The new address.
    pub address: Words,
    /// Difference as in [`super::maps`].
    pub difference: u32,
}

/// Look-ups of the node and its peers.
pub trait Tables {
    /// Returns the node; `None` before the daemon has configured it.
    fn node(&self) -> Option<&Node>;
    /// Returns the MoA for a HoA, and counts the packet.
    fn peer(&self, hoa: &Words) -> Option<Translated>;
    /// Returns the HoA for a peer's MoA.
    fn peer_moa(&self, moa: &Words) -> Option<Translated>;
    /// Returns the difference of this node's MoA to the HoA; `None` for other addresses. The active
    /// MoA may have no entry.
    fn own_moa(&self, moa: &Words) -> Option<u32>;
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The packet continues unchanged.
    Pass,
    /// The packet is dropped.
    Drop,
    /// A NIC sends the packet to the next hop on the path to the new destination.
    Send,
    /// A NIC sends the packet with its MACs.
    Redirect,
    /// The packet enters the host by `mat0`.
    Deliver,
    /// A copy enters the host by `mat0`; the packet continues unchanged.
    Copy,
    /// The packet waits until the daemon has found the peer.
    Hold,
}

/// The action for a packet, its interface and its counter.
///
/// Verifier: no field depends on another. In an enum, the fields missing in a variant would be
/// registers without a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Action to carry out.
    pub action: Action,
    /// Interface of the action, 0 for actions without one.
    pub ifindex: u32,
    /// Counter of the packet. Copied and held packets have counters of their own.
    pub reason: Option<Counter>,
}

impl Decision {
    const PASS: Self = Self::new(Action::Pass, 0, None);
    const HOLD: Self = Self::new(Action::Hold, 0, None);

    const fn new(action: Action, ifindex: u32, reason: Option<Counter>) -> Self {
        Self {
            action,
            ifindex,
            reason,
        }
    }

    const fn drop(reason: Counter) -> Self {
        Self::new(Action::Drop, 0, Some(reason))
    }
}

/// Decides about a packet that leaves by `mat0`.
#[inline(always)]
pub fn outbound<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Decision {
    let Some(node) = tables.node() else {
        return Decision::drop(Counter::OutNoNic);
    };
    let Some((ether_type, head)) = packet.head() else {
        return Decision::drop(Counter::OutNotCarried);
    };
    if ether_type != ethernet::IPV6.to_be() || head.version() != 6 {
        return Decision::drop(Counter::OutNotCarried);
    }
    if is_multicast(head.destination) {
        return multicast_out(packet, &head, node);
    }
    let hoa = node.hoa;
    if head.destination == hoa {
        // A packet from the daemon for this host: an error about a held packet, or a Query.
        let counter = match mld_type(packet, &head) {
            MLD_QUERY => None,
            _ => Some(Counter::OutRefused),
        };
        return Decision::new(Action::Deliver, node.mat0_ifindex, counter);
    }
    if !is_home(head.destination, node) {
        return Decision::drop(Counter::OutNotCarried);
    }
    if head.source != hoa {
        return Decision::drop(Counter::OutForeignSource);
    }
    let Some(peer) = tables.peer(&head.destination) else {
        return Decision::HOLD;
    };
    if node.ifindex == 0 {
        return Decision::drop(Counter::OutNoNic);
    }
    let own = Translated {
        address: node.moa,
        difference: node.difference,
    };
    if !packet.set_addresses(own.address, peer.address) {
        return Decision::drop(Counter::OutRefusedByKernel);
    }
    let mut difference = own.difference + peer.difference;
    if head.next_header() == ICMPV6
        && icmp_type(packet) < ECHO_REQUEST
        && !quoted_out(packet, &head, own, peer, &mut difference)
    {
        return Decision::drop(Counter::OutRefusedByKernel);
    }
    if difference != 0 && !change_checksum(packet, head.next_header(), difference) {
        return Decision::drop(Counter::OutUntranslatable);
    }
    Decision::new(Action::Send, node.ifindex, Some(Counter::OutTranslated))
}

/// Translates the packet that an error of this node quotes: a packet of the peer that receives the
/// error. `false` when the kernel refuses the write.
#[inline(always)]
fn quoted_out<P: Packet>(
    packet: &mut P,
    outer: &Head,
    own: Translated,
    peer: Translated,
    difference: &mut u32,
) -> bool {
    let Some(quoted) = packet.quoted() else {
        return true;
    };
    let Head {
        mut source,
        mut destination,
        ..
    } = quoted;
    if source == outer.destination {
        source = peer.address;
        *difference += peer.difference;
    }
    if destination == outer.source {
        destination = own.address;
        *difference += own.difference;
    }
    packet.set_quoted_addresses(source, destination)
}

/// Decides about a packet that arrives by the NIC `ifindex`.
#[inline(always)]
pub fn inbound<P: Packet, T: Tables>(packet: &mut P, tables: &T, ifindex: u32) -> Decision {
    let Some((ether_type, head)) = packet.head() else {
        return Decision::PASS;
    };
    if ether_type != ethernet::IPV6.to_be() || head.version() != 6 || packet.vlan_metadata() != 0 {
        return Decision::PASS;
    }
    let Some(node) = tables.node() else {
        return Decision::PASS;
    };
    if is_multicast(head.destination) {
        return multicast_in(packet, &head, node, ifindex);
    }
    let (known, from) = match tables.peer_moa(&head.source) {
        Some(from) => (true, from),
        None => (
            false,
            Translated {
                address: head.source,
                difference: 0,
            },
        ),
    };
    let next_header = head.next_header();
    if !known && next_header != ICMPV6 {
        return plain(&head, node);
    }
    let Some(mut difference) = own_difference(tables, node, &head.destination) else {
        return plain(&head, node);
    };
    let mut reason = Counter::InTranslated;
    if next_header == ICMPV6 {
        match icmp_type(packet) {
            ..ECHO_REQUEST => {
                if let Some(verdict) = quoted_in(packet, tables, node, &mut difference) {
                    return verdict;
                }
                reason = Counter::InErrors;
            }
            ECHO_REQUEST | ECHO_REPLY if known => {}
            // Neighbor Discovery, among others, uses MoAs.
            _ => return plain(&head, node),
        }
    }
    if next_header == udp::NEXT_HEADER
        && let Some([a, b, c, d, ..]) = packet.payload()
        && is_signalling([a, b, c, d])
    {
        return Decision::new(Action::Pass, 0, Some(Counter::InSignalling));
    }
    difference += from.difference;
    if !packet.set_addresses(from.address, node.hoa) || !packet.set_destination_mac(node.mat0_mac) {
        return Decision::drop(Counter::InRefusedByKernel);
    }
    if difference != 0 && !change_checksum(packet, next_header, difference) {
        return Decision::drop(Counter::InUntranslatable);
    }
    Decision::new(Action::Deliver, node.mat0_ifindex, Some(reason))
}

/// Translates the packet that an error quotes when this node sent the packet to a peer; else
/// returns the decision about the error.
#[inline(always)]
fn quoted_in<P: Packet, T: Tables>(
    packet: &mut P,
    tables: &T,
    node: &Node,
    difference: &mut u32,
) -> Option<Decision> {
    let Some(quoted) = packet.quoted() else {
        return Some(Decision::PASS);
    };
    let Some(own) = own_difference(tables, node, &quoted.source) else {
        return Some(Decision::PASS);
    };
    let Some(peer) = tables.peer_moa(&quoted.destination) else {
        return Some(Decision::PASS);
    };
    if quoted.next_header() == udp::NEXT_HEADER
        && let Ok(ports) = packet.read(QUOTED_PAYLOAD)
        && is_signalling(ports)
    {
        return Some(Decision::new(Action::Pass, 0, Some(Counter::InSignalling)));
    }
    *difference += own + peer.difference;
    if packet.set_quoted_addresses(node.hoa, peer.address) {
        None
    } else {
        Some(Decision::drop(Counter::InRefusedByKernel))
    }
}

/// Difference of a MoA of this node to the HoA, as [`Tables::own_moa`]. Most packets are for the
/// active MoA.
#[inline(always)]
fn own_difference<T: Tables>(tables: &T, node: &Node, moa: &Words) -> Option<u32> {
    if *moa == node.moa {
        return Some(node.difference_back);
    }
    tables.own_moa(moa)
}

/// Decides about a packet outside MAT. The packet must not use the home prefix: `mat0` receives
/// packets of peers only.
#[inline(always)]
fn plain(head: &Head, node: &Node) -> Decision {
    if is_home(head.source, node) || is_home(head.destination, node) {
        Decision::drop(Counter::InHomeOnWire)
    } else {
        Decision::PASS
    }
}

/// Type of the ICMPv6 message; an unassigned type for a truncated one.
#[inline(always)]
fn icmp_type<P: Packet>(packet: &P) -> u8 {
    match packet.payload() {
        Some([kind, ..]) => kind,
        None => u8::MAX,
    }
}

/// Whether either port belongs to the daemons or the IMS.
#[inline(always)]
fn is_signalling([s0, s1, d0, d1]: [u8; 4]) -> bool {
    [[s0, s1], [d0, d1]]
        .map(u16::from_be_bytes)
        .iter()
        .any(|port| matches!(*port, IMS_PORT | NODE_PORT))
}

#[inline(always)]
fn is_multicast([first, _]: Words) -> bool {
    let [byte, ..] = first.to_ne_bytes();
    byte == 0xff
}

#[inline(always)]
fn is_home(address: Words, node: &Node) -> bool {
    let [first, second] = address;
    let ([mask_first, mask_second], [home_first, home_second]) = (node.home_mask, node.home);
    first & mask_first == home_first && second & mask_second == home_second
}

#[cfg(test)]
mod tests;
