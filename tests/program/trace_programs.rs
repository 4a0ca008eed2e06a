//! Reports of the traced programs by program test-run: each decision with its reason, number and
//! flow, filtered and limited in the kernel. The usual programs contain none of this.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::net::Ipv6Addr;

use common::forward;
use common::maps::{
    BridgeNumber, Forward, ForwardKey, Gate, Origins, RelayStream, SubscriberKey, Translation,
    TranslationKey,
};
use common::testing::frame::{Frame, address, record};
use common::trace::{Filter, Program};
use support::gate::{Gated, HOLD};
use support::kernel::{IFINDEX, Kernel, PASS, SHOT};
use support::netns::{Namespace, privileged};
use support::relay::Relayed;
use support::told::{
    RATE, Told, decision, decisions, flow, left_out, only, records, tell, tell_everything,
};

const GROUP: &str = "ff3e:1::1234";
const SOURCE: &str = "2001:db8::1";

fn traced() -> Option<Kernel> {
    let mut kernel = Kernel::load_traced()?;
    tell_everything(&mut kernel);
    Some(kernel)
}

fn gated() -> Option<Gated> {
    Some(Gated { kernel: traced()? })
}

fn udp(payload: &[u8]) -> Frame {
    Frame::udp(SOURCE, GROUP, (5000, 5004), payload)
}

fn endpoints() -> (([u8; 16], u16), ([u8; 16], u16)) {
    ((address(SOURCE), 5000), (address(GROUP), 5004))
}

#[test]
fn usual_programs_have_nothing_to_tell_with() {
    let (Some(usual), Some(traced)) = (Kernel::load(), Kernel::load_traced()) else {
        return;
    };
    for map in ["TRACE", "TRACE_FILTER", "TRACE_CPU"] {
        assert!(!usual.has_map(map), "{map}");
        assert!(traced.has_map(map), "{map}");
    }
    let traced = traced.translated_bytes();
    for (program, bytes) in usual.translated_bytes() {
        println!("{program}: {bytes} bytes, traced {}", traced[&program]);
        assert!(bytes < traced[&program], "{program}");
    }
}

#[test]
fn gate_tells_what_it_passes_records_and_holds() {
    let Some(mut gated) = gated() else {
        return;
    };
    let frame = udp(&[7; 300]).bytes();
    let expect = |gated: &mut Gated, verdict, told: Told, number| {
        assert_eq!(gated.run(&frame), verdict);
        let record = only(&mut gated.kernel);
        assert_eq!(decision(&record), told);
        assert_eq!(record.number, number, "{told:?}");
        assert_eq!(flow(&record), endpoints());
        assert_eq!(record.length as usize, frame.len());
        assert_eq!((record.ifindex, record.vlan), (IFINDEX, 0));
        assert_ne!(record.at_ns, 0);
    };
    expect(&mut gated, PASS, ("gate", "passed", None), 0);
    gated.record(0);
    for number in 1..=2 {
        expect(&mut gated, PASS, ("gate", "recorded", None), number);
    }
    gated.hold();
    for number in 1..=3 {
        expect(&mut gated, SHOT, ("gate", "held", None), number);
    }
    gated.replayed(3);
    expect(&mut gated, PASS, ("gate", "opened", None), 3);
    let open = ("gate", "passed", Some("gate_open"));
    expect(&mut gated, PASS, open, 0);
    gated.set(
        IFINDEX,
        Gate {
            until_ns: 1,
            ..HOLD
        },
    );
    let expired = ("gate", "passed", Some("held_expired"));
    expect(&mut gated, PASS, expired, 0);
    gated
        .kernel
        .remove::<u32, common::maps::GateUsage>("GATE_USAGE", IFINDEX);
    let unready = ("gate", "passed", Some("gate_unready"));
    expect(&mut gated, PASS, unready, 0);
}

