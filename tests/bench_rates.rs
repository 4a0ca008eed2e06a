//! Handovers of a stream at high rates between the TAPs of two hosts. A process reads each TAP as
//! QEMU's main loop does. The programs, gates and replay are real; the VM and the agents' dialogue
//! are simulated.
//!
//! ```text
//!                      .-- up0 -- br0 (host 0) -- vnet0 -- main loop
//!  sender -- sw (network)
//!                      '-- up0 -- br0 (host 1) -- vnet0 -- main loop
//! ```
//!
//! The VM moves back and forth during the stream. Together, both main loops must read exactly the
//! stream. `--rates MBPS,..`, `--pauses MS,..`, `--moves N`; `--report FILE` also writes the
//! numbers as JSON.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a bench that can't run has to stop"
)]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lab::main_loop::{HeldUp, MainLoop};
use nix::sys::prctl::set_timerslack;
use roamcast::clock::now;
use roamcast::config::Handover;
use roamcast::datapath::{Datapath, DatapathConfig};
use roamcast::net::tap_queue::make_room;
use roamcast::proto::handover::{ClockOffset, HoldReport, Placed};
use roamcast::proto::{GateCommand, GateEvent, Mac};
use roamcast::runtime::agent::gates::Gates;
use roamcast::runtime::trace::Replays;
use serde::Serialize;
use socket2::SockRef;
use support::host::{LIMITS, config, group};
use support::netns::Namespace;
use support::tap;
use tokio::runtime::Runtime;
use tokio::time::timeout;

const MAC: Mac = [0x52, 0x54, 0, 0, 0, 7];
const PORT: u16 = 5004;
/// UDP payload of a packet, bytes.
const PAYLOAD_BYTES: usize = 1450;
/// Time for which the VM runs on a host between two moves.
const STAY: Duration = Duration::from_millis(400);
/// Time for which the gate holds before the VM stops.
const COPY: Duration = Duration::from_millis(200);
/// Timeout of each step.
const PATIENCE: Duration = Duration::from_secs(20);
/// Limit of packets that a delayed sender sends at once.
const MOST: u64 = 256;

/// One row of the result.
#[derive(Serialize)]
struct Row {
    mbps: u32,
    pause_ms: u64,
    moves: u32,
    /// Measured rate of the sender, packets per second.
    packets_per_second: u64,
    lost: u64,
    doubled: u64,
    reordered: u64,
    /// Moves whose record says `exact`.
    exact: u32,
    /// Longest hold time of a packet, milliseconds; median of the moves.
    held_ms: u64,
    /// Packets that the agent replayed; median of the moves.
    replayed: u64,
    /// Frames lost because a TAP or the agent's buffer was full.
    no_room: u64,
}

/// One host of the VM.
struct Place {
    ifindex: u32,
    tap: File,
    main_loop: MainLoop,
    gates: Gates,
    _datapath: Datapath,
}

impl Place {
    fn open(namespace: &Namespace, bpffs: &Path) -> Self {
        let tap = tap::open("vnet0");
        namespace.ip("link set vnet0 master br0 up");
        let ifindex = namespace.ifindex("vnet0");
        make_room(ifindex).unwrap();
        let handover = Handover {
            held_mib: 1024,
            ..Handover::default()
        };
        let mut wanted: DatapathConfig = config(bpffs);
        wanted.capacities.held_bytes = 64 << 20;
        let datapath = Datapath::load(&wanted).unwrap();
        datapath.attach_port(ifindex, "vnet0", &LIMITS).unwrap();
        Self {
            ifindex,
            main_loop: MainLoop::start(&[tap.try_clone().unwrap()]).unwrap(),
            tap,
            gates: Gates::start(&datapath, &handover, Replays::untraced()).unwrap(),
            _datapath: datapath,
        }
    }

    fn record(&mut self) {
        self.gates.perform(GateCommand::Record {
            ifindex: self.ifindex,
            mac: MAC,
            vhost: false,
        });
    }

    /// Discards the unread frames.
    fn drain(&mut self) {
        let mut frame = vec![0; 1 << 16];
        while self.tap.read(&mut frame).is_ok() {}
    }
}

fn next(runtime: &Runtime, gates: &mut Gates) -> GateEvent {
    let event = runtime.block_on(async { timeout(PATIENCE, gates.next()).await });
    event.expect("an event in time").expect("a thread")
}

