use std::vec;
use std::vec::Vec;

use etherparse::{PacketBuilder, VlanId};
use proptest::prelude::*;

use super::*;
use crate::maps::{Address, BridgeNumber};
use crate::snoop;
use crate::testing::frame::{Frame, address, record};

const GROUP: &str = "ff3e:1::1234";
const SOURCE: &str = "2001:db8::1";

fn udp(payload: &[u8]) -> Frame {
    Frame::udp(SOURCE, GROUP, (5000, 5004), payload)
}

fn packet_of(frame: &Frame) -> Option<Packet> {
    packet(&frame.bytes()[..])
}

fn stream(ports: (u16, u16), vlan: u16) -> StreamKey {
    StreamKey {
        multicast_address: address(GROUP),
        source: address(SOURCE),
        source_port: ports.0,
        destination_port: ports.1,
        vlan,
        bridge: NO_BRIDGE,
    }
}

/// The fingerprint of a frame's packet.
fn fingerprint_of(frame: &[u8]) -> u64 {
    let Payload { offset, length } = packet(frame).unwrap().payload;
    fingerprint(frame, offset, length).unwrap()
}

#[test]
fn datagram_is_of_the_flow_of_its_addresses_and_ports() {
    let found = packet_of(&udp(b"hello")).unwrap();
    assert_eq!(found.stream, stream((5000, 5004), 0));
    let payload = Payload {
        offset: 62,
        length: 5,
    };
    assert_eq!(found.payload, payload);
}

#[test]
fn tag_in_the_frame_and_in_metadata_are_the_same_flow() {
    let in_frame = udp(b"hello").with(|frame| frame.vlan = Some(0x2007));
    let found = packet_of(&in_frame).unwrap();
    assert_eq!(found.stream, stream((5000, 5004), 7));
    assert_eq!(found.payload.offset, 66);
    let in_metadata = snoop::Frame {
        bytes: &udp(b"hello").bytes(),
        vlan_metadata: 7,
    };
    let found = packet(&in_metadata).unwrap();
    assert_eq!(found.stream, stream((5000, 5004), 7));
    assert_eq!(found.payload.offset, 62);
}

#[test]
fn frame_of_two_tags_is_left_alone() {
    let mut frame = udp(b"hello").with(|frame| frame.vlan = Some(7)).bytes();
    frame.splice(12..12, [0x81, 0, 0, 8]);
    assert_eq!(packet(&frame[..]), None);
    let one_in_metadata = snoop::Frame {
        bytes: &udp(b"hello").with(|frame| frame.vlan = Some(7)).bytes(),
        vlan_metadata: 8,
    };
    assert_eq!(packet(&one_in_metadata), None);
}

#[test]
fn what_is_not_udp_right_after_the_header_has_no_ports() {
    let fragment =
        udp(b"hello").with(|frame| frame.headers = vec![(44, vec![0, 0, 1, 0, 0, 0, 7])]);
    let options = udp(b"hello").with(|frame| frame.options = Some(vec![1, 4, 0, 0, 0, 0]));
    let other = udp(b"hello").with(|frame| frame.protocol = 103);
    for (frame, length) in [(fragment, 8 + 13), (options, 8 + 13), (other, 13)] {
        let found = packet_of(&frame).unwrap();
        assert_eq!(found.stream, stream((0, 0), 0), "{frame:?}");
        assert_eq!(found.payload, Payload { offset: 54, length });
    }
}

#[test]
fn datagram_without_a_whole_header_has_no_ports() {
    let frame = udp(b"").with(|frame| frame.body.truncate(7));
    let found = packet_of(&frame).unwrap();
    assert_eq!(found.stream, stream((0, 0), 0));
    let payload = Payload {
        offset: 54,
        length: 7,
    };
    assert_eq!(found.payload, payload);
}

#[test]
fn scopes_that_end_at_the_link_are_left_alone() {
    for scope in 0..16 {
        let destination = std::format!("ff1{scope:x}::1");
        let frame = Frame::udp(SOURCE, &destination, (1, 2), b"hello");
        assert_eq!(packet_of(&frame).is_some(), scope > 2, "{destination}");
    }
    let unicast = Frame::udp(SOURCE, "2001:db8::2", (1, 2), b"hello");
    assert_eq!(packet_of(&unicast), None);
    let mut ipv4 = udp(b"hello").bytes();
    ipv4[12..14].copy_from_slice(&[8, 0]);
    assert_eq!(packet(&ipv4[..]), None);
}

