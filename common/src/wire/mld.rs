//! Multicast Listener Discovery: MLDv2 (RFC 9777, STD 101) and MLDv1 (RFC 2710).
//!
//! An MLD message is ICMPv6 behind a Hop-by-Hop Options header with Router Alert, with hop limit 1
//! and a link-local source. [`parse`] checks these rules and the checksum before it returns a
//! [`Message`]. [`check_records`] then checks the address records of a Report, and the caller reads
//! them one by one.
//!
//! # Wire format
//!
//! ```text
//! Query (130)     type code checksum | max resp code, reserved | multicast address
//!                 MLDv2: S+QRV, QQIC, number of sources | sources
//! Report v1 (131) type code checksum | 0, reserved             | multicast address
//! Done (132)      as Report v1
//! Report v2 (143) type res. checksum | reserved, number of records | records
//! record          type, aux length (4-byte words), number of sources | multicast address
//!                 | sources | auxiliary data
//! ```

use crate::counter::Counter;
use crate::group;
use crate::maps::Address;
use crate::packet::{PacketRead, Truncated};
use crate::wire::{checksum, ethernet, ipv6};

mod record;

pub use record::{AddressRecord, RECORD_BYTES, ReportV2, SOURCE_BYTES, check_records};

/// IPv6 next header value of ICMPv6.
pub const ICMPV6: u8 = 58;
/// ICMPv6 type of a Query.
pub const LISTENER_QUERY: u8 = 130;
/// ICMPv6 type of an MLDv1 Report.
pub const LISTENER_REPORT_V1: u8 = 131;
/// ICMPv6 type of an MLDv1 Done.
pub const LISTENER_DONE: u8 = 132;
/// ICMPv6 type of an MLDv2 Report.
pub const LISTENER_REPORT_V2: u8 = 143;

/// Longest message that the parser reads, bytes. Linux sends at most a page.
pub const MAX_BYTES: usize = 4096;
/// Length of an MLDv1 message, and of the shortest Query, bytes.
const V1_BYTES: usize = 24;
/// Length of an MLDv2 Query without sources, bytes.
const QUERY_V2_BYTES: usize = 28;
/// Length of an MLDv2 Report before its records, bytes.
const REPORT_V2_BYTES: usize = 8;

/// Robustness Variable for a Query without one (RFC 9777 §9.1).
pub const ROBUSTNESS_VARIABLE: u8 = 2;
/// Query Interval for a Query without one, seconds (RFC 9777 §9.2).
pub const QUERY_INTERVAL_SECONDS: u32 = 125;

/// A Query of MLDv1 or MLDv2, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// Multicast address in question; `::` in a General Query.
    pub multicast_address: Address,
    /// Maximum Response Delay, milliseconds.
    pub max_response_delay_ms: u32,
    /// Querier's Robustness Variable; 2 for a Query without one.
    pub robustness: u8,
    /// Querier's Query Interval, seconds; 125 for a Query without one.
    pub query_interval_seconds: u32,
    /// Version of the Query: 1 or 2.
    pub version: u8,
}

/// A valid message; the records of a Report still need a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// Query of either version.
    Query(Query),
    /// MLDv1 Report for the address.
    ReportV1(Address),
    /// MLDv1 Done for the address.
    Done(Address),
    /// MLDv2 Report.
    ReportV2(ReportV2),
}

/// Addresses of a message's sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Ethernet source.
    pub mac: [u8; 6],
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// IPv6 source.
    pub source: Address,
}

/// Why a frame has no valid message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoMessage {
    /// The frame is not MLD.
    Other,
    /// The frame is MLD and breaks the rule of the counter.
    Malformed(Counter),
    /// Headers, options, records or bytes exceed the limits; larger limits may parse the message.
    Unfinished,
}

impl From<Truncated> for NoMessage {
    fn from(_: Truncated) -> Self {
        Self::Malformed(Counter::MalformedLength)
    }
}

/// An IPv6 packet in an Ethernet frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6Frame {
    /// Ethernet source.
    pub mac: [u8; 6],
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Fixed IPv6 header.
    pub header: ipv6::Header,
    /// Offset of the payload, bytes.
    pub payload: usize,
}

/// Reads Ethernet and IPv6 headers; `None` for other frames.
#[inline(always)]
pub fn ipv6_frame<P: PacketRead + ?Sized>(packet: &P) -> Option<Ipv6Frame> {
    let ethernet = ethernet::parse(packet).ok()?;
    if ethernet.ether_type != ethernet::IPV6 {
        return None;
    }
    let header = ipv6::parse(packet, ethernet.payload).ok()?;
    Some(Ipv6Frame {
        mac: ethernet.source,
        vlan: ethernet.vlan,
        header,
        payload: ethernet.payload + ipv6::HEADER_BYTES,
    })
}

