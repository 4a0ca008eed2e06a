//! Cost of `gate` by program test-run: nanoseconds per frame that enters a TAP.
//!
//! `--report FILE` also writes the numbers as JSON.

#![allow(unsafe_code, reason = "the bench has a network namespace of its own")]
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a bench that can't run has to stop"
)]

use std::fs::File;
use std::io::Write as _;
use std::process::Command;
use std::time::Instant;

use common::counter::Counter;
use common::maps::RECORDS_PER_SLOT;
use common::testing::frame::Frame;
use roamcast::datapath::Datapath;
use serde::Serialize;
use support::gate::Gated;
use support::host::{LIMITS, config};
use support::kernel::Kernel;
use support::netns::Namespace;
use support::relay::Relayed;
use support::tap;
use support::wire::Wire;

/// Runs per measurement; the frames held by all of them fit into `HELD`.
const RUNS: u32 = 4000;
/// Measurements per kind of frame; the median counts.
const ROUNDS: usize = 101;
/// UDP payload, bytes.
const PAYLOAD_BYTES: [usize; 2] = [100, 1400];
/// Limit for a frame while no VM migrates, nanoseconds.
const BUDGET_NS: u64 = 100;

/// Results of one bench run.
#[derive(Serialize)]
struct Results {
    kernel: String,
    budget_ns: u64,
    costs: Vec<Cost>,
    /// Median time to read a full slot of records, microseconds.
    read_records_us: u64,
}

/// Cost of one kind of frame.
#[derive(Serialize)]
struct Cost {
    mode: &'static str,
    frame: &'static str,
    payload_bytes: usize,
    /// Median of the rounds, nanoseconds.
    ns_per_frame: u64,
    /// Fastest and slowest round, nanoseconds.
    range_ns: [u64; 2],
    /// Median for the traced programs in the same rounds, with a filter that matches nothing.
    traced_ns_per_frame: u64,
}

fn main() {
    // SAFETY: no thread has been started, and the namespace is this process's own.
    assert_eq!(
        unsafe { libc::unshare(libc::CLONE_NEWNET) },
        0,
        "Needs root"
    );
    let status = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    assert!(status.unwrap().success());
    let results = Results {
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
            .unwrap()
            .trim()
            .to_owned(),
        budget_ns: BUDGET_NS,
        costs: PAYLOAD_BYTES.into_iter().flat_map(costs).collect(),
        read_records_us: read_records(),
    };
    println!(
        "{:<10} {:<28} {:>8} {:>13} {:>12} {:>7}",
        "Mode", "frame", "payload", "ns per frame", "range", "traced"
    );
    for cost in &results.costs {
        println!(
            "{:<10} {:<28} {:>8} {:>13} {:>12} {:>7}",
            cost.mode,
            cost.frame,
            cost.payload_bytes,
            cost.ns_per_frame,
            format!("{}-{}", cost.range_ns[0], cost.range_ns[1]),
            cost.traced_ns_per_frame
        );
    }
    println!(
        "{RECORDS_PER_SLOT} records are read in {} us",
        results.read_records_us
    );
    let mut arguments = std::env::args().skip_while(|argument| argument != "--report");
    if let Some(file) = arguments.nth(1) {
        let json = serde_json::to_string_pretty(&results).unwrap();
        File::create(file)
            .unwrap()
            .write_all(json.as_bytes())
            .unwrap();
    }
}

fn costs(payload_bytes: usize) -> Vec<Cost> {
    let payload = vec![7; payload_bytes];
    let relayed = Relayed::usual();
    let stream = relayed.native(&payload);
    let unicast = relayed.datagram(&payload);
    let link_local = Frame::udp("fe80::1", "ff02::fb", (5353, 5353), &payload).bytes();
    let tagged = Frame::udp("2001:db8::1", "ff3e::1234", (1, 2), &payload)
        .with(|frame| frame.vlan = Some(7))
        .bytes();
    let normal: fn(&mut Gated) = |_| ();
    let record: fn(&mut Gated) = |gated| gated.record(0);
    let hold: fn(&mut Gated) = Gated::hold;
    let open: fn(&mut Gated) = |gated| {
        gated.hold();
        gated.replayed(0);
    };
    let cases = [
        ("normal", normal, "multicast", &stream),
        ("normal", normal, "multicast, tag in the frame", &tagged),
        ("normal", normal, "link-local multicast", &link_local),
        ("normal", normal, "unicast", &unicast),
        ("record", record, "multicast", &stream),
        ("record", record, "unicast", &unicast),
        ("hold", hold, "multicast", &stream),
        ("hold", hold, "unicast", &unicast),
        ("hold, open", open, "multicast", &stream),
    ];
    cases
        .into_iter()
        .map(|(mode, prepare, name, frame)| {
            let mut both = [Kernel::load(), Kernel::load_traced_in_vain()].map(|kernel| Gated {
                kernel: kernel.unwrap_or_else(|| panic!("Needs root")),
            });
            both.iter_mut().for_each(prepare);
            measure(&mut both, mode, name, payload_bytes, frame)
        })
        .collect()
}

/// Fills a slot with frames into a TAP without a reader, and reads the slot as the agent does.
fn read_records() -> u64 {
    let host = Namespace::new("bench");
    let _tap = host.run(|| tap::open("vnet0"));
    host.ip("link set vnet0 up");
    let ifindex = host.ifindex("vnet0");
    host.run_with_bpffs(|bpffs| {
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        datapath.attach_port(ifindex, "vnet0", &LIMITS).unwrap();
        let slot = datapath.gate_record(ifindex, false).unwrap();
        let sender = Wire::new(ifindex);
        let frame = Relayed::usual().native(&[7; 100]);
        for _ in 0..RECORDS_PER_SLOT {
            // `EAGAIN` of a full queue is expected.
            let _ = sender.try_send(&frame);
        }
        let mut rounds: Vec<u64> = (0..ROUNDS)
            .map(|_| {
                let started = Instant::now();
                let (_, usage) = datapath.gate(ifindex).unwrap().unwrap();
                let records = datapath.gate_records(slot, &usage).unwrap();
                assert_eq!(records.len(), RECORDS_PER_SLOT as usize);
                u64::try_from(started.elapsed().as_micros()).unwrap_or(u64::MAX)
            })
            .collect();
        rounds.sort_unstable();
        rounds[ROUNDS / 2]
    })
}

/// Measures the usual program and the traced one alternately.
fn measure(
    both: &mut [Gated; 2],
    mode: &'static str,
    frame: &'static str,
    payload_bytes: usize,
    bytes: &[u8],
) -> Cost {
    let mut rounds = [const { Vec::new() }; 2];
    for _ in 0..ROUNDS {
        for (gated, rounds) in both.iter_mut().zip(&mut rounds) {
            let time = gated.kernel.repeatedly("gate", bytes, RUNS);
            gated.kernel.ring("HELD");
            let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
            rounds.push(ns / u64::from(RUNS));
        }
    }
    for gated in both {
        let lost = gated.kernel.counter(Counter::HeldLost);
        assert_eq!(lost, 0, "frames found no room");
    }
    rounds.iter_mut().for_each(|rounds| rounds.sort_unstable());
    let [usual, traced] = rounds;
    Cost {
        mode,
        frame,
        payload_bytes,
        ns_per_frame: usual[ROUNDS / 2],
        range_ns: [usual[0], usual[ROUNDS - 1]],
        traced_ns_per_frame: traced[ROUNDS / 2],
    }
}
