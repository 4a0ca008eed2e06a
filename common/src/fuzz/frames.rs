//! Arbitrary frames through the parsers and rewrites of the kernel programs.

use crate::group;
use arbitrary::Unstructured;
use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};

use super::finish;
use crate::forward;
use crate::handover;
use crate::maps::{BridgeNumber, RelayFlow, StreamKey, Subscriber};
use crate::relay::{self, Endpoints};
use crate::trace::{Decision, Record};
use crate::wire::datagram::{self, Header};
use crate::wire::neighbour::{self, Kind};
use crate::wire::signalling::{self, PORT, Signalling};
use crate::wire::{checksum, ipv6, mld, udp};

/// Flag in the input: leave the lengths of the datagram unchanged.
const AS_IT_IS: u16 = 0x8000;

/// One frame: headers, signalling, and the packet of a handover.
pub(super) fn run(bytes: &[u8]) {
    let Some(frame) = mld::ipv6_frame(bytes) else {
        assert_eq!(handover::packet(bytes), None);
        return;
    };
    let theirs = LaxSlicedPacket::from_ethernet(bytes).expect("a frame for etherparse");
    let Some(LaxNetSlice::Ipv6(ip)) = &theirs.net else {
        unreachable!("no IPv6 for etherparse: {bytes:02x?}");
    };
    assert_eq!(ip.header().source(), frame.header.source);
    assert_eq!(ip.header().destination(), frame.header.destination);
    assert_eq!(ip.header().payload_length(), frame.header.payload_length);
    assert_eq!(ip.header().hop_limit(), frame.header.hop_limit);

    let ports = (frame.header.next_header == udp::NEXT_HEADER)
        .then(|| udp::parse(bytes, frame.payload).ok())
        .flatten();
    if let (Some(ports), Some(TransportSlice::Udp(udp))) = (ports, &theirs.transport) {
        assert_eq!(ports.source, udp.source_port());
        assert_eq!(ports.destination, udp.destination_port());
    }
    let class = signalling::classify(bytes, &frame);
    if class != Signalling::Other {
        assert!(ipv6::is_link_local(&frame.header.source));
    }
    match (class, ports) {
        (Signalling::Request, Some(ports)) => assert_eq!(ports.destination, PORT),
        (Signalling::Answer, Some(ports)) => assert_eq!(ports.source, PORT),
        (Signalling::Other, Some(ports)) if ipv6::is_link_local(&frame.header.source) => {
            assert!(ports.source != PORT && ports.destination != PORT);
        }
        _ => {}
    }

    if let Some(packet) = handover::packet(bytes) {
        let stream = &packet.stream;
        assert!(group::is_routable(&stream.multicast_address));
        assert_eq!(handover::packet(bytes), Some(packet));
        let payload = packet.payload;
        assert!(payload.length == 0 || payload.offset + usize::from(payload.length) <= bytes.len());
        handover::fingerprint(bytes, payload.offset, payload.length).expect("is all there");
    }
    let record = Record::by_agent(1, 2, Decision::Replayed, 3, bytes);
    let flow = record.flow().expect("its headers are in the record");
    assert_eq!(flow.source, frame.header.source);
    assert_eq!(flow.destination, frame.header.destination);
    assert_eq!(flow.vlan, frame.vlan);
}

/// A Neighbor Solicitation or Advertisement.
pub(super) fn neighbour(bytes: &[u8]) {
    let mut frame = bytes.to_vec();
    finish(&mut frame, 54);
    let Some(message) = neighbour::parse(&frame[..]) else {
        return;
    };
    assert!(!group::is_multicast(&message.target));
    assert!(!group::is_multicast(&message.source));
    if message.is_probe() {
        assert_eq!(
            message.destination,
            neighbour::solicited_node(&message.target)
        );
        assert_eq!(message.claimant(), message.source_mac);
        if let Some(nonce) = message.nonce {
            let again = neighbour::probe(&message.target, message.source_mac, nonce);
            let again = neighbour::parse(&again[..]).expect("our own probe");
            assert_eq!(again, message);
        }
    }
    if let Kind::Advertisement { solicited, .. } = message.kind {
        assert!(!solicited || !group::is_multicast(&message.destination));
    }
}

