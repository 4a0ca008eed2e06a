//! From a sender through a relay to its subscribers.
//!
//! ```text
//!   sender's namespace          relay's namespace             sink's namespace
//!   stream  eth0 --- veth --- eth0    routes    eth1 --- veth --- eth0  counts, drops
//! ```
//!
//! The subscribers' MAC addresses are none of the sink's, so its stack drops the copies at once.
//! The relay has joined the multicast address on every way, as a real one has; what its CPU time
//! is measured from is a relay that has joined and makes no copies.

use std::fs;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use common::maps::{Origins, RelayStream, Subscriber, SubscriberKey};
use common::relay::{self, Endpoints};
use lab::bench::{ReplicateRound, ReplicateSetting, ReplicateWay, median, ratio};
use nix::net::if_::if_nametoindex;
use roamcast::datapath::{Datapath, DatapathConfig};
use roamcast::proto::Timestamp;
use socket2::{Domain, Protocol, Socket, Type};

use super::cpu::CpuClock;
use super::forward::Forwarder;
use super::sender::{self, Sender};
use super::world::{
    self, DESTINATION_PORT, MULTICAST_ADDRESS, Namespace, SOURCE, SOURCE_PORT, STREAM, endpoints,
    ip, link,
};
use super::{Options, Steps};

const RELAY_ADDRESS: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1);
/// Number of the flow in the relay's maps.
const FLOW: u32 = 1;
const DEADLINE: Duration = Duration::from_secs(10);
const QUIET: Duration = Duration::from_millis(20);
const RUN_UP: Duration = Duration::from_millis(30);

/// What the relay does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// `replicate` at TC ingress.
    Replicate,
    /// A socket that receives, and another that sends to all subscribers by one `sendmmsg`.
    Loop,
    /// Nothing.
    Idle,
}

const WAYS: [Way; 3] = [Way::Replicate, Way::Loop, Way::Idle];

/// Packets per second at which the loop is at about half of what it can do.
fn rate(subscribers: usize) -> u32 {
    match subscribers {
        0 | 1 => 16_000,
        2..=10 => 5_000,
        _ => 800,
    }
}

/// Measures all settings.
pub fn run(options: &Options) -> Result<Vec<ReplicateSetting>> {
    let (sender, _sink) = build()?;
    let datapath = Datapath::load(&DatapathConfig {
        pin_root: world::BPF_FS.into(),
        ..DatapathConfig::default()
    })?;
    datapath.manage(&STREAM.managed(), Timestamp(0), Origins::Native)?;
    let _joined = join()?;
    let clock = CpuClock::new()?;
    let settings = options.payloads.len() * options.subscribers.len();
    let mut steps = Steps::of(settings * options.rounds);
    let mut results = Vec::new();
    for &payload_bytes in &options.payloads {
        for &subscribers in &options.subscribers {
            let bench = Bench {
                options,
                clock: &clock,
                datapath: &datapath,
                subscribers: subscribe(&datapath, subscribers)?,
                rate: rate(subscribers),
                sender: Sender::new(sender.within(socket)?, payload_bytes),
            };
            results.push(bench.run(payload_bytes, &mut steps)?);
        }
    }
    Ok(results)
}

fn socket() -> Result<Socket> {
    let from = SocketAddrV6::new(SOURCE, SOURCE_PORT, 0, 0);
    let to = SocketAddrV6::new(MULTICAST_ADDRESS, DESTINATION_PORT, 0, 0);
    sender::socket("eth0", from, to)
}

/// Joins the calling thread's namespace, the relay's, with those of a sender and a sink.
fn build() -> Result<(Namespace, Namespace)> {
    let (sender, sink) = (Namespace::new()?, Namespace::new()?);
    for interface in ["eth0", "eth1"] {
        let peer = if interface == "eth0" { &sender } else { &sink };
        link(interface, peer, "eth0")?;
    }
    sender.within(|| ip(&format!("addr add {SOURCE}/64 dev eth0 nodad\n")))?;
    ip(&format!("addr add {RELAY_ADDRESS}/64 dev eth1 nodad\n"))?;
    // The kernel looks routes up for a program only where it may forward.
    world::sysctl("lo/forwarding", "1")?;
    world::with_input("ethtool", ["-K", "eth1", "tx", "off"], "")?;
    Ok((sender, sink))
}

