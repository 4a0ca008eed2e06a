//! Cost of a node's programs by program test-run: nanoseconds per packet.
//!
//! The kernel runs a program repeatedly on one packet, so each run must leave the packet unchanged.
//! The MoAs are therefore the HoAs themselves: the program does all lookups and stores, which
//! change nothing. Where the bench measures checksum changes, the map's differences change the
//! checksum to another value in each run.
//!
//! `--report FILE` also writes the numbers as JSON.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a bench that can't run has to stop"
)]

use std::fs::File;
use std::io::Write as _;

use serde::Serialize;
use support::mat_frame;
use support::mat_world::{Kernel, World, parse};

/// Runs per measurement.
const RUNS: u32 = 200_000;
/// Measurements per kind of packet; the median counts.
const ROUNDS: usize = 7;
/// UDP or TCP payload, bytes.
const PAYLOAD_BYTES: [usize; 2] = [100, 1400];
/// Limit for a translated packet, nanoseconds.
const BUDGET_NS: u64 = 100;

/// Results of one bench run.
#[derive(Serialize)]
struct Results {
    kernel: String,
    budget_ns: u64,
    costs: Vec<Cost>,
}

/// Cost of one kind of packet.
#[derive(Serialize)]
struct Cost {
    program: &'static str,
    packet: &'static str,
    payload_bytes: usize,
    /// Median of the rounds, nanoseconds.
    ns_per_packet: u64,
    /// Fastest and slowest round, nanoseconds.
    range_ns: [u64; 2],
}

fn main() {
    let mut costs = Vec::new();
    for bytes in PAYLOAD_BYTES {
        costs.extend(all(&vec![7; bytes]));
    }
    let results = Results {
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
            .unwrap()
            .trim()
            .to_owned(),
        budget_ns: BUDGET_NS,
        costs,
    };
    println!(
        "{:<8} {:<34} {:>8} {:>14} {:>12}",
        "Program", "packet", "payload", "ns per packet", "range"
    );
    for cost in &results.costs {
        println!(
            "{:<8} {:<34} {:>8} {:>14} {:>12}",
            cost.program,
            cost.packet,
            cost.payload_bytes,
            cost.ns_per_packet,
            format!("{}-{}", cost.range_ns[0], cost.range_ns[1])
        );
    }
    let mut arguments = std::env::args().skip_while(|argument| argument != "--report");
    if let Some(file) = arguments.nth(1) {
        let json = serde_json::to_string_pretty(&results).unwrap();
        File::create(file)
            .unwrap()
            .write_all(json.as_bytes())
            .unwrap();
    }
}

fn all(payload: &[u8]) -> Vec<Cost> {
    let own = parse("fd5e:6d61:74::a");
    let peer = parse("fd5e:6d61:74::1234:b");
    let neutral = World::new((own, own), (peer, peer));
    let mut given = neutral.clone();
    given.change_checksums();
    let stranger = parse("2001:db8::99");
    let (udp, tcp) = (mat_frame::udp, mat_frame::tcp);
    [
        ("mat_out", "UDP", &neutral, udp(own, peer, payload)),
        ("mat_out", "TCP", &neutral, tcp(own, peer, payload)),
        ("mat_out", "UDP, given", &given, udp(own, peer, payload)),
        ("mat_out", "TCP, given", &given, tcp(own, peer, payload)),
        (
            "mat_out",
            "not carried",
            &neutral,
            udp(own, stranger, payload),
        ),
        ("mat_in", "UDP", &neutral, udp(peer, own, payload)),
        ("mat_in", "TCP", &neutral, tcp(peer, own, payload)),
        ("mat_in", "UDP, given", &given, udp(peer, own, payload)),
        ("mat_in", "TCP, given", &given, tcp(peer, own, payload)),
        (
            "mat_in",
            "UDP, plain",
            &neutral,
            udp(stranger, stranger, payload),
        ),
        (
            "mat_in",
            "TCP, plain",
            &neutral,
            tcp(stranger, stranger, payload),
        ),
    ]
    .into_iter()
    .map(|(program, packet, world, frame)| {
        let mut kernel = Kernel::load(world);
        let mut rounds: Vec<u64> = (0..ROUNDS)
            .map(|_| u64::try_from(kernel.time(program, &frame, RUNS).as_nanos()).unwrap())
            .collect();
        rounds.sort_unstable();
        Cost {
            program,
            packet,
            payload_bytes: payload.len(),
            ns_per_packet: rounds[ROUNDS / 2],
            range_ns: [rounds[0], rounds[ROUNDS - 1]],
        }
    })
    .collect()
}
