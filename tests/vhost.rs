//! The cut where vhost-net reads the TAP: a VM is stopped as QEMU stops it, time and again, and what
//! the agent calls exact is what is in the VM's rings.
//!
//! ```text
//!  sender --> bridge --> gate --> TAP --> vhost-net --> rings --> guest     had
//!                                  '----> main loop after the stop --.
//!                                  '----> what is there at the end --'      left
//!
//!  a cut that is called exact: all of a flow up to its number was had, and nothing of it is left
//! ```
//!
//! `ROAMCAST_STOPS` sets how many stops each test makes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

#[path = "support/bridged.rs"]
mod bridged;
#[path = "support/frame.rs"]
mod frame;
#[path = "support/host.rs"]
mod host;
#[path = "support/netns.rs"]
mod netns;
#[path = "support/tap.rs"]
mod tap;
#[path = "support/vmm.rs"]
mod vmm;
#[path = "support/wire.rs"]
mod wire;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bridged::{Bridged, GROUP, SOURCE};
use common::maps::{Gate, GateUsage};
use common::signal::{CutBasis, FlowCut, NicCut};
use frame::{Frame, address};
use host::config;
use lab::main_loop::{HeldUp, MainLoop};
use netns::{privileged, wait_for};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use roamcast::clock::now;
use roamcast::config::Handover;
use roamcast::datapath::Datapath;
use roamcast::net::tap_queue::TapQueues;
use roamcast::proto::{GateCommand, GateEvent, Mac};
use roamcast::runtime::gates::Gates;
use roamcast::runtime::trace::Replays;
use tokio::runtime::Runtime;
use vmm::{Ring, Vmm};
use wire::Wire;

const VM_MAC: Mac = [0x52, 0x54, 0, 0, 0, 7];
/// Stops, where nobody says how many; there are more if fewer than so many are exact.
const STOPS: u32 = 20;
const LEAST_EXACT: u32 = 3;
/// How it stands is printed after so many.
const PRINTED: u32 = 250;
/// QEMU's main loop comes round so soon, microseconds, where the agent does not see it: later than the
/// agent waits for it, sometimes, but not later than it looks.
const UNSEEN_US: u64 = 50_000;
/// Where it does, and is to be exact.
const SEEN_US: u64 = 150_000;
/// Where it does, and gives up.
const TOO_LATE_US: u64 = 1_100_000;
/// So long after a cut it may be revised.
const REVISION: Duration = Duration::from_millis(300);
/// Payload of a datagram, bytes.
const PAYLOAD_BYTES: usize = 1000;
/// Where the payload begins in a frame.
const PAYLOAD_AT: usize = 62;
/// Where the UDP destination port stands in a frame.
const PORT_AT: usize = 56;
/// Destination port of the first flow.
const PORT: u16 = 5004;
/// Where the IPv6 destination stands.
const DESTINATION: std::ops::Range<usize> = 38..54;
/// Of a scope that is counted at a TAP and is no stream.
const LINK_LOCAL: &str = "ff02::1234";
/// After so many faults there is no more to learn.
const MOST_FAULTS: usize = 8;

/// How one stop comes about; times in microseconds.
#[derive(Clone, Debug)]
struct Stop {
    ring: Ring,
    /// Length of each of the TAP's queues.
    room: u32,
    load: Load,
    /// How long the stream runs before the stop, at least.
    before_us: u64,
    /// Time between two looks of the guest at its rings, and how many frames it takes at a time.
    look_us: u64,
    most: usize,
    /// Whether the agent sees the main loop, what that does first, and for how long.
    is_seen: bool,
    held_up: HeldUp,
    main_loop_us: u64,
    /// From the stop to the agent.
    agent_us: u64,
}

/// What is sent to the VM.
#[derive(Clone, Debug)]
struct Load {
    flows: u16,
    /// Every so many frames there is one of no stream; 0 for never.
    other_every: u32,
    /// Frames at a time, and the time between two such times.
    burst: u32,
    pause_us: u64,
}

fn rings() -> impl Strategy<Value = Ring> {
    let entries = prop_oneof![Just(64_u16), Just(256), Just(1024)];
    let buffers = prop_oneof![
        Just((false, 2048_u32)),
        Just((true, 2048)),
        Just((true, 400)),
    ];
    (entries, buffers).prop_map(|(entries, (is_mergeable, buffer_bytes))| Ring {
        entries,
        is_mergeable,
        buffer_bytes,
    })
}

