//! Rewrites frames for an address that the VM left into packets for the VM's new address, by the rules
//! of [`common::forward`]. `uplink` applies the same rules to later packets.

use common::counter::Counter;
use common::forward::send_on;
use common::packet::PacketRead as _;
use common::wire::checksum::fold;
use common::wire::datagram::Header;
use common::wire::{ethernet, ipv6};

use super::unread::Way;
use super::upper::{Upper, put, split};

/// Placeholder MACs; the sending socket supplies the actual MACs.
const NO_MACS: [[u8; 6]; 2] = [[0; 6]; 2];

/// Returns the packets that a frame represents, from their IPv6 headers on, with a new destination and
/// the hop limit decremented. `segment_bytes` as for [`split`].
///
/// # Errors
///
/// Returns the counter of the cause if a packet cannot be forwarded.
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
    // `gate` copies no tagged frames.
    let end = ethernet::HEADER_BYTES
        + ipv6::HEADER_BYTES
        + usize::from(u16::from_be(header.payload_length));
    if end > packet.len() {
        return Err(Counter::ForwardHeaders);
    }
    packet.truncate(end);
    let hop_limit = header.hop_limit;
    send_on(&mut header, &way.to, hop_limit, NO_MACS);
    // A packet shorter than a UDP header ends within the bytes that `header` covers.
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
