//! `gate` by program test-run: counting, recording, holding, and the opening of the gate.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use common::counter::Counter;
use common::handover::{fingerprint, flow_hash_of};
use common::maps::{
    BridgeNumber, Delivered, DeliveredKey, Forward, ForwardKey, Gate, GateUsage, Port,
    RECORDS_PER_SLOT, StreamKey,
};
use common::testing::frame::{self, Frame, address};
use common::wire::signalling::AGENT_MARK;
use support::gate::{Gated, HOLD};
use support::kernel::{
    CONTEXT_IFINDEX, CONTEXT_MARK, CONTEXT_SEGMENT_BYTES, CONTEXT_SEGMENTS, IFINDEX, PASS, SHOT,
};
use support::netns;

const GROUP: &str = "ff3e:1::1234";
const SOURCE: &str = "2001:db8::1";
/// Address that a VM leaves.
const LEFT: &str = "2001:db8::2";

fn udp(payload: &[u8]) -> Frame {
    Frame::udp(SOURCE, GROUP, (5000, 5004), payload)
}

fn stream(ports: (u16, u16), vlan: u16) -> StreamKey {
    StreamKey {
        multicast_address: address(GROUP),
        source: address(SOURCE),
        source_port: ports.0,
        destination_port: ports.1,
        vlan,
        bridge: BridgeNumber::FIRST,
    }
}

/// Returns frames that no gate counts or holds.
fn others() -> Vec<Vec<u8>> {
    let ipv4 = {
        let mut bytes = udp(b"hello").bytes();
        bytes[12..14].copy_from_slice(&[8, 0]);
        bytes
    };
    let mut two_tags = udp(b"hello").with(|frame| frame.vlan = Some(7)).bytes();
    two_tags.splice(12..12, [0x81, 0, 0, 8]);
    let mut others = vec![
        Frame::udp(SOURCE, "2001:db8::2", (1, 2), b"hello").bytes(),
        Frame::udp(SOURCE, "ff02::fb", (5353, 5353), b"hello").bytes(),
        Frame::udp(SOURCE, "ff31::1", (1, 2), b"hello").bytes(),
        Frame::udp(SOURCE, "ff30::1", (1, 2), b"hello")
            .with(|frame| frame.vlan = Some(7))
            .bytes(),
        Frame::report(&[frame::record(4, GROUP, &[])]).bytes(),
        Frame::v1(131, GROUP).bytes(),
        Frame::query("::", 1000, Some((2, 125))).bytes(),
        Frame::query(GROUP, 1000, Some((2, 125)))
            .with(|frame| frame.destination = address(GROUP))
            .bytes(),
        ipv4,
        two_tags,
    ];
    // ARP.
    others.push([&[0xff; 12][..], &[8, 6], &[0; 28]].concat());
    others
}

#[test]
fn packets_are_counted_by_flow_and_vlan() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    let plain = udp(&[7; 100]).bytes();
    let tagged = udp(&[7; 100])
        .with(|frame| frame.vlan = Some(0x6007))
        .bytes();
    let other_port = Frame::udp(SOURCE, GROUP, (5000, 5005), b"").bytes();
    for frame in [&plain, &plain, &plain, &tagged, &tagged, &other_port] {
        assert_eq!(gated.run(frame), PASS);
    }
    let bytes = |frame: &Vec<u8>| frame.len() as u64;
    for (stream, packets, bytes) in [
        (stream((5000, 5004), 0), 3, 3 * bytes(&plain)),
        (stream((5000, 5004), 7), 2, 2 * bytes(&tagged)),
        (stream((5000, 5005), 0), 1, bytes(&other_port)),
    ] {
        let delivered = gated.delivered_of(IFINDEX, stream);
        assert_eq!(delivered, Delivered { packets, bytes });
    }
    assert_eq!(gated.delivered().len(), 3);
    assert_eq!(gated.kernel.counted(), []);
}

