//! Cost of address translation for applications: TCP and UDP between two nodes, by permanent
//! addresses and without MAT, between namespaces with a router in between.
//!
//! Sender, router and receiver share one fully loaded CPU, so the cost per packet is the total time
//! divided by the number of packets. Each round measures all paths one after the other, and ratios
//! compare paths of the same round: a temporarily slow machine slows down all of them.
//!
//! `--rounds N` sets the number of rounds; `--report FILE` also writes the numbers as JSON.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a bench that can't run has to stop"
)]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use lab::bench::{Samples, ratio};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::Serialize;
use support::mat_net::{Moas, Net};
use support::netns::{self, command};

/// Measuring time per path and round.
const TIME: Duration = Duration::from_millis(400);
const ROUNDS: usize = 15;
/// Bytes per write.
const CHUNK: usize = 64 * 1024;
/// Limit of datagrams in flight, so that no queue overflows.
const BURST: usize = 64;

/// Path of the packets to the other node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Without MAT, by the nodes' own addresses.
    Plain,
    /// With checksum-neutral MoAs.
    Neutral,
    /// With MoAs that require checksum changes.
    Given,
}

/// Kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    /// TCP with segmentation offload in the virtual NICs.
    Tcp,
    /// TCP without segmentation offload.
    TcpSegments,
    /// UDP datagrams with this payload, bytes.
    Udp(usize),
}

const WAYS: [Way; 3] = [Way::Plain, Way::Neutral, Way::Given];
const LOADS: [Load; 4] = [
    Load::Tcp,
    Load::TcpSegments,
    Load::Udp(1400),
    Load::Udp(100),
];

/// Results of one bench run.
#[derive(Serialize)]
struct Results {
    kernel: String,
    rows: Vec<Row>,
}

/// Results for one load on one path.
#[derive(Serialize)]
struct Row {
    load: String,
    way: &'static str,
    /// Received payload, Mbit/s.
    mbps: Samples,
    /// CPU time of the whole path per 1000 bytes of payload, nanoseconds.
    cpu_ns_per_kb: Samples,
    /// Throughput relative to the path without MAT, median of the rounds.
    to_plain: f64,
}

/// Two nodes that communicate by one path.
struct Pair {
    way: Way,
    net: Net,
}

impl Pair {
    fn new(way: Way) -> Self {
        let moas = match way {
            Way::Given => Moas::Given,
            Way::Neutral | Way::Plain => Moas::Neutral,
        };
        let net = Net::new(moas);
        if way == Way::Plain {
            for node in [&net.a, &net.b] {
                node.slot(|slot| slot.take().unwrap().detach()).unwrap();
            }
        }
        Self { way, net }
    }

    /// Returns the receiver's address.
    fn to(&self) -> Ipv6Addr {
        let receiver = &self.net.b;
        match self.way {
            Way::Plain => receiver.moas[0],
            Way::Neutral | Way::Given => receiver.hoa,
        }
    }

    /// Switches segmentation offload on or off.
    fn offload(&self, on: bool) {
        let state = if on { "on" } else { "off" };
        let net = &self.net;
        for (namespace, interfaces) in [
            (&net.a.namespace, &["eth0", "mat0"][..]),
            (&net.b.namespace, &["eth0", "mat0"][..]),
            (&net.router, &["to-a", "to-b0"][..]),
        ] {
            for interface in interfaces {
                if *interface == "mat0" && self.way == Way::Plain {
                    continue;
                }
                namespace.run(|| {
                    let settings = ["-K", interface, "tso", state, "gso", state, "gro", "off"];
                    command("ethtool", &settings);
                });
            }
        }
    }

    /// Returns the received payload bytes and the measuring time.
    fn measure(&self, load: Load) -> (u64, Duration) {
        match load {
            Load::Tcp | Load::TcpSegments => {
                self.offload(load == Load::Tcp);
                self.tcp()
            }
            Load::Udp(bytes) => self.udp(bytes),
        }
    }

