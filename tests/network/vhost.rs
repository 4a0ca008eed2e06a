//! The cut when vhost-net reads the TAP. A VM is stopped repeatedly as QEMU stops it, and every cut
//! that the agent calls exact must match the VM's rings.
//!
//! ```text
//!  sender --> bridge --> gate --> TAP --> vhost-net --> rings --> guest     had
//!                                  '----> main loop after the stop --.
//!                                  '----> what is there at the end --'      left
//!
//!  an exact cut: the guest had all of a flow up to the cut's number, and nothing of that is left
//! ```
//!
//! `ROAMCAST_STOPS` sets the number of stops per test.
//! `ROAMCAST_STOPS` sets how many stops each test makes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::cell::RefCell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::maps::{Gate, GateUsage};
use common::signal::NicCut;
use common::testing::frame::Frame;
use lab::main_loop::MainLoop;
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::TestRunner;
use roamcast::clock::now;
use roamcast::config::Handover;
use roamcast::datapath::Datapath;
use roamcast::net::tap_queue::TapQueues;
use roamcast::proto::{GateCommand, GateEvent, Mac};
use roamcast::runtime::agent::gates::Gates;
use roamcast::runtime::trace::Replays;
use support::bridged::{Bridged, GROUP, SOURCE};
use support::host::config;
use support::netns::{self, privileged, wait_for};
use support::stops::{
    Load, Outcome, PAYLOAD_AT, PAYLOAD_BYTES, PORT, Stop, Tally, datagram, stops,
};
use support::tap;
use support::vmm::{self, Vmm};
use support::wire::Wire;
use tokio::runtime::Runtime;

const VM_MAC: Mac = [0x52, 0x54, 0, 0, 0, 7];
/// Default number of stops; more follow if fewer than this many are exact.
const STOPS: u32 = 10;
const LEAST_EXACT: u32 = 3;
/// Time after a cut in which the agent may revise it.
const REVISION: Duration = Duration::from_millis(300);
/// Address of a scope that `gate` counts at a TAP without treating it as a stream.
const LINK_LOCAL: &str = "ff02::1234";
/// Limit of faults, after which the test stops.
const MOST_FAULTS: usize = 8;

/// A host whose VM is stopped repeatedly.
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
            // Counted in looks instead of time, so that the agent can look on a slow machine too.
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
            main_loop.stopped(stop.held_up, stop.reads, late).unwrap();
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
            // One round per frame that the main loop reads late.
            while outcome.fault(stop).is_some()
                && let Some(revised) = self.next_cut(REVISION)
            {
                outcome.cuts.push(revised);
            }
            shall_end.store(true, Ordering::Relaxed);
            let mut left = main_loop.gone().unwrap();
            // The remaining frames carry their headers.
            left.iter_mut()
                .for_each(|frame| drop(frame.drain(..tap::HEADER_BYTES)));
            self.perform(GateCommand::Clear { ifindex });
            // Otherwise the test would mistake the end of this recording for the start of the next.
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
            // One flow has twice the rate of the others.
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

/// Makes random stops, some of which must be exact. Panics if a cut is wrong.
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
            // A wrong cut does not end the test, because the others show how frequent it is.
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