fn main_loops() -> impl Strategy<Value = (bool, HeldUp, u64)> {
    let held_up = prop_oneof![Just(HeldUp::Busy), Just(HeldUp::Locked), Just(HeldUp::Both),];
    let times = prop_oneof![
        8 => (Just(false), 0..UNSEEN_US),
        16 => (Just(true), 0..20_000_u64),
        7 => (Just(true), 0..SEEN_US),
        1 => (Just(true), TOO_LATE_US..TOO_LATE_US + 100_000),
    ];
    (times, held_up).prop_map(|((is_seen, time), held_up)| (is_seen, held_up, time))
}

/// Mostly few frames, so that the queues are empty most of the time.
fn loads() -> impl Strategy<Value = Load> {
    let flows = prop_oneof![Just(1_u16), 2_u16..12];
    let others = prop_oneof![Just(0_u32), 2_u32..9];
    let frames = prop_oneof![
        4 => (1_u32..8, 1_000_u64..15_000),
        1 => (8_u32..80, 200_u64..20_000),
    ];
    (flows, others, frames).prop_map(|(flows, other_every, (burst, pause_us))| Load {
        flows,
        other_every,
        burst,
        pause_us,
    })
}

/// How often guests look, and for how many frames; mostly they keep up.
fn guests() -> impl Strategy<Value = (u64, usize)> {
    prop_oneof![
        4 => (500_u64..2_000, 8_usize..64),
        1 => (2_000_u64..20_000, 1_usize..16),
    ]
}

prop_compose! {
    fn stops()(
        ring in rings(),
        room in prop_oneof![1 => Just(80_u32), 2 => Just(1000)],
        load in loads(),
        before_us in 80_000_u64..220_000,
        (look_us, most) in guests(),
        (is_seen, held_up, main_loop_us) in main_loops(),
        agent_us in 0_u64..8_000,
    ) -> Stop {
        Stop {
            ring,
            room,
            load,
            before_us,
            look_us,
            most,
            is_seen,
            held_up,
            main_loop_us,
            agent_us,
        }
    }
}

/// A datagram of a stream: the number of its flow, and its own.
type Datagram = (u16, u32);

fn datagram(frame: &[u8]) -> Option<Datagram> {
    let number = frame.get(PAYLOAD_AT..PAYLOAD_AT + 4)?;
    if frame[DESTINATION] != address(GROUP) {
        return None;
    }
    let port = u16::from_be_bytes(frame[PORT_AT..PORT_AT + 2].try_into().unwrap());
    let flow = port.checked_sub(PORT)?;
    Some((flow, u32::from_be_bytes(number.try_into().unwrap())))
}

/// What came of one stop.
struct Outcome {
    /// What the agent says, its revision included.
    cuts: Vec<NicCut>,
    had: Vec<Datagram>,
    left: Vec<Datagram>,
}

impl Outcome {
    fn cut(&self) -> &NicCut {
        self.cuts.last().expect("a cut")
    }

    /// What is wrong with what the agent says: packets that the VM loses by it, or gets twice. Where the
    /// agent says that it may be too early, it is so at most.
    fn fault(&self, stop: &Stop) -> Option<String> {
        let mut last = BTreeMap::<u16, u32>::new();
        let mut is_in_order =
            |(flow, number): &Datagram| last.insert(*flow, *number) < Some(*number);
        if !self.had.iter().all(&mut is_in_order) {
            return Some(format!("a flow is out of order: {:?}", self.had));
        }
        let is_revised = self.cuts.len() > 1 && self.cuts[0].basis == CutBasis::Count;
        if stop.is_seen && is_revised {
            return Some("the main loop read more than the agent saw it leave".to_owned());
        }
        let basis = self.cut().basis;
        if basis == CutBasis::Time {
            return None;
        }
        let mut flows = BTreeMap::<u16, (u64, u64)>::new();
        for (flow, number) in &self.had {
            let (had, _) = flows.entry(*flow).or_insert((0, u64::MAX));
            *had = u64::from(*number) + 1;
        }
        for (flow, number) in &self.left {
            let (_, left) = flows.entry(*flow).or_insert((0, u64::MAX));
            *left = u64::from(*number).min(*left);
        }
        let faults: Vec<String> = flows
            .into_iter()
            .filter_map(|(flow, (had, left))| {
                let of_flow = |it: &&FlowCut| it.destination_port == PORT + flow;
                let said = self.cut().flows.iter().find(of_flow);
                let said = said.map_or(0, |it| it.delivered);
                let is_late = said > left;
                let is_early = said < had && basis == CutBasis::Count;
                (is_late || is_early).then(|| {
                    format!("flow {flow}: {had} had, {said} said, {left} is the first one left")
                })
            })
            .collect();
        (!faults.is_empty()).then(|| faults.join("; "))
    }
}

