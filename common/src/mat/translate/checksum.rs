//! Search and update of the checksum that covers the addresses.

use super::{ICMPV6, MAX_HEADERS, PAYLOAD, Packet};
use crate::forward::TCP;
use crate::packet::{PacketRead, Truncated};
use crate::wire::{ipv6, udp};

const DCCP: u8 = 33;
const UDP_LITE: u8 = 136;

/// Updates the checksum that covers the addresses. `false` when the search fails.
#[inline(always)]
pub(super) fn change_checksum<P: Packet>(packet: &mut P, next_header: u8, difference: u32) -> bool {
    packet.update_full_checksum(next_header, difference)
        || find_and_change_checksum(packet, next_header, difference)
}

#[inline(never)]
fn find_and_change_checksum<P: Packet>(packet: &mut P, next_header: u8, difference: u32) -> bool {
    match checksum_offset(packet, next_header) {
        Ok(Some((offset, may_be_none))) => packet.update_checksum(offset, difference, may_be_none),
        Ok(None) => true,
        Err(Truncated) => false,
    }
}

/// Returns the offset of the checksum, and whether 0 means no checksum; `None` when no checksum
/// covers the addresses.
#[inline(always)]
fn checksum_offset<P: PacketRead>(
    packet: &P,
    next_header: u8,
) -> Result<Option<(usize, bool)>, Truncated> {
    let mut next_header = next_header;
    let mut at = PAYLOAD;
    for _ in 0..=MAX_HEADERS {
        match next_header {
            TCP => return Ok(Some((at + 16, false))),
            udp::NEXT_HEADER | UDP_LITE => return Ok(Some((at + 6, true))),
            DCCP => return Ok(Some((at + 6, false))),
            ICMPV6 => return Ok(Some((at + 2, false))),
            ipv6::HOP_BY_HOP | ipv6::DESTINATION_OPTIONS => {
                let [next, length] = packet.read(at)?;
                next_header = next;
                at += (usize::from(length) + 1) * 8;
            }
            ipv6::FRAGMENT => {
                let [next, _, high, low] = packet.read(at)?;
                if u16::from_be_bytes([high, low]) >> 3 != 0 {
                    return Ok(None);
                }
                next_header = next;
                at += 8;
            }
            // The checksum covers the last address of the route instead (RFC 8200 §8.1).
            ipv6::ROUTING => return Err(Truncated),
            _ => return Ok(None),
        }
    }
    Err(Truncated)
}