/// Hands the VM over. Returns the destination's report and the VM's packets at the source.
fn hand_over(
    runtime: &Runtime,
    [from, to]: [&mut Place; 2],
    pause: Duration,
) -> (HoldReport, Vec<u32>) {
    to.gates.perform(GateCommand::Hold {
        ifindex: to.ifindex,
    });
    to.drain();
    thread::sleep(COPY);
    from.main_loop
        .stopped(HeldUp::Busy, 1, Duration::ZERO)
        .unwrap();
    let stopped = now();
    from.gates.perform(GateCommand::Cut {
        ifindex: from.ifindex,
        migration: 1,
        stopped,
    });
    let cut = loop {
        if let GateEvent::Cut { cut, .. } = next(runtime, &mut from.gates) {
            break cut;
        }
    };
    to.gates.perform(GateCommand::Replay {
        ifindex: to.ifindex,
        cut,
        clock_ns: now().0,
        clock: ClockOffset::default(),
    });
    thread::sleep(pause.saturating_sub(now().since(stopped)));
    from.main_loop.gone().unwrap();
    let had = from.main_loop.had().unwrap();
    to.main_loop.serve().unwrap();
    let report = loop {
        if let GateEvent::Opened { report, .. } = next(runtime, &mut to.gates) {
            break report;
        }
    };
    from.gates.perform(GateCommand::Clear {
        ifindex: from.ifindex,
    });
    to.record();
    (report, had)
}

/// Sends numbered packets at a fixed rate until the end. Returns their number.
fn send(socket: &UdpSocket, per_second: u64, is_over: &AtomicBool, sent: &AtomicU32) {
    // The default timer slack delays a sleeper by 50 microseconds.
    set_timerslack(1).unwrap();
    let mut payload = vec![7; PAYLOAD_BYTES];
    let start = Instant::now();
    let (mut number, mut missed) = (0_u32, 0_u64);
    while !is_over.load(Ordering::Relaxed) {
        let due = start.elapsed().as_nanos() * u128::from(per_second) / 1_000_000_000;
        let due = u64::try_from(due).unwrap() - u64::from(number) - missed;
        let count = due.min(MOST);
        missed += due - count;
        for _ in 0..count {
            payload[..4].copy_from_slice(&number.to_le_bytes());
            socket.send(&payload).unwrap();
            number += 1;
        }
        sent.store(number, Ordering::Relaxed);
        thread::sleep(Duration::from_micros(50));
    }
}

/// Counts the packets that a VM lost, received twice or received out of order.
fn compare(had: &[u32]) -> [u64; 3] {
    let (mut highest, mut reordered, mut doubled) = (had[0], 0, 0);
    let mut seen = vec![false; *had.iter().max().unwrap() as usize + 1];
    for number in had {
        let is_again = std::mem::replace(&mut seen[*number as usize], true);
        doubled += u64::from(is_again);
        reordered += u64::from(!is_again && *number < highest);
        highest = highest.max(*number);
    }
    let lost = seen[had[0] as usize..].iter().filter(|seen| !**seen);
    [lost.count() as u64, doubled, reordered]
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

fn measure(
    places: &mut [Place; 2],
    socket: &UdpSocket,
    (mbps, pause): (u32, Duration),
    runs: u32,
) -> Row {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let per_second = u64::from(mbps) * 1_000_000 / (8 * PAYLOAD_BYTES as u64);
    let (is_over, sent) = (AtomicBool::new(false), AtomicU32::new(0));
    let (mut reports, mut had) = (Vec::new(), Vec::new());
    let started = Instant::now();
    thread::scope(|scope| {
        let [first, _] = &mut *places;
        first.drain();
        first.main_loop.serve().unwrap();
        first.record();
        scope.spawn(|| send(socket, per_second, &is_over, &sent));
        for run in 0..runs {
            thread::sleep(STAY);
            let [a, b] = &mut *places;
            let pair = if run % 2 == 0 { [a, b] } else { [b, a] };
            let (report, numbers) = hand_over(&runtime, pair, pause);
            reports.push(report);
            had.extend(numbers);
        }
        thread::sleep(STAY);
        is_over.store(true, Ordering::Relaxed);
    });
    let time = started.elapsed();
    // Let packets in flight arrive.
    thread::sleep(STAY);
    let last = &mut places[runs as usize % 2];
    last.main_loop
        .stopped(HeldUp::Busy, 0, Duration::ZERO)
        .unwrap();
    last.main_loop.gone().unwrap();
    had.extend(last.main_loop.had().unwrap());
    last.gates.perform(GateCommand::Clear {
        ifindex: last.ifindex,
    });
    let [lost, doubled, reordered] = compare(&had);
    let flows = || reports.iter().filter_map(|report| report.flows.first());
    Row {
        mbps,
        pause_ms: u64::try_from(pause.as_millis()).unwrap(),
        moves: runs,
        packets_per_second: u64::from(sent.into_inner()) * 1000
            / u64::try_from(time.as_millis()).unwrap(),
        lost,
        doubled,
        reordered,
        exact: u32::try_from(
            flows()
                .filter(|flow| flow.placed == Some(Placed::Fingerprint) && flow.lost == 0)
                .count(),
        )
        .unwrap(),
        held_ms: median(
            flows()
                .map(|flow| u64::try_from(flow.longest_held.as_millis()).unwrap())
                .collect(),
        ),
        replayed: median(flows().map(|flow| flow.replayed).collect()),
        no_room: reports
            .iter()
            .map(|report| report.tap_full + report.lost_in_kernel)
            .sum(),
    }
}

/// Returns the value after a command-line argument.
fn argument(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1)
}