#[test]
fn mld_is_left_alone_whatever_it_is_sent_to() {
    let general = Frame::query("::", 1000, Some((2, 125)));
    let specific =
        Frame::query(GROUP, 1000, Some((2, 125))).with(|frame| frame.destination = address(GROUP));
    let report = Frame::report(&[record(4, GROUP, &[])]);
    let without_source = Frame::v1(131, GROUP).with(|frame| frame.source = [0; 16]);
    for frame in [
        general,
        specific.clone(),
        report,
        Frame::v1(131, GROUP),
        without_source,
    ] {
        assert_eq!(packet_of(&frame), None, "{frame:?}");
    }
    let routed = specific.clone().with(|frame| frame.hop_limit = 9);
    assert!(packet_of(&routed).is_some(), "MLD is not routed");
    let other = specific.with(|frame| frame.protocol = 17);
    assert!(packet_of(&other).is_some(), "not ICMPv6");
}

#[test]
fn padding_of_the_frame_is_no_payload() {
    let mut frame = udp(b"hello").bytes();
    let before = packet(&frame[..]);
    frame.extend([0; 20]);
    assert_eq!(packet(&frame[..]), before);
}

#[test]
fn relayed_copy_has_the_fingerprint_of_the_native_one() {
    let native = udp(&[7; 1316]);
    let relayed = native.clone().with(|frame| frame.hop_limit = 1);
    let mut relayed = relayed.bytes();
    relayed[6..12].copy_from_slice(b"\x02rcast");
    relayed[60..62].copy_from_slice(&[0x12, 0x34]);
    let native = native.bytes();
    assert_eq!(packet(&native[..]), packet(&relayed[..]));
    assert_eq!(fingerprint_of(&native), fingerprint_of(&relayed));
}

#[test]
fn one_tag_more_does_not_change_the_fingerprint() {
    let tagged = udp(&[7; 1316]).with(|frame| frame.vlan = Some(7));
    assert_eq!(
        fingerprint_of(&tagged.bytes()),
        fingerprint_of(&udp(&[7; 1316]).bytes())
    );
}

/// Bytes of a payload that the fingerprint covers, computed independently.
fn covered(length: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..length.min(64)).collect();
    if length >= 64 {
        places.extend(length - 16..length);
    }
    if length >= 512 {
        for part in 1..7 {
            places.extend(length * part / 7..length * part / 7 + 16);
        }
    }
    places
}

#[test]
fn every_covered_byte_counts() {
    for length in (0..130).chain([511, 512, 513, 1316, 1400, 9000]) {
        let payload: Vec<u8> = (0..length).map(|at| (at * 31 % 251) as u8).collect();
        let mut frame = udp(&payload).bytes();
        let before = fingerprint_of(&frame);
        for at in covered(length) {
            frame[62 + at] ^= 1;
            assert_ne!(fingerprint_of(&frame), before, "byte {at} of {length}");
            frame[62 + at] ^= 1;
        }
        assert_eq!(fingerprint_of(&frame), before);
    }
}

#[test]
fn packets_that_are_a_beginning_of_one_another_differ() {
    let mut seen = std::collections::HashSet::new();
    for length in 0..600 {
        assert!(seen.insert(fingerprint_of(&udp(&vec![0; length]).bytes())));
    }
}

#[test]
fn truncated_payload_has_no_fingerprint() {
    let frame = udp(&[7; 1400]).bytes();
    for end in 0..frame.len() {
        let result = fingerprint(&frame[..end], 62, 1400);
        assert_eq!(result, Err(Truncated), "{end} bytes");
    }
}

prop_compose! {
    fn any_stream()(
        multicast_address: Address,
        source: Address,
        ports: [u16; 2],
        vlan in 0..4096_u16,
        bridge: u16,
    ) -> StreamKey {
        let [source_port, destination_port] = ports;
        let bridge = BridgeNumber(bridge);
        StreamKey { multicast_address, source, source_port, destination_port, vlan, bridge }
    }
}

