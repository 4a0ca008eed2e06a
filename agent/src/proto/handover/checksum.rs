//! Makes held frames what they would have become on their way to the guest: whole packets with
//! finished checksums.
//!
//! A sender on the same machine leaves the checksum to the network card. Until there, the field
//! holds the folded sum of the pseudo-header, not inverted (`CHECKSUM_PARTIAL`), and one frame may
//! stand for several packets (generic segmentation offload). A packet socket takes neither.

use common::packet::{PacketRead, Truncated};
use common::wire::{checksum, ethernet, udp};

use super::flow::{Flow, UDP_HEADER_BYTES, flow_of};

/// Where the payload length stands in an IPv6 header, bytes (RFC 8200 §3).
const PAYLOAD_LENGTH: usize = 4;
/// Where the length stands in a UDP header, bytes (RFC 768).
const LENGTH: usize = 4;
/// Where the checksum stands in a UDP header, bytes.
const CHECKSUM: usize = 6;
/// Where an 802.1Q tag stands, bytes from the first of the frame.
const TAG: usize = 12;

/// Finishes the UDP checksum if the field holds the sum of the pseudo-header only, and tells
/// whether it did. Any other one stays as it is, right or wrong.
pub fn finish_checksum(frame: &mut [u8]) -> bool {
    let Some(flow) = flow_of(frame, 0).filter(|flow| flow.is_udp) else {
        return false;
    };
    let udp = flow.payload - UDP_HEADER_BYTES;
    let Some((partial, finished)) = sums(frame, &flow) else {
        return false;
    };
    let Ok(field) = frame.read::<2>(udp + CHECKSUM) else {
        return false;
    };
    let field = u16::from_ne_bytes(field);
    if field != partial || field == finished {
        return false;
    }
    put(frame, udp + CHECKSUM, finished.to_ne_bytes());
    true
}

/// The packets that a frame stands for, each with the headers of the frame, its own lengths and
/// checksum. `segment_bytes` is the UDP payload of each but the last, 0 for a single packet, whose
/// checksum is finished if it must be. What is not UDP stays as it is.
pub fn split(frame: &[u8], segment_bytes: u16) -> Vec<Vec<u8>> {
    let segments = flow_of(frame, 0)
        .filter(|flow| flow.is_udp && segment_bytes != 0 && flow.length > segment_bytes)
        .and_then(|flow| segments(frame, &flow, segment_bytes));
    segments.unwrap_or_else(|| {
        let mut frame = frame.to_vec();
        finish_checksum(&mut frame);
        vec![frame]
    })
}

/// A frame with its 802.1Q tag in its place, if it has one in metadata.
pub(super) fn tagged(frame: &[u8], vlan: u16) -> Vec<u8> {
    let vlan = vlan & ethernet::VLAN_IDENTIFIER;
    match frame.split_at_checked(TAG) {
        Some((addresses, rest)) if vlan != 0 => {
            let tag = [ethernet::VLAN.to_be_bytes(), vlan.to_be_bytes()];
            [addresses, tag.as_flattened(), rest].concat()
        }
        _ => frame.to_vec(),
    }
}

fn segments(frame: &[u8], flow: &Flow, segment_bytes: u16) -> Option<Vec<Vec<u8>>> {
    let udp = flow.payload - UDP_HEADER_BYTES;
    let headers = frame.get(..flow.payload)?;
    let payload = frame.get(flow.payload..flow.payload + usize::from(flow.length))?;
    let without_checksum = headers.read::<2>(udp + CHECKSUM) == Ok([0; 2]);
    let mut packets = Vec::new();
    for part in payload.chunks(segment_bytes.into()) {
        let mut packet = [headers, part].concat();
        let length = u16::try_from(UDP_HEADER_BYTES + part.len()).ok()?;
        put(
            &mut packet,
            flow.network + PAYLOAD_LENGTH,
            length.to_be_bytes(),
        );
        put(&mut packet, udp + LENGTH, length.to_be_bytes());
        if !without_checksum {
            let flow = flow_of(&packet, 0)?;
            let (_, finished) = sums(&packet, &flow)?;
            put(&mut packet, udp + CHECKSUM, finished.to_ne_bytes());
        }
        packets.push(packet);
    }
    Some(packets)
}

/// The checksum field with the pseudo-header only, and finished, both as they lie in memory.
/// `None` when the UDP length is not that of the packet.
fn sums(frame: &[u8], flow: &Flow) -> Option<(u16, u16)> {
    let udp = flow.payload - UDP_HEADER_BYTES;
    let length = u16::from_be_bytes(frame.read(udp + LENGTH).ok()?);
    if usize::from(length) != UDP_HEADER_BYTES + usize::from(flow.length) {
        return None;
    }
    let stream = &flow.stream;
    let pseudo = checksum::pseudo_header(
        &stream.source,
        &stream.multicast_address,
        length.into(),
        udp::NEXT_HEADER,
    );
    let before = checksum::sum(frame, udp, CHECKSUM).ok()?;
    let after = sum(frame, flow.payload, flow.length.into()).ok()?;
    let finished = match !checksum::fold(pseudo + before + after) {
        0 => u16::MAX,
        finished => finished,
    };
    Some((checksum::fold(pseudo), finished))
}

/// [`checksum::sum`] of any length.
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

fn put(packet: &mut [u8], at: usize, bytes: [u8; 2]) {
    if let Some(place) = packet.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(&bytes);
    }
}

const _: () = {
    // The parts that `sum` makes must begin at even bytes.
    assert!(checksum::MAX_BYTES.is_multiple_of(2));
};