#[test]
fn gate_tells_nothing_of_what_it_leaves_alone() {
    let Some(mut gated) = gated() else {
        return;
    };
    let unicast = Frame::udp(SOURCE, "2001:db8::2", (1, 2), b"hello").bytes();
    let link_local = Frame::udp(SOURCE, "ff02::fb", (5353, 5353), b"hello").bytes();
    for gate in [None, Some(HOLD), Some(Gate::record(0, true, u64::MAX))] {
        if let Some(gate) = gate {
            gated.set(IFINDEX, gate);
        }
        for frame in [&unicast, &link_local] {
            assert_eq!(gated.run(frame), PASS);
        }
    }
    assert_eq!(records(&mut gated.kernel), []);
}

#[test]
fn tag_in_the_frame_and_short_frames_are_told_too() {
    let Some(mut gated) = gated() else {
        return;
    };
    let tagged = udp(b"hello").with(|frame| frame.vlan = Some(7)).bytes();
    assert_eq!(gated.run(&tagged), PASS);
    let record = only(&mut gated.kernel);
    assert_eq!(record.flow().unwrap().vlan, 7);
    assert_eq!(flow(&record), endpoints());
    let empty = udp(b"").bytes();
    assert_eq!(gated.run(&empty), PASS);
    let record = only(&mut gated.kernel);
    assert_eq!(usize::from(record.copied), empty.len());
    assert_eq!(record.frame[..empty.len()], empty);
}

#[test]
fn uplink_tells_at_both_hooks_what_it_passes_drops_and_restores() {
    for program in ["uplink", "uplink_xdp"] {
        let Some(mut kernel) = traced() else {
            return;
        };
        let relayed = Relayed::usual();
        let stream = (
            (relayed.stream.source, relayed.stream.source_port),
            (
                relayed.stream.multicast_address,
                relayed.stream.destination_port,
            ),
        );
        let expect = |kernel: &mut Kernel, frame: &[u8], told: Told, ends| {
            kernel.run_frame(program, frame);
            let record = only(kernel);
            assert_eq!(decision(&record), told, "{program}");
            assert_eq!(flow(&record), ends, "{program} {told:?}");
            assert_eq!(record.length as usize, frame.len());
        };
        let native = relayed.native(&[7; 100]);
        let datagram = relayed.datagram(&[7; 100]);
        let unmanaged = ("uplink", "passed", Some("not_managed"));
        expect(&mut kernel, &native, unmanaged, stream);
        kernel.insert("RELAY_FLOWS", relayed.flow_key(), relayed.entry());
        kernel.insert("RELAYS", relayed.relay_key(), 1_u32);
        let dropped = |reason| ("uplink", "dropped", Some(reason));
        expect(&mut kernel, &datagram, dropped("other_origin"), stream);

        let group = Ipv6Addr::from(relayed.stream.multicast_address).to_string();
        kernel.manage_as(&group, 0, Origins::Native);
        expect(&mut kernel, &native, ("uplink", "passed", None), stream);
        expect(&mut kernel, &datagram, dropped("other_origin"), stream);
        kernel.manage_as(&group, 0, Origins::Relay);
        expect(&mut kernel, &native, dropped("other_origin"), stream);
        expect(&mut kernel, &datagram, ("uplink", "restored", None), stream);
        kernel.manage_as(&group, 0, Origins::Both);
        let fresh = relayed.native(&[8; 100]);
        expect(&mut kernel, &fresh, ("uplink", "passed", None), stream);
        let again = relayed.datagram(&[8; 100]);
        expect(&mut kernel, &again, dropped("second_copies"), stream);

        let mut cut = datagram.clone();
        cut.truncate(100);
        expect(&mut kernel, &cut, dropped("relay_malformed"), stream);
        let mut other_port = datagram.clone();
        other_port[55] ^= 1;
        kernel.run_frame(program, &other_port);
        let told = decision(&only(&mut kernel));
        assert_eq!(told, ("uplink", "passed", Some("relay_unknown_flow")));
    }
}

