//! Frames between nodes of MAT, built and checked by etherparse instead of Roamcast's own code.

use common::maps::Address;
use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};

const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

/// Returns a UDP datagram between fixed ports.
pub fn udp(source: Address, destination: Address, payload: &[u8]) -> Vec<u8> {
    udp_ports(source, destination, (5000, 6000), payload)
}

/// Returns a UDP datagram.
pub fn udp_ports(
    source: Address,
    destination: Address,
    ports: (u16, u16),
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(MACS.0, MACS.1)
        .ipv6(source, destination, 64)
        .udp(ports.0, ports.1)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

/// Returns a TCP segment.
pub fn tcp(source: Address, destination: Address, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(MACS.0, MACS.1)
        .ipv6(source, destination, 64)
        .tcp(5000, 6000, 1, 1000)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

/// Returns an ICMPv6 message with this type and code.
pub fn icmp(source: Address, destination: Address, kind: (u8, u8), payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(MACS.0, MACS.1)
        .ipv6(source, destination, 64)
        .icmpv6_raw(kind.0, kind.1, [0, 0, 5, 0])
        .write(&mut frame, payload)
        .unwrap();
    frame
}

/// Returns an ICMPv6 error that quotes the packet of a frame.
pub fn error(source: Address, destination: Address, about: &[u8]) -> Vec<u8> {
    icmp(source, destination, (2, 0), &about[14..])
}

/// Inserts extension headers in front of the upper layer, each given by its next header value and
/// the bytes after the first.
pub fn extended(frame: &[u8], headers: &[(u8, &[u8])]) -> Vec<u8> {
    let mut out = frame[..14].to_vec();
    let mut ip = frame[14..54].to_vec();
    let mut extensions = Vec::new();
    let mut next = ip[6];
    for (kind, bytes) in headers.iter().rev() {
        let mut header = vec![next];
        header.extend(*bytes);
        header.extend(&extensions);
        extensions = header;
        next = *kind;
    }
    ip[6] = next;
    let length = (extensions.len() + frame.len() - 54) as u16;
    ip[4..6].copy_from_slice(&length.to_be_bytes());
    out.extend(ip);
    out.extend(extensions);
    out.extend(&frame[54..]);
    out
}

/// Returns true if the checksum of an unfragmented packet is correct.
pub fn checksum_is_right(frame: &[u8]) -> bool {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(NetSlice::Ipv6(ip)) = &packet.net else {
        panic!("not IPv6");
    };
    let header = ip.header().to_header();
    match packet.transport.unwrap() {
        TransportSlice::Udp(it) => {
            let right = it
                .to_header()
                .calc_checksum_ipv6(&header, it.payload())
                .unwrap();
            right == it.checksum()
        }
        TransportSlice::Tcp(it) => {
            let right = it
                .to_header()
                .calc_checksum_ipv6(&header, it.payload())
                .unwrap();
            right == it.checksum()
        }
        TransportSlice::Icmpv6(it) => it.is_checksum_valid(header.source, header.destination),
        TransportSlice::Icmpv4(_) | TransportSlice::Igmp(_) => false,
    }
}

/// Returns source and destination.
pub fn addresses(frame: &[u8]) -> (Address, Address) {
    (
        frame[22..38].try_into().unwrap(),
        frame[38..54].try_into().unwrap(),
    )
}

/// Returns source and destination of the packet that an ICMPv6 error quotes.
pub fn quoted(frame: &[u8]) -> (Address, Address) {
    (
        frame[70..86].try_into().unwrap(),
        frame[86..102].try_into().unwrap(),
    )
}
