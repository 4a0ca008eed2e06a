//! Classification of packets as signalling between VMs and agents ([`crate::signal`]), without
//! decoding a message.
//!
//! A signalling datagram is UDP over IPv6 from a link-local address. A VM sends to [`PORT`] from
//! any other port; an agent answers from [`PORT`]. No sender uses extension headers: a datagram
//! with extension headers is never valid signalling, whatever a receiver would accept.

use crate::maps::Address;
use crate::packet::PacketRead;
use crate::wire::mld::Ipv6Frame;
use crate::wire::{ipv6, udp};

/// UDP and TCP port of all signalling.
pub const PORT: u16 = 47411;
/// Mark of packets from this host's agent to VMs: "roam". Neither a VM nor a process without
/// CAP_NET_ADMIN or CAP_NET_RAW can set the mark.
pub const AGENT_MARK: u32 = 0x726f_616d;

/// Limit of headers that the classification reads, UDP included. No sender uses as many.
const HEADERS: usize = 5;

/// Class of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signalling {
    /// The packet is not signalling.
    Other,
    /// A datagram to an agent's port.
    Request,
    /// A datagram from an agent's port.
    Answer,
    /// A datagram to or from an agent's port behind extension headers, or a packet with more
    /// headers than the limit.
    Hidden,
}

/// Returns whether the first 62 bytes of a packet allow another class than [`Signalling::Other`].
/// `ports` are the 4 bytes after the IPv6 header; they are ports only if `next_header` is UDP.
#[inline(always)]
pub fn may_be(source: &Address, next_header: u8, ports: [u16; 2]) -> bool {
    ipv6::is_link_local(source)
        && if next_header == udp::NEXT_HEADER {
            ports.contains(&PORT)
        } else {
            is_walked(next_header)
        }
}

/// Returns the class of a packet.
#[inline(always)]
pub fn classify<P: PacketRead + ?Sized>(packet: &P, frame: &Ipv6Frame) -> Signalling {
    if !ipv6::is_link_local(&frame.header.source) {
        return Signalling::Other;
    }
    let mut next_header = frame.header.next_header;
    let mut offset = frame.payload;
    for _ in 0..HEADERS {
        if !is_walked(next_header) {
            return Signalling::Other;
        }
        // Each of these headers has at least 8 bytes, and the first 4 contain all fields in use.
        let Ok([following, length, b2, b3]) = packet.read::<4>(offset) else {
            return truncated(frame);
        };
        let bytes = match next_header {
            udp::NEXT_HEADER => {
                let source = u16::from_be_bytes([following, length]);
                let destination = u16::from_be_bytes([b2, b3]);
                return datagram(frame, source, destination);
            }
            ipv6::FRAGMENT if u16::from_be_bytes([b2, b3]) >> 3 != 0 => {
                // No receiver can use the datagram without its first fragment.
                return Signalling::Other;
            }
            ipv6::FRAGMENT => 8,
            ipv6::AUTHENTICATION => (usize::from(length) + 2) * 4,
            _ => (usize::from(length) + 1) * 8,
        };
        next_header = following;
        offset += bytes;
    }
    Signalling::Hidden
}

#[inline(always)]
fn is_walked(next_header: u8) -> bool {
    matches!(
        next_header,
        udp::NEXT_HEADER
            | ipv6::HOP_BY_HOP
            | ipv6::ROUTING
            | ipv6::FRAGMENT
            | ipv6::AUTHENTICATION
            | ipv6::DESTINATION_OPTIONS
    )
}

/// Class of a packet that ends within its headers. A receiver may still reassemble such a packet,
/// although RFC 7112 forbids it.
#[inline(always)]
fn truncated(frame: &Ipv6Frame) -> Signalling {
    if frame.header.next_header == udp::NEXT_HEADER {
        Signalling::Other
    } else {
        Signalling::Hidden
    }
}

#[inline(always)]
fn datagram(frame: &Ipv6Frame, source: u16, destination: u16) -> Signalling {
    if source != PORT && destination != PORT {
        Signalling::Other
    } else if frame.header.next_header != udp::NEXT_HEADER {
        Signalling::Hidden
    } else if source == PORT {
        Signalling::Answer
    } else {
        Signalling::Request
    }
}

#[cfg(test)]
mod tests {
    use std::vec;
    use std::vec::Vec;

    use super::*;
    use crate::testing::frame::Frame;
    use crate::wire::mld::ipv6_frame;