/// How many cuts were made in which way.
#[derive(Default)]
struct Tally {
    stops: u32,
    exact: u32,
    overflow: u32,
    time: u32,
    revised: u32,
    /// Those that were exact where the main loop was seen.
    seen: u32,
    faults: Vec<String>,
}

impl Tally {
    fn take(&mut self, stop: &Stop, outcome: &Outcome) {
        self.stops += 1;
        self.revised += u32::from(outcome.cuts.len() > 1);
        match outcome.cut().basis {
            CutBasis::Count => {
                self.exact += 1;
                self.seen += u32::from(stop.is_seen);
            }
            CutBasis::Overflow => self.overflow += 1,
            CutBasis::Time => self.time += 1,
        }
        if let Some(fault) = outcome.fault(stop) {
            let fault = format!("{:?}: {fault}\n{stop:?}", outcome.cut().basis);
            println!("{fault}");
            self.faults.push(fault);
        }
        if self.stops.is_multiple_of(PRINTED) {
            println!("{self}");
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} stops: {} by the count ({} with the main loop seen), {} by an overflow, {} by the time; \
             {} revised",
            self.stops, self.exact, self.seen, self.overflow, self.time, self.revised
        )
    }
}

/// A host whose VM is stopped time and again.
struct Host<'a> {
    setup: &'a Bridged,
    datapath: &'a Datapath,
    gates: RefCell<Gates>,
    queues: RefCell<TapQueues>,
    main_loop: RefCell<MainLoop>,
    runtime: Runtime,
}

impl<'a> Host<'a> {
    fn new(setup: &'a Bridged, datapath: &'a Datapath) -> Self {
        let gates = Gates::start(datapath, &Handover::default(), Replays::untraced()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        Self {
            setup,
            datapath,
            gates: RefCell::new(gates),
            queues: RefCell::new(TapQueues::open().unwrap()),
            main_loop: RefCell::new(MainLoop::start(&setup.taps).unwrap()),
            runtime,
        }
    }

    fn stop(&self, stop: &Stop) -> Outcome {
        let ifindex = self.setup.ifindex;
        let mut queues = self.queues.borrow_mut();
        queues.set_length(ifindex, stop.room).unwrap();
        let mut main_loop = self.main_loop.borrow_mut();
        main_loop.show(stop.is_seen).unwrap();
        let start = |tap| Mutex::new(Vmm::start(tap, stop.ring));
        let vmms: Vec<_> = self.setup.taps.iter().map(start).collect();
        self.perform(GateCommand::Record {
            ifindex,
            mac: VM_MAC,
            vhost: true,
        });
        wait_for("the recording", || self.gate());
        let shall_end = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| send(&self.setup.sender, &stop.load, &shall_end));
            // By looks and not by the clock, so that the agent has had time to look on a slow machine too.
            let guest = scope.spawn(|| {
                let mut had = Vec::new();
                for _ in 0..(stop.before_us / stop.look_us).max(1) {
                    for vmm in &vmms {
                        had.extend(vmm.lock().unwrap().take(stop.most));
                    }
                    thread::sleep(Duration::from_micros(stop.look_us));
                }
                had
            });
            let mut had = guest.join().unwrap();
            for vmm in &vmms {
                vmm.lock().unwrap().stop();
            }
            let late = Duration::from_micros(stop.main_loop_us);
            main_loop.stopped(stop.held_up, late).unwrap();
            let stopped = now();
            for vmm in &vmms {
                had.extend(vmm.lock().unwrap().take(usize::MAX));
            }
            thread::sleep(Duration::from_micros(stop.agent_us));
            self.perform(GateCommand::Cut {
                ifindex,
                migration: 1,
                stopped,
            });
            let cuts = vec![self.next_cut(netns::DEADLINE).expect("a cut")];
            let had = had.iter().filter_map(|frame| datagram(frame)).collect();
            let mut outcome = Outcome {
                cuts,
                had,
                left: Vec::new(),
            };
            // Once for each frame that the main loop reads late.
            while outcome.fault(stop).is_some()
                && let Some(revised) = self.next_cut(REVISION)
            {
                outcome.cuts.push(revised);
            }
            shall_end.store(true, Ordering::Relaxed);
            let mut left = main_loop.gone().unwrap();
            // They have their headers.
            left.iter_mut()
                .for_each(|frame| drop(frame.drain(..tap::HEADER_BYTES)));
            self.perform(GateCommand::Clear { ifindex });
            // Else the next recording is taken to have begun before it has.
            wait_for("its end", || self.gate().is_none().then_some(()));
            outcome.cuts.extend(self.next_cut(Duration::ZERO));
            wait_for("the queue to be empty", || {
                let frames = self.setup.received();
                let is_empty = frames.is_empty();
                left.extend(frames);
                is_empty.then_some(())
            });
            outcome.left = left.iter().filter_map(|frame| datagram(frame)).collect();
            outcome
        })
    }

    fn next_cut(&self, patience: Duration) -> Option<NicCut> {
        let mut gates = self.gates.borrow_mut();
        let next = async { tokio::time::timeout(patience, gates.next()).await };
        match self.runtime.block_on(next).ok()?? {
            GateEvent::Cut { cut, .. } => Some(cut),
            other => panic!("{other:?}"),
        }
    }

    fn perform(&self, command: GateCommand) {
        self.gates.borrow_mut().perform(command);
    }

    fn gate(&self) -> Option<(Gate, GateUsage)> {
        self.datapath.gate(self.setup.ifindex).unwrap()
    }
}

