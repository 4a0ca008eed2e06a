//! Tests of frames that a VM did not read before the stop.

use std::collections::BTreeMap;

use common::forward::{TCP, difference};
use common::maps::{Address, Gate, HeldFrame};
use common::wire::neighbour::ICMPV6;
use proptest::prelude::*;

use super::*;
use crate::proto::Timestamp;
use crate::proto::handover::{Cut, HoldLimits, Unread, UnreadReport, Way, split};

const NOW: Timestamp = Timestamp(1_000_000_000);
const SOURCE: Address = [0x20; 16];
const OLD: Address = [0x21; 16];
const NEW: Address = [0x22, 7, 1, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 5];

/// Returns an untagged frame with the given bytes after its IPv6 header.
fn frame(protocol: u8, hop_limit: u8, upper: &[u8]) -> Vec<u8> {
    let mut frame = vec![
        2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xdd, 0x60, 0, 0, 0,
    ];
    frame.extend((upper.len() as u16).to_be_bytes());
    frame.extend([protocol, hop_limit]);
    frame.extend(SOURCE);
    frame.extend(OLD);
    frame.extend(upper);
    frame
}

/// Returns an echo request with a number and a correct checksum.
fn echo(number: u8) -> Vec<u8> {
    let frame = frame(ICMPV6, 64, &[128, 0, 0, 0, 0, 1, 0, number]);
    finished(frame, 56)
}

/// Returns a TCP segment with the flags ACK, PSH, FIN and CWR.
fn segment(sequence: u32, payload: &[u8]) -> Vec<u8> {
    let mut upper = vec![0x1f, 0x40, 0x1f, 0x41];
    upper.extend(sequence.to_be_bytes());
    upper.extend([0, 0, 0, 9, 6 << 4, 0x99, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0]);
    upper.extend(payload);
    frame(TCP, 64, &upper)
}

/// Returns the one's complement sum of a packet's payload and pseudo-header; 0xffff for a correct
/// checksum.
fn sum_of(packet: &[u8]) -> u16 {
    let (header, upper) = packet.split_at(40);
    let mut bytes = header[8..40].to_vec();
    bytes.extend((upper.len() as u32).to_be_bytes());
    bytes.extend([0, 0, 0, header[6]]);
    bytes.extend(upper);
    sum(&bytes)
}