    fn tcp(&self) -> (u64, Duration) {
        let Net { a, b, .. } = &self.net;
        let to = self.to();
        let listener = b.namespace.run(|| TcpListener::bind((to, 0)).unwrap());
        let address = listener.local_addr().unwrap();
        let mut sender = a.namespace.run(|| TcpStream::connect(address).unwrap());
        let (mut receiver, _) = listener.accept().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let chunk = vec![7; CHUNK];
                while sender.write_all(&chunk).is_ok() {}
            });
            let mut buffer = vec![0; 4 * CHUNK];
            let mut read_for = |time: Duration| {
                let (start, mut bytes) = (Instant::now(), 0);
                while start.elapsed() < time {
                    bytes += receiver.read(&mut buffer).unwrap() as u64;
                }
                (bytes, start.elapsed())
            };
            // Let the TCP window open before the measurement.
            read_for(TIME / 8);
            let measured = read_for(TIME);
            // Wakes the writer if it waits for buffer space.
            receiver.shutdown(Shutdown::Both).unwrap();
            drop(receiver);
            measured
        })
    }

    fn udp(&self, bytes: usize) -> (u64, Duration) {
        let Net { a, b, .. } = &self.net;
        let to = self.to();
        let receiver = b.namespace.run(|| UdpSocket::bind((to, 0)).unwrap());
        let patience = Some(Duration::from_secs(5));
        receiver.set_read_timeout(patience).unwrap();
        let address = receiver.local_addr().unwrap();
        let any = (Ipv6Addr::UNSPECIFIED, 0);
        let sender = a.namespace.run(|| {
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(address).unwrap();
            socket
        });
        let (payload, mut buffer) = (vec![7; bytes], vec![0; 2048]);
        let (start, mut arrived) = (Instant::now(), 0);
        while start.elapsed() < TIME {
            for _ in 0..BURST {
                sender.send(&payload).unwrap();
            }
            for _ in 0..BURST {
                arrived += receiver.recv(&mut buffer).expect("a datagram was lost") as u64;
            }
        }
        (arrived, start.elapsed())
    }
}

fn main() {
    assert!(netns::privileged(), "Needs root");
    let argument = |name: &str| {
        let mut arguments = std::env::args().skip_while(|argument| argument != name);
        arguments.nth(1)
    };
    let rounds = argument("--rounds").map_or(ROUNDS, |it| it.parse().unwrap());
    let pairs = WAYS.map(Pair::new);
    stay_on_one_cpu();
    let mut rows = Vec::new();
    for load in LOADS {
        let mut samples = [(); WAYS.len()].map(|()| Samples::default());
        for _ in 0..rounds {
            for (pair, samples) in pairs.iter().zip(&mut samples) {
                let (bytes, time) = pair.measure(load);
                samples
                    .rounds
                    .push(bytes as f64 * 8.0 / time.as_secs_f64() / 1e6);
            }
        }
        let plain = samples[0].clone();
        for (way, mut mbps) in WAYS.into_iter().zip(samples) {
            mbps.summarize(None, None);
            let mut cpu_ns_per_kb = Samples {
                rounds: mbps.rounds.iter().map(|it| 8e6 / it).collect(),
                ..Samples::default()
            };
            cpu_ns_per_kb.summarize(None, None);
            rows.push(Row {
                load: name(load),
                way: match way {
                    Way::Plain => "plain",
                    Way::Neutral => "neutral MoA",
                    Way::Given => "given MoA",
                },
                to_plain: ratio(&mbps.rounds, &plain.rounds),
                mbps,
                cpu_ns_per_kb,
            });
        }
    }
    println!(
        "{:<22} {:<12} {:>10} {:>14} {:>9}",
        "load", "way", "Mbit/s", "CPU ns per kB", "to plain"
    );
    for row in &rows {
        println!(
            "{:<22} {:<12} {:>10.0} {:>14.0} {:>9.3}",
            row.load, row.way, row.mbps.median, row.cpu_ns_per_kb.median, row.to_plain
        );
    }
    if let Some(file) = argument("--report") {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let results = Results {
            kernel: kernel.trim().to_owned(),
            rows,
        };
        let json = serde_json::to_string_pretty(&results).unwrap();
        let mut file = File::create(file).unwrap();
        file.write_all(json.as_bytes()).unwrap();
    }
}

fn name(load: Load) -> String {
    match load {
        Load::Tcp => "TCP".to_owned(),
        Load::TcpSegments => "TCP, single segments".to_owned(),
        Load::Udp(bytes) => format!("UDP, {bytes} bytes"),
    }
}

/// Pins this process to the last CPU that it may use; the kernel's work for its packets follows.
fn stay_on_one_cpu() {
    let this = Pid::from_raw(0);
    let allowed = sched_getaffinity(this).unwrap();
    let last = (0..CpuSet::count()).rfind(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(last.unwrap()).unwrap();
    sched_setaffinity(this, &one).unwrap();
}
