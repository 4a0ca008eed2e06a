//! Parser and builders for Neighbor Solicitations and Advertisements (RFC 4861 §4.3, §4.4), as
//! whole frames.
//!
//! ```text
//!  0        14                54                 78            86
//!  | Ethernet | IPv6, limit 255 | type .. target | one option   |
//! ```
//!
//! [`parse`] accepts the messages that a host accepts by RFC 4861 §7.1.1 and §7.1.2, checksum
//! included. Deviation: the parser refuses extension headers before the message, which no host
//! sends.

use super::{checksum, ethernet, ipv6};
use crate::group;
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
/// Hop limit of every Neighbor Discovery message (RFC 4861 §7.1): a message from another link has a
/// smaller one.
pub const HOP_LIMIT: u8 = 255;
/// Length of the frames that this module builds, bytes.
pub const FRAME_BYTES: usize = 86;

/// All-nodes multicast address of the link (RFC 4291 §2.7.1).
pub const ALL_NODES: Address = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// Offset of the ICMPv6 message in an untagged frame, bytes.
const MESSAGE: usize = 54;
/// Length of a message without options, bytes.
const MESSAGE_BYTES: usize = 24;
/// Limit of options that the parser reads; no host sends as many.
const MAX_OPTIONS: usize = 8;
const SOURCE_LINK_ADDRESS: u8 = 1;
const TARGET_LINK_ADDRESS: u8 = 2;
/// Nonce option (RFC 3971 §5.3.2), by which a node recognizes its own looped-back probe (RFC 7527
/// §4).
const NONCE: u8 = 14;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

/// A Neighbor Solicitation or Advertisement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Solicitation or Advertisement, with the flags of the latter.
    pub kind: Kind,
    /// Ethernet source.
    pub source_mac: [u8; 6],
    /// IPv6 source; `::` while the sender has no address yet.
    pub source: Address,
    /// IPv6 destination.
    pub destination: Address,
    /// Target address of the message.
    pub target: Address,
    /// Link-layer address from its option: of the source of a Solicitation, of the target of an
    /// Advertisement.
    pub link_address: Option<[u8; 6]>,
    /// Nonce option of a Solicitation.
    pub nonce: Option<[u8; 6]>,
}

/// Kind of a [`Message`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The sender asks for the link-layer address of the target.
    Solicitation,
    /// The sender announces the link-layer address of the target.
    Advertisement {
        /// S flag: the message answers a Solicitation.
        solicited: bool,
        /// O flag: the message overrides a cached link-layer address.
        overrides: bool,
    },
}

impl Message {
    /// Whether the message is a probe of duplicate address detection (RFC 4862 §5.4.2): a
    /// Solicitation from `::`.
    pub fn is_probe(&self) -> bool {
        self.kind == Kind::Solicitation && ipv6::is_unspecified(&self.source)
    }

    /// Link-layer address of the node that has, or claims, the target.
    pub fn claimant(&self) -> [u8; 6] {
        match self.kind {
            Kind::Solicitation => self.source_mac,
            Kind::Advertisement { .. } => self.link_address.unwrap_or(self.source_mac),
        }
    }
}

/// Solicited-node multicast address of an address (RFC 4291 §2.7.1).
pub fn solicited_node(address: &Address) -> Address {
    let [.., a, b, c] = *address;
    [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c]
}

/// Parses a frame. Returns `None` for any other frame, and for a message that a host must discard.
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
    if code != 0 || group::is_multicast(&target) {
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
            if solicited && group::is_multicast(&header.destination) {
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
    let strange = group::is_multicast(&message.source)
        || ipv6::is_unspecified(&message.source)
            && (kind != Kind::Solicitation
                || message.destination != solicited_node(&target)
                || link_address.is_some());
    Ok((!strange).then_some(message))
}

/// Finds an option of 8 bytes. The outer `None` means that a host must discard the options.
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

/// Builds a Solicitation of duplicate address detection (RFC 4862 §5.4.2).
pub fn probe(target: &Address, source_mac: [u8; 6], nonce: [u8; 6]) -> [u8; FRAME_BYTES] {
    let destination = solicited_node(target);
    let macs = [group::mac(&destination), source_mac];
    let addresses = [&ipv6::UNSPECIFIED, &destination];
    message(macs, addresses, SOLICITATION, 0, target, NONCE, nonce)
}

/// Receiver of an Advertisement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Node that sent the Solicitation: IPv6 and link-layer address.
    Asker(Address, [u8; 6]),
    /// All nodes of the link: the Advertisement is unsolicited, or answers a probe.
    Everybody,
}

/// Builds an Advertisement for `target` (RFC 4861 §7.2.4) with the owner's link-layer address.
/// `overrides` tells the neighbours to replace their cache entry. `source` is an address of this
/// host, or the target.
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
        Audience::Everybody => (ALL_NODES, group::mac(&ALL_NODES), 0),
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