/// Finds and checks the MLD message of a packet, with limits of `OPTIONS` Hop-by-Hop options and
/// `BYTES` bytes. Further extension headers exceed the limits; see [`is_hidden`].
///
/// # Errors
///
/// See [`NoMessage`].
#[inline(always)]
pub fn parse<P: PacketRead + ?Sized, const OPTIONS: usize, const BYTES: usize>(
    packet: &P,
    frame: &Ipv6Frame,
) -> Result<Message, NoMessage> {
    let header = &frame.header;
    if !matches!(
        header.next_header,
        ipv6::HOP_BY_HOP | ipv6::FRAGMENT | ICMPV6
    ) {
        return Err(NoMessage::Other);
    }
    let end = frame.payload + usize::from(header.payload_length);
    let extensions = match ipv6::walk::<P, OPTIONS>(packet, header.next_header, frame.payload, end)
    {
        Ok(extensions) => extensions,
        Err(ipv6::WalkError::Malformed) => {
            return Err(NoMessage::Malformed(Counter::MalformedOptions));
        }
        Err(ipv6::WalkError::TooMany) => return Err(NoMessage::Unfinished),
    };
    let start = extensions.offset;
    match extensions.next_header {
        ICMPV6 => {}
        ipv6::FRAGMENT => return Err(fragment(packet, start)),
        next_header if is_passed_by_bridges(next_header) => {
            return Err(NoMessage::Unfinished);
        }
        _ => return Err(NoMessage::Other),
    }

    let Ok(head) = packet.read::<REPORT_V2_BYTES>(start) else {
        return Err(too_short(packet, start));
    };
    let [kind, ..] = head;
    if !is_mld(kind) {
        return Err(NoMessage::Other);
    }
    if end > packet.len() || end < start + REPORT_V2_BYTES {
        return Err(NoMessage::Malformed(Counter::MalformedLength));
    }
    if header.hop_limit != 1 {
        return Err(NoMessage::Malformed(Counter::MalformedHopLimit));
    }
    let source_allowed = ipv6::is_link_local(&header.source)
        || kind != LISTENER_QUERY && ipv6::is_unspecified(&header.source);
    if !source_allowed {
        return Err(NoMessage::Malformed(Counter::MalformedSource));
    }
    if !extensions.router_alert {
        return Err(NoMessage::Malformed(Counter::MalformedRouterAlert));
    }
    let length = end - start;
    if length > MAX_BYTES {
        return Err(NoMessage::Malformed(Counter::Oversized));
    }
    if length > BYTES {
        return Err(NoMessage::Unfinished);
    }
    let sum = checksum::sum_within::<P, BYTES>(packet, start, length)?
        + checksum::pseudo_header(&header.source, &header.destination, length as u32, ICMPV6);
    if checksum::fold(sum) != 0xffff {
        return Err(NoMessage::Malformed(Counter::MalformedChecksum));
    }
    message(packet, &head, start, end)
}

#[inline(always)]
fn is_mld(kind: u8) -> bool {
    matches!(
        kind,
        LISTENER_QUERY | LISTENER_REPORT_V1 | LISTENER_DONE | LISTENER_REPORT_V2
    )
}

/// Why a frame that ends within the first bytes of ICMPv6 has no message.
#[inline(always)]
fn too_short<P: PacketRead + ?Sized>(packet: &P, start: usize) -> NoMessage {
    match packet.read::<1>(start) {
        Ok([kind]) if is_mld(kind) => NoMessage::Malformed(Counter::MalformedLength),
        _ => NoMessage::Other,
    }
}

/// Whether a packet may be MLD that a bridge finds and [`parse`] does not: another extension header
/// follows the Hop-by-Hop Options. No MLD sender uses such a header.
#[inline(always)]
pub fn is_hidden<P: PacketRead + ?Sized>(packet: &P, frame: &Ipv6Frame) -> bool {
    if frame.header.next_header != ipv6::HOP_BY_HOP {
        return false;
    }
    let Ok([next_header, length]) = packet.read::<2>(frame.payload) else {
        return false;
    };
    if next_header != ipv6::FRAGMENT {
        return is_passed_by_bridges(next_header);
    }
    let offset = frame.payload + (usize::from(length) + 1) * 8;
    packet
        .read::<4>(offset)
        .is_ok_and(|[next_header, _, o0, o1]| {
            is_first_fragment([o0, o1]) && is_passed_by_bridges(next_header)
        })
}

/// Whether the offset and flags of a Fragment header are those of a first fragment.
#[inline(always)]
fn is_first_fragment(offset: [u8; 2]) -> bool {
    u16::from_be_bytes(offset) >> 3 == 0
}

