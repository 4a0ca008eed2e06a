//! The programs of a node by program test-run: resulting frames and counters, compared with the
//! same rules in memory.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::cell::RefCell;

use common::mat::counter::Counter;
use common::mat::translate::{Action, Bytes, Decision, inbound, outbound, words};
use common::mat::{IMS_PORT, NODE_PORT};
use common::testing::frame::{self, Frame};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::mat_frame::{
    addresses, checksum_is_right, error, extended, icmp, quoted, tcp, udp, udp_ports,
};
use support::mat_world::{IFINDEX, Kernel, MAT0_MAC, NIC_MAC, PASS, REDIRECT, SHOT, World, parse};
use support::test_run;

const PAYLOAD: &[u8] = b"odd payload";

/// Runs a frame in the kernel and in memory, asserts equal results, and returns the result.
fn both(world: &World, kernel: &mut Kernel, name: &str, frame: &[u8]) -> (Decision, Vec<u8>) {
    let mut memory = frame.to_vec();
    let decision = if name == "mat_out" {
        outbound(&mut Bytes(&mut memory), world)
    } else {
        inbound(&mut Bytes(&mut memory), world, IFINDEX)
    };
    let (verdict, out) = kernel.run(name, frame);
    let expected = match decision.action {
        Action::Pass | Action::Copy | Action::Hold => PASS,
        Action::Drop => SHOT,
        Action::Send | Action::Redirect | Action::Deliver => REDIRECT,
    };
    assert_eq!(verdict, expected, "{name} {decision:?}");
    assert_eq!(out, memory, "{name} {decision:?}");
    (decision, out)
}

/// Runs a frame in a separate world.
fn alone(world: &World, name: &str, frame: &[u8]) -> (Decision, Vec<u8>) {
    both(world, &mut Kernel::load(world), name, frame)
}

fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    assert!(root || std::env::var_os("CI").is_none(), "needs root");
    root
}

#[test]
fn packets_of_all_protocols_go_out_and_come_back_with_right_checksums() {
    if !is_root() {
        return;
    }
    for world in [World::neutral(), World::given()] {
        let mut kernel = Kernel::load(&world);
        for build in [udp, tcp, |a, b, p: &[u8]| icmp(a, b, (128, 0), p)] {
            let frame = build(world.hoa, world.peer_hoa, PAYLOAD);
            let (decision, out) = both(&world, &mut kernel, "mat_out", &frame);
            assert_eq!((decision.action, decision.ifindex), (Action::Send, 7));
            assert_eq!(addresses(&out), (world.moa, world.peer_moa));
            assert!(checksum_is_right(&out));

            let frame = build(world.peer_moa, world.moa, PAYLOAD);
            let (decision, out) = both(&world, &mut kernel, "mat_in", &frame);
            assert_eq!(decision.action, Action::Deliver);
            assert_eq!(addresses(&out), (world.peer_hoa, world.hoa));
            assert_eq!(out[..6], MAT0_MAC);
            assert!(checksum_is_right(&out));
        }
        let peer = kernel.peer(world.peer_hoa);
        assert_eq!(peer.packets, 3);
        assert!(peer.last_used_ns != 0);
        assert_eq!(
            kernel.counted(),
            [(Counter::OutTranslated, 3), (Counter::InTranslated, 3)]
        );
    }
}

#[test]
fn every_moa_of_the_node_is_accepted() {
    if !is_root() {
        return;
    }
    for world in [World::neutral(), World::given()] {
        let mut switched = world.clone();
        switched.node.moa = words(parse("2001:db8:f::1"));
        let frame = tcp(world.peer_moa, world.moa, PAYLOAD);
        let (decision, out) = alone(&switched, "mat_in", &frame);
        assert_eq!(decision.action, Action::Deliver);
        assert!(checksum_is_right(&out));
    }
}

#[test]
fn sum_over_a_packet_that_a_card_delivers_stays_right() {
    if !is_root() {
        return;
    }
    for world in [World::neutral(), World::given()] {
        let mut kernel = Kernel::load(&world);
        let quoted = udp(world.moa, world.peer_moa, PAYLOAD);
        for frame in [
            udp(world.peer_moa, world.moa, PAYLOAD),
            tcp(world.peer_moa, world.moa, PAYLOAD),
            error(parse("2001:db8::1"), world.moa, &quoted),
        ] {
            let Some(result) = test_run::with_sum(kernel.descriptor("mat_in"), &frame) else {
                println!("skipped: this kernel cannot test such sums");
                return;
            };
            assert!(checksum_is_right(&result.unwrap()));
        }
    }
}

