//! The kernel programs by program test-run: effect of a frame on the maps, counters and verdict;
//! and the same results in userspace for the same frames.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use common::counter::Counter;
use common::event::Kind;
use common::maps::FilterMode;
use common::snoop::KERNEL_RECORDS;
use common::testing::frame::{self, Frame, address, record};
use support::kernel::{self, Kernel, PASS, SHOT};

const GROUP: &str = "ff3e:1::1234";
const OTHER_GROUP: &str = "ff3e:1::4321";
const SSM: &str = "ff3e::1234";

/// Limit of instructions that the verifier walks per program, because they cost start-up time; the
/// kernel's limit is a million.
const VERIFIED_INSTRUCTIONS: u32 = 60_000;

#[test]
fn programs_load_within_the_verifiers_budget() {
    let Some(kernel) = Kernel::load() else { return };
    for (name, count) in kernel.verified_instructions() {
        println!("{name}: {count} instructions verified");
        assert!(count < VERIFIED_INSTRUCTIONS, "{name} takes {count}");
    }
}

#[test]
fn join_makes_a_listener_and_an_event() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    let verdict = kernel.snoop(&Frame::report(&[record(4, GROUP, &[])]).bytes());
    assert_eq!(verdict, PASS);
    let (key, listener) = kernel.listeners().pop().unwrap();
    assert_eq!(key.multicast_address, address(GROUP));
    assert_eq!(key.vlan, 0);
    assert_eq!(listener.filter_mode, FilterMode::Exclude as u8);
    assert_eq!(listener.mld_version, 2);
    assert_eq!(listener.guest_mac, frame::MAC);
    assert_eq!(listener.last_answer_ns, 0);
    assert_eq!(kernel.counted(), [(Counter::ReportsV2, 1)]);
    assert_eq!(kernel.events(), [Kind::Listener as u32]);
    assert_eq!(kernel.usage().listeners, 1);
    assert_eq!(kernel.usage().reports, 1);
}

#[test]
fn leave_removes_the_listener() {
    for leave in [
        Frame::report(&[record(3, GROUP, &[])]),
        Frame::v1(132, GROUP),
    ] {
        let Some(mut kernel) = Kernel::load() else {
            return;
        };
        kernel.snoop(&Frame::v1(131, GROUP).bytes());
        assert_eq!(kernel.listeners().len(), 1);
        kernel.snoop(&leave.bytes());
        assert!(kernel.listeners().is_empty());
        assert_eq!(kernel.usage().listeners, 0);
    }
}

#[test]
fn answer_to_a_query_is_told_even_without_a_change() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    let answer = Frame::report(&[record(2, GROUP, &[])]).bytes();
    kernel.snoop(&answer);
    kernel.snoop(&answer);
    let (_, listener) = kernel.listeners().pop().unwrap();
    assert!(listener.last_answer_ns > listener.first_report_ns);
    assert_eq!(kernel.events().len(), 2);
}

#[test]
fn sources_are_listed_with_the_generation_of_the_listener() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    kernel.snoop(&Frame::report(&[record(3, SSM, &["2001:db8::1", "2001:db8::2"])]).bytes());
    kernel.snoop(&Frame::report(&[record(6, SSM, &["2001:db8::1"])]).bytes());
    let (_, listener) = kernel.listeners().pop().unwrap();
    assert_eq!(listener.filter_mode, FilterMode::Include as u8);
    assert_eq!(listener.source_count, 1);
    let (key, source) = kernel.sources().pop().unwrap();
    assert_eq!(key.source, address("2001:db8::2"));
    assert_eq!(source.generation, listener.generation);
    kernel.snoop(&Frame::report(&[record(6, SSM, &["2001:db8::2"])]).bytes());
    assert!(kernel.listeners().is_empty());
    assert_eq!(kernel.usage().sources, 0);
}

#[test]
fn tag_in_the_frame_is_in_the_key() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    let report = Frame::report(&[record(4, GROUP, &[])]).with(|f| f.vlan = Some(0x2007));
    kernel.snoop(&report.bytes());
    assert_eq!(kernel.listeners().pop().unwrap().0.vlan, 7);
}

