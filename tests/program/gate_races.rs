//! `gate` on several CPUs at once: the gate opens once for all of them, and no frame is lost or
//! duplicated.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::hint;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use aya::maps::{MapData, RingBuf};
use common::maps::{Delivered, DeliveredKey, GateUsage};
use common::testing::frame::Frame;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use support::gate::{self, Gated};
use support::kernel::{PASS, SHOT};
use support::test_run;

/// Timeout for the opening of the gate.
const DEADLINE: Duration = Duration::from_secs(20);
/// Threads that send at the same time, each on its own CPU if there are enough.
const SENDERS: usize = 3;
/// Openings of the gate.
const ROUNDS: usize = 100;
/// Frames held before the first replay.
const BEFORE: usize = 10;
/// Frames that each thread sends after it has seen the gate open.
const AFTER: u64 = 20;

/// Numbers of the frames that one thread sent.
#[derive(Default)]
struct Sent {
    held: u64,
    passed: u64,
}

#[test]
fn frames_are_held_until_the_agent_has_replayed_all_and_never_after() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    let program = gated.kernel.program_fd("gate");
    let frame = Frame::udp("2001:db8::1", "ff3e::1", (1, 2), &[7; 200]).bytes();
    let mut ring = RingBuf::try_from(gated.kernel.take_map("HELD")).unwrap();
    for _ in 0..ROUNDS {
        gated.hold();
        gated.kernel.clear::<DeliveredKey, Delivered>("DELIVERED");
        let open = AtomicBool::new(false);
        let (mut numbers, sent) = thread::scope(|scope| {
            let senders: Vec<_> = (0..SENDERS)
                .map(|processor| {
                    let (frame, open) = (&frame, &open);
                    scope.spawn(move || send(program, frame, processor, open))
                })
                .collect();
            // The agent's part: replay the frames taken from the ring buffer.
            let mut numbers: Vec<u64> = Vec::new();
            while !senders.iter().all(ScopedJoinHandle::is_finished) {
                let before = numbers.len();
                take(&mut ring, &mut numbers);
                if numbers.len() >= BEFORE && numbers.len() > before {
                    gated.replayed(numbers.len() as u64);
                }
            }
            let sent: Vec<Sent> = senders
                .into_iter()
                .map(|sender| sender.join().unwrap())
                .collect();
            (numbers, sent)
        });
        take(&mut ring, &mut numbers);
        let held: u64 = sent.iter().map(|sent| sent.held).sum();
        let passed: u64 = sent.iter().map(|sent| sent.passed).sum();
        assert!(numbers.len() >= BEFORE);
        numbers.sort_unstable();
        assert_eq!(numbers, (1..=held).collect::<Vec<_>>(), "each once");
        assert_eq!(gated.delivered()[0].1.packets, passed);
        let usage = gated.usage();
        assert_eq!(usage.lost, 0);
        assert!(usage.held & GateUsage::OPEN != 0);
    }
}

/// Takes the held frames out of the ring buffer and records their numbers.
fn take(ring: &mut RingBuf<MapData>, numbers: &mut Vec<u64>) {
    while let Some(record) = ring.next() {
        numbers.push(gate::held(&record).0.number);
    }
}

/// Sends frames until the gate has been open for a while.
fn send(program: RawFd, frame: &[u8], processor: usize, open: &AtomicBool) -> Sent {
    pin_to(processor);
    let deadline = lab::wait::end_after(DEADLINE);
    let mut sent = Sent::default();
    while sent.passed < AFTER {
        // Whether any thread saw the gate open before this frame.
        let was_open = open.load(Ordering::SeqCst);
        match test_run::verdict(program, frame, 1).unwrap() {
            PASS => {
                open.store(true, Ordering::SeqCst);
                sent.passed += 1;
            }
            SHOT => {
                assert!(!was_open, "held although it was open");
                sent.held += 1;
            }
            verdict => panic!("verdict {verdict}"),
        }
        assert!(Instant::now() < deadline, "the gate does not open");
        thread::yield_now();
    }
    sent
}

/// Attempts to open the gate between frames of two CPUs.
const CROSSINGS: u32 = 1000;
/// Frames from each CPU per attempt.
const FRAMES: u32 = 200;
/// Number of replayed frames after which the gate opens, if exactly as many are held.
const OPENS_AFTER: u64 = 150;

#[test]
fn no_frame_is_held_by_one_processor_while_another_opens_the_gate() {
    let Some(mut gated) = Gated::load() else {
        return;
    };
    let program = gated.kernel.program_fd("gate");
    let frame = Frame::udp("2001:db8::1", "ff3e::1", (1, 2), &[7; 20]).bytes();
    let mut ring = RingBuf::try_from(gated.kernel.take_map("HELD")).unwrap();
    let mut opened = 0;
    for _ in 0..CROSSINGS {
        gated.hold();
        gated.replayed(OPENS_AFTER);
        let waiting = AtomicUsize::new(2);
        thread::scope(|scope| {
            for processor in 0..2 {
                let (frame, waiting) = (&frame, &waiting);
                scope.spawn(move || {
                    pin_to(processor);
                    waiting.fetch_sub(1, Ordering::SeqCst);
                    while waiting.load(Ordering::SeqCst) > 0 {
                        hint::spin_loop();
                    }
                    test_run::verdict(program, frame, FRAMES).unwrap();
                });
            }
        });
        let mut numbers = Vec::new();
        take(&mut ring, &mut numbers);
        numbers.sort_unstable();
        let usage = gated.usage();
        // The two frames raced, so the count never had the value at which the gate opens.
        let held = if usage.held & GateUsage::OPEN == 0 {
            2 * u64::from(FRAMES)
        } else {
            opened += 1;
            OPENS_AFTER
        };
        assert_eq!(numbers, (1..=held).collect::<Vec<_>>(), "{usage:?}");
    }
    println!("opened {opened} times of {CROSSINGS}");
    assert!(opened > 0);
}

/// Pins this thread to one of the CPUs that it may use.
fn pin_to(processor: usize) {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this).unwrap();
    let processors: Vec<usize> = (0..CpuSet::count())
        .filter(|processor| allowed.is_set(*processor).unwrap())
        .collect();
    let mut set = CpuSet::new();
    set.set(processors[processor % processors.len()]).unwrap();
    sched_setaffinity(this, &set).unwrap();
}