/// A key as words of memory.
fn words(stream: &StreamKey) -> [u64; 5] {
    let mut bytes = Vec::new();
    bytes.extend(stream.multicast_address);
    bytes.extend(stream.source);
    for number in [
        stream.source_port,
        stream.destination_port,
        stream.vlan,
        stream.bridge.0,
    ] {
        bytes.extend(number.to_ne_bytes());
    }
    let mut words = [0; 5];
    for (word, chunk) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_ne_bytes(*chunk);
    }
    words
}

proptest! {
    #[test]
    fn flow_hash_is_that_of_the_key_in_memory(stream in any_stream()) {
        prop_assert_eq!(flow_hash(words(&stream)), flow_hash_of(&stream));
    }

    #[test]
    fn flow_has_one_hash_on_all_hosts(stream in any_stream(), bridge: u16) {
        let elsewhere = StreamKey { bridge: BridgeNumber(bridge), ..stream };
        prop_assert_eq!(flow_hash(words(&elsewhere)), flow_hash(words(&stream)));
    }

    #[test]
    fn flows_that_differ_in_one_bit_differ(stream in any_stream(), bit in 0..304_usize) {
        let mut other = words(&stream);
        other[bit / 64] ^= 1 << (bit % 64);
        prop_assert_ne!(flow_hash(other), flow_hash_of(&stream));
    }

    #[test]
    fn datagrams_are_read_as_etherparse_writes_them(
        mut stream in any_stream(),
        scope in 3..16_u8,
        tagged: bool,
        payload in proptest::collection::vec(any::<u8>(), 0..1500),
    ) {
        stream.multicast_address[0] = 0xff;
        stream.multicast_address[1] = scope;
        let builder = PacketBuilder::ethernet2([2; 6], [3; 6]);
        let builder = if tagged {
            let vlan = VlanId::try_new(stream.vlan).unwrap();
            builder.single_vlan(vlan).ipv6(stream.source, stream.multicast_address, 9)
        } else {
            stream.vlan = 0;
            builder.ipv6(stream.source, stream.multicast_address, 9)
        };
        let mut frame = Vec::new();
        builder
            .udp(stream.source_port, stream.destination_port)
            .write(&mut frame, &payload)
            .unwrap();
        let found = packet(&frame[..]).unwrap();
        prop_assert_eq!(found.stream, StreamKey { bridge: NO_BRIDGE, ..stream });
        let Payload { offset, length } = found.payload;
        prop_assert_eq!(&frame[offset..], &payload);
        prop_assert_eq!(usize::from(length), payload.len());
    }

    #[test]
    fn fingerprint_differs_by_any_covered_byte(
        payload in proptest::collection::vec(any::<u8>(), 1..2000),
        place: prop::sample::Index,
        flip in 1..=255_u8,
    ) {
        let mut frame = udp(&payload).bytes();
        let before = fingerprint_of(&frame);
        let places = covered(payload.len());
        frame[62 + *place.get(&places)] ^= flip;
        prop_assert_ne!(fingerprint_of(&frame), before);
    }

    /// Truncation and changed bytes: the payload stays within the frame.
    #[test]
    fn broken_frames_are_read_within_their_bounds(
        kind in 0..3_u8,
        payload in proptest::collection::vec(any::<u8>(), 0..600),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        end: prop::sample::Index,
        vlan_metadata in 0..4096_u16,
    ) {
        let mut frame = udp(&payload)
            .with(|frame| match kind {
                0 => {}
                1 => frame.vlan = Some(7),
                _ => frame.options = Some(vec![5, 2, 0, 0, 1, 0]),
            })
            .bytes();
        for (place, byte) in changes {
            let place = place.index(frame.len().min(70));
            frame[place] = byte;
        }
        frame.truncate(end.index(frame.len() + 1));
        let frame = snoop::Frame { bytes: &frame, vlan_metadata };
        if let Some(Packet { payload: Payload { offset, length }, .. }) = packet(&frame) {
            prop_assert!(offset + usize::from(length) <= frame.bytes.len());
            prop_assert!(fingerprint(&frame, offset, length).is_ok());
        }
    }

    #[test]
    fn any_bytes_are_read_within_their_bounds(
        frame in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        if let Some(Packet { payload: Payload { offset, length }, .. }) = packet(&frame[..]) {
            prop_assert!(offset + usize::from(length) <= frame.len());
        }
    }
}