#[test]
fn what_is_not_udp_is_counted_without_ports() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    let fragment =
        udp(b"hello").with(|frame| frame.headers = vec![(44, vec![0, 0, 1, 0, 0, 0, 7])]);
    let options = udp(b"hello").with(|frame| frame.options = Some(vec![1, 4, 0, 0, 0, 0]));
    let other = udp(b"hello").with(|frame| frame.protocol = 103);
    let short = udp(b"").with(|frame| frame.body.truncate(5));
    for frame in [fragment, options, other, short] {
        assert_eq!(gated.run(&frame.bytes()), PASS);
    }
    let delivered = gated.delivered();
    assert_eq!(delivered.len(), 1);
    assert_eq!(delivered[0].0.stream, stream((0, 0), 0));
    assert_eq!(delivered[0].1.packets, 4);
}

#[test]
fn aggregated_frame_counts_as_the_packets_in_it() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    let frame = udp(&[7; 1000]).bytes();
    // The last case is a frame whose packets the kernel has not counted yet.
    for (segments, segment_bytes) in [(0, 0), (4, 250), (0, 300)] {
        let context = [
            (CONTEXT_SEGMENTS, segments),
            (CONTEXT_SEGMENT_BYTES, segment_bytes),
        ];
        assert_eq!(gated.kernel.run_in("gate", &frame, &context), PASS);
    }
    let delivered = gated.delivered_of(IFINDEX, stream((5000, 5004), 0));
    assert_eq!(delivered.packets, 1 + 4 + 4);
    assert_eq!(delivered.bytes, 3 * frame.len() as u64);
}

#[test]
fn aggregate_enters_as_what_the_tap_makes_of_it() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    const ALL: u32 = Gate::SPLITS_TCP4 | Gate::SPLITS_TCP6 | Gate::SPLITS_UDP;
    let tcp = |aggregate: bool| {
        // 20 bytes of header without options.
        let mut segment = vec![0; 20 + 1000];
        segment[12] = 5 << 4;
        let frame = udp(&[]).with(|frame| {
            frame.destination = address("2001:db8::7");
            frame.protocol = 6;
            frame.body = segment.clone();
        });
        let segment_bytes = if aggregate { 250 } else { 0 };
        (frame.bytes(), [(CONTEXT_SEGMENT_BYTES, segment_bytes)])
    };
    let datagram = (udp(&[7; 1000]).bytes(), [(CONTEXT_SEGMENT_BYTES, 250)]);
    let mut tcp4 = vec![0; 14 + 24 + 32 + 1000];
    // IPv4 with one word of options, TCP with three.
    tcp4[12..15].copy_from_slice(&[0x08, 0x00, 0x46]);
    tcp4[23] = 6;
    tcp4[14 + 24 + 12] = 8 << 4;
    let tcp4 = (tcp4, [(CONTEXT_SEGMENT_BYTES, 250)]);
    for ((frame, context), splits, frames) in [
        (&tcp(false), ALL, 1),
        (&tcp(true), ALL, 4),
        (&tcp(true), ALL & !Gate::SPLITS_TCP6, 1),
        (&tcp4, ALL, 4),
        (&tcp4, ALL & !Gate::SPLITS_TCP4, 1),
        (&datagram, ALL, 4),
        (&datagram, ALL & !Gate::SPLITS_UDP, 1),
    ] {
        gated.set(
            IFINDEX,
            Gate {
                splits,
                ..Gate::record(0, false, u64::MAX)
            },
        );
        assert_eq!(gated.kernel.run_in("gate", frame, context), PASS);
        assert_eq!(
            gated.usage().entered,
            frames,
            "{splits}: {:02x?}",
            &frame[..24]
        );
    }
}

#[test]
fn what_is_no_multicast_of_routable_scope_passes_uncounted_in_every_mode() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    for mode in [None, Some(HOLD), Some(Gate::record(0, true, u64::MAX))] {
        if let Some(gate) = mode {
            gated.set(IFINDEX, gate);
        }
        for frame in others() {
            assert_eq!(gated.run(&frame), PASS, "{mode:?}: {frame:02x?}");
        }
    }
    assert_eq!(gated.delivered(), []);
    assert_eq!(gated.kernel.counted(), []);
    assert!(gated.held().is_empty());
    let entered = others().len() as u64;
    let usage = GateUsage {
        entered,
        ..GateUsage::default()
    };
    assert_eq!(gated.usage(), usage);
}

