//! Ethernet II header with at most one 802.1Q tag, in the frame or in the metadata.

use crate::packet::{PacketRead, Truncated};

/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;
/// EtherType of an 802.1Q tag.
pub const VLAN: u16 = 0x8100;

/// Length of a header without a tag, bytes.
pub const HEADER_BYTES: usize = 14;
/// Length of a tag, bytes.
const TAG_BYTES: usize = 4;

/// VLAN identifier within the tag control information (TCI).
pub const VLAN_IDENTIFIER: u16 = 0x0fff;

/// An Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Source MAC.
    pub source: [u8; 6],
    /// VLAN identifier, 0 for untagged and for priority tags.
    pub vlan: u16,
    /// EtherType of the payload. [`VLAN`] for a second tag, which no parser here reads.
    pub ether_type: u16,
    /// Offset of the payload, bytes: 14 or 18.
    pub payload: usize,
}

/// Reads the header at the start of the packet.
///
/// # Errors
///
/// [`Truncated`] when the frame ends within the header.
#[inline(always)]
pub fn parse<P: PacketRead + ?Sized>(packet: &P) -> Result<Header, Truncated> {
    // One read, because each read is a helper call in the kernel.
    let header = packet.read::<HEADER_BYTES>(0)?;
    let [_, _, _, _, _, _, s0, s1, s2, s3, s4, s5, t0, t1] = header;
    let source = [s0, s1, s2, s3, s4, s5];
    let ether_type = u16::from_be_bytes([t0, t1]);
    let metadata = packet.vlan_metadata() & VLAN_IDENTIFIER;
    if ether_type != VLAN || metadata != 0 {
        return Ok(Header {
            source,
            vlan: metadata,
            ether_type,
            payload: HEADER_BYTES,
        });
    }
    let [control_high, control_low, type_high, type_low] =
        packet.read::<TAG_BYTES>(HEADER_BYTES)?;
    Ok(Header {
        source,
        vlan: u16::from_be_bytes([control_high, control_low]) & VLAN_IDENTIFIER,
        ether_type: u16::from_be_bytes([type_high, type_low]),
        payload: HEADER_BYTES + TAG_BYTES,
    })
}