fn join() -> Result<Socket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))
        .context("Failed to make a socket")?;
    let index = if_nametoindex("eth0").context("Failed to find eth0")?;
    socket
        .join_multicast_v6(&MULTICAST_ADDRESS, index)
        .context("Failed to join")?;
    Ok(socket)
}

/// Writes subscribers to the maps, and how they are reached to the neighbour table.
fn subscribe(datapath: &Datapath, count: usize) -> Result<Vec<Endpoints>> {
    let mut neighbours = String::new();
    let mut all = Vec::new();
    for number in 0..count as u16 {
        let agent_address = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 1, number);
        let endpoints = endpoints(RELAY_ADDRESS, agent_address)?;
        let differences = relay::to_agent(&STREAM, &endpoints);
        let key = SubscriberKey {
            flow: FLOW,
            index: number.into(),
        };
        let subscriber = Subscriber {
            lease_end_ns: u64::MAX,
            relay_address: endpoints.relay_address,
            agent_address: endpoints.agent_address,
            relay_port: endpoints.relay_port,
            agent_port: endpoints.agent_port,
            address_difference: differences.address,
            port_difference: differences.port,
            pad: 0,
        };
        datapath.subscriber_set(&key, &subscriber)?;
        neighbours += &format!(
            "neigh replace {agent_address} lladdr 02:00:00:00:{:02x}:{:02x} dev eth1 nud permanent\n",
            number >> 8,
            number & 0xff
        );
        all.push(endpoints);
    }
    ip(&neighbours)?;
    Ok(all)
}

/// One setting.
struct Bench<'a> {
    options: &'a Options,
    clock: &'a CpuClock,
    datapath: &'a Datapath,
    subscribers: Vec<Endpoints>,
    rate: u32,
    sender: Sender,
}

/// What one way did in one round.
struct Measured {
    /// CPU time of the whole path for each packet that was sent.
    packet_ns: f64,
    lost: u64,
    copies_per_second: f64,
}

impl<'a> Bench<'a> {
    fn run(mut self, payload_bytes: usize, steps: &mut Steps) -> Result<ReplicateSetting> {
        let count = self.subscribers.len();
        let mut rounds = [Vec::new(), Vec::new()];
        for round in 0..self.options.rounds {
            steps.next(format!(
                "{payload_bytes} bytes, {count} subscribers, round {}",
                round + 1
            ))?;
            let mut measured = [const { None }; WAYS.len()];
            for turn in 0..WAYS.len() {
                let index = (round + turn) % WAYS.len();
                let way = WAYS[index];
                let result = self.round(way);
                measured[index] = Some(result.with_context(|| format!("Way {way:?}"))?);
            }
            let [Some(replicate), Some(other), Some(idle)] = measured else {
                continue;
            };
            for (rounds, it) in rounds.iter_mut().zip([replicate, other]) {
                rounds.push(ReplicateRound {
                    cpu_ns: (it.packet_ns - idle.packet_ns) / count as f64,
                    path_ns: it.packet_ns / count as f64,
                    lost: it.lost,
                    copies_per_second: it.copies_per_second,
                });
            }
        }
        let [_, reference] = &rounds;
        let ways = ["replicate", "recvmmsg/sendmmsg"].iter().zip(&rounds);
        let ways = ways.map(|(way, rounds)| {
            let values = |it: fn(&ReplicateRound) -> f64| rounds.iter().map(it);
            let to_loop = |it: fn(&ReplicateRound) -> f64| {
                ratio(rounds.iter().map(it), reference.iter().map(it))
            };
            ReplicateWay {
                way: (*way).to_owned(),
                rounds: rounds.clone(),
                cpu_ns: median(values(|it| it.cpu_ns)),
                path_ns: median(values(|it| it.path_ns)),
                cpu_to_loop: to_loop(|it| it.cpu_ns),
                path_to_loop: to_loop(|it| it.path_ns),
                copies_per_second: median(values(|it| it.copies_per_second)),
                rate_to_loop: to_loop(|it| it.copies_per_second),
            }
        });
        Ok(ReplicateSetting {
            payload_bytes,
            subscribers: count,
            packets_per_second: self.rate,
            ways: ways.collect(),
        })
    }

