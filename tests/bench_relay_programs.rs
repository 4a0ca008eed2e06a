//! Cost of the relay's programs by program test-run: nanoseconds per packet.
//!
//! The kernel runs a program repeatedly on one packet, so each run must leave the packet unchanged.
//! Packets that `uplink` restores therefore belong to a flow that is its own relayed form: the
//! program does all lookups and stores, which change only the MACs and the hop limit.
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
use std::time::Duration;

use common::maps::{Managed, ManagedKey, Origins, RelayStream, SubscriberKey};
use common::relay::Endpoints;
use serde::Serialize;
use support::kernel::Kernel;
use support::relay::Relayed;

/// Runs per measurement.
const RUNS: u32 = 200_000;
/// Measurements per kind of packet; the median counts.
const ROUNDS: usize = 7;
/// UDP payload, bytes.
const PAYLOAD_BYTES: [usize; 2] = [100, 1400];
/// Limit for a relayed packet in `uplink`, nanoseconds.
const BUDGET_NS: u64 = 150;

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
    /// Median for the traced programs in the same rounds, with a filter that matches nothing.
    traced_ns_per_packet: u64,
}

fn main() {
    // SAFETY: no thread has been started, and the namespace is this process's own.
    assert_eq!(
        unsafe { libc::unshare(libc::CLONE_NEWNET) },
        0,
        "Needs root"
    );
    ip("link set lo up");
    let mut costs = Vec::new();
    for payload_bytes in PAYLOAD_BYTES {
        let payload = vec![7; payload_bytes];
        for program in ["uplink", "uplink_xdp"] {
            costs.extend(uplink(program, &payload));
        }
        costs.push(leak(&payload));
        costs.push(replicate(&payload));
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
        "{:<12} {:<34} {:>8} {:>14} {:>12} {:>7}",
        "Program", "packet", "payload", "ns per packet", "range", "traced"
    );
    for cost in &results.costs {
        println!(
            "{:<12} {:<34} {:>8} {:>14} {:>12} {:>7}",
            cost.program,
            cost.packet,
            cost.payload_bytes,
            cost.ns_per_packet,
            format!("{}-{}", cost.range_ns[0], cost.range_ns[1]),
            cost.traced_ns_per_packet
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

fn uplink(program: &'static str, payload: &[u8]) -> Vec<Cost> {
    let usual = Relayed::usual();
    let own = own_form();
    let mut other = usual.datagram(payload);
    other[56..58].copy_from_slice(&443_u16.to_be_bytes());
    let mut stranger = usual.datagram(payload);
    stranger[37] ^= 1;
    [
        ("unicast to another port", other, Origins::Relay),
        ("unicast to a relayed flow's port", stranger, Origins::Relay),
        ("native", usual.native(payload), Origins::Native),
        (
            "native, relay passes",
            usual.native(payload),
            Origins::Relay,
        ),
        ("native, both live", usual.native(payload), Origins::Both),
        (
            "relayed, native passes",
            own.datagram(payload),
            Origins::Native,
        ),
        ("relayed", own.datagram(payload), Origins::Relay),
        ("relayed, both live", own.datagram(payload), Origins::Both),
    ]
    .into_iter()
    .map(|(packet, frame, origins)| {
        let mut both = load();
        for kernel in &mut both {
            for relayed in [usual, own] {
                kernel.insert("RELAY_FLOWS", relayed.flow_key(), relayed.entry());
                kernel.insert("RELAYS", relayed.relay_key(), 1_u32);
                manage(kernel, &relayed, origins);
            }
        }
        measure(&mut both, program, packet, payload.len(), &frame)
    })
    .collect()
}

/// Returns a flow whose relayed form is the flow itself.
fn own_form() -> Relayed {
    let mut relayed = Relayed::usual();
    let Endpoints {
        relay_address,
        relay_port,
        agent_address,
        agent_port,
    } = relayed.endpoints;
    relayed.stream.source = relay_address;
    relayed.stream.source_port = relay_port;
    relayed.stream.multicast_address = agent_address;
    relayed.stream.destination_port = agent_port;
    relayed
}

fn leak(payload: &[u8]) -> Cost {
    let frame = Relayed::usual().native(payload);
    measure(&mut load(), "leak", "any", payload.len(), &frame)
}

/// Measures one subscriber behind a bridge without ports: the program clones, routes and transmits
/// the packet, and the bridge drops it.
fn replicate(payload: &[u8]) -> Cost {
    let relayed = Relayed::usual();
    let agent = std::net::Ipv6Addr::from(relayed.endpoints.agent_address);
    let setting = "/proc/sys/net/ipv6/conf/lo/forwarding";
    std::fs::write(setting, "1").unwrap();
    ip("link add out0 type bridge");
    ip("link set out0 up");
    ip(&format!("-6 route add {agent}/128 dev out0"));
    ip(&format!(
        "neigh replace {agent} lladdr 52:54:00:00:00:99 dev out0 nud permanent"
    ));
    let mut both = load();
    for kernel in &mut both {
        manage(kernel, &relayed, Origins::Native);
        let served = RelayStream {
            flow: 1,
            subscribers: 1,
        };
        kernel.insert("RELAY_STREAMS", relayed.stream, served);
        let key = SubscriberKey { flow: 1, index: 0 };
        kernel.insert("RELAY_SUBSCRIBERS", key, relayed.subscriber(u64::MAX));
    }
    let frame = relayed.native(payload);
    let cost = measure(
        &mut both,
        "replicate",
        "one subscriber",
        payload.len(),
        &frame,
    );
    ip("link del out0");
    let runs = u64::from(RUNS) * ROUNDS as u64;
    for kernel in &mut both {
        let counted = kernel.counted();
        assert!(
            counted.contains(&(common::counter::Counter::ReplicatedPackets, runs)),
            "{counted:?}"
        );
    }
    cost
}

/// Measures the usual program and the traced one alternately.
fn measure(
    both: &mut [Kernel; 2],
    program: &'static str,
    packet: &'static str,
    payload_bytes: usize,
    frame: &[u8],
) -> Cost {
    let mut rounds = [const { Vec::new() }; 2];
    for _ in 0..ROUNDS {
        for (kernel, rounds) in both.iter_mut().zip(&mut rounds) {
            let time = kernel.repeatedly(program, frame, RUNS);
            rounds.push(nanoseconds(time) / u64::from(RUNS));
        }
    }
    rounds.iter_mut().for_each(|rounds| rounds.sort_unstable());
    let [usual, traced] = rounds;
    Cost {
        program,
        packet,
        payload_bytes,
        ns_per_packet: usual[ROUNDS / 2],
        range_ns: [usual[0], usual[ROUNDS - 1]],
        traced_ns_per_packet: traced[ROUNDS / 2],
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn manage(kernel: &mut Kernel, relayed: &Relayed, origins: Origins) {
    let key: ManagedKey = relayed.stream.managed();
    let value = Managed::new(0, origins, u16::MAX);
    kernel.insert("MANAGED", key, value);
}

/// Loads the usual programs and the traced ones.
fn load() -> [Kernel; 2] {
    [Kernel::load(), Kernel::load_traced_in_vain()]
        .map(|kernel| kernel.unwrap_or_else(|| panic!("Needs root")))
}

fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split(' '))
        .status()
        .unwrap();
    assert!(status.success(), "ip {arguments} failed");
}
