//! Aggregates (GSO) that enter a TAP: `gate` counts the part that fits into the TAP, records each
//! packet, and holds aggregates whole.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::thread;

use common::handover::{PROBE_MAC, fingerprint};
use common::maps::{Gate, GateRecord};
use nix::sys::socket::{setsockopt, sockopt};
use roamcast::datapath::Datapath;
use roamcast::net::tap_queue::TapQueues;
use socket2::SockRef;
use support::bridged::{Bridged, GROUP};
use support::host::{self, config};
use support::netns::{privileged, wait_for};
use support::tap::{self, Guest};

/// UDP payload of each packet in an aggregate, bytes.
const SEGMENT_BYTES: usize = 1400;
/// Packets per aggregate.
const SEGMENTS: usize = 20;
/// Ethernet, IPv6 and UDP headers of a packet, bytes.
const HEADERS_BYTES: usize = 62;
/// Payload of the TCP session, bytes.
const BULK_BYTES: usize = 4 << 20;

/// Sends one aggregate to the multicast address. Each packet has a different payload.
fn send_aggregate(setup: &Bridged) -> Vec<u8> {
    let payload: Vec<u8> = (0..SEGMENTS * SEGMENT_BYTES)
        .map(|at| (at / SEGMENT_BYTES + at % 251) as u8)
        .collect();
    setup.network.run(|| {
        let ifindex = nix::net::if_::if_nametoindex("n0").unwrap();
        let socket = UdpSocket::bind("[::]:5000").unwrap();
        SockRef::from(&socket).set_multicast_if_v6(ifindex).unwrap();
        SockRef::from(&socket).set_multicast_hops_v6(8).unwrap();
        setsockopt(&socket, sockopt::UdpGsoSegment, &(SEGMENT_BYTES as i32)).unwrap();
        let to = SocketAddrV6::new(GROUP.parse::<Ipv6Addr>().unwrap(), 5004, 0, 0);
        assert_eq!(socket.send_to(&payload, to).unwrap(), payload.len());
    });
    payload
}

fn with_sender(setup: &Bridged) {
    setup.network.ip("addr add 2001:db8:1::5/64 dev n0 nodad");
}

fn records(datapath: &Datapath, ifindex: u32, slot: u32) -> Vec<GateRecord> {
    let (_, usage) = datapath.gate(ifindex).unwrap().unwrap();
    datapath.gate_records(slot, &usage).unwrap()
}

#[test]
fn packets_of_an_aggregate_are_counted_and_recorded_as_a_tap_without_offloads_gets_them() {
    if !privileged() {
        return;
    }
    for probes in [false, true] {
        recorded_one_by_one(probes);
    }
}

fn recorded_one_by_one(probes: bool) {
    let setup = Bridged::new();
    with_sender(&setup);
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        setup.received();
        let slot = datapath.gate_record(setup.ifindex, probes).unwrap();
        send_aggregate(&setup);
        let mut frames = Vec::new();
        wait_for("every packet", || {
            frames.extend(setup.received());
            let (_, usage) = datapath.gate(setup.ifindex).unwrap().unwrap();
            (usage.recorded == SEGMENTS as u64 && usage.entered == frames.len() as u64)
                .then_some(())
        });
        let expected: Vec<(u64, u64)> = (1..)
            .zip(&frames)
            .filter(|(_, frame)| {
                frame.len() == HEADERS_BYTES + SEGMENT_BYTES && frame[..6] != PROBE_MAC
            })
            .map(|(number, frame)| {
                let payload = fingerprint(&frame[..], HEADERS_BYTES, SEGMENT_BYTES as u16);
                (number, payload.unwrap())
            })
            .collect();
        let found: Vec<(u64, u64)> = records(&datapath, setup.ifindex, slot)
            .iter()
            .map(|record| (record.number, record.fingerprint))
            .collect();
        assert_eq!(found, expected);
    });
}

