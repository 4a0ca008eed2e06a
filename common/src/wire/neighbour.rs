//! Neighbor Solicitations and Advertisements (RFC 4861 §4.3, §4.4), read and written as whole frames.
//!
//! ```text
//!  0        14                54                 78            86
//!  | Ethernet | IPv6, limit 255 | type .. target | one option   |
//! ```
//!
//! [`parse`] accepts what RFC 4861 §7.1.1 and §7.1.2 let a host accept, checksum included. What is
//! left out: extension headers before the message, which no host sends.

use super::{checksum, datagram, ethernet, ipv6};
use crate::maps::Address;
use crate::packet::{PacketRead, Truncated};

/// ICMPv6 type of a Router Solicitation, the first of Neighbor Discovery.
pub const FIRST_TYPE: u8 = 133;
/// ICMPv6 type of a Neighbor Solicitation.
pub const SOLICITATION: u8 = 135;
/// ICMPv6 type of a Neighbor Advertisement.
pub const ADVERTISEMENT: u8 = 136;
/// ICMPv6 type of a Redirect, the last of Neighbor Discovery.
pub const LAST_TYPE: u8 = 137;
/// Next header value of ICMPv6.
pub const ICMPV6: u8 = 58;
/// Hop limit of all these messages: what comes from off the link has less.
pub const HOP_LIMIT: u8 = 255;
/// Length of the frames that are written here, bytes.
pub const FRAME_BYTES: usize = 86;

/// Every node of a link.
pub const ALL_NODES: Address = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// Where the ICMPv6 message starts in a frame without a tag.
const MESSAGE: usize = 54;
/// Length of a message without options.
const MESSAGE_BYTES: usize = 24;
/// Options that are read; more than any message has.
const MAX_OPTIONS: usize = 8;
const SOURCE_LINK_ADDRESS: u8 = 1;
const TARGET_LINK_ADDRESS: u8 = 2;
/// Nonce (RFC 3971 §5.3.2), by which a node knows its own probe again (RFC 7527 §4).
const NONCE: u8 = 14;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

/// A message of either kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Which kind.
    pub kind: Kind,
    /// Ethernet source.
    pub source_mac: [u8; 6],
    /// IPv6 source; `::` while the sender has no address yet.
    pub source: Address,
    /// IPv6 destination.
    pub destination: Address,
    /// The address that it is about.
    pub target: Address,
    /// Link address from its option: of the source of a Solicitation, of the target of an
    /// Advertisement.
    pub link_address: Option<[u8; 6]>,
    /// Nonce of a Solicitation.
    pub nonce: Option<[u8; 6]>,
}

/// Kind of a [`Message`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Who has the target?
    Solicitation,
    /// The target is there.
    Advertisement {
        /// Whether it answers a Solicitation.
        solicited: bool,
        /// Whether it replaces another link address.
        overrides: bool,
    },
}

impl Message {
    /// Whether the sender checks if the target is still free (RFC 4862 §5.4.2).
    pub fn is_probe(&self) -> bool {
        self.kind == Kind::Solicitation && ipv6::is_unspecified(&self.source)
    }

    /// The link address of who has, or wants, the target.
    pub fn claimant(&self) -> [u8; 6] {
        match self.kind {
            Kind::Solicitation => self.source_mac,
            Kind::Advertisement { .. } => self.link_address.unwrap_or(self.source_mac),
        }
    }
}

/// The group that a Solicitation for an address goes to (RFC 4291 §2.7.1).
pub fn solicited_node(address: &Address) -> Address {
    let [.., a, b, c] = *address;
    [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c]
}

/// Reads a frame; `None` for one that is no such message, or that a host has to discard.
pub fn parse<P: PacketRead + ?Sized>(packet: &P) -> Option<Message> {
    read(packet).ok().flatten()
}

fn read<P: PacketRead + ?Sized>(packet: &P) -> Result<Option<Message>, Truncated> {
    let link = ethernet::parse(packet)?;
    if link.ether_type != ethernet::IPV6 || link.vlan != 0 {
        return Ok(None);
    }
    let header = ipv6::parse(packet, link.payload)?;
    let length = usize::from(header.payload_length);
    if header.next_header != ICMPV6 || header.hop_limit != HOP_LIMIT || length < MESSAGE_BYTES {
        return Ok(None);
    }
    let start = link.payload + ipv6::HEADER_BYTES;
    let [kind, code, _, _, flags, _, _, _] = packet.read::<8>(start)?;
    let target = packet.read::<16>(start + 8)?;
    if code != 0 || ipv6::is_multicast(&target) {
        return Ok(None);
    }
    let sum = checksum::sum(packet, start, length)?
        + checksum::pseudo_header(
            &header.source,
            &header.destination,
            u32::from(header.payload_length),
            ICMPV6,
        );
    if checksum::fold(sum) != u16::MAX {
        return Ok(None);
    }
    let end = start + length;
    let (kind, wanted) = match kind {
        SOLICITATION => (Kind::Solicitation, SOURCE_LINK_ADDRESS),
        ADVERTISEMENT => {
            let solicited = flags & SOLICITED != 0;
            if solicited && ipv6::is_multicast(&header.destination) {
                return Ok(None);
            }
            let overrides = flags & OVERRIDE != 0;
            (
                Kind::Advertisement {
                    solicited,
                    overrides,
                },
                TARGET_LINK_ADDRESS,
            )
        }
        _ => return Ok(None),
    };
    let Some(link_address) = option(packet, start + MESSAGE_BYTES, end, wanted)? else {
        return Ok(None);
    };
    let Some(nonce) = option(packet, start + MESSAGE_BYTES, end, NONCE)? else {
        return Ok(None);
    };
    let message = Message {
        kind,
        source_mac: link.source,
        source: header.source,
        destination: header.destination,
        target,
        link_address,
        nonce,
    };
    let strange = ipv6::is_multicast(&message.source)
        || ipv6::is_unspecified(&message.source)
            && (kind != Kind::Solicitation
                || message.destination != solicited_node(&target)
                || link_address.is_some());
    Ok((!strange).then_some(message))
}