#[test]
fn errors_are_translated_with_what_they_quote() {
    if !is_root() {
        return;
    }
    for world in [World::neutral(), World::given()] {
        let mut kernel = Kernel::load(&world);
        let router = parse("2001:db8::1");
        let sent = udp(world.moa, world.peer_moa, PAYLOAD);
        for (source, becomes) in [(router, router), (world.peer_moa, world.peer_hoa)] {
            let frame = error(source, world.moa, &sent);
            let (decision, out) = both(&world, &mut kernel, "mat_in", &frame);
            assert_eq!(decision.action, Action::Deliver);
            assert_eq!(decision.reason, Some(Counter::InErrors));
            assert_eq!(addresses(&out), (becomes, world.hoa));
            assert_eq!(quoted(&out), (world.hoa, world.peer_hoa));
            assert!(checksum_is_right(&out));
        }
        let received = udp(world.peer_hoa, world.hoa, PAYLOAD);
        let frame = error(world.hoa, world.peer_hoa, &received);
        let (decision, out) = both(&world, &mut kernel, "mat_out", &frame);
        assert_eq!(decision.action, Action::Send);
        assert_eq!(addresses(&out), (world.moa, world.peer_moa));
        assert_eq!(quoted(&out), (world.peer_moa, world.moa));
        assert!(checksum_is_right(&out));
    }
}

#[test]
fn errors_about_other_packets_are_plain() {
    if !is_root() {
        return;
    }
    let world = World::neutral();
    let router = parse("2001:db8::1");
    let stranger = parse("2001:db8::99");
    for about in [
        udp(world.moa, stranger, PAYLOAD),
        udp(stranger, world.peer_moa, PAYLOAD),
        udp(world.peer_moa, world.moa, PAYLOAD),
        udp_ports(world.moa, world.peer_moa, (NODE_PORT, NODE_PORT), PAYLOAD),
    ] {
        for source in [router, world.peer_moa] {
            let frame = error(source, world.moa, &about);
            let (decision, out) = alone(&world, "mat_in", &frame);
            assert_eq!((decision.action, out), (Action::Pass, frame));
        }
    }
}

#[test]
fn what_is_not_from_a_peer_to_this_node_passes() {
    if !is_root() {
        return;
    }
    let world = World::neutral();
    let stranger = parse("2001:db8::99");
    let solicitation = |kind| icmp(world.peer_moa, world.moa, (kind, 0), &world.moa);
    for frame in [
        udp(stranger, world.moa, PAYLOAD),
        udp(world.peer_moa, stranger, PAYLOAD),
        icmp(stranger, world.moa, (128, 0), PAYLOAD),
        udp(parse("fe80::1"), parse("fe80::2"), PAYLOAD),
        // Neighbour discovery with a peer on the same link.
        solicitation(135),
        solicitation(136),
        udp_ports(world.peer_moa, world.moa, (NODE_PORT, 1), PAYLOAD),
        udp_ports(world.peer_moa, world.moa, (1, NODE_PORT), PAYLOAD),
        udp_ports(world.peer_moa, world.moa, (IMS_PORT, 1), PAYLOAD),
        vec![0; 60],
        vec![0x60; 14],
    ] {
        let (decision, out) = alone(&world, "mat_in", &frame);
        assert_eq!((decision.action, out), (Action::Pass, frame));
    }
}

#[test]
fn a_wire_carries_no_home_address() {
    if !is_root() {
        return;
    }
    let world = World::neutral();
    for (source, destination) in [
        (world.peer_hoa, world.hoa),
        (world.peer_hoa, world.moa),
        (world.peer_moa, world.hoa),
        (parse("2001:db8::99"), world.hoa),
    ] {
        for frame in [
            tcp(source, destination, PAYLOAD),
            icmp(source, destination, (128, 0), PAYLOAD),
        ] {
            let (decision, _) = alone(&world, "mat_in", &frame);
            assert_eq!(decision.action, Action::Drop);
            assert_eq!(decision.reason, Some(Counter::InHomeOnWire));
        }
    }
}