#[test]
fn uplink_tells_of_queries() {
    let Some(mut kernel) = traced() else {
        return;
    };
    kernel.uplink(&Frame::query("::", 1000, Some((2, 125))).bytes());
    let told = decision(&only(&mut kernel));
    assert_eq!(told, ("uplink", "passed", Some("queries")));
    let broken = Frame::query("::", 1000, Some((2, 125))).with(|frame| frame.checksum = false);
    kernel.uplink(&broken.bytes());
    let told = decision(&only(&mut kernel));
    assert_eq!(told, ("uplink", "ignored", Some("malformed_checksum")));
}

#[test]
fn leak_tells_what_does_not_leave() {
    let Some(mut kernel) = traced() else {
        return;
    };
    let relayed = Relayed::usual();
    kernel.run_frame("leak", &relayed.native(&[7; 100]));
    assert_eq!(records(&mut kernel), []);
    kernel.run_frame("leak", &relayed.restored(&[7; 100]));
    let told = decision(&only(&mut kernel));
    assert_eq!(told, ("leak", "dropped", Some("relay_leaks")));
}

#[test]
fn snoop_tells_what_becomes_of_each_message() {
    let Some(mut kernel) = traced() else {
        return;
    };
    let expect = |kernel: &mut Kernel, frame: Frame, told: Told| {
        kernel.snoop(&frame.bytes());
        assert_eq!(decision(&only(kernel)), told);
    };
    let report = || Frame::report(&[record(4, GROUP, &[])]);
    let snoop = |decision, reason| ("snoop", decision, Some(reason));
    kernel.limit(100, 100, 0);
    expect(&mut kernel, report(), snoop("dropped", "refused_rate"));
    kernel.limit(100, 100, 1_000_000);
    expect(&mut kernel, report(), snoop("admitted", "reports_v2"));
    let v1 = Frame::v1(131, GROUP);
    expect(&mut kernel, v1, snoop("admitted", "reports_v1"));
    let link = Frame::report(&[record(4, "ff02::1:3", &[])]);
    expect(&mut kernel, link, snoop("admitted", "ignored_scope"));
    let broken = report().with(|frame| frame.checksum = false);
    expect(&mut kernel, broken, snoop("dropped", "malformed_checksum"));
    let header = (60, vec![0, 1, 4, 0, 0, 0, 0]);
    let more = report().with(|frame| frame.headers = vec![header]);
    expect(&mut kernel, more, snoop("dropped", "malformed_options"));
    let long: Vec<_> = (0..100)
        .map(|number| record(4, &format!("ff1e::{number:x}"), &[]))
        .collect();
    let long = Frame::report(&long);
    expect(&mut kernel, long, snoop("handed_over", "unfinished"));
    let query = Frame::query("::", 1000, Some((2, 125)));
    expect(&mut kernel, query, snoop("dropped", "guest_queries"));
    let signalling = Frame::udp("fe80::2a", "ff02::1", (4711, 47411), b"hello");
    let marked = snoop("passed", "signalling_datagrams");
    expect(&mut kernel, signalling, marked);

    kernel.limit(1, 100, 1_000_000);
    let second = Frame::report(&[record(4, "ff1e::2", &[])]);
    expect(&mut kernel, second, snoop("dropped", "refused_listeners"));
    kernel.forget_port();
    expect(&mut kernel, report(), snoop("ignored", "ignored_port"));

    kernel.snoop(&udp(b"hello").bytes());
    assert_eq!(records(&mut kernel), [], "nothing is decided about others");
}

const NEW: &str = "2001:db8:2::88";
const OLD: &str = "2001:db8:1::77";