#[test]
fn signalling_enters_if_this_hosts_agent_has_sent_it() {
    let answer = || Frame::udp("fe80::1", "fe80::2a", (47411, 5000), b"x");
    let request = || Frame::udp("fe80::1", "ff02::1", (5000, 47411), b"x");
    let options = || vec![(60, vec![0, 1, 4, 0, 0, 0, 0])];
    let strange = [
        answer(),
        answer().with(|frame| frame.vlan = Some(7)),
        answer().with(|frame| frame.destination = address(GROUP)),
        answer().with(|frame| frame.headers = options()),
        request(),
        request().with(|frame| frame.headers = options()),
    ];
    let Some(mut gated) = Gated::load() else {
        return;
    };
    gated.record(0);
    for frame in &strange {
        assert_eq!(gated.run(&frame.bytes()), SHOT, "{frame:?}");
    }
    let count = strange.len() as u64;
    assert_eq!(
        gated.kernel.counted(),
        [(Counter::SignallingWithheld, count)]
    );
    assert_eq!(gated.kernel.usage().withheld_datagrams, count);
    assert_eq!(gated.usage().entered, 0, "they are not in the TAP");
    let by_agent = [(CONTEXT_IFINDEX, IFINDEX), (CONTEXT_MARK, AGENT_MARK)];
    let agents = answer().bytes();
    assert_eq!(gated.kernel.run_in("gate", &agents, &by_agent), PASS);
    for frame in [
        Frame::udp("2001:db8::1", "2001:db8::2a", (47411, 5000), b"x"),
        Frame::udp("fe80::1", "ff02::fb", (5353, 5353), b"x")
            .with(|frame| frame.headers = options()),
    ] {
        assert_eq!(gated.run(&frame.bytes()), PASS, "{frame:?}");
    }
    assert_eq!(gated.usage().entered, 3);
}

#[test]
fn full_table_is_counted_and_the_frame_passes() {
    let Some(mut gated) = Gated::load_with(&[("DELIVERED", 2)]) else {
        return;
    };
    for port in 1..=4 {
        let frame = Frame::udp(SOURCE, GROUP, (1, port), b"hello").bytes();
        assert_eq!(gated.run(&frame), PASS);
    }
    assert_eq!(gated.delivered().len(), 2);
    assert_eq!(gated.kernel.counted(), [(Counter::DeliveredFull, 2)]);
}

#[test]
fn flows_into_a_tap_keep_to_its_share_and_those_removed_make_room() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    let mut port = Port {
        max_flows: 2,
        ..Port::default()
    };
    let run = |gated: &mut Gated, ports: std::ops::RangeInclusive<u16>| {
        for port in ports {
            let frame = Frame::udp(SOURCE, GROUP, (1, port), b"hello").bytes();
            assert_eq!(gated.run(&frame), PASS);
        }
    };
    gated.kernel.insert("PORTS", IFINDEX, port);
    run(&mut gated, 1..=4);
    assert_eq!(gated.delivered().len(), 2);
    assert_eq!(gated.kernel.counted(), [(Counter::PortFlowsFull, 2)]);
    port.forgotten_flows = 1;
    gated.kernel.insert("PORTS", IFINDEX, port);
    run(&mut gated, 1..=4);
    assert_eq!(gated.delivered().len(), 3);
    assert_eq!(gated.kernel.counted(), [(Counter::PortFlowsFull, 3)]);
}

#[test]
fn every_frame_has_a_number_and_multicast_a_record() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    gated.record(0);
    let unicast = &others()[0];
    let packets = [[1; 600], [2; 600], [3; 600]].map(|payload| udp(&payload).bytes());
    for frame in [&packets[0], unicast, &packets[1], unicast, &packets[2]] {
        assert_eq!(gated.run(frame), PASS);
    }
    let records = gated.records(4);
    let numbers: Vec<u64> = records.iter().map(|record| record.number).collect();
    assert_eq!(numbers, [1, 3, 5, 0]);
    let flow = flow_hash_of(&stream((5000, 5004), 0));
    for (record, frame) in records.iter().zip(&packets) {
        assert_eq!(record.flow, flow);
        assert_eq!(
            record.fingerprint,
            fingerprint(&frame[..], 62, 600).unwrap()
        );
    }
    assert!(records[0].at_ns < records[1].at_ns && records[1].at_ns < records[2].at_ns);
    let usage = GateUsage {
        entered: 5,
        recorded: 3,
        ..GateUsage::default()
    };
    assert_eq!(gated.usage(), usage);
    let delivered = gated.delivered_of(IFINDEX, stream((5000, 5004), 0));
    assert_eq!(delivered.packets, 3);
}