/// Whether a bridge skips this extension header in search of MLD (`ipv6_skip_exthdr`).
#[inline(always)]
fn is_passed_by_bridges(next_header: u8) -> bool {
    matches!(
        next_header,
        ipv6::HOP_BY_HOP | ipv6::ROUTING | ipv6::AUTHENTICATION | ipv6::DESTINATION_OPTIONS
    )
}

/// Why a fragment has no message: the first fragment of MLD is malformed, and other fragments are
/// not MLD.
#[inline(always)]
fn fragment<P: PacketRead + ?Sized>(packet: &P, offset: usize) -> NoMessage {
    let Ok([next_header, _, o0, o1, _, _, _, _, kind]) = packet.read::<9>(offset) else {
        return NoMessage::Other;
    };
    if next_header == ICMPV6 && is_first_fragment([o0, o1]) && is_mld(kind) {
        NoMessage::Malformed(Counter::MalformedFragment)
    } else {
        NoMessage::Other
    }
}

#[inline(always)]
fn message<P: PacketRead + ?Sized>(
    packet: &P,
    head: &[u8; REPORT_V2_BYTES],
    start: usize,
    end: usize,
) -> Result<Message, NoMessage> {
    let [kind, _, _, _, code_high, code_low, count_high, count_low] = *head;
    let length = end - start;
    if kind == LISTENER_REPORT_V2 {
        return Ok(Message::ReportV2(ReportV2 {
            count: u16::from_be_bytes([count_high, count_low]),
            offset: start + REPORT_V2_BYTES,
            end,
        }));
    }
    if length < V1_BYTES {
        return Err(NoMessage::Malformed(Counter::MalformedLength));
    }
    let multicast_address = packet.read::<16>(start + 8)?;
    if kind == LISTENER_QUERY {
        let max_resp_code = u16::from_be_bytes([code_high, code_low]);
        return query(packet, multicast_address, max_resp_code, start, length).map(Message::Query);
    }
    if !group::is_multicast(&multicast_address) {
        return Err(NoMessage::Malformed(Counter::MalformedAddress));
    }
    if kind == LISTENER_DONE {
        Ok(Message::Done(multicast_address))
    } else {
        Ok(Message::ReportV1(multicast_address))
    }
}

/// Decodes a Query; its length tells the version (RFC 9777 §8.1).
#[inline(always)]
fn query<P: PacketRead + ?Sized>(
    packet: &P,
    multicast_address: Address,
    max_resp_code: u16,
    start: usize,
    length: usize,
) -> Result<Query, NoMessage> {
    if !ipv6::is_unspecified(&multicast_address) && !group::is_multicast(&multicast_address) {
        return Err(NoMessage::Malformed(Counter::MalformedAddress));
    }
    if length == V1_BYTES {
        return Ok(Query {
            multicast_address,
            max_response_delay_ms: u32::from(max_resp_code),
            robustness: ROBUSTNESS_VARIABLE,
            query_interval_seconds: QUERY_INTERVAL_SECONDS,
            version: 1,
        });
    }
    if length < QUERY_V2_BYTES {
        return Err(NoMessage::Malformed(Counter::MalformedLength));
    }
    let [flags, qqic, s0, s1] = packet.read::<4>(start + V1_BYTES)?;
    let sources = usize::from(u16::from_be_bytes([s0, s1]));
    if QUERY_V2_BYTES + sources * SOURCE_BYTES > length {
        return Err(NoMessage::Malformed(Counter::MalformedLength));
    }
    let qrv = flags & 0x07;
    Ok(Query {
        multicast_address,
        max_response_delay_ms: max_response_delay_ms(max_resp_code),
        robustness: if qrv == 0 { ROBUSTNESS_VARIABLE } else { qrv },
        query_interval_seconds: match qqic {
            0 => QUERY_INTERVAL_SECONDS,
            _ => query_interval_seconds(qqic),
        },
        version: 2,
    })
}

/// Decodes the Maximum Response Code to milliseconds: a floating-point value from 32768 on (RFC
/// 9777 §5.1.3).
#[inline(always)]
pub fn max_response_delay_ms(code: u16) -> u32 {
    if code < 0x8000 {
        return u32::from(code);
    }
    let exponent = u32::from(code >> 12) & 0x07;
    (u32::from(code & 0x0fff) | 0x1000) << (exponent + 3)
}

/// Decodes the Querier's Query Interval Code to seconds: a floating-point value from 128 on (RFC
/// 9777 §5.1.9).
#[inline(always)]
pub fn query_interval_seconds(code: u8) -> u32 {
    if code < 0x80 {
        return u32::from(code);
    }
    let exponent = u32::from(code >> 4) & 0x07;
    (u32::from(code & 0x0f) | 0x10) << (exponent + 3)
}