/// Looks for an option of 8 bytes. The outer `None` is of options that a host must not accept.
fn option<P: PacketRead + ?Sized>(
    packet: &P,
    from: usize,
    end: usize,
    wanted: u8,
) -> Result<Option<Option<[u8; 6]>>, Truncated> {
    let mut at = from;
    let mut found = None;
    for _ in 0..MAX_OPTIONS {
        if at >= end {
            break;
        }
        let [kind, units] = packet.read::<2>(at)?;
        let next = at + 8 * usize::from(units);
        if units == 0 || next > end {
            return Ok(None);
        }
        if kind == wanted && units == 1 && found.is_none() {
            found = Some(packet.read::<6>(at + 2)?);
        }
        at = next;
    }
    Ok(Some(found))
}

/// A Solicitation by which this host finds out whether an address is free (RFC 4862 §5.4.2).
pub fn probe(target: &Address, source_mac: [u8; 6], nonce: [u8; 6]) -> [u8; FRAME_BYTES] {
    let destination = solicited_node(target);
    let macs = [datagram::multicast_mac(&destination), source_mac];
    let addresses = [&ipv6::UNSPECIFIED, &destination];
    message(macs, addresses, SOLICITATION, 0, target, NONCE, nonce)
}

/// Whom an Advertisement is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Who has asked: address and link address.
    Asker(Address, [u8; 6]),
    /// Every node of the link, which nobody or a probe has asked for.
    Everybody,
}

/// An Advertisement on behalf of the target (RFC 4861 §7.2.4): who owns it, and whether that
/// replaces what the neighbours knew. `source` is this host's own address, or the target.
pub fn advertisement(
    target: &Address,
    owner: [u8; 6],
    overrides: bool,
    source: &Address,
    source_mac: [u8; 6],
    audience: Audience,
) -> [u8; FRAME_BYTES] {
    let (destination, mac, solicited) = match audience {
        Audience::Asker(address, mac) => (address, mac, SOLICITED),
        Audience::Everybody => (ALL_NODES, datagram::multicast_mac(&ALL_NODES), 0),
    };
    let flags = solicited | if overrides { OVERRIDE } else { 0 };
    let addresses = [source, &destination];
    let macs = [mac, source_mac];
    message(
        macs,
        addresses,
        ADVERTISEMENT,
        flags,
        target,
        TARGET_LINK_ADDRESS,
        owner,
    )
}

fn message(
    [destination_mac, source_mac]: [[u8; 6]; 2],
    [source, destination]: [&Address; 2],
    kind: u8,
    flags: u8,
    target: &Address,
    option: u8,
    value: [u8; 6],
) -> [u8; FRAME_BYTES] {
    const LENGTH: u8 = (FRAME_BYTES - MESSAGE) as u8;
    let mut frame = [0; FRAME_BYTES];
    let mut rest = &mut frame[..];
    for field in [
        &destination_mac[..],
        &source_mac,
        &ethernet::IPV6.to_be_bytes(),
        &[0x60, 0, 0, 0, 0, LENGTH, ICMPV6, HOP_LIMIT],
        source,
        destination,
        &[kind, 0, 0, 0, flags, 0, 0, 0],
        target,
        &[option, 1],
        &value,
    ] {
        let Some((place, after)) = rest.split_at_mut_checked(field.len()) else {
            break;
        };
        place.copy_from_slice(field);
        rest = after;
    }
    let covered = checksum::sum(&frame[..], MESSAGE, usize::from(LENGTH)).unwrap_or_default()
        + checksum::pseudo_header(source, destination, u32::from(LENGTH), ICMPV6);
    frame[MESSAGE + 2..MESSAGE + 4].copy_from_slice(&(!checksum::fold(covered)).to_ne_bytes());
    frame
}

#[cfg(test)]
mod tests;