#[test]
fn recording_that_its_agent_does_not_renew_ends() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    let frame = udp(b"hello").bytes();
    for probes in [false, true] {
        gated.set(IFINDEX, Gate::record(0, probes, 1));
        assert_eq!(gated.run(&frame), PASS);
        assert_eq!(gated.usage(), GateUsage::default());
        assert_eq!(gated.records(1)[0].number, 0);
    }
    assert_eq!(gated.kernel.counted(), [(Counter::RecordExpired, 2)]);
    assert_eq!(gated.delivered()[0].1.packets, 2);
}

#[test]
fn records_go_round_within_their_slot() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    gated.record(1);
    let frame = udp(b"hello").bytes();
    let count = RECORDS_PER_SLOT + 3;
    gated.kernel.repeatedly("gate", &frame, count);
    assert_eq!(gated.usage().recorded, u64::from(count));
    let records = gated.records(3 * RECORDS_PER_SLOT);
    let numbers: Vec<u64> = records.iter().map(|record| record.number).collect();
    let slots: Vec<&[u64]> = numbers.chunks(RECORDS_PER_SLOT as usize).collect();
    assert!(slots[0].iter().all(|number| *number == 0), "of another VM");
    assert!(slots[2].iter().all(|number| *number == 0), "of another VM");
    let round = u64::from(RECORDS_PER_SLOT);
    assert_eq!(slots[1][..4], [round + 1, round + 2, round + 3, 4]);
    assert!(slots[1][3..].is_sorted());
}

/// Makes the VM of a port leave [`LEFT`].
fn leave(gated: &mut Gated, ifindex: u32) {
    let key = ForwardKey {
        address: address(LEFT),
        vlan: 0,
        bridge: BridgeNumber::FIRST,
    };
    let value = Forward {
        ifindex,
        ..Forward::default()
    };
    gated.kernel.insert("FORWARDS", key, value);
    gated.kernel.set_array("FORWARDING", 0, 1_u32);
}

#[test]
fn copies_are_kept_of_what_enters_for_an_address_that_the_vm_leaves() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    gated.record(0);
    let to = |address: &str| Frame::udp(SOURCE, address, (1, 2), b"hello").bytes();
    let solicits = |from: &str| {
        let frame = Frame::udp(from, LEFT, (0, 0), b"hello");
        frame.with(|frame| (frame.protocol, frame.body[0]) = (58, 135))
    };
    assert_eq!(gated.run(&to(LEFT)), PASS);
    assert_eq!(gated.held(), []);
    leave(&mut gated, IFINDEX);
    let frames = [
        to(LEFT),
        to("2001:db8::3"),
        udp(b"hello").bytes(),
        solicits(SOURCE).bytes(),
        to(LEFT),
    ];
    for frame in &frames {
        assert_eq!(gated.run(frame), PASS);
    }
    let kept = gated.held();
    let numbers: Vec<u64> = kept.iter().map(|(head, _)| head.number).collect();
    assert_eq!(numbers, [2, 6], "by their numbers among all");
    for (head, frame) in &kept {
        assert_eq!((head.ifindex, frame), (IFINDEX, &frames[0]));
    }
    let usage = gated.usage();
    assert_eq!((usage.entered, usage.held, usage.lost), (6, 2, 0));
    assert_eq!(gated.kernel.counted(), [(Counter::UnreadKept, 2)]);
}

#[test]
fn no_copies_are_kept_at_another_port_or_by_a_gate_that_holds() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    let packet = Frame::udp(SOURCE, LEFT, (1, 2), b"hello").bytes();
    gated.record(0);
    leave(&mut gated, IFINDEX + 1);
    assert_eq!(gated.run(&packet), PASS);
    leave(&mut gated, IFINDEX);
    gated.hold();
    assert_eq!(gated.run(&packet), PASS);
    assert_eq!(gated.held(), []);
    assert_eq!(gated.usage().held, 0);
}