#[test]
fn extension_headers_and_fragments_are_passed_on() {
    if !is_root() {
        return;
    }
    let options: &[u8] = &[0, 1, 4, 0, 0, 0, 0];
    let first: &[u8] = &[0, 0, 1, 0, 0, 0, 9];
    let later: &[u8] = &[0, 0, 0xb9, 0, 0, 0, 9];
    for world in [World::neutral(), World::given()] {
        let given = world.node.difference != 0;
        let plain = tcp(world.hoa, world.peer_hoa, PAYLOAD);
        for (headers, right) in [
            (&[(0, options)][..], true),
            (&[(60, options), (60, options)], true),
            (&[(0, options), (60, options), (44, first)], true),
            (&[(44, later)], false),
        ] {
            let frame = extended(&plain, headers);
            let (decision, out) = alone(&world, "mat_out", &frame);
            assert_eq!(decision.action, Action::Send, "{headers:?}");
            assert_eq!(addresses(&out), (world.moa, world.peer_moa));
            let tail = frame.len() - (plain.len() - 54);
            let mut bare = out[..54].to_vec();
            bare[20] = 6;
            bare[18..20].copy_from_slice(&plain[18..20]);
            bare.extend(&out[tail..]);
            // A non-first fragment carries no checksum and stays unchanged.
            assert_eq!(checksum_is_right(&bare), right || !given, "{headers:?}");
            assert_eq!(out[54..tail], frame[54..tail]);
        }
        for headers in [&[(43, options)][..], &[(60, options); 5]] {
            let (decision, _) = alone(&world, "mat_out", &extended(&plain, headers));
            if given {
                assert_eq!(decision.reason, Some(Counter::OutUntranslatable));
            } else {
                assert_eq!(decision.action, Action::Send);
            }
        }
    }
}

#[test]
fn a_packet_to_an_unknown_peer_is_held() {
    if !is_root() {
        return;
    }
    let world = World::neutral();
    let mut kernel = Kernel::load(&world);
    let unknown = parse("fd5e:6d61:74::99");
    for bytes in [8, 1400, 2048 - 62] {
        let frame = udp(world.hoa, unknown, &vec![7; bytes]);
        let (decision, _) = both(&world, &mut kernel, "mat_out", &frame);
        assert_eq!(decision.action, Action::Hold);
        let held = kernel.held();
        assert_eq!(held.len(), 1);
        assert_eq!(held[0][..16], unknown);
        assert_eq!(held[0][16..20], (frame.len() as u32).to_ne_bytes());
        assert_eq!(held[0][24..24 + frame.len()], frame);
    }
    // The daemon learns of the peer, and the sender learns of the loss.
    let frame = udp(world.hoa, unknown, &[7; 2049 - 62]);
    assert_eq!(kernel.run("mat_out", &frame).0, SHOT);
    assert_eq!(kernel.held()[0][16..20], [0; 4]);
    assert_eq!(
        kernel.counted(),
        [(Counter::Held, 3), (Counter::HeldTooLong, 1)]
    );
    let frame = udp(world.hoa, unknown, PAYLOAD);
    while kernel.run("mat_out", &frame).0 == PASS {}
    assert!(kernel.counted().contains(&(Counter::HeldFull, 1)));
}

#[test]
fn what_mat0_does_not_carry_is_dropped_for_a_named_reason() {
    if !is_root() {
        return;
    }
    let world = World::neutral();
    for (frame, reason) in [
        (
            udp(world.hoa, parse("ff3e::1"), PAYLOAD),
            Counter::OutNotCarried,
        ),
        (
            udp(world.hoa, parse("fe80::1"), PAYLOAD),
            Counter::OutNotCarried,
        ),
        (
            udp(world.hoa, parse("2001:db8::1"), PAYLOAD),
            Counter::OutNotCarried,
        ),
        (
            udp(world.moa, world.peer_hoa, PAYLOAD),
            Counter::OutForeignSource,
        ),
        (vec![0; 60], Counter::OutNotCarried),
    ] {
        let (decision, _) = alone(&world, "mat_out", &frame);
        assert_eq!(decision.reason, Some(reason));
        assert_eq!(decision.action, Action::Drop);
    }
    let mut idle = world.clone();
    idle.node.ifindex = 0;
    let frame = udp(world.hoa, world.peer_hoa, PAYLOAD);
    let (decision, _) = alone(&idle, "mat_out", &frame);
    assert_eq!(decision.reason, Some(Counter::OutNoNic));
}

