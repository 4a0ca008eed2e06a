//! Properties of a TAP's queue on which the handover relies, on a real kernel; the test reads the
//! TAP as a hypervisor does.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::thread;

use roamcast::datapath::Datapath;
use roamcast::net::tap_queue::{ROOM, TapCounts, TapQueueError, TapQueues, make_room};
use roamcast::net::tap_socket::{Sent, TapSocket};
use support::host::config;
use support::netns::{Namespace, privileged};
use support::tap;

/// Returns a numbered frame that no other node sends.
fn frame(number: u32) -> [u8; 60] {
    let mut frame = [0; 60];
    frame[..6].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 1]);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    frame[12..14].copy_from_slice(&0x88b5_u16.to_be_bytes());
    frame[14..18].copy_from_slice(&number.to_be_bytes());
    frame
}

/// Reads the queue until it is empty. Returns the numbers of the test's frames.
fn read_all(tap: &mut File) -> Vec<u32> {
    let mut bytes = [0; 2048];
    let mut numbers = Vec::new();
    while let Ok(length) = tap.read(&mut bytes) {
        if length == 60 && bytes[12..14] == [0x88, 0xb5] {
            numbers.push(u32::from_be_bytes(bytes[14..18].try_into().unwrap()));
        }
    }
    numbers
}

/// Runs with a TAP that is up, in a namespace whose kernel sends nothing by itself.
fn with_tap(tag: &str, work: impl FnOnce(File, u32) + Send) {
    if !privileged() {
        return;
    }
    let host = Namespace::new(tag);
    host.run(|| with_tap_in(&host, work));
}

/// Like [`with_tap`], with a data path.
fn with_datapath(tag: &str, work: impl FnOnce(File, u32, &Datapath) + Send) {
    if !privileged() {
        return;
    }
    let host = Namespace::new(tag);
    host.run_with_bpffs(|bpffs| {
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        with_tap_in(&host, |tap, ifindex| work(tap, ifindex, &datapath));
    });
}

fn with_tap_in(host: &Namespace, work: impl FnOnce(File, u32)) {
    std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
    let tap = tap::open("vnet0");
    host.ip("link set vnet0 up");
    work(tap, host.ifindex("vnet0"));
}

#[test]
fn frames_sent_past_the_qdisc_are_read_in_order_and_counted_when_read() {
    with_tap("tapread", |mut tap, ifindex| {
        let mut queues = TapQueues::open().unwrap();
        let socket = TapSocket::open(ifindex).unwrap();
        let before = queues.counts(ifindex).unwrap();
        for number in 0..10 {
            assert_eq!(socket.send(&frame(number)).unwrap(), Sent::Queued);
        }
        assert_eq!(queues.counts(ifindex).unwrap(), before);
        assert_eq!(read_all(&mut tap), (0..10).collect::<Vec<_>>());
        let read = before.read + 10;
        let after = TapCounts { read, ..before };
        assert_eq!(queues.counts(ifindex).unwrap(), after);
    });
}

#[test]
fn full_queue_refuses_the_newest_frame_and_counts_it() {
    with_tap("tapfull", |mut tap, ifindex| {
        let mut queues = TapQueues::open().unwrap();
        queues.set_length(ifindex, 5).unwrap();
        let socket = TapSocket::open(ifindex).unwrap();
        let sent: Vec<Sent> = (0..7).map(|n| socket.send(&frame(n)).unwrap()).collect();
        assert_eq!(&sent[..5], [Sent::Queued; 5]);
        assert_eq!(&sent[5..], [Sent::Full; 2]);
        assert_eq!(queues.counts(ifindex).unwrap().dropped, 2);
        assert_eq!(read_all(&mut tap), [0, 1, 2, 3, 4]);
    });
}