#[test]
fn copies_take_half_of_the_ring_buffer_and_what_finds_no_room_is_counted() {
    let Some(mut gated) = Gated::load_with(&[("HELD", 1 << 16)]) else {
        return;
    };
    gated.record(0);
    leave(&mut gated, IFINDEX);
    let packet = Frame::udp(SOURCE, LEFT, (1, 2), &[7; 962]).bytes();
    for _ in 0..60 {
        assert_eq!(gated.run(&packet), PASS);
    }
    let kept = gated.held().len() as u64;
    // A record consists of head, frame and 8 bytes of the ring buffer's header.
    let fitting = (1 << 15) / (32 + 1024 + 8);
    assert!((fitting..=fitting + 1).contains(&kept), "{kept}");
    let usage = gated.usage();
    assert_eq!((usage.held, usage.lost), (60, 60 - kept));
    let counted = [
        (Counter::UnreadKept, kept),
        (Counter::UnreadLost, 60 - kept),
    ];
    assert_eq!(gated.kernel.counted(), counted);
}

#[test]
fn slot_that_does_not_exist_records_nothing() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    for slot in [8, u32::MAX] {
        gated.record(slot);
        assert_eq!(gated.run(&udp(b"hello").bytes()), PASS);
        assert_eq!(gated.usage().entered, 1);
    }
}

#[test]
fn held_frames_come_whole_with_their_numbers() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    gated.hold();
    let frames: Vec<Vec<u8>> = [0, 1, 8, 100, 1400, 3000]
        .into_iter()
        .map(|length: u16| udp(&(0..length).map(|at| at as u8).collect::<Vec<_>>()))
        .chain([udp(b"tagged").with(|frame| frame.vlan = Some(7))])
        .map(|frame| frame.bytes())
        .collect();
    for frame in &frames {
        assert_eq!(gated.run(frame), SHOT);
    }
    let held = gated.held();
    assert_eq!(held.len(), frames.len());
    let mut before_ns = 0;
    for ((number, frame), (head, bytes)) in (1..).zip(&frames).zip(&held) {
        assert_eq!(head.number, number);
        assert_eq!(head.ifindex, IFINDEX);
        assert_eq!(head.length as usize, frame.len());
        assert_eq!((head.vlan, head.segment_bytes, head.pad), (0, 0, 0));
        assert!(head.at_ns > before_ns);
        before_ns = head.at_ns;
        assert_eq!(bytes, frame);
    }
    let count = frames.len() as u64;
    assert_eq!(gated.kernel.counted(), [(Counter::HeldFrames, count)]);
    assert_eq!(gated.delivered(), [], "nothing was delivered");
}

#[test]
fn aggregated_frame_is_held_with_the_size_of_its_packets() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    gated.hold();
    let frame = udp(&[7; 1000]).bytes();
    let context = [(CONTEXT_SEGMENTS, 4), (CONTEXT_SEGMENT_BYTES, 250)];
    assert_eq!(gated.kernel.run_in("gate", &frame, &context), SHOT);
    assert_eq!(gated.held()[0].0.segment_bytes, 250);
}

#[test]
fn gate_opens_exactly_when_no_held_frame_waits() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    let frame = udp(b"hello").bytes();
    gated.hold();
    assert_eq!(gated.run(&frame), SHOT);
    assert_eq!(gated.run(&frame), SHOT);
    for replayed in [0, 1, 3] {
        gated.replayed(replayed);
        let held = gated.usage().held;
        assert_eq!(gated.run(&frame), SHOT, "{replayed} of {held}");
    }
    let held = gated.usage().held;
    assert_eq!(held, 5);
    gated.replayed(held);
    assert_eq!(gated.usage().held, held, "a frame opens it, not the agent");
    assert_eq!(gated.run(&frame), PASS);
    assert_eq!(gated.usage().held, held | GateUsage::OPEN);
    for replayed in [held, 0, Gate::CLOSED] {
        gated.replayed(replayed);
        assert_eq!(gated.run(&frame), PASS, "it stays open");
    }
    assert_eq!(gated.held().len(), 5);
    let delivered = gated.delivered_of(IFINDEX, stream((5000, 5004), 0));
    assert_eq!(delivered.packets, 4);
    gated.hold();
    assert_eq!(gated.run(&frame), SHOT, "another handover");
}