#[test]
fn mld_leaves_from_the_nic_with_a_right_checksum() {
    if !is_root() {
        return;
    }
    let world = World::neutral();
    let record = frame::record(4, "ff3e::1234", &[]);
    for source in ["fe80::aa", "::"] {
        for frame in [
            Frame::report(std::slice::from_ref(&record)),
            Frame::v1(131, "ff3e::1234"),
            Frame::v1(132, "ff3e::1234"),
        ] {
            let frame = frame.with(|it| it.source = parse(source)).bytes();
            let (decision, out) = alone(&world, "mat_out", &frame);
            assert_eq!(decision.action, Action::Redirect);
            assert_eq!(addresses(&out).0, parse("fe80::bb"));
            assert_eq!(out[6..12], NIC_MAC);
            assert_eq!(out[..6], frame[..6]);
            let mut bare = out[..54].to_vec();
            bare[20] = 58;
            bare[18..20].copy_from_slice(&((frame.len() - 62) as u16).to_be_bytes());
            bare.extend(&out[62..]);
            assert!(checksum_is_right(&bare));
        }
    }
    let mut unready = world.clone();
    unready.node.multicast_source = [0; 2];
    let (decision, _) = alone(&unready, "mat_out", &Frame::report(&[record]).bytes());
    assert_eq!(decision.reason, Some(Counter::OutMldNoSource));
}

#[test]
fn multicast_of_one_nic_is_copied() {
    if !is_root() {
        return;
    }
    let world = World::neutral();
    let query = Frame::query("::", 1000, Some((2, 125))).bytes();
    let stream = Frame::udp("2001:db8:5::1", "ff3e::1234", (1, 2), PAYLOAD).bytes();
    let local = Frame::udp("fe80::1", "ff02::fb", (5353, 5353), PAYLOAD).bytes();
    let mut elsewhere = world.clone();
    elsewhere.node.multicast_ifindex = 9;
    for (world, frame, action) in [
        (&world, &query, Action::Copy),
        (&world, &stream, Action::Copy),
        (&world, &local, Action::Pass),
        (&elsewhere, &query, Action::Pass),
        (&elsewhere, &stream, Action::Pass),
    ] {
        let (decision, out) = alone(world, "mat_in", frame);
        assert_eq!((decision.action, &out), (action, frame));
    }
}

#[test]
fn memory_and_kernel_agree_about_any_packet() {
    if !is_root() {
        return;
    }
    for world in [World::neutral(), World::given()] {
        let kernel = RefCell::new(Kernel::load(&world));
        let address = prop_oneof![
            Just(world.hoa),
            Just(world.moa),
            Just(world.peer_hoa),
            Just(world.peer_moa),
            Just(parse("2001:db8::1")),
            Just(parse("ff3e::1")),
            Just(parse("fe80::1")),
        ];
        let header = prop_oneof![0..=60_u8, Just(58), Just(17), Just(6), Just(136)];
        let packet = (
            address.clone(),
            address.clone(),
            header,
            prop::collection::vec(any::<u8>(), 0..120),
            address.clone(),
            address,
        );
        let mut runner = TestRunner::new(Config::with_cases(2000));
        runner
            .run(
                &packet,
                |(source, destination, next, body, inner, other)| {
                    let mut frame = vec![0; 12];
                    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                    frame.extend((body.len() as u16).to_be_bytes());
                    frame.extend([next, 64]);
                    frame.extend(source);
                    frame.extend(destination);
                    frame.extend(body);
                    if frame.len() >= 102 {
                        frame[70..86].copy_from_slice(&inner);
                        frame[86..102].copy_from_slice(&other);
                    }
                    let mut kernel = kernel.borrow_mut();
                    both(&world, &mut kernel, "mat_in", &frame);
                    if both(&world, &mut kernel, "mat_out", &frame).0.action == Action::Hold {
                        kernel.held();
                    }
                    Ok(())
                },
            )
            .unwrap();
    }
}