#[test]
fn aggregate_that_a_tap_takes_whole_is_one_frame_with_a_record_for_each_packet() {
    if !privileged() {
        return;
    }
    let setup = Bridged::with_queues(1);
    if !tap::takes_aggregates(&setup.taps[0]) {
        eprintln!("skipped: this kernel's TAPs take no aggregates of UDP (6.2)");
        return;
    }
    with_sender(&setup);
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        setup.received();
        let slot = datapath.gate_record(setup.ifindex, false).unwrap();
        let (gate, _) = datapath.gate(setup.ifindex).unwrap().unwrap();
        assert_eq!(gate.splits, 0);
        let payload = send_aggregate(&setup);
        let mut frames = Vec::new();
        wait_for("the aggregate", || {
            frames.extend(setup.received());
            let (_, usage) = datapath.gate(setup.ifindex).unwrap().unwrap();
            (usage.recorded == SEGMENTS as u64 && usage.entered == frames.len() as u64)
                .then_some(())
        });
        let number = (1..)
            .zip(&frames)
            .find(|(_, frame)| frame.len() == HEADERS_BYTES + payload.len())
            .map(|(number, _)| number);
        let found = records(&datapath, setup.ifindex, slot);
        assert!(found.iter().all(|record| Some(record.number) == number));
        let mut fingerprints: Vec<u64> = found.iter().map(|it| it.fingerprint).collect();
        let mut expected: Vec<u64> = payload
            .chunks(SEGMENT_BYTES)
            .map(|part| fingerprint(part, 0, SEGMENT_BYTES as u16).unwrap())
            .collect();
        fingerprints.sort_unstable();
        expected.sort_unstable();
        assert_eq!(fingerprints, expected);
    });
}

#[test]
fn bulk_tcp_into_a_tap_without_offloads_counts_as_the_frames_that_it_gets() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    with_sender(&setup);
    let guest = Guest::start(&setup.host, "br0", "vnet9", 0);
    guest
        .namespace
        .ip("addr add 2001:db8:1::9/64 dev eth0 nodad");
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        datapath
            .attach_port(guest.ifindex, "vnet9", &host::LIMITS)
            .unwrap();
        datapath.gate_record(guest.ifindex, false).unwrap();
        let (gate, _) = datapath.gate(guest.ifindex).unwrap().unwrap();
        let all = Gate::SPLITS_TCP4 | Gate::SPLITS_TCP6 | Gate::SPLITS_UDP;
        assert_eq!(gate.splits, all);
        let mut queues = TapQueues::open().unwrap();
        let gone = |queues: &mut TapQueues| {
            let counts = queues.counts(guest.ifindex).unwrap();
            counts.read + counts.dropped
        };
        let before = gone(&mut queues);
        let listener = guest
            .namespace
            .run(|| TcpListener::bind("[::]:5004").unwrap());
        let reader = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = vec![0; BULK_BYTES];
            stream.read_exact(&mut bytes).unwrap();
        });
        let mut stream = setup.network.run(|| {
            let address: Ipv6Addr = "2001:db8:1::9".parse().unwrap();
            wait_for("the guest", || TcpStream::connect((address, 5004)).ok())
        });
        stream.write_all(&vec![7; BULK_BYTES]).unwrap();
        reader.join().unwrap();
        wait_for("as many frames entered as have left", || {
            let (_, usage) = datapath.gate(guest.ifindex).unwrap().unwrap();
            (usage.entered == gone(&mut queues) - before).then_some(())
        });
    });
}

#[test]
fn aggregate_that_comes_while_a_gate_holds_waits_whole() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    with_sender(&setup);
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let mut ring = datapath.held().unwrap();
        datapath.gate_hold(setup.ifindex).unwrap();
        let payload = send_aggregate(&setup);
        let (head, bytes) = wait_for("the aggregate", || {
            ring.next(|head, bytes| (*head, bytes.to_vec()))
        });
        assert_eq!(
            (head.number, usize::from(head.segment_bytes)),
            (1, SEGMENT_BYTES)
        );
        assert_eq!(bytes.get(HEADERS_BYTES..), Some(&payload[..]));
        let large = |frame: &Vec<u8>| frame.len() >= SEGMENT_BYTES;
        assert!(!setup.received().iter().any(large), "nothing has passed");
    });
}
