//! Completes the upper-layer part of a frame as the frame's path to the guest would have: whole packets
//! with final checksums.
//!
//! A sender on the same machine leaves the checksum to the network card. Until then, the field holds
//! the folded sum of the pseudo-header, not inverted (`CHECKSUM_PARTIAL`). One frame may also represent
//! several packets (generic segmentation offload, or a card's receive aggregation). A packet socket
//! accepts neither.

use common::forward::TCP;
use common::maps::Address;
use common::packet::{PacketRead, Truncated};
use common::wire::neighbour::ICMPV6;
use common::wire::{checksum, ethernet, ipv6, udp};

use super::flow::UDP_HEADER_BYTES;

/// Offset of the payload length in an IPv6 header, bytes (RFC 8200 §3).
const PAYLOAD_LENGTH: usize = 4;
/// Offset of the length in a UDP header, bytes (RFC 768).
const UDP_LENGTH: usize = 4;
/// Offset of the sequence number in a TCP header, bytes (RFC 9293 §3.1).
const TCP_SEQUENCE: usize = 4;
/// Offset of the data offset in a TCP header, bytes; the flags follow.
const TCP_DATA_OFFSET: usize = 12;
/// Length of the shortest TCP header, bytes.
const TCP_HEADER_BYTES: usize = 20;
/// Flags that only the last segment carries: FIN and PSH.
const TCP_LAST: u8 = 0x09;
/// Flag that only the first segment carries: CWR (RFC 3168 §6.1.2).
const TCP_FIRST: u8 = 0x80;

/// A TCP segment, a UDP datagram or an ICMPv6 message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Upper {
    source: Address,
    destination: Address,
    protocol: u8,
    /// Offset of the IPv6 header, bytes from the start of the frame.
    network: usize,
    /// Offset of the upper-layer header, bytes from the start of the frame.
    start: usize,
    /// Length of header and payload, bytes.
    length: usize,
    /// Offset of the checksum, bytes from the start of the frame.
    pub(super) field: usize,
}

impl Upper {
    /// Parses a frame. Returns `None` after extension headers, for other protocols, and for frames
    /// shorter than their lengths say.
    pub(super) fn of(frame: &[u8]) -> Option<Self> {
        let ethernet = ethernet::parse(frame).ok()?;
        if ethernet.ether_type != ethernet::IPV6 {
            return None;
        }
        let network = ethernet.payload;
        let header = ipv6::parse(frame, network).ok()?;
        let start = network + ipv6::HEADER_BYTES;
        let length = usize::from(header.payload_length);
        let (field, shortest) = match header.next_header {
            TCP => (16, TCP_HEADER_BYTES),
            udp::NEXT_HEADER => (6, UDP_HEADER_BYTES),
            ICMPV6 => (2, 4),
            _ => return None,
        };
        (length >= shortest && start + length <= frame.len()).then_some(Self {
            source: header.source,
            destination: header.destination,
            protocol: header.next_header,
            network,
            start,
            length,
            field: start + field,
        })
    }

    /// Returns the end of the packet, bytes from the start of the frame; padding follows.
    pub(super) fn end(&self) -> usize {
        self.start + self.length
    }

    /// Completes the checksum if the field holds only the sum of the pseudo-header; returns true in
    /// this case. Any other checksum stays, right or wrong.
    fn finish(&self, frame: &mut [u8]) -> bool {
        let (Some((partial, finished)), Ok(field)) = (self.sums(frame), frame.read(self.field))
        else {
            return false;
        };
        let field = u16::from_ne_bytes(field);
        if field != partial || field == finished {
            return false;
        }
        put(frame, self.field, &finished.to_ne_bytes());
        true
    }

    /// Returns the checksum field with only the pseudo-header, and the final checksum, both in memory
    /// order. `None` if the UDP length differs from the packet's length.
    fn sums(&self, frame: &[u8]) -> Option<(u16, u16)> {
        if self.protocol == udp::NEXT_HEADER {
            let length = u16::from_be_bytes(frame.read(self.start + UDP_LENGTH).ok()?);
            if usize::from(length) != self.length {
                return None;
            }
        }
        let length = u32::try_from(self.length).ok()?;
        let pseudo =
            checksum::pseudo_header(&self.source, &self.destination, length, self.protocol);
        let before = sum(frame, self.start, self.field - self.start).ok()?;
        let after = sum(frame, self.field + 2, self.end() - self.field - 2).ok()?;
        let finished = match !checksum::fold(pseudo + before + after) {
            0 => u16::MAX,
            finished => finished,
        };
        Some((checksum::fold(pseudo), finished))
    }

