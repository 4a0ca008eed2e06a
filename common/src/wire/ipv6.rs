//! IPv6 header, address classes, and the walk over the extension headers before MLD.

use crate::maps::Address;
use crate::packet::{PacketRead, Truncated};

/// Length of the fixed header, bytes (RFC 8200 §3).
pub const HEADER_BYTES: usize = 40;
/// Next header value of Hop-by-Hop Options (RFC 8200 §4.3).
pub const HOP_BY_HOP: u8 = 0;
/// Next header value of a Routing header (RFC 8200 §4.4).
pub const ROUTING: u8 = 43;
/// Next header value of a Fragment header (RFC 8200 §4.5).
pub const FRAGMENT: u8 = 44;
/// Next header value of an Authentication Header (RFC 4302 §2).
pub const AUTHENTICATION: u8 = 51;
/// Next header value of Destination Options (RFC 8200 §4.6).
pub const DESTINATION_OPTIONS: u8 = 60;

const PAD1: u8 = 0;
const ROUTER_ALERT: u8 = 5;
const ROUTER_ALERT_MLD: u16 = 0;

/// The unspecified address `::`.
pub const UNSPECIFIED: Address = [0; 16];

/// The fixed header (RFC 8200 §3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Length of the packet after this header, bytes.
    pub payload_length: u16,
    /// Type of the next header.
    pub next_header: u8,
    /// Remaining hops; routers decrement it.
    pub hop_limit: u8,
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
}

/// Reads the fixed header at `offset`.
///
/// # Errors
///
/// [`Truncated`] when the packet ends within the header, or the version is not 6.
#[inline(always)]
pub fn parse<P: PacketRead + ?Sized>(packet: &P, offset: usize) -> Result<Header, Truncated> {
    let [version, _, _, _, l0, l1, next_header, hop_limit] = packet.read::<8>(offset)?;
    if version >> 4 != 6 {
        return Err(Truncated);
    }
    Ok(Header {
        payload_length: u16::from_be_bytes([l0, l1]),
        next_header,
        hop_limit,
        source: packet.read::<16>(offset + 8)?,
        destination: packet.read::<16>(offset + 24)?,
    })
}

/// Whether the address is in fe80::/10.
#[inline(always)]
pub fn is_link_local(address: &Address) -> bool {
    let [first, second, ..] = *address;
    first == 0xfe && second & 0xc0 == 0x80
}

/// Whether the address is `::`.
#[inline(always)]
pub fn is_unspecified(address: &Address) -> bool {
    u128::from_ne_bytes(*address) == 0
}

/// Result of the walk over extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extensions {
    /// Type of the first header that the walk does not skip.
    pub next_header: u8,
    /// Offset of that header, bytes.
    pub offset: usize,
    /// Whether the Hop-by-Hop Options contain a Router Alert of value 0, "MLD message" (RFC 2711
    /// §2.1).
    pub router_alert: bool,
}

/// Why the walk over extension headers failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError {
    /// A header or an option exceeds the header around it.
    Malformed,
    /// The headers have more options than the limit.
    TooMany,
}

impl From<Truncated> for WalkError {
    fn from(_: Truncated) -> Self {
        Self::Malformed
    }
}

/// Skips Hop-by-Hop Options of at most `OPTIONS` options. `end` is the end of the IPv6 packet.
///
/// # Errors
///
/// [`WalkError::Malformed`] or [`WalkError::TooMany`].
#[inline(always)]
pub fn walk<P: PacketRead + ?Sized, const OPTIONS: usize>(
    packet: &P,
    next_header: u8,
    offset: usize,
    end: usize,
) -> Result<Extensions, WalkError> {
    let mut extensions = Extensions {
        next_header,
        offset,
        router_alert: false,
    };
    if next_header != HOP_BY_HOP {
        return Ok(extensions);
    }
    // An extension header has at least 8 bytes; Router Alert with padding has exactly 8.
    let [next_header, length, options @ ..] = packet.read::<8>(offset)?;
    let options_end = offset + (usize::from(length) + 1) * 8;
    if options_end > end {
        return Err(WalkError::Malformed);
    }
    extensions.router_alert = (length == 0
        && matches!(
            options,
            [ROUTER_ALERT, 2, 0, 0, 1, 0]
                | [ROUTER_ALERT, 2, 0, 0, 0, 0]
                | [1, 0, ROUTER_ALERT, 2, 0, 0]
        ))
        || router_alert::<P, OPTIONS>(packet, offset + 2, options_end)?;
    extensions.next_header = next_header;
    extensions.offset = options_end;
    Ok(extensions)
}

#[inline(always)]
fn router_alert<P: PacketRead + ?Sized, const OPTIONS: usize>(
    packet: &P,
    offset: usize,
    end: usize,
) -> Result<bool, WalkError> {
    let mut at = offset;
    let mut found = false;
    for _ in 0..OPTIONS {
        if at == end {
            return Ok(found);
        }
        let [kind] = packet.read::<1>(at)?;
        if kind == PAD1 {
            at += 1;
            continue;
        }
        let [length] = packet.read::<1>(at + 1)?;
        let next = at + 2 + usize::from(length);
        if next > end {
            return Err(WalkError::Malformed);
        }
        if kind == ROUTER_ALERT {
            if length != 2 {
                return Err(WalkError::Malformed);
            }
            found |= u16::from_be_bytes(packet.read::<2>(at + 2)?) == ROUTER_ALERT_MLD;
        }
        at = next;
    }
    if at == end {
        Ok(found)
    } else {
        Err(WalkError::TooMany)
    }
}