fn numbers<T: std::str::FromStr>(name: &str, default: &str) -> Vec<T> {
    let text = argument(name).unwrap_or_else(|| default.to_owned());
    text.split(',')
        .map(|number| number.parse().unwrap_or_else(|_| panic!("{name} {text}")))
        .collect()
}

fn main() {
    let rates: Vec<u32> = numbers("--rates", "200,500,1000");
    let pauses: Vec<u64> = numbers("--pauses", "50,200,500");
    let moves: u32 = numbers("--moves", "10")[0];
    let network = Namespace::new("network");
    network.ip("link add sw type bridge mcast_snooping 0");
    network.ip("link set sw up");
    network.ip("addr add 2001:db8:1::5/64 dev sw nodad");
    let hosts = [Namespace::new("host0"), Namespace::new("host1")];
    for (host, port) in hosts.iter().zip(["p0", "p1"]) {
        host.ip("link add br0 type bridge mcast_snooping 0");
        host.ip("link set br0 up");
        network.add_peer("sw", port, host, "up0");
        host.ip("link set up0 master br0");
    }
    let socket = network.run(|| {
        let socket = UdpSocket::bind("[::]:0").unwrap();
        let sw = nix::net::if_::if_nametoindex("sw").unwrap();
        SockRef::from(&socket).set_multicast_if_v6(sw).unwrap();
        SockRef::from(&socket).set_multicast_hops_v6(8).unwrap();
        let to: Ipv6Addr = group(1);
        socket.connect(SocketAddrV6::new(to, PORT, 0, 0)).unwrap();
        socket
    });
    let [first, second] = &hosts;
    let rows = first.run_with_bpffs(|bpffs| {
        let one = Place::open(first, bpffs);
        second.run_with_bpffs(|bpffs| {
            let mut places = [one, Place::open(second, bpffs)];
            let mut rows = Vec::new();
            println!(
                "{:>7} {:>9} {:>6} {:>10} {:>6} {:>8} {:>10} {:>6} {:>8} {:>9} {:>8}",
                "Mbit/s",
                "pause, ms",
                "moves",
                "packets/s",
                "lost",
                "doubled",
                "reordered",
                "exact",
                "held, ms",
                "replayed",
                "no room"
            );
            for mbps in rates {
                for pause in &pauses {
                    let pause = Duration::from_millis(*pause);
                    let row = measure(&mut places, &socket, (mbps, pause), moves);
                    println!(
                        "{:>7} {:>9} {:>6} {:>10} {:>6} {:>8} {:>10} {:>6} {:>8} {:>9} {:>8}",
                        row.mbps,
                        row.pause_ms,
                        row.moves,
                        row.packets_per_second,
                        row.lost,
                        row.doubled,
                        row.reordered,
                        row.exact,
                        row.held_ms,
                        row.replayed,
                        row.no_room
                    );
                    rows.push(row);
                }
            }
            rows
        })
    });
    if let Some(file) = argument("--report") {
        let json = serde_json::to_string_pretty(&rows).unwrap();
        File::create(file)
            .unwrap()
            .write_all(json.as_bytes())
            .unwrap();
    }
}