#[test]
fn longer_queue_keeps_what_is_in_it_and_a_shorter_one_drops_the_newest() {
    with_tap("taplength", |mut tap, ifindex| {
        let mut queues = TapQueues::open().unwrap();
        let length = queues.length(ifindex).unwrap();
        let socket = TapSocket::open(ifindex).unwrap();
        for number in 0..20 {
            socket.send(&frame(number)).unwrap();
        }
        queues.set_length(ifindex, length * 4).unwrap();
        assert_eq!(queues.length(ifindex).unwrap(), length * 4);
        socket.send(&frame(20)).unwrap();
        queues.set_length(ifindex, 8).unwrap();
        assert_eq!(read_all(&mut tap), (0..8).collect::<Vec<_>>());
    });
}

#[test]
fn room_is_made_and_a_longer_queue_stays_as_it_is() {
    with_tap("taproom", |_tap, ifindex| {
        let mut queues = TapQueues::open().unwrap();
        make_room(ifindex).unwrap();
        assert_eq!(queues.length(ifindex).unwrap(), ROOM);
        // Debian's kernels accept at most 32,767.
        queues.set_length(ifindex, ROOM + 1000).unwrap();
        make_room(ifindex).unwrap();
        assert_eq!(queues.length(ifindex).unwrap(), ROOM + 1000);
    });
}

#[test]
fn tap_that_is_gone_is_named() {
    with_tap("tapgone", |tap, ifindex| {
        let mut queues = TapQueues::open().unwrap();
        drop(tap);
        let error = queues.counts(ifindex).unwrap_err();
        assert!(
            matches!(error, TapQueueError::Refused { .. }),
            "{error}: not the kernel's refusal"
        );
        assert!(error.to_string().contains(&ifindex.to_string()), "{error}");
    });
}

#[test]
fn frames_that_one_thread_reads_are_told_from_those_that_another_does() {
    with_datapath("tapown", |mut tap, ifindex, datapath| {
        let mut other = tap::open("vnet1");
        let socket = TapSocket::open(ifindex).unwrap();
        let mut frames = 0..;
        let mut send = |count: usize| {
            for number in frames.by_ref().take(count) {
                assert_eq!(socket.send(&frame(number)).unwrap(), Sent::Queued);
            }
        };
        let thread = nix::unistd::gettid().as_raw().cast_unsigned();
        let reads = datapath
            .own_reads(thread, &[tap.as_raw_fd().cast_unsigned()])
            .unwrap();
        let read = |tap: &mut File| tap.read(&mut [0; 2048]).is_ok();

        send(3);
        assert!(read(&mut tap) && read(&mut tap));
        assert_eq!(reads.count().unwrap(), 2);
        // None of these reads counts: on another thread, as by vhost-net; on an empty queue; on
        // another TAP; on another file.
        thread::scope(|scope| assert!(scope.spawn(|| read(&mut tap)).join().unwrap()));
        assert!(!read(&mut tap) && !read(&mut other));
        assert!(File::open("/dev/zero").is_ok_and(|mut it| read(&mut it)));
        assert_eq!(reads.count().unwrap(), 2);
        send(1);
        assert!(read(&mut tap));
        assert_eq!(reads.count().unwrap(), 3);
    });
}

#[test]
fn reads_of_a_thread_are_counted_of_each_tap_apart_and_no_longer_than_wanted() {
    with_datapath("tapowns", |mut tap, ifindex, datapath| {
        let socket = TapSocket::open(ifindex).unwrap();
        let thread = nix::unistd::gettid().as_raw().cast_unsigned();
        let descriptor = tap.as_raw_fd().cast_unsigned();
        let early = datapath.own_reads(thread, &[descriptor]).unwrap();
        let mut read = || {
            assert_eq!(socket.send(&frame(0)).unwrap(), Sent::Queued);
            tap.read_exact(&mut [0; 60]).unwrap();
        };
        read();
        let late = datapath
            .own_reads(thread, &[descriptor, descriptor + 1])
            .unwrap();
        read();
        assert_eq!((early.count().unwrap(), late.count().unwrap()), (2, 1));
        drop(early);
        read();
        assert_eq!(late.count().unwrap(), 2);
    });
}
