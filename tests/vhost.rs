//! The cut where vhost-net reads the TAP: a VM is stopped as QEMU stops it, time and again, and what
//! the agent calls exact is what is in the VM's ring.
//!
//! `ROAMCAST_STOPS` sets how many stops there are.
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

use std::cell::{Cell, RefCell};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bridged::{Bridged, udp};
use common::maps::{Gate, GateUsage};
use common::signal::{CutBasis, NicCut};
use host::config;
use netns::{privileged, wait_for};
use nix::poll::PollTimeout;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use roamcast::clock::now;
use roamcast::config::Handover;
use roamcast::datapath::Datapath;
use roamcast::proto::{GateCommand, GateEvent, Mac};
use roamcast::runtime::gates::Gates;
use roamcast::runtime::trace::Replays;
use tokio::runtime::Runtime;
use vmm::Vmm;
use wire::Wire;

const VM_MAC: Mac = [0x52, 0x54, 0, 0, 0, 7];
/// Stops, where nobody says how many.
const STOPS: u32 = 40;
/// QEMU's main loop comes round so soon, microseconds: later than the agent waits for it, sometimes,
/// but not later than it looks.
const MAIN_LOOP_US: u64 = 50_000;
/// So long after QEMU's main loop has come round a cut may be revised.
const REVISION: Duration = Duration::from_millis(300);
/// Payload of a datagram, bytes.
const PAYLOAD_BYTES: usize = 1000;
/// Where the payload begins in a frame.
const PAYLOAD_AT: usize = 62;

/// How one stop comes about; times in microseconds.
#[derive(Clone, Debug)]
struct Stop {
    /// Entries of the ring.
    entries: u16,
    is_mergeable: bool,
    /// Datagrams at a time, and the time between two such times.
    burst: u32,
    pause_us: u64,
    /// How long the stream runs before the stop.
    before_us: u64,
    /// Time between two looks of the guest at its ring, and how many frames it takes at a time.
    look_us: u64,
    most: usize,
    /// From the stop to QEMU's main loop, and to the agent.
    main_loop_us: u64,
    agent_us: u64,
}

prop_compose! {
    fn stops()(
        entries in prop_oneof![Just(64_u16), Just(256), Just(1024)],
        is_mergeable in any::<bool>(),
        burst in 1_u32..80,
        pause_us in 200_u64..20_000,
        before_us in 150_000_u64..400_000,
        look_us in 50_u64..20_000,
        most in 1_usize..16,
        main_loop_us in 0..MAIN_LOOP_US,
        agent_us in 0_u64..8_000,
    ) -> Stop {
        Stop { entries, is_mergeable, burst, pause_us, before_us, look_us, most, main_loop_us, agent_us }
    }
}

/// The number of a datagram of the stream.
fn number(frame: &[u8]) -> Option<u32> {
    let is_ours = frame.len() == PAYLOAD_AT + PAYLOAD_BYTES;
    is_ours.then(|| u32::from_be_bytes(frame[PAYLOAD_AT..PAYLOAD_AT + 4].try_into().unwrap()))
}

/// A host whose VM is stopped time and again.
struct Host<'a> {
    setup: &'a Bridged,
    datapath: &'a Datapath,
    gates: RefCell<Gates>,
    runtime: Runtime,
}

