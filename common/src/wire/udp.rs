//! Ports of a UDP header (RFC 768); no caller needs the other fields.

use crate::packet::{PacketRead, Truncated};

/// IPv6 next header value of UDP.
pub const NEXT_HEADER: u8 = 17;

/// Length of a UDP header, bytes.
pub const HEADER_BYTES: usize = 8;

/// Ports of a datagram, host order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ports {
    /// Source port.
    pub source: u16,
    /// Destination port.
    pub destination: u16,
}

/// Reads the ports of the UDP header at `offset`.
///
/// # Errors
///
/// [`Truncated`] when the packet ends within the 8 bytes of the header.
#[inline(always)]
pub fn parse<P: PacketRead + ?Sized>(packet: &P, offset: usize) -> Result<Ports, Truncated> {
    let [s0, s1, d0, d1, _, _, _, _] = packet.read::<8>(offset)?;
    Ok(Ports {
        source: u16::from_be_bytes([s0, s1]),
        destination: u16::from_be_bytes([d0, d1]),
    })
}