#[test]
fn malformed_frames_are_counted_by_reason_and_leave_no_state() {
    let report = || Frame::report(&[record(4, GROUP, &[])]);
    let cases = [
        (
            Counter::MalformedHopLimit,
            report().with(|f| f.hop_limit = 2),
        ),
        (
            Counter::MalformedSource,
            report().with(|f| f.source = address("2001:db8::1")),
        ),
        (
            Counter::MalformedRouterAlert,
            report().with(|f| f.options = None),
        ),
        (
            Counter::MalformedRouterAlert,
            report().with(|f| f.options = Some(vec![1, 4, 0, 0, 0, 0])),
        ),
        (
            Counter::MalformedRouterAlert,
            report().with(|f| f.options = Some(vec![5, 2, 0, 1, 1, 0])),
        ),
        (
            Counter::MalformedChecksum,
            report().with(|f| f.checksum = false),
        ),
        (
            Counter::MalformedOptions,
            report().with(|f| f.options = Some(vec![1, 9, 0, 0, 0, 0])),
        ),
        (Counter::MalformedRecord, report().with(|f| f.body[7] = 2)),
        (Counter::MalformedRecord, report().with(|f| f.body[11] = 1)),
        (
            Counter::MalformedAddress,
            Frame::report(&[record(4, "2001:db8::1", &[])]),
        ),
        (Counter::MalformedAddress, Frame::v1(131, "2001:db8::1")),
        (
            Counter::MalformedLength,
            Frame::v1(131, GROUP).with(|f| f.body.truncate(20)),
        ),
        (
            Counter::MalformedFragment,
            report().with(|f| f.headers = vec![(44, vec![0, 0, 1, 0, 0, 0, 7])]),
        ),
    ];
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    for (counter, frame) in cases {
        let before = kernel.counter(counter);
        assert_eq!(kernel.snoop(&frame.bytes()), SHOT);
        assert_eq!(
            kernel.counter(counter),
            before + 1,
            "{counter:?} for {frame:?}"
        );
        assert!(kernel.listeners().is_empty(), "{counter:?} left state");
    }
    assert_eq!(kernel.counter(Counter::ReportsV2), 0);
}

#[test]
fn checksum_is_verified_at_every_length() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    for extra in 0..70 {
        let report = Frame::report(&[record(2, GROUP, &[])])
            .with(|f| f.body.extend((0..extra).map(|byte| 0x80 | byte as u8)));
        kernel.snoop(&report.bytes());
        assert_eq!(
            kernel.counter(Counter::ReportsV2),
            extra + 1,
            "{extra} more bytes"
        );
        let mut broken = report.bytes();
        let last = broken.len() - 1;
        broken[last] ^= 0x10;
        kernel.snoop(&broken);
        assert_eq!(kernel.counter(Counter::MalformedChecksum), extra + 1);
    }
}

#[test]
fn report_of_the_longest_ethernet_frame_is_finished_in_the_kernel() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    let records: Vec<_> = (0..KERNEL_RECORDS)
        .map(|i| record(4, &format!("ff1e::{i:x}"), &[]))
        .collect();
    kernel.snoop(&Frame::report(&records).bytes());
    assert_eq!(kernel.listeners().len(), KERNEL_RECORDS);
    assert_eq!(kernel.counter(Counter::Unfinished), 0);
}

#[test]
fn report_beyond_the_bounds_goes_whole_to_the_agent() {
    // Program test-run accepts no much longer frame.
    let records: Vec<_> = (0..165)
        .map(|i| record(4, &format!("ff1e::{i:x}"), &[]))
        .collect();
    let frame = Frame::report(&records);
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    assert_eq!(kernel.snoop(&frame.bytes()), PASS);
    assert!(kernel.listeners().is_empty());
    assert_eq!(kernel.counter(Counter::Unfinished), 1);
    assert_eq!(kernel.unfinished_reports(), [frame.bytes()]);
}

#[test]
fn port_over_its_limits_is_refused_and_its_reports_go_no_further() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    kernel.limit(2, 1, 1000);
    let records: Vec<_> = (0..3)
        .map(|i| record(4, &format!("ff1e::{i:x}"), &[]))
        .collect();
    assert_eq!(kernel.snoop(&Frame::report(&records).bytes()), SHOT);
    assert_eq!(kernel.listeners().len(), 2);
    assert_eq!(kernel.counter(Counter::RefusedListeners), 1);
    let sources = record(5, "ff1e::1", &["2001:db8::1"]);
    assert_eq!(kernel.snoop(&Frame::report(&[sources]).bytes()), PASS);
    let block = record(6, "ff1e::1", &["2001:db8::1", "2001:db8::2"]);
    assert_eq!(kernel.snoop(&Frame::report(&[block]).bytes()), SHOT);
    assert_eq!(kernel.usage().refused_sources, 1);
}