/// Runs a test in a namespace with a route and its next hop.
fn with_route(test: impl Fn(&mut Kernel) + Sync) {
    if !privileged() {
        return;
    }
    let namespace = Namespace::new("trace");
    namespace.ip("link add up0 type veth peer name far");
    namespace.ip("link set far up");
    namespace.ip("link set up0 mtu 1400 up");
    namespace.ip("addr add 2001:db8:1::10/64 dev up0 nodad");
    namespace.ip("route add default via 2001:db8:1::fe dev up0");
    namespace.ip("neigh add 2001:db8:1::fe lladdr 02:00:00:00:00:fe dev up0");
    namespace.run(|| {
        std::fs::write("/proc/sys/net/ipv6/conf/lo/forwarding", "1").unwrap();
        let mut kernel = traced().unwrap();
        test(&mut kernel);
    });
}

#[test]
fn packets_that_are_sent_on_are_told_with_the_address_that_they_came_for() {
    with_route(|kernel| {
        let key = ForwardKey {
            address: address(OLD),
            vlan: 0,
            bridge: BridgeNumber::FIRST,
        };
        let value = Forward {
            until_ns: u64::MAX,
            destination: address(NEW),
            difference: forward::difference(&address(OLD), &address(NEW)),
            bridge: 4711,
            ..Forward::default()
        };
        kernel.insert("FORWARDS", key, value);
        kernel.set_array("FORWARDING", 0, 1_u32);
        let frame = Frame::udp(SOURCE, OLD, (5000, 5004), &[7; 100]);
        let late = frame.clone().with(|frame| frame.hop_limit = 1);
        let ends = ((address(SOURCE), 5000), (address(OLD), 5004));
        for (program, by) in [
            ("uplink", "uplink"),
            ("uplink_xdp", "uplink"),
            ("snoop", "snoop"),
        ] {
            for (frame, told) in [
                (&frame, (by, "sent_on", None)),
                (&late, (by, "dropped", Some("forward_hop_limit"))),
            ] {
                kernel.run_frame(program, &frame.bytes());
                let record = only(kernel);
                assert_eq!(decision(&record), told, "{program}");
                assert_eq!(flow(&record), ends, "{program}");
            }
        }
    });
}

#[test]
fn packets_from_an_address_that_the_vm_has_left_are_told_with_that_address() {
    with_route(|kernel| {
        let key = TranslationKey {
            address: address(OLD),
            ifindex: IFINDEX,
            vlan: 0,
            bridge: BridgeNumber::FIRST,
        };
        let value = Translation {
            until_ns: u64::MAX,
            source: address(NEW),
            difference: forward::difference(&address(OLD), &address(NEW)),
            ..Translation::default()
        };
        kernel.insert("TRANSLATIONS", key, value);
        kernel.set_array("FORWARDING", 0, 1_u32);
        let frame = Frame::udp(OLD, SOURCE, (5000, 5004), &[7; 100]);
        let late = frame.clone().with(|frame| frame.hop_limit = 1);
        for (frame, told) in [
            (frame, ("snoop", "translated", None)),
            (late, ("snoop", "dropped", Some("forward_hop_limit"))),
        ] {
            kernel.run_frame("snoop", &frame.bytes());
            let record = only(kernel);
            assert_eq!(decision(&record), told);
            assert_eq!(flow(&record).0, (address(OLD), 5000));
        }
    });
}