impl Host<'_> {
    /// One stop: what the agent says, its revision included, and what the VM has had.
    fn stop(&self, stop: &Stop) -> (Vec<NicCut>, Vec<u32>) {
        let ifindex = self.setup.ifindex;
        let tap = &self.setup.tap;
        let vmm = Mutex::new(Vmm::start(tap, stop.entries, stop.is_mergeable));
        self.perform(GateCommand::Record {
            ifindex,
            mac: VM_MAC,
            vhost: true,
        });
        wait_for("the recording", || self.gate());
        let (shall_end, is_stopped) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| send(&self.setup.sender, stop, &shall_end));
            let guest = scope.spawn(|| {
                let mut had = Vec::new();
                while !is_stopped.load(Ordering::Relaxed) {
                    had.extend(vmm.lock().unwrap().take(stop.most));
                    thread::sleep(Duration::from_micros(stop.look_us));
                }
                had
            });
            thread::sleep(Duration::from_micros(stop.before_us));
            is_stopped.store(true, Ordering::Relaxed);
            let mut had = guest.join().unwrap();
            vmm.lock().unwrap().stop();
            let stopped = now();
            let main_loop = scope.spawn(|| {
                thread::sleep(Duration::from_micros(stop.main_loop_us));
                // It is held back, and gone.
                tap::read(tap, PollTimeout::from(500_u16));
            });
            thread::sleep(Duration::from_micros(stop.agent_us));
            self.perform(GateCommand::Cut {
                ifindex,
                migration: 1,
                stopped,
            });
            let mut cuts = vec![self.next_cut(netns::DEADLINE).expect("a cut")];
            main_loop.join().unwrap();
            cuts.extend(self.next_cut(REVISION));
            shall_end.store(true, Ordering::Relaxed);
            had.extend(vmm.lock().unwrap().take(usize::MAX));
            self.perform(GateCommand::Clear { ifindex });
            // Else the next recording is taken to have begun before it has.
            wait_for("its end", || self.gate().is_none().then_some(()));
            (cuts, had.iter().filter_map(|frame| number(frame)).collect())
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

/// Sends the stream until the end.
fn send(sender: &Wire, stop: &Stop, shall_end: &AtomicBool) {
    let mut next = Instant::now();
    let mut payload = [0; PAYLOAD_BYTES];
    for burst in 0_u32.. {
        for number in 0..stop.burst {
            let number = burst * stop.burst + number;
            payload[..4].copy_from_slice(&number.to_be_bytes());
            sender.send(&udp(&payload));
        }
        if shall_end.load(Ordering::Relaxed) {
            return;
        }
        next += Duration::from_micros(stop.pause_us);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

#[test]
fn what_the_agent_calls_exact_is_what_is_in_the_ring_of_a_vm_that_vhost_net_serves() {
    if !privileged() || !vmm::is_there() {
        return;
    }
    let setup = Bridged::with_headers();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let gates = Gates::start(&datapath, &Handover::default(), Replays::untraced()).unwrap();
        let host = Host {
            setup: &setup,
            datapath: &datapath,
            gates: RefCell::new(gates),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
        };
        let count = std::env::var("ROAMCAST_STOPS").map_or(STOPS, |stops| stops.parse().unwrap());
        let (bases, revised) = (RefCell::new(Vec::new()), Cell::new(0));
        let mut runner = TestRunner::new(Config {
            cases: count,
            failure_persistence: None,
            max_shrink_iters: 0,
            ..Config::default()
        });
        let result = runner.run(&stops(), |stop| {
            let (cuts, had) = host.stop(&stop);
            let cut = cuts.last().expect("a cut");
            revised.set(revised.get() + cuts.len() - 1);
            // What is left is of nobody.
            wait_for("the queue to be empty", || {
                setup.received().is_empty().then_some(())
            });
            prop_assert!(had.is_sorted(), "{:?}", had);
            let said = cut.flows.first().map_or(0, |flow| flow.delivered);
            bases.borrow_mut().push(cut.basis);
            let last = had.last().map_or(0, |last| u64::from(*last) + 1);
            if cut.basis == CutBasis::Count {
                prop_assert_eq!(said, last, "of which {} are there", had.len());
            }
            Ok(())
        });
        let of = |basis| bases.borrow().iter().filter(|it| **it == basis).count();
        let (exact, revised) = (of(CutBasis::Count), revised.get());
        let (overflow, time) = (of(CutBasis::Overflow), of(CutBasis::Time));
        println!(
            "{exact} by the count ({revised} revised), {overflow} by an overflow, {time} by the time"
        );
        if let Err(error) = result {
            panic!("{error}");
        }
        assert!(exact >= count as usize / 4, "nearly nothing was exact");
    });
}