#[test]
fn port_that_reports_too_often_is_refused() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    kernel.limit(10, 10, 3);
    let report = Frame::report(&[record(2, GROUP, &[])]).bytes();
    let verdicts: Vec<_> = (0..100).map(|_| kernel.snoop(&report)).collect();
    assert_eq!(verdicts[..3], [PASS; 3]);
    assert!(verdicts.contains(&SHOT));
    assert_eq!(
        kernel.usage().refused_reports,
        verdicts.iter().filter(|verdict| **verdict == SHOT).count() as u64
    );
}

#[test]
fn report_on_an_unknown_port_leaves_no_state() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    kernel.forget_port();
    assert_eq!(
        kernel.snoop(&Frame::report(&[record(4, GROUP, &[])]).bytes()),
        PASS
    );
    assert!(kernel.listeners().is_empty());
    assert_eq!(kernel.counted(), [(Counter::IgnoredPort, 1)]);
}

#[test]
fn signalling_from_a_link_local_address_is_marked_with_the_port() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    let cases = [
        (
            Frame::udp("fe80::2a", "ff02::1", (5000, 47411), b"x"),
            kernel::IFINDEX,
        ),
        (Frame::udp("2001:db8::1", "ff02::1", (5000, 47411), b"x"), 0),
        (Frame::udp("fe80::2a", "ff02::1", (5000, 47412), b"x"), 0),
    ];
    for (frame, mark) in cases {
        assert_eq!(kernel.snoop_mark(&frame.bytes()), (PASS, mark), "{frame:?}");
    }
}

#[test]
fn datagram_of_a_vm_from_the_agents_port_is_dropped_and_charged() {
    let answer = || Frame::udp("fe80::2a", "ff02::1", (47411, 5000), b"x");
    let options = || (60, vec![0, 1, 4, 0, 0, 0, 0]);
    let fragment = || (44, vec![0, 0, 1, 0, 0, 0, 7]);
    let frames = [
        answer(),
        answer().with(|f| f.vlan = Some(7)),
        Frame::udp("fe80::2a", "fe80::2b", (47411, 47411), b"x"),
        answer().with(|f| f.options = Some(vec![1, 4, 0, 0, 0, 0])),
        answer().with(|f| f.headers = vec![options()]),
        answer().with(|f| f.headers = vec![fragment()]),
        answer().with(|f| f.headers = vec![fragment(), options()]),
        answer().with(|f| f.headers = vec![options(); 5]),
        Frame::udp("fe80::2a", "ff02::1", (5000, 47411), b"x")
            .with(|f| f.headers = vec![fragment()]),
    ];
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    for frame in &frames {
        assert_eq!(kernel.snoop_mark(&frame.bytes()), (SHOT, 0), "{frame:?}");
    }
    let count = frames.len() as u64;
    assert_eq!(kernel.counted(), [(Counter::SignallingForged, count)]);
    assert_eq!(kernel.usage().forged_datagrams, count);
    for frame in [
        Frame::udp("2001:db8::2a", "ff02::1", (47411, 5000), b"x"),
        Frame::udp("fe80::2a", "ff02::fb", (5353, 5353), b"x")
            .with(|f| f.headers = vec![fragment()]),
        answer().with(|f| f.protocol = 6),
    ] {
        assert_eq!(kernel.snoop(&frame.bytes()), PASS, "{frame:?}");
    }
}

#[test]
fn port_that_signals_too_often_is_refused() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    let search = Frame::udp("fe80::2a", "ff02::1", (5000, 47411), b"x").bytes();
    let verdicts: Vec<_> = (0..1000).map(|_| kernel.snoop_mark(&search)).collect();
    let marked = (PASS, kernel::IFINDEX);
    assert_eq!(verdicts[..50], [marked; 50]);
    let refused = verdicts.iter().filter(|it| **it == (SHOT, 0)).count() as u64;
    let usage = kernel.usage();
    assert!(refused > 500, "{refused}");
    assert_eq!(usage.refused_datagrams, refused);
    assert_eq!(usage.datagrams, 1000 - refused);
    // Reports have a separate allowance.
    assert_eq!(kernel.snoop(&Frame::v1(131, GROUP).bytes()), PASS);
}

