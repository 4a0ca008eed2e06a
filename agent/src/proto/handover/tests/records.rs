//! Tests of the source's cut message.

use common::handover::flow_hash_of;
use common::maps::{Delivered, GateRecord, StreamKey};
use common::signal::CutBasis;

use super::*;
use crate::proto::Timestamp;
use crate::proto::handover::{Cut, Reading, nic_cut};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const END: Timestamp = Timestamp(u64::MAX);

/// Returns the record of frame `number`, which arrived in millisecond `number`.
fn record(stream: &StreamKey, number: u64) -> GateRecord {
    GateRecord {
        number,
        flow: flow_hash_of(stream),
        fingerprint: number * 10,
        at_ns: number * 1_000_000,
    }
}

fn passed(packets: u64) -> Delivered {
    Delivered { packets, bytes: 0 }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().map(|word| u64::from_le_bytes(*word)).collect()
}

fn number(number: u64) -> Cut {
    Cut::Number {
        number,
        overflow: false,
    }
}

#[test]
fn flow_has_what_entered_up_to_the_cut() {
    let flows = [(stream(2), passed(9)), (stream(1), passed(9))];
    let mut records: Vec<_> = (1..=20)
        .map(|n| record(&stream(1 + (n % 2) as u16), n))
        .collect();
    records.reverse();
    records.push(GateRecord::default());
    let reach = nic_cut(MAC, &number(15), &records, &read(&flows, END));
    let [first, second] = &reach.cut.flows[..] else {
        panic!("{reach:?}");
    };
    assert_eq!(reach.unknown_records, 0);
    assert_eq!(*first.multicast_address, stream(1).multicast_address);
    assert_eq!(first.delivered, 7);
    assert_eq!(words(&first.fingerprints), [20, 40, 60, 80, 100, 120, 140]);
    assert_eq!(second.delivered, 8);
    assert_eq!(second.last_ns, 15_000_000);
}

#[test]
fn flow_that_began_after_the_cut_is_left_out() {
    let flows = [(stream(1), passed(5))];
    let records: Vec<_> = (11..=15).map(|n| record(&stream(1), n)).collect();
    assert!(
        nic_cut(MAC, &number(10), &records, &read(&flows, END))
            .cut
            .flows
            .is_empty()
    );
}

#[test]
fn records_of_unknown_flows_are_counted() {
    let records: Vec<_> = (1..=5).map(|n| record(&stream(1), n)).collect();
    assert_eq!(
        nic_cut(MAC, &number(10), &records, &read(&[], END)).unknown_records,
        5
    );
}

#[test]
fn cut_by_time_has_what_came_before() {
    let flows = [(stream(1), passed(5))];
    let records: Vec<_> = (1..=5).map(|n| record(&stream(1), n)).collect();
    let cut = Cut::Time(Timestamp(3_500_000));
    let reach = nic_cut(MAC, &cut, &records, &read(&flows, END));
    assert_eq!(reach.cut.flows[0].delivered, 3);
    assert_eq!(reach.cut.basis, common::signal::CutBasis::Time);
}

#[test]
fn count_of_a_slot_that_was_written_over_is_that_of_the_map() {
    let flows = [(stream(1), passed(50_000)), (stream(2), passed(3))];
    let records: Vec<_> = (40_001..=40_000 + 16_384)
        .map(|n| record(&stream(1), n))
        .collect();
    // At the reading of the map, 50,000 packets had arrived.
    let counted = Timestamp(50_000 * 1_000_000);
    let reach = nic_cut(MAC, &number(49_000), &records, &read(&flows, counted));
    let [first, second] = &reach.cut.flows[..] else {
        panic!("{reach:?}");
    };
    assert_eq!(first.delivered, 49_000);
    assert_eq!(first.last_ns, 49_000 * 1_000_000);
    assert_eq!(second.delivered, 3);
    assert_eq!(second.last_ns, 40_001 * 1_000_000);
    assert!(second.fingerprints.is_empty());
}