fn finished(mut frame: Vec<u8>, at: usize) -> Vec<u8> {
    frame[at..at + 2].fill(0);
    let checksum = !sum_of(&frame[14..]);
    frame[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    frame
}

fn head(number: u64) -> HeldFrame {
    HeldFrame {
        number,
        at_ns: (NOW + MS * number as u32).0,
        ifindex: 7,
        length: 0,
        vlan: 0,
        segment_bytes: 0,
        pad: 0,
    }
}

fn ways() -> BTreeMap<Address, Way> {
    let way = Way {
        to: NEW,
        difference: difference(&OLD, &NEW),
    };
    BTreeMap::from([(OLD, way)])
}

fn kept(numbers: &[u8]) -> Unread {
    let mut unread = Unread::new(LIMITS);
    for number in numbers {
        unread.push(&head((*number).into()), &echo(*number));
    }
    unread
}

/// Sends all packets possible, and returns them.
fn send(unread: &mut Unread) -> Vec<Vec<u8>> {
    let mut sent = Vec::new();
    while let Some((packet, to)) = unread.next(&ways()) {
        assert_eq!(to, NEW);
        sent.push(packet.to_vec());
        unread.sent();
    }
    sent
}

/// Returns the numbers of echo requests.
fn numbers(packets: &[Vec<u8>]) -> Vec<u8> {
    packets.iter().map(|packet| packet[47]).collect()
}

#[test]
fn what_is_behind_the_cut_is_sent_on_in_order_and_the_gate_told_when_nothing_waits() {
    let mut unread = kept(&[1, 2, 4, 3, 5]);
    assert_eq!(unread.done(0), Gate::CLOSED);
    assert_eq!(unread.next(&ways()), None);
    unread.cut(count(2));
    assert_eq!(unread.done(0), Gate::CLOSED);
    assert_eq!(numbers(&send(&mut unread)), [3, 4, 5]);
    assert_eq!(unread.done(0), 5);
    unread.push(&head(6), &echo(6));
    assert_eq!(unread.done(1), Gate::CLOSED);
    assert_eq!(numbers(&send(&mut unread)), [6]);
    // One frame found no room in the ring.
    assert_eq!(unread.done(1), 7);
    let (packets, dropped) = (4, 0);
    let report = UnreadReport { packets, dropped };
    assert_eq!(unread.take_report(), Some(report));
}

#[test]
fn a_cut_by_time_sends_on_what_came_then_or_later() {
    let mut unread = kept(&[1, 2, 3]);
    unread.cut(Cut::Time(NOW + MS * 2));
    assert_eq!(numbers(&send(&mut unread)), [2, 3]);
}

#[test]
fn packet_that_the_network_refuses_for_now_stays_the_next() {
    let mut unread = kept(&[1, 2]);
    unread.cut(count(0));
    let first = unread.next(&ways()).map(|(packet, _)| packet.to_vec());
    assert_eq!(
        unread.next(&ways()).map(|(packet, _)| packet.to_vec()),
        first
    );
    unread.given_up();
    assert_eq!(numbers(&send(&mut unread)), [2]);
    let (packets, dropped) = (1, 1);
    let report = UnreadReport { packets, dropped };
    assert_eq!(unread.take_report(), Some(report));
}

#[test]
fn vm_that_runs_on_reads_what_was_kept_and_later_numbers_go_on() {
    let mut unread = kept(&[1, 2]);
    unread.cut(count(1));
    let mut unread = unread.again();
    assert_eq!(unread.done(0), Gate::CLOSED);
    unread.push(&head(3), &echo(3));
    unread.cut(count(2));
    assert_eq!(numbers(&send(&mut unread)), [3]);
    assert_eq!(unread.done(0), 3);
}

#[test]
fn what_is_for_no_address_that_is_left_is_let_go() {
    let mut unread = kept(&[1]);
    unread.cut(count(0));
    assert_eq!(unread.next(&BTreeMap::new()), None);
    assert_eq!(unread.done(0), 1);
}

#[test]
fn memory_is_bounded_by_the_newest() {
    let mut unread = Unread::new(HoldLimits {
        bytes: 3000,
        ..LIMITS
    });
    for number in 0..100 {
        unread.push(&head(number), &echo(number as u8));
    }
    unread.cut(count(0));
    let sent = numbers(&send(&mut unread));
    assert!((5..50).contains(&sent.len()), "{sent:?}");
    assert_eq!(sent.last(), Some(&99));
}

#[test]
fn packet_has_the_new_destination_one_hop_limit_less_and_a_right_checksum() {
    let mut unread = kept(&[1]);
    unread.cut(count(0));
    let sent = send(&mut unread);
    let mut expected = echo(1).split_off(14);
    expected[7] = 63;
    expected[24..40].copy_from_slice(&NEW);
    assert_eq!(sent[0][..42], expected[..42]);
    assert_eq!(sent[0][44..], expected[44..]);
    assert_eq!(sum_of(&sent[0]), 0xffff);
}

#[test]
fn packet_of_few_bytes_has_the_new_destination_too() {
    const NO_NEXT_HEADER: u8 = 59;
    let mut unread = Unread::new(LIMITS);
    let padded = [frame(NO_NEXT_HEADER, 64, &[1, 2, 3]), vec![0; 16]].concat();
    unread.push(&head(1), &padded);
    unread.cut(count(0));
    let way = Way {
        to: NEW,
        difference: 0,
    };
    let ways = BTreeMap::from([(OLD, way)]);
    let (packet, to) = unread.next(&ways).unwrap();
    assert_eq!((to, packet.len()), (NEW, 43));
    assert_eq!(packet[24..], [&NEW[..], &[1, 2, 3]].concat());
}

#[test]
fn packet_whose_hop_limit_is_used_up_is_dropped_and_counted() {
    let mut unread = Unread::new(LIMITS);
    unread.push(&head(1), &frame(ICMPV6, 1, &[128, 0, 0, 0, 0, 1, 0, 1]));
    unread.cut(count(0));
    assert_eq!(unread.next(&ways()), None);
    let (packets, dropped) = (0, 1);
    let report = UnreadReport { packets, dropped };
    assert_eq!(unread.take_report(), Some(report));
}

proptest! {
    #[test]
    fn aggregated_segments_are_cut_into_what_they_were(
        payload in prop::collection::vec(any::<u8>(), 1..5000),
        segment_bytes in 1..2000u16,
        sequence: u32,
    ) {
        // As left by a network card's aggregation, or by a sender that leaves the checksum to the card.
        let whole = segment(sequence, &payload);
        let packets = split(&whole, segment_bytes);
        let count = payload.len().div_ceil(segment_bytes.into());
        prop_assert_eq!(packets.len(), count);
        let mut joined: Vec<u8> = Vec::new();
        for (number, packet) in packets.iter().enumerate() {
            let header = &packet[54..78];
            let at = sequence.wrapping_add(joined.len() as u32);
            prop_assert_eq!(&header[4..8], &at.to_be_bytes());
            if count > 1 {
                let (first, last) = (number == 0, number + 1 == count);
                let flags = 0x10 | if first { 0x80 } else { 0 } | if last { 9 } else { 0 };
                prop_assert_eq!(header[13], flags);
                prop_assert_eq!(sum_of(&packet[14..]), 0xffff);
            }
            prop_assert_eq!(&packet[18..20], &((packet.len() - 54) as u16).to_be_bytes());
            joined.extend(&packet[78..]);
        }
        prop_assert_eq!(joined, payload);
    }

    #[test]
    fn any_frame_is_taken(
        bytes in prop::collection::vec(any::<u8>(), 0..150),
        protocol in prop::sample::select(vec![6u8, 17, 58, 0, 44]),
        segment_bytes: u16,
    ) {
        for frame in [bytes.clone(), frame(protocol, 64, &bytes)] {
            let mut unread = Unread::new(LIMITS);
            unread.push(&HeldFrame { segment_bytes, ..head(1) }, &frame);
            unread.cut(count(0));
            send(&mut unread);
            prop_assert_eq!(unread.done(0), 1);
        }
    }
}