    fn datagram(ports: (u16, u16)) -> Frame {
        Frame::udp("fe80::2a", "ff02::1", ports, b"search")
    }

    /// The glance must never overlook what the whole look finds.
    fn of(frame: &Frame) -> Signalling {
        let bytes = frame.bytes();
        let frame = ipv6_frame(&bytes[..]).unwrap();
        let found = classify(&bytes[..], &frame);
        if let Some(&[a, b, c, d]) = bytes.get(frame.payload..frame.payload + 4) {
            let ports = [[a, b], [c, d]].map(u16::from_be_bytes);
            let header = &frame.header;
            assert!(
                found == Signalling::Other || may_be(&header.source, header.next_header, ports)
            );
        }
        found
    }

    #[test]
    fn a_glance_is_enough_for_other_datagrams_and_sources() {
        let source = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        assert!(!may_be(&source, udp::NEXT_HEADER, [5000, 5001]));
        assert!(!may_be(&source, 6, [PORT, PORT]), "TCP");
        assert!(may_be(&source, udp::NEXT_HEADER, [5000, PORT]));
        assert!(may_be(&source, udp::NEXT_HEADER, [PORT, 5000]));
        assert!(may_be(&source, ipv6::FRAGMENT, [0, 0]));
        let mut routable = source;
        routable[0] = 0x20;
        assert!(!may_be(&routable, udp::NEXT_HEADER, [PORT, PORT]));
    }

    fn options() -> (u8, Vec<u8>) {
        (60, vec![0, 1, 4, 0, 0, 0, 0])
    }

    #[test]
    fn port_tells_who_speaks() {
        for (ports, expected) in [
            ((5000, PORT), Signalling::Request),
            ((PORT, 5000), Signalling::Answer),
            ((PORT, PORT), Signalling::Answer),
            ((5000, 5001), Signalling::Other),
        ] {
            assert_eq!(of(&datagram(ports)), expected, "{ports:?}");
            let tagged = datagram(ports).with(|f| f.vlan = Some(7));
            assert_eq!(of(&tagged), expected, "{ports:?}");
        }
    }

    #[test]
    fn datagram_of_another_scope_or_protocol_is_none() {
        let global = Frame::udp("2001:db8::1", "ff02::1", (PORT, PORT), b"x");
        assert_eq!(of(&global), Signalling::Other);
        let tcp = datagram((PORT, PORT)).with(|f| f.protocol = 6);
        assert_eq!(of(&tcp), Signalling::Other);
        let short = datagram((PORT, PORT)).with(|f| f.body.truncate(3));
        assert_eq!(of(&short), Signalling::Other);
    }

    #[test]
    fn extension_headers_hide_nothing() {
        let fragment = (44, vec![0, 0, 1, 0, 0, 0, 7]);
        let authentication = (51, vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let routing = (43, vec![0, 4, 0, 0, 0, 0, 0]);
        for headers in [
            vec![options()],
            vec![fragment.clone()],
            vec![authentication],
            vec![routing],
            vec![fragment.clone(), options()],
            vec![options(), options(), options(), options()],
        ] {
            for ports in [(PORT, 5000), (5000, PORT)] {
                let hidden = datagram(ports).with(|f| f.headers = headers.clone());
                assert_eq!(of(&hidden), Signalling::Hidden, "{headers:?}");
            }
            let other = datagram((5000, 5353)).with(|f| f.headers = headers.clone());
            let expected = match headers.len() {
                4 => Signalling::Other,
                _ => of(&datagram((5000, 5353))),
            };
            assert_eq!(of(&other), expected, "{headers:?}");
        }
        let options_first =
            datagram((PORT, 5000)).with(|f| f.options = Some(vec![1, 4, 0, 0, 0, 0]));
        assert_eq!(of(&options_first), Signalling::Hidden);
        let cut = datagram((PORT, 5000)).with(|f| {
            f.headers = vec![fragment];
            f.body.truncate(2);
        });
        assert_eq!(of(&cut), Signalling::Hidden);
    }

    #[test]
    fn more_headers_than_anybody_sends_are_not_waited_for() {
        let many = datagram((5000, 5353)).with(|f| f.headers = vec![options(); HEADERS]);
        assert_eq!(of(&many), Signalling::Hidden);
    }

    #[test]
    fn later_fragment_is_none() {
        let later =
            datagram((PORT, PORT)).with(|f| f.headers = vec![(44, vec![0, 0, 9, 0, 0, 0, 7])]);
        assert_eq!(of(&later), Signalling::Other);
    }
}