/// A datagram that a relay sends and an agent restores: the checksum stays.
pub(super) fn relayed(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let (Ok(relay_address), Ok(agent_address), Ok(choice)) =
        (input.arbitrary(), input.arbitrary(), input.arbitrary())
    else {
        return;
    };
    let choice: u16 = choice;
    let mut frame = input.take_rest().to_vec();
    if choice & AS_IT_IS == 0 {
        make_whole(&mut frame);
    }
    let Ok(header) = Header::read(&frame[..]) else {
        return;
    };
    assert_eq!(&header.bytes()[..], &frame[..datagram::HEADER_BYTES]);
    if !header.is_ipv6() || !header.is_whole(frame.len()) {
        return;
    }
    let stream = StreamKey {
        multicast_address: header.destination,
        source: header.source,
        source_port: u16::from_be(header.source_port),
        destination_port: u16::from_be(header.destination_port),
        vlan: 0,
        bridge: BridgeNumber(choice),
    };
    let mut pairs = relay::port_pairs(&stream, &relay_address, &agent_address);
    let Some((relay_port, agent_port)) = pairs.nth(usize::from(choice % 64)) else {
        unreachable!("there are 15,000 pairs");
    };
    let endpoints = Endpoints {
        relay_address,
        relay_port,
        agent_address,
        agent_port,
    };
    assert!(relay::is_neutral(&stream, &endpoints));
    let sum = |header: &Header, frame: &mut [u8]| {
        frame[..datagram::HEADER_BYTES].copy_from_slice(&header.bytes());
        let length = usize::from(u16::from_be(header.length));
        let pseudo =
            checksum::pseudo_header(&header.source, &header.destination, length as u32, 17);
        checksum::sum(&*frame, 54, length)
            .ok()
            .map(|sum| checksum::fold(sum + pseudo) % 0xffff)
    };
    let before = sum(&header, &mut frame);
    let mut sent = header;
    let subscriber = Subscriber {
        lease_end_ns: 1,
        relay_address,
        agent_address,
        relay_port,
        agent_port,
        address_difference: relay::to_agent(&stream, &endpoints),
    };
    relay::send_to(&mut sent, &subscriber, [[2; 6], [4; 6]]);
    assert_eq!(sum(&sent, &mut frame), before);
    let mut restored = sent;
    let flow = RelayFlow {
        session: 1,
        stream,
        agent_address,
        address_difference: relay::to_multicast(&stream, &endpoints),
        pad: 0,
    };
    relay::restore(&mut restored, &flow);
    assert_eq!(sum(&restored, &mut frame), before);
    assert!(relay::is_restored(
        restored.destination_mac,
        restored.source_mac
    ));
    restored.destination_mac = header.destination_mac;
    restored.source_mac = header.source_mac;
    restored.hop_limit = header.hop_limit;
    assert_eq!(restored, header);
    sent_on(header, agent_address);
}

/// Turns a frame into an IPv6 packet with consistent lengths.
fn make_whole(frame: &mut [u8]) {
    let length = frame.len().saturating_sub(54) as u16;
    for (offset, bytes) in [
        (12, [0x86, 0xdd]),
        (14, [0x60, 0]),
        (18, length.to_be_bytes()),
        (58, length.to_be_bytes()),
    ] {
        if let Some(place) = frame.get_mut(offset..offset + 2) {
            place.copy_from_slice(&bytes);
        }
    }
}

/// A forwarded packet: the checksum follows the new destination.
fn sent_on(header: Header, to: [u8; 16]) {
    if forward::stays(&header) || header.hop_limit == 0 {
        return;
    }
    let mut moved = header;
    forward::send_on(&mut moved, &to, header.hop_limit, [[2; 6], [4; 6]]);
    let folded = |address: &[u8; 16]| {
        let sum = checksum::sum(&address[..], 0, 16).expect("16 bytes");
        checksum::fold(sum)
    };
    let difference = forward::difference(&header.destination, &to);
    let expected = checksum::fold(u64::from(folded(&header.destination)) + u64::from(difference));
    assert_eq!(expected % 0xffff, folded(&to) % 0xffff);
    assert_eq!(moved.hop_limit, header.hop_limit - 1);
}