#[test]
fn gate_that_never_held_opens_at_the_first_frame() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    gated.hold();
    gated.replayed(0);
    assert_eq!(gated.run(&udp(b"hello").bytes()), PASS);
    assert_eq!(gated.usage().held, GateUsage::OPEN);
}

#[test]
fn full_ring_buffer_is_counted_and_the_numbers_go_on() {
    let Some(mut gated) = Gated::load_with(&[("HELD", 1 << 16)]) else {
        return;
    };
    gated.hold();
    let frame = udp(&[7; 1400]).bytes();
    for _ in 0..100 {
        assert_eq!(gated.run(&frame), SHOT);
    }
    let held = gated.held();
    let lost = 100 - held.len() as u64;
    assert!(lost > 0);
    let usage = GateUsage {
        held: 100,
        lost,
        ..GateUsage::default()
    };
    assert_eq!(gated.usage(), usage);
    let count = held.len() as u64;
    let counted = [(Counter::HeldFrames, count), (Counter::HeldLost, lost)];
    assert_eq!(gated.kernel.counted(), counted);
    assert_eq!(gated.run(&frame), SHOT);
    assert_eq!(gated.held()[0].0.number, 101);
}

#[test]
fn gate_without_usage_lets_everything_through() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    let frame = udp(b"hello").bytes();
    for gate in [HOLD, Gate::record(0, false, u64::MAX)] {
        gated.set(IFINDEX, gate);
        gated.kernel.remove::<u32, GateUsage>("GATE_USAGE", IFINDEX);
        assert_eq!(gated.run(&frame), PASS);
    }
    assert_eq!(gated.kernel.counted(), [(Counter::GateUnready, 2)]);
    let delivered = gated.delivered_of(IFINDEX, stream((5000, 5004), 0));
    assert_eq!(delivered.packets, 2);
}

#[test]
fn gate_whose_lease_has_ended_lets_everything_through() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    gated.set(IFINDEX, Gate::hold(1));
    assert_eq!(gated.run(&udp(b"hello").bytes()), PASS);
    assert_eq!(gated.usage(), GateUsage::default());
    assert_eq!(gated.kernel.counted(), [(Counter::HeldExpired, 1)]);
}

#[test]
fn unknown_mode_lets_everything_through() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    gated.hold();
    let gate = Gate { mode: 3, ..HOLD };
    gated.kernel.insert("GATES", IFINDEX, gate);
    assert_eq!(gated.run(&udp(b"hello").bytes()), PASS);
    assert_eq!(gated.usage(), GateUsage::default());
}

#[test]
fn ports_do_not_disturb_each_other() {
    if !netns::privileged() {
        return;
    }
    let namespace = netns::Namespace::new("gates");
    for port in ["port1", "port2", "port3"] {
        namespace.ip(&format!("link add {port} type bridge"));
    }
    let ports = ["port1", "port2", "port3"].map(|port| namespace.ifindex(port));
    let [holding, recording, normal] = ports;
    namespace.run(|| {
        let mut gated = Gated::load().unwrap();
        gated.set(holding, HOLD);
        gated.set(recording, Gate::record(0, false, u64::MAX));
        let frame = udp(b"hello").bytes();
        for _ in 0..3 {
            assert_eq!(gated.run_into(holding, &frame), SHOT);
            assert_eq!(gated.run_into(recording, &frame), PASS);
            assert_eq!(gated.run_into(normal, &frame), PASS);
        }
        assert_eq!(gated.usage_of(holding).held, 3);
        assert_eq!(gated.usage_of(recording).held, 0);
        assert_eq!(gated.usage_of(recording).entered, 3);
        assert_eq!(gated.usage_of(holding).entered, 0);
        let held = gated.held();
        assert!(held.iter().all(|(head, _)| head.ifindex == holding));
        let stream = stream((5000, 5004), 0);
        let keys: Vec<DeliveredKey> = gated.delivered().iter().map(|(key, _)| *key).collect();
        let expected = [recording, normal].map(|ifindex| DeliveredKey { ifindex, stream });
        assert_eq!(keys, expected);
    });
}