/// Sends the streams until the end.
fn send(sender: &Wire, load: &Load, shall_end: &AtomicBool) {
    let payload = [0; PAYLOAD_BYTES];
    let frame = |to, port| Frame::udp(SOURCE, to, (5000, port), &payload).bytes();
    let other = Frame::udp(SOURCE, LINK_LOCAL, (1, 2), b"other").bytes();
    let mut flows: Vec<(Vec<u8>, u32)> = (0..load.flows)
        .map(|flow| (frame(GROUP, PORT + flow), 0))
        .collect();
    let mut next = Instant::now();
    let mut sent = 0_u32;
    while !shall_end.load(Ordering::Relaxed) {
        for _ in 0..load.burst {
            sent += 1;
            if load.other_every != 0 && sent.is_multiple_of(load.other_every) {
                sender.send(&other);
                continue;
            }
            // One flow has twice what the others have.
            let flow = (sent % (u32::from(load.flows) + 1)) as usize % flows.len();
            let (frame, number) = &mut flows[flow];
            frame[PAYLOAD_AT..PAYLOAD_AT + 4].copy_from_slice(&number.to_be_bytes());
            sender.send(frame);
            *number += 1;
        }
        next += Duration::from_micros(load.pause_us);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

/// Makes stops by chance, of which some are to be exact; panics if one is wrong.
fn stop_often(queues: usize) {
    if !privileged() || !vmm::is_there() {
        return;
    }
    let setup = Bridged::with_queues(queues);
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let host = Host::new(&setup, &datapath);
        let count = std::env::var("ROAMCAST_STOPS").map_or(STOPS, |stops| stops.parse().unwrap());
        let mut tally = Tally::default();
        let mut runner = TestRunner::default();
        while tally.stops < count || tally.seen < LEAST_EXACT {
            assert!(tally.stops < 10 * count, "nearly nothing is exact: {tally}");
            let stop = stops().new_tree(&mut runner).unwrap().current();
            tally.take(&stop, &host.stop(&stop));
            // One that is wrong does not end it: the others tell how often it is.
            let faults = &tally.faults;
            assert!(faults.len() < MOST_FAULTS, "{tally}\n{}", faults.join("\n"));
        }
        println!("{tally}");
        assert!(tally.faults.is_empty(), "{}", tally.faults.join("\n"));
    });
}

#[test]
fn what_the_agent_calls_exact_is_what_is_in_the_ring_of_a_vm_that_vhost_net_serves() {
    stop_often(1);
}

#[test]
fn what_the_agent_calls_exact_of_several_queues_is_what_is_in_their_rings() {
    stop_often(2);
    stop_often(4);
}