    /// Returns the length of the upper-layer header, bytes; `None` for protocols without segmentation.
    fn header_bytes(&self, frame: &[u8]) -> Option<usize> {
        match self.protocol {
            udp::NEXT_HEADER => Some(UDP_HEADER_BYTES),
            TCP => {
                let [offset] = frame.read(self.start + TCP_DATA_OFFSET).ok()?;
                let bytes = usize::from(offset >> 4) * 4;
                (TCP_HEADER_BYTES..=self.length)
                    .contains(&bytes)
                    .then_some(bytes)
            }
            _ => None,
        }
    }

    /// Returns the packets that a frame represents, if the frame represents several.
    fn segments(&self, frame: &[u8], segment_bytes: u16) -> Option<Vec<Vec<u8>>> {
        let header_bytes = self.header_bytes(frame)?;
        let headers = frame.get(..self.start + header_bytes)?;
        let payload = frame.get(self.start + header_bytes..self.end())?;
        if segment_bytes == 0 || payload.len() <= segment_bytes.into() {
            return None;
        }
        let without_checksum =
            self.protocol == udp::NEXT_HEADER && headers.read::<2>(self.field) == Ok([0; 2]);
        let mut packets = Vec::new();
        let count = payload.len().div_ceil(segment_bytes.into());
        for (number, part) in payload.chunks(segment_bytes.into()).enumerate() {
            let mut packet = [headers, part].concat();
            let length = header_bytes + part.len();
            let own = Self { length, ..*self };
            own.resize(&mut packet)?;
            if self.protocol == TCP {
                let place = [number == 0, number + 1 == count];
                self.number_segment(&mut packet, number * usize::from(segment_bytes), place)?;
            }
            if !without_checksum {
                let (_, finished) = own.sums(&packet)?;
                put(&mut packet, own.field, &finished.to_ne_bytes());
            }
            packets.push(packet);
        }
        Some(packets)
    }

    /// Writes the length into every header that carries the length.
    fn resize(&self, packet: &mut [u8]) -> Option<()> {
        let length = u16::try_from(self.length).ok()?.to_be_bytes();
        put(packet, self.network + PAYLOAD_LENGTH, &length);
        if self.protocol == udp::NEXT_HEADER {
            put(packet, self.start + UDP_LENGTH, &length);
        }
        Some(())
    }

    /// Sets a TCP segment's sequence number, `offset` bytes after the frame's sequence number, and the
    /// flags of the segment's position.
    fn number_segment(
        &self,
        packet: &mut [u8],
        offset: usize,
        [is_first, is_last]: [bool; 2],
    ) -> Option<()> {
        let at = self.start + TCP_SEQUENCE;
        let sequence = u32::from_be_bytes(packet.read(at).ok()?);
        let sequence = sequence.wrapping_add(u32::try_from(offset).ok()?);
        put(packet, at, &sequence.to_be_bytes());
        let at = self.start + TCP_DATA_OFFSET + 1;
        let [mut flags] = packet.read(at).ok()?;
        if !is_first {
            flags &= !TCP_FIRST;
        }
        if !is_last {
            flags &= !TCP_LAST;
        }
        put(packet, at, &[flags]);
        Some(())
    }
}

/// Completes the checksum of a frame's packet if the field holds only the sum of the pseudo-header;
/// returns true in this case. Any other checksum stays, right or wrong.
pub fn finish_checksum(frame: &mut [u8]) -> bool {
    Upper::of(frame).is_some_and(|upper| upper.finish(frame))
}

/// Returns the packets that a frame represents, each with the frame's headers and its own lengths,
/// checksum and sequence number. `segment_bytes` is the payload of each packet except the last, 0 for a
/// single packet, whose checksum is completed if necessary. Protocols other than UDP and TCP stay one
/// packet.
pub fn split(frame: &[u8], segment_bytes: u16) -> Vec<Vec<u8>> {
    let segments = Upper::of(frame).and_then(|upper| upper.segments(frame, segment_bytes));
    segments.unwrap_or_else(|| {
        let mut frame = frame.to_vec();
        finish_checksum(&mut frame);
        vec![frame]
    })
}

/// [`checksum::sum`] for any length.
fn sum(frame: &[u8], mut offset: usize, mut length: usize) -> Result<u64, Truncated> {
    let mut sum = 0;
    while length > 0 {
        let part = length.min(checksum::MAX_BYTES);
        sum += checksum::sum(frame, offset, part)?;
        offset += part;
        length -= part;
    }
    Ok(sum)
}

pub(super) fn put(packet: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = packet.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

const _: () = {
    // The parts that `sum` creates must begin at even offsets.
    assert!(checksum::MAX_BYTES.is_multiple_of(2));
};
