//! Flows of frames, checksums and aggregated frames.

use proptest::prelude::*;

use super::*;
use crate::proto::handover::{finish_checksum, flow_of, split};

/// Offset of the UDP checksum in an untagged frame, bytes.
const CHECKSUM: usize = 60;

/// Returns the sum of the pseudo-header of an untagged frame.
fn partial(frame: &[u8]) -> u16 {
    let mut pseudo = frame[22..54].to_vec();
    pseudo.extend([0, 0, frame[58], frame[59], 0, 0, 0, 17]);
    sum(&pseudo)
}

/// Returns the correct checksum of an untagged frame.
fn right(frame: &[u8]) -> u16 {
    let mut whole = partial(frame).to_be_bytes().to_vec();
    let mut datagram = frame[54..].to_vec();
    datagram[6..8].fill(0);
    whole.extend(datagram);
    match !sum(&whole) {
        0 => 0xffff,
        sum => sum,
    }
}

fn field(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[CHECKSUM], frame[CHECKSUM + 1]])
}

fn with_field(mut frame: Vec<u8>, checksum: u16) -> Vec<u8> {
    frame[CHECKSUM..CHECKSUM + 2].copy_from_slice(&checksum.to_be_bytes());
    frame
}

#[test]
fn flow_of_a_datagram_has_its_ports_and_payload() {
    let frame = datagram(&stream(3), 1, b"payload");
    let flow = flow_of(&frame, 0).unwrap();
    assert_eq!(flow.stream, stream(3));
    assert_eq!((flow.payload, flow.length), (62, 7));
    for length in 0..frame.len() {
        assert_eq!(flow_of(&frame[..length], 0), None);
    }
}

#[test]
fn tag_is_found_in_the_frame_and_in_metadata() {
    let frame = datagram(&stream(3), 1, b"payload");
    let mut tagged = frame[..12].to_vec();
    tagged.extend([0x81, 0, 0, 42]);
    tagged.extend(&frame[12..]);
    let [within, beside] = [flow_of(&tagged, 0), flow_of(&frame, 42)].map(Option::unwrap);
    assert_eq!(within.stream, beside.stream);
    assert_eq!(within.stream.vlan, 42);
    assert_eq!(within.payload, beside.payload + 4);
}

#[test]
fn packet_without_udp_has_no_ports() {
    let mut frame = datagram(&stream(3), 1, b"payload");
    frame[20] = 58;
    let flow = flow_of(&frame, 0).unwrap();
    assert!(!flow.is_udp);
    assert_eq!(
        (flow.stream.source_port, flow.stream.destination_port),
        (0, 0)
    );
    assert_eq!((flow.payload, flow.length), (54, 15));
    assert_eq!(split(&frame, 4), [frame]);
}

#[test]
fn checksums_that_are_rare() {
    let (mut equal, mut zero) = (0, 0);
    for word in 0..=u16::MAX {
        let frame = datagram(&stream(1), 0, &word.to_be_bytes());
        let (partial, right) = (partial(&frame), right(&frame));
        // The field is correct although it holds only the pseudo-header's sum.
        let is_equal = partial == right;
        // A sum of zero means that there is no checksum.
        let is_zero = right == u16::MAX;
        if is_equal || is_zero {
            let mut frame = with_field(frame, partial);
            assert_eq!(finish_checksum(&mut frame), !is_equal);
            assert_eq!(field(&frame), right);
            equal += u32::from(is_equal);
            zero += u32::from(is_zero);
        }
    }
    assert!(equal > 0 && zero > 0);
}

proptest! {
    #[test]
    fn partial_checksum_is_finished(payload in prop::collection::vec(any::<u8>(), 0..5000)) {
        let frame = datagram(&stream(1), 0, &payload);
        let right = right(&frame);
        let mut frame = with_field(frame.clone(), partial(&frame));
        let is_right_already = field(&frame) == right;
        prop_assert_eq!(finish_checksum(&mut frame), !is_right_already);
        prop_assert_eq!(field(&frame), right);
        prop_assert!(!finish_checksum(&mut frame) || right == partial(&frame));
    }

    #[test]
    fn any_other_checksum_stays(
        payload in prop::collection::vec(any::<u8>(), 0..200),
        checksum: u16,
    ) {
        let frame = datagram(&stream(1), checksum, &payload);
        prop_assume!(checksum != partial(&frame));
        let mut finished = frame.clone();
        prop_assert!(!finish_checksum(&mut finished));
        prop_assert_eq!(finished, frame);
    }

    #[test]
    fn aggregated_frame_is_split(
        payload in prop::collection::vec(any::<u8>(), 1..5000),
        segment_bytes in 1..2000u16,
    ) {
        let frame = datagram(&stream(1), 0, &payload);
        let frame = with_field(frame.clone(), partial(&frame));
        let packets = split(&frame, segment_bytes);
        let mut joined: Vec<u8> = Vec::new();
        for packet in &packets {
            let flow = flow_of(packet, 0).unwrap();
            prop_assert_eq!(flow.stream, stream(1));
            prop_assert_eq!(usize::from(flow.length), packet.len() - 62);
            prop_assert!(flow.length <= segment_bytes);
            prop_assert_eq!(&packet[58..60], &(flow.length + 8).to_be_bytes());
            prop_assert_eq!(field(packet), right(packet));
            joined.extend(&packet[62..]);
        }
        prop_assert_eq!(packets.len(), payload.len().div_ceil(segment_bytes.into()));
        prop_assert_eq!(joined, payload);
    }

    #[test]
    fn any_bytes_are_taken(bytes in prop::collection::vec(any::<u8>(), 0..100), vlan: u16) {
        flow_of(&bytes, vlan);
        split(&bytes, vlan);
        finish_checksum(&mut bytes.clone());
    }
}
