//! What the two ends of a migration compare: flows and packets of one guest, told apart by numbers.
//!
//! Both ends make them of the same bytes, whichever way the packets came and whoever has finished
//! their checksums: neither Ethernet header, hop limit nor checksum is part of them.

use crate::hash::Hash;
use crate::maps::StreamKey;
use crate::packet::{PacketRead, Truncated};
use crate::wire::datagram::UDP_HEADER_BYTES;
use crate::wire::ipv6::Header;
use crate::wire::mld::{self, ICMPV6};
use crate::wire::{ipv6, udp};

/// Ethernet destination of probes: frames that go into a TAP before each that is recorded or kept, and
/// that no guest takes for its own. Locally administered, and of nobody.
///
/// A hypervisor that stops a VM loses the first frame that it reads from then on, and a VM whose
/// receive queue was full at that moment has lost one, too; in either case the hypervisor goes on to
/// read one more. With probes, the one that is lost is a probe: whatever was read last, the VM has
/// had all the packets before it.
pub const PROBE_MAC: [u8; 6] = *b"\x02rprob";

/// EtherType of probes: for local experiments (IEEE 802).
pub const PROBE_ETHER_TYPE: u16 = 0x88b5;

/// Payloads from this length on are looked at in between too, bytes.
const LONG: usize = 512;
/// Into how many parts; seven transport stream packets fill a datagram, and each has its counter at
/// its beginning.
const PARTS: usize = 7;
/// Bytes looked at where a part begins.
const PART: usize = 16;

/// A multicast packet of routable scope, which is what a handover is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Its flow. The ports are 0 unless UDP follows the IPv6 header.
    pub stream: StreamKey,
    /// What the guest's application gets of it.
    pub payload: Payload,
}

/// Where the payload of a packet is: that of UDP, or all that follows the IPv6 header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Where it starts, bytes.
    pub offset: usize,
    /// Its length, bytes; never more than the frame has.
    pub length: u16,
}

impl Payload {
    /// The payload in a frame of `frame_bytes`, whose IPv6 header ends at `start` and says that
    /// `length` bytes follow. What the frame has beyond them is padding.
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

/// Looks at a frame; `None` for all that a handover leaves alone: what is not IPv6, not multicast
/// or of a scope that ends at the link, and MLD, whose Queries may be sent to any address.
#[inline(always)]
pub fn packet<P: PacketRead + ?Sized>(packet: &P) -> Option<Packet> {
    let frame = mld::ipv6_frame(packet)?;
    let header = &frame.header;
    if !ipv6::is_routable_multicast(&header.destination) {
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
            pad: 0,
        },
        payload: Payload::new(packet.len(), start, header.payload_length, ports.is_some()),
    })
}

/// Whether a packet with Hop-by-Hop Options is one of MLD's: ICMPv6 that stays on the link.
#[inline(always)]
fn is_mld<P: PacketRead + ?Sized>(packet: &P, header: &Header, start: usize) -> bool {
    header.hop_limit == 1
        && (ipv6::is_link_local(&header.source) || ipv6::is_unspecified(&header.source))
        && packet.read::<1>(start) == Ok([ICMPV6])
}

/// A flow, whose key is given as words of memory.
#[inline(always)]
pub fn flow_hash(flow: [u64; 5]) -> u64 {
    let mut hash = Hash::new(0);
    for word in flow {
        hash.word(word);
    }
    hash.finish()
}

/// The same of a key.
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

/// A packet within its flow: `length` bytes at `payload`, of which the first 64, the last 16 and,
/// if there are 512 or more, 16 at each seventh count.
///
/// # Errors
///
/// [`Truncated`] when the packet is shorter than that.
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