#[test]
fn packets_that_come_while_the_map_is_read_are_not_taken_for_had() {
    let records: Vec<_> = (40_001..=40_000 + 16_384)
        .map(|n| record(&stream(1), n))
        .collect();
    // Packet n arrives in millisecond n, and is counted before the reading ends, or not.
    let reading = |from_us: u64, packets, until_us: u64| Reading {
        from: Timestamp(from_us * 1000),
        packets,
        until: Timestamp(until_us * 1000),
    };
    let disturbed = reading(49_500_500, 49_505, 49_510_500);
    let quiet = reading(49_600_500, 49_600, 49_600_600);
    let delivered = |readings: &[Reading]| {
        let flows = [(stream(1), readings.to_vec())];
        let reach = nic_cut(MAC, &number(49_000), &records, &flows);
        reach.cut.flows[0].delivered
    };
    assert_eq!(delivered(&[disturbed, quiet]), 49_000);
    assert_eq!(delivered(&[quiet, disturbed]), 49_000);
    assert_eq!(delivered(&[disturbed]), 48_995, "rather too few");
}

#[test]
fn fingerprints_are_those_of_the_last_second_but_some_in_any_case() {
    let flows = [(stream(1), passed(0))];
    let spread = |ms: u64| -> Vec<_> {
        (1..=5000)
            .map(|n| GateRecord {
                at_ns: n * ms * 1_000_000,
                ..record(&stream(1), n)
            })
            .collect()
    };
    for (ms, expected) in [(1, 1001), (10, 101), (500, 16)] {
        let reach = nic_cut(MAC, &number(5000), &spread(ms), &read(&flows, END));
        let fingerprints = words(&reach.cut.flows[0].fingerprints);
        assert_eq!(fingerprints.len(), expected);
        assert_eq!(fingerprints.last(), Some(&50_000));
    }
}

#[test]
fn message_is_bounded() {
    let flows: Vec<_> = (0..900).map(|n| (stream(n), passed(0))).collect();
    // Ten flows have 10,000 packets each, the others 100.
    let records: Vec<_> = (0..10_000u64)
        .flat_map(|round| (0..if round < 100 { 900 } else { 10 }).map(move |flow| (round, flow)))
        .zip(1..)
        .map(|((_, flow), n)| GateRecord {
            at_ns: 1,
            ..record(&stream(flow), n)
        })
        .collect();
    let cut = nic_cut(MAC, &number(u64::MAX), &records, &read(&flows, END)).cut;
    let counts: Vec<usize> = cut.flows.iter().map(|f| f.fingerprints.len() / 8).collect();
    assert!(counts.iter().sum::<usize>() <= 65_536);
    assert!(counts.iter().sum::<usize>() > 64_000);
    let message = common::signal::PeerMessage::HandoverCut(common::signal::HandoverCut {
        clock_ns: u64::MAX,
        nics: vec![cut],
    });
    assert!(message.encode(u64::MAX).len() < 600 * 1024);
}

#[test]
fn frames_of_one_flow_say_where_a_cut_among_them_is() {
    let flows = [(stream(1), passed(20)), (stream(2), passed(20))];
    let among = Cut::Among {
        after: 10,
        had: 3,
        until: 16,
    };
    let said = |records: &[GateRecord]| {
        let cut = nic_cut(MAC, &among, records, &read(&flows, END)).cut;
        let delivered: Vec<_> = cut.flows.iter().map(|flow| flow.delivered).collect();
        (cut.basis, delivered)
    };
    let flow = |number| stream(if number > 10 { 1 } else { 2 });
    let mut records: Vec<_> = (1..=20).map(|n| record(&flow(n), n)).collect();
    assert_eq!(said(&records), (CutBasis::Count, vec![3, 10]));
    // A packet of another flow, or of none, may be among the three.
    records[12] = record(&stream(2), 13);
    assert_eq!(said(&records), (CutBasis::Overflow, vec![10]));
    records.remove(12);
    assert_eq!(said(&records), (CutBasis::Overflow, vec![10]));
}
