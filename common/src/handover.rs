//! Identification of flows and packets of one guest by numbers that both ends of a migration
//! compare.
//!
//! Both ends compute the numbers from bytes that no path changes: Ethernet header, hop limit and
//! checksum are no part of the numbers.

use crate::group;
use crate::hash::Hash;
use crate::maps::{NO_BRIDGE, StreamKey};
use crate::packet::{PacketRead, Truncated};
use crate::wire::datagram::UDP_HEADER_BYTES;
use crate::wire::ipv6::Header;
use crate::wire::mld::{self, ICMPV6};
use crate::wire::{ipv6, udp};

/// Ethernet destination of probes, locally administered and unused by any device. A probe enters a
/// TAP before each recorded or copied frame; no guest accepts a probe.
///
/// A hypervisor that stops a VM loses the first frame that it reads after the stop. A VM whose
/// receive queue was full at that moment loses a frame too. In both cases the hypervisor reads one
/// more frame. With probes the lost frame is a probe: the VM has received every packet before the
/// last frame that the hypervisor read.
pub const PROBE_MAC: [u8; 6] = *b"\x02rprob";

/// EtherType of probes: local experimental (IEEE 802).
pub const PROBE_ETHER_TYPE: u16 = 0x88b5;

/// Length from which a fingerprint also covers the middle of a payload, bytes.
const LONG: usize = 512;
/// Parts of a long payload. Seven transport stream packets fill a datagram, and each has a counter
/// at its start.
const PARTS: usize = 7;
/// Bytes that a fingerprint covers at the start of a part.
const PART: usize = 16;

/// A multicast packet of routable scope, as a handover delivers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Flow of the packet, without a bridge. The ports are 0 unless UDP follows the IPv6 header.
    pub stream: StreamKey,
    /// Position of the payload that the guest's application receives.
    pub payload: Payload,
}

/// Position of a packet's payload: the payload of UDP, or all bytes after the IPv6 header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Offset in the frame, bytes.
    pub offset: usize,
    /// Payload length, bytes; at most what the frame has.
    pub length: u16,
}

impl Payload {
    /// Returns the payload of a frame of `frame_bytes` bytes, whose IPv6 header ends at `start` and
    /// announces `length` bytes. Further bytes of the frame are padding.
    #[inline(always)]
    pub fn new(frame_bytes: usize, start: usize, length: u16, is_udp: bool) -> Self {
        let there = frame_bytes.saturating_sub(start);
        let mut length = if usize::from(length) > there {
            there as u16
        } else {
            length
        };
        let mut offset = start;
        if is_udp {
            offset += usize::from(UDP_HEADER_BYTES);
            length = length.saturating_sub(UDP_HEADER_BYTES);
        }
        Self { offset, length }
    }
}

/// Parses a frame. Returns `None` for frames outside a handover: not IPv6, not multicast,
/// link-local or smaller scope, and MLD, whose Queries may have any destination.
#[inline(always)]
pub fn packet<P: PacketRead + ?Sized>(packet: &P) -> Option<Packet> {
    let frame = mld::ipv6_frame(packet)?;
    let header = &frame.header;
    if !group::is_routable(&header.destination) {
        return None;
    }
    let start = frame.payload;
    if header.next_header == ipv6::HOP_BY_HOP && is_mld(packet, header, start) {
        return None;
    }
    let ports = match header.next_header {
        udp::NEXT_HEADER => udp::parse(packet, start).ok(),
        _ => None,
    };
    let (source_port, destination_port) =
        ports.map_or((0, 0), |ports| (ports.source, ports.destination));
    Some(Packet {
        stream: StreamKey {
            multicast_address: header.destination,
            source: header.source,
            source_port,
            destination_port,
            vlan: frame.vlan,
            bridge: NO_BRIDGE,
        },
        payload: Payload::new(packet.len(), start, header.payload_length, ports.is_some()),
    })
}

/// Whether a packet with Hop-by-Hop Options is MLD: ICMPv6 with a hop limit of 1 and a link-local
/// or unspecified source.
#[inline(always)]
fn is_mld<P: PacketRead + ?Sized>(packet: &P, header: &Header, start: usize) -> bool {
    header.hop_limit == 1
        && (ipv6::is_link_local(&header.source) || ipv6::is_unspecified(&header.source))
        && packet.read::<1>(start) == Ok([ICMPV6])
}

/// Bits of the last word of a [`StreamKey`] that both hosts of a migration have in common: the
/// ports and the VLAN, but not the bridge.
const COMMON_BITS: u64 = u64::from_ne_bytes([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0]);

/// Hash of a flow whose key is given as words of memory. The bridge of the key does not change the
/// hash.
#[inline(always)]
pub fn flow_hash(flow: [u64; 5]) -> u64 {
    let [a, b, c, d, last] = flow;
    let mut hash = Hash::new(0);
    for word in [a, b, c, d, last & COMMON_BITS] {
        hash.word(word);
    }
    hash.finish()
}

/// Hash of a flow's key.
pub fn flow_hash_of(stream: &StreamKey) -> u64 {
    let word = |bytes: &[u8], at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_ne_bytes(word)
    };
    let mut last = [0; 8];
    last[..2].copy_from_slice(&stream.source_port.to_ne_bytes());
    last[2..4].copy_from_slice(&stream.destination_port.to_ne_bytes());
    last[4..6].copy_from_slice(&stream.vlan.to_ne_bytes());
    flow_hash([
        word(&stream.multicast_address, 0),
        word(&stream.multicast_address, 8),
        word(&stream.source, 0),
        word(&stream.source, 8),
        u64::from_ne_bytes(last),
    ])
}

/// Fingerprint of a packet within its flow. The fingerprint covers the first 64 and the last 16 of
/// `length` bytes at `payload`; for 512 bytes and more also 16 bytes at each seventh.
///
/// # Errors
///
/// [`Truncated`] when the packet is shorter than `payload + length`.
#[inline(always)]
pub fn fingerprint<P: PacketRead + ?Sized>(
    packet: &P,
    payload: usize,
    length: u16,
) -> Result<u64, Truncated> {
    let length = usize::from(length);
    let mut hash = Hash::new(length as u64);
    hash.ends(packet, payload, length)?;
    if length >= LONG {
        for part in 1..PARTS {
            hash.bytes(&packet.read::<PART>(payload + length * part / PARTS)?);
        }
    }
    Ok(hash.finish())
}

#[cfg(test)]
mod tests;
