//! Frames for an address that their VM has left, as packets for the one that it has now: by the rules
//! of [`common::forward`], which `uplink` follows for what comes later.

use common::counter::Counter;
use common::forward::send_on;
use common::packet::PacketRead as _;
use common::wire::checksum::fold;
use common::wire::datagram::Header;
use common::wire::{ethernet, ipv6};

use super::unread::Way;
use super::upper::{Upper, put, split};

/// MACs of a packet that leaves by a socket, which gives it others.
const NO_MACS: [[u8; 6]; 2] = [[0; 6]; 2];

/// The packets that a frame stands for, from their IPv6 headers on, for another destination and with
/// one hop limit less. `segment_bytes` as for [`split`].
///
/// # Errors
///
/// Why it cannot be sent on.
pub(super) fn readdress(
    frame: &[u8],
    segment_bytes: u16,
    way: &Way,
) -> Result<Vec<Vec<u8>>, Counter> {
    split(frame, segment_bytes)
        .into_iter()
        .map(|packet| readdress_packet(packet, way))
        .collect()
}

fn readdress_packet(mut packet: Vec<u8>, way: &Way) -> Result<Vec<u8>, Counter> {
    let mut header = Header::read(&packet[..]).map_err(|_| Counter::ForwardHeaders)?;
    if header.hop_limit <= 1 {
        return Err(Counter::ForwardHopLimit);
    }
    // `gate` keeps no frame with a tag.
    let end = ethernet::HEADER_BYTES
        + ipv6::HEADER_BYTES
        + usize::from(u16::from_be(header.payload_length));
    if end > packet.len() {
        return Err(Counter::ForwardHeaders);
    }
    packet.truncate(end);
    let hop_limit = header.hop_limit;
    send_on(&mut header, &way.to, hop_limit, NO_MACS);
    // A short packet ends within the UDP header that would be read there.
    let header = header.bytes();
    let length = header.len().min(packet.len());
    put(&mut packet, 0, header.get(..length).unwrap_or_default());
    if way.difference != 0 {
        let upper = Upper::of(&packet).ok_or(Counter::ForwardHeaders)?;
        let before = packet
            .read::<2>(upper.field)
            .map_err(|_| Counter::ForwardHeaders)?;
        // RFC 1624 §3.
        let before = u64::from(!u16::from_ne_bytes(before));
        let after = match !fold(before + u64::from(way.difference)) {
            0 => u16::MAX,
            after => after,
        };
        put(&mut packet, upper.field, &after.to_ne_bytes());
    }
    Ok(packet.split_off(ethernet::HEADER_BYTES))
}