    fn round(&mut self, way: Way) -> Result<Measured> {
        let open = self.open(way)?;
        let copies = match way {
            Way::Idle => 0,
            _ => self.subscribers.len() as u64,
        };
        let start = Instant::now();
        let before = arrived()?;
        while copies > 0 && arrived()? - before < copies {
            ensure!(start.elapsed() < DEADLINE, "No copy arrived");
            self.sender.burst(1)?;
            thread::sleep(Duration::from_millis(2));
        }
        settle()?;

        let before = arrived()?;
        let cpu = self.clock.now(None)?;
        let sent = self.sender.paced(self.rate, self.options.paced)?;
        settle()?;
        let used = self.clock.now(None)? - cpu;
        let lost = (sent * copies).saturating_sub(arrived()? - before);

        self.sender.flat_out(Instant::now() + RUN_UP)?;
        let (start, before) = (Instant::now(), arrived()?);
        self.sender.flat_out(start + self.options.flat_out)?;
        let copies_per_second = (arrived()? - before) as f64 / start.elapsed().as_secs_f64();
        settle()?;
        drop(open);
        Ok(Measured {
            packet_ns: used.as_nanos() as f64 / sent as f64,
            lost,
            copies_per_second,
        })
    }

    fn open(&self, way: Way) -> Result<Open<'a>> {
        match way {
            Way::Idle => Ok(Open::Nothing),
            Way::Replicate => {
                let ifindex = if_nametoindex("eth0").context("Failed to find eth0")?;
                let stream = RelayStream {
                    flow: FLOW,
                    subscribers: self.subscribers.len() as u32,
                };
                self.datapath.relay_stream_set(&STREAM, &stream)?;
                self.datapath.attach_replicate(ifindex, "eth0")?;
                Ok(Open::Program(self.datapath, ifindex))
            }
            Way::Loop => {
                let at = SocketAddrV6::new(MULTICAST_ADDRESS, DESTINATION_PORT, 0, 0);
                let to = self
                    .subscribers
                    .iter()
                    .map(|it| SocketAddrV6::new(it.agent_address.into(), it.agent_port, 0, 0));
                let forwarder = Forwarder::to_many(at, "eth0", RELAY_ADDRESS, to.collect())?;
                Ok(Open::Thread {
                    _forwarder: forwarder,
                })
            }
        }
    }
}

/// A way that is open until this is dropped.
enum Open<'a> {
    Nothing,
    Program(&'a Datapath, u32),
    Thread { _forwarder: Forwarder },
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if let Self::Program(datapath, ifindex) = self {
            // The next way would count its copies, and says so by having too many.
            let _ = datapath.detach_replicate(*ifindex);
        }
    }
}

/// Packets that have arrived at the sink: those that its end of the link has taken.
fn arrived() -> Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/dev")
        .context("Failed to read the interfaces' counters")?;
    let line = text
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("eth1:"));
    let packets = line.and_then(|line| line.split_whitespace().nth(9)?.parse().ok());
    packets.context("Interface eth1 has no counters")
}

/// Waits until nothing is under way.
fn settle() -> Result<()> {
    let mut count = arrived()?;
    let mut since = Instant::now();
    while since.elapsed() < QUIET {
        thread::sleep(QUIET / 4);
        let now = arrived()?;
        if now != count {
            (count, since) = (now, Instant::now());
        }
    }
    Ok(())
}