#[test]
fn first_packet_of_a_watched_flow_is_told_once() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    let packet = Frame::udp("2001:db8::1", GROUP, (5000, 5004), &[0; 100]).bytes();
    kernel.uplink(&packet);
    assert!(kernel.streams().is_empty(), "unmanaged address");
    kernel.manage(GROUP, 0);
    for _ in 0..3 {
        kernel.uplink(&packet);
    }
    let (key, stream) = kernel.streams().pop().unwrap();
    assert_eq!((key.source_port, key.destination_port), (5000, 5004));
    assert_eq!(key.source, address("2001:db8::1"));
    assert_eq!(stream.native.packets, 3);
    assert_eq!(stream.native.bytes, 3 * packet.len() as u64);
    assert!(stream.native.interarrival_ns > 0);
    assert_eq!(kernel.events(), [Kind::FirstPacket as u32]);
    kernel.manage(GROUP, stream.native.last_ns + 1);
    kernel.uplink(&packet);
    kernel.uplink(&packet);
    assert_eq!(kernel.events(), [Kind::FirstPacket as u32]);
}

#[test]
fn flows_of_an_address_keep_to_its_share_and_the_others_raise_few_events() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    let packet = |group, port| Frame::udp("2001:db8::1", group, (port, 5004), &[0; 100]).bytes();
    kernel.manage_with(GROUP, 3);
    kernel.manage(OTHER_GROUP, 0);
    for port in 1..=2000 {
        assert_eq!(kernel.uplink(&packet(GROUP, port)), PASS);
    }
    assert_eq!(kernel.streams().len(), 3);
    assert_eq!(kernel.counter(Counter::AddressFlowsFull), 1997);
    assert_eq!(kernel.counter(Counter::StreamsFull), 0);
    // One event per known flow, and one per 134 ms for the other packets.
    let events = kernel.events().len();
    assert!((4..200).contains(&events), "{events}");
    kernel.uplink(&packet(OTHER_GROUP, 1));
    assert_eq!(
        kernel.streams().len(),
        4,
        "another address has a share of its own"
    );
    kernel.uplink(&packet(GROUP, 1));
    assert_eq!(
        kernel.counter(Counter::AddressFlowsFull),
        1997,
        "a flow that has its place"
    );
}

#[test]
fn flow_that_finds_the_map_full_is_counted() {
    let Some(mut kernel) = Kernel::load_with(&[("STREAMS", 2)]) else {
        return;
    };
    kernel.manage(GROUP, 0);
    for port in 1..=4 {
        kernel.uplink(&Frame::udp("2001:db8::1", GROUP, (port, 5004), &[0; 100]).bytes());
    }
    assert_eq!(kernel.streams().len(), 2);
    assert_eq!(kernel.counter(Counter::StreamsFull), 2);
    assert_eq!(kernel.counter(Counter::AddressFlowsFull), 0);
}

#[test]
fn general_query_names_the_querier() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    kernel.uplink(&Frame::query("::", 0x8000, Some((3, 0x80))).bytes());
    let (_, querier) = kernel.queriers().pop().unwrap();
    assert_eq!(querier.address, address("fe80::2a"));
    assert_eq!(querier.query_response_interval_ms, 32768);
    assert_eq!(querier.query_interval_ms, 128_000);
    assert_eq!((querier.robustness, querier.mld_version), (3, 2));
    kernel.uplink(&Frame::query("::", 10_000, None).bytes());
    let (_, querier) = kernel.queriers().pop().unwrap();
    assert_eq!(querier.query_interval_ms, 125_000);
    assert_eq!((querier.robustness, querier.mld_version), (2, 1));
    assert_eq!(kernel.events().len(), 2);
    kernel.uplink(&Frame::query(GROUP, 1000, Some((2, 125))).bytes());
    assert!(kernel.events().is_empty(), "not a General Query");
}
