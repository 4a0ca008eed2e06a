//! Translation: what becomes of a packet that leaves by `mat0`, or comes in by a NIC.
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
//! Where HoA and MoA are neutral, 32 bytes are written and no checksum is looked at, so that
//! extension headers, fragments, offloaded packets and protocols that nobody here knows are as
//! right as before. Else the checksum of TCP, UDP, DCCP and ICMPv6 is found behind at most
//! [`MAX_HEADERS`] extension headers and changed by the difference of the addresses (RFC 1624); a
//! fragment other than the first has none.
//!
//! An ICMPv6 error (RFC 4443 §2.1: type below 128) quotes a packet, whose addresses are translated
//! too, so that the wire never carries a HoA and an application recognizes its own packet. The
//! source of the error may be any router's and stays as it is, unless it is a peer's MoA.
//! Deviation: the checksum within the quoted packet is not changed where addresses are not neutral;
//! the packet is cut off, and nobody looks at it.
//!
//! Neighbour discovery between peers on one link is about MoAs and passes as it is, like all of
//! ICMPv6 but errors and echoes. Datagrams of the daemons and of the IMS are between MoAs themselves and pass as they are: by
//! them it is found out whether a MoA is good.

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

/// Where the outer addresses stand, bytes from the first of the frame.
pub const ADDRESSES: usize = 22;
/// Where what follows the IPv6 header stands.
pub const PAYLOAD: usize = 54;
/// Where the packet stands that an ICMPv6 error quotes.
pub const QUOTED: usize = 62;
/// Where its addresses stand.
pub const QUOTED_ADDRESSES: usize = 70;
/// End of its IPv6 header.
pub const QUOTED_PAYLOAD: usize = 102;
/// Most extension headers that are passed in search of a checksum.
pub const MAX_HEADERS: usize = 4;

const ICMPV6: u8 = 58;
/// First type of ICMPv6 that is no error, which is Echo Request.
const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;
/// An address as two words of memory.
pub type Words = [u64; 2];

/// A MAC as half words of memory.
pub type Mac = [u16; 3];

/// The half words of a MAC.
#[inline(always)]
pub fn mac([a, b, c, d, e, f]: [u8; 6]) -> Mac {
    [
        u16::from_ne_bytes([a, b]),
        u16::from_ne_bytes([c, d]),
        u16::from_ne_bytes([e, f]),
    ]
}

/// The words of an address.
#[inline(always)]
pub fn words(address: Address) -> Words {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address;
    [
        u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
        u64::from_ne_bytes([i, j, k, l, m, n, o, p]),
    ]
}

/// The address of words.
#[inline(always)]
pub fn address([first, second]: Words) -> Address {
    let [a, b, c, d, e, f, g, h] = first.to_ne_bytes();
    let [i, j, k, l, m, n, o, p] = second.to_ne_bytes();
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

/// An IPv6 header where it lies: that of the packet, or of a quoted one.
#[derive(Clone, Copy)]
pub struct Head {
    /// The first 8 bytes.
    pub start: u64,
    /// Source.
    pub source: Words,
    /// Destination.
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

/// A packet that can be translated. What a method writes was read before, by the one of its name
/// without `set`.
pub trait Packet: PacketRead {
    /// EtherType in network order, and the IPv6 header; `None` for a shorter frame.
    fn head(&self) -> Option<(u16, Head)>;
    /// The first 8 bytes after the IPv6 header.
    fn payload(&self) -> Option<[u8; 8]>;
    /// The header of the packet that an ICMPv6 error quotes.
    fn quoted(&self) -> Option<Head>;
    /// Writes source and destination. `false` when the packet cannot be written to.
    fn set_addresses(&mut self, source: Words, destination: Words) -> bool;
    /// The same of the quoted packet.
    fn set_quoted_addresses(&mut self, source: Words, destination: Words) -> bool;
    /// Writes the Ethernet destination.
    fn set_destination_mac(&mut self, mac: Mac) -> bool;
    /// Writes the Ethernet source.
    fn set_source_mac(&mut self, mac: Mac) -> bool;
    /// Changes the checksum right behind the IPv6 header by a difference if it is known to be finished,
    /// which is quicker than [`Packet::update_checksum`]; `false` where it is not.
    fn update_full_checksum(&mut self, next_header: u8, difference: u32) -> bool;
    /// Changes the checksum at `offset` by a difference. One that a device has yet to finish covers
    /// the addresses only. `may_be_none`: 0 stands for no checksum, and is never the result.
    fn update_checksum(&mut self, offset: usize, difference: u32, may_be_none: bool) -> bool;
}

/// What an address becomes, and the difference that this makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translated {
    /// The address to put in its place.
    pub address: Words,
    /// See [`super::maps`].
    pub difference: u32,
}

/// What is known of the node and its peers.
pub trait Tables {
    /// The node; `None` before the daemon has said anything.
    fn node(&self) -> Option<&Node>;
    /// Where packets to a HoA go, which counts this one.
    fn peer(&self, hoa: &Words) -> Option<Translated>;
    /// Which peer's a MoA is.
    fn peer_moa(&self, moa: &Words) -> Option<Translated>;
    /// Whether a MoA other than the active one is this node's, and the difference that the HoA makes.
    fn own_moa(&self, moa: &Words) -> Option<u32>;
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It goes on as it is.
    Pass,
    /// It goes no further.
    Drop,
    /// It goes out by a NIC, to the next hop on the way to its new destination.
    Send,
    /// It goes out by a NIC with the MACs that it has.
    Redirect,
    /// It comes in by `mat0`.
    Deliver,
    /// A copy of it comes in by `mat0`, and it goes on as it is.
    Copy,
    /// It waits for the daemon to find its peer.
    Hold,
}

/// What happens to a packet, by which interface, and what is counted.
///
/// Verifier: no field depends on another, because what a variant of an enum does not have would be
/// a register without a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What happens.
    pub action: Action,
    /// Index of the interface for actions that have one, else 0.
    pub ifindex: u32,
    /// What is counted, apart from what becomes of a copy and of a packet that waits.
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

/// Translates a packet that leaves by `mat0`.
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
        // Of the daemon: an error about a held packet, or a Query, to be answered by this kernel.
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

/// Translates the packet that an error of this node quotes: one of the peer that the error goes to.
/// `false` when the packet cannot be written to.
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

/// Translates a packet that comes in by the NIC with that index.
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
            // Neighbour discovery, for one, is about MoAs.
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

/// Translates the packet that an error quotes, if it is one of this node to a peer; else returns what
/// happens to the error.
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

/// Whether a MoA is this node's, as [`Tables::own_moa`]. Most packets are to the active one.
#[inline(always)]
fn own_difference<T: Tables>(tables: &T, node: &Node, moa: &Words) -> Option<u32> {
    if *moa == node.moa {
        return Some(node.difference_back);
    }
    tables.own_moa(moa)
}

/// A packet that is not MAT's. It must not pretend to be: what `mat0` gets is from peers.
#[inline(always)]
fn plain(head: &Head, node: &Node) -> Decision {
    if is_home(head.source, node) || is_home(head.destination, node) {
        Decision::drop(Counter::InHomeOnWire)
    } else {
        Decision::PASS
    }
}

/// Type of an ICMPv6 message; one that nobody uses where there is none.
#[inline(always)]
fn icmp_type<P: Packet>(packet: &P) -> u8 {
    match packet.payload() {
        Some([kind, ..]) => kind,
        None => u8::MAX,
    }
}

/// Whether either port is that of the daemons or of the IMS.
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