#[test]
fn copies_are_told_with_the_stream_and_the_subscriber() {
    with_route(|kernel| {
        let relayed = Relayed::usual();
        let native = relayed.native(&[7; 100]);
        let not_copied = |reason| ("replicate", "not_copied", Some(reason));
        let expect = |kernel: &mut Kernel, told: &[Told]| {
            kernel.run_frame("replicate", &native);
            let records = records(kernel);
            assert_eq!(decisions(&records), told);
            for (number, record) in (0..).zip(&records) {
                let source = (relayed.stream.source, relayed.stream.source_port);
                assert_eq!(flow(record).0, source);
                assert_eq!(record.number, number);
            }
        };
        expect(kernel, &[not_copied("not_managed")]);
        let group = Ipv6Addr::from(relayed.stream.multicast_address).to_string();
        kernel.manage(&group, 0);
        expect(kernel, &[not_copied("no_subscriber")]);
        let served = RelayStream {
            flow: 1,
            subscribers: 2,
        };
        kernel.insert("RELAY_STREAMS", relayed.stream, served);
        for (index, lease_end_ns) in [(0, u64::MAX), (1, 1)] {
            let key = SubscriberKey { flow: 1, index };
            kernel.insert("RELAY_SUBSCRIBERS", key, relayed.subscriber(lease_end_ns));
        }
        let copied = ("replicate", "copied", None);
        expect(kernel, &[copied, not_copied("replicate_lease_ended")]);
        let fragment = Frame::udp(SOURCE, &group, (1, 2), b"hello")
            .with(|frame| frame.headers = vec![(44, vec![0, 0, 1, 0, 0, 0, 7])]);
        kernel.run_frame("replicate", &fragment.bytes());
        let told = decision(&only(kernel));
        assert_eq!(told, not_copied("replicate_fragment"));
    });
}

#[test]
fn filter_lets_through_what_meets_all_conditions() {
    let Some(mut gated) = gated() else {
        return;
    };
    let plain = udp(b"hello").bytes();
    let tagged = udp(b"hello").with(|frame| frame.vlan = Some(7)).bytes();
    let everything = Filter::everything(RATE);
    let with = |change: fn(&mut Filter)| {
        let mut filter = everything;
        change(&mut filter);
        filter
    };
    for (filter, told) in [
        (everything, true),
        (Filter::NOTHING, false),
        (with(|it| it.programs = Program::Gate.bit()), true),
        (with(|it| it.programs = !Program::Gate.bit()), false),
        (with(|it| it.ifindex = IFINDEX), true),
        (with(|it| it.ifindex = IFINDEX + 1), false),
        (with(|it| it.address = address(GROUP)), true),
        (with(|it| it.address = address(SOURCE)), true),
        (with(|it| it.address = address("ff3e:1::1235")), false),
    ] {
        tell(&mut gated.kernel, filter);
        for frame in [&plain, &tagged] {
            assert_eq!(gated.run(frame), PASS);
            let count = records(&mut gated.kernel).len();
            assert_eq!(count, usize::from(told), "{filter:?}");
        }
    }
}

#[test]
fn relayed_packets_are_found_by_their_multicast_address() {
    let Some(mut kernel) = traced() else {
        return;
    };
    let relayed = Relayed::usual();
    kernel.insert("RELAY_FLOWS", relayed.flow_key(), relayed.entry());
    let mut filter = Filter::everything(RATE);
    filter.address = relayed.stream.multicast_address;
    tell(&mut kernel, filter);
    for program in ["uplink", "uplink_xdp"] {
        kernel.run_frame(program, &relayed.datagram(&[7; 100]));
        let told = decision(&only(&mut kernel));
        assert_eq!(told, ("uplink", "dropped", Some("other_origin")));
    }
}

#[test]
fn decisions_beyond_the_rate_are_counted() {
    let Some(mut gated) = gated() else {
        return;
    };
    tell(&mut gated.kernel, Filter::everything(1));
    let frame = udp(b"hello").bytes();
    let runs = 1000;
    gated.kernel.repeatedly("gate", &frame, runs);
    let told = records(&mut gated.kernel).len() as u64;
    assert!(told >= 1);
    assert_eq!(told + left_out(&mut gated.kernel), u64::from(runs));
    assert!(left_out(&mut gated.kernel) > 0);
}

#[test]
fn decisions_that_find_the_ring_full_are_counted() {
    let Some(mut gated) = gated() else {
        return;
    };
    let frame = udp(b"hello").bytes();
    let runs = 20_000;
    gated.kernel.repeatedly("gate", &frame, runs);
    let told = records(&mut gated.kernel).len() as u64;
    assert_eq!(told + left_out(&mut gated.kernel), u64::from(runs));
    assert!(left_out(&mut gated.kernel) > 0, "{told}");
}
