//! Measures the cost from a sender through a relay to its subscribers.
//!
//! ```text
//!   sender's namespace          relay's namespace             sink's namespace
//!   stream  eth0 --- veth --- eth0    routes    eth1 --- veth --- eth0  counts, drops
//! ```
//!
//! Rounds and loads are the same as on the [path to the TAPs](mod@super::relay).
//!
//! The MAC addresses of the subscribers are not the sink's, so the sink's stack drops the copies at
//! once. The relay has joined the multicast address with every method, like a real relay. The
//! baseline of the CPU time is a relay that has joined and makes no copies.

use std::fs;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use common::maps::{Origins, RelayStream, Subscriber, SubscriberKey};
use common::relay::{self, Endpoints};
use lab::bench::{ReplicateSetting, ReplicateWay, Samples};
use nix::net::if_::if_nametoindex;
use roamcast::datapath::{Datapath, DatapathConfig};
use roamcast::proto::Timestamp;
use socket2::{Domain, Protocol, Socket, Type};

use super::cpu::{CpuClock, OtherLoad};
use super::forward::Forwarder;
use super::sender::{self, Sender, idle};
use super::world::{
    self, DESTINATION_PORT, MULTICAST_ADDRESS, Namespace, SOURCE, SOURCE_PORT, STREAM, endpoints,
    ip, link,
};
use super::{Options, Steps};

const RELAY_ADDRESS: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1);
/// Number of the flow in the relay's maps.
const FLOW: u32 = 1;
const DEADLINE: Duration = Duration::from_secs(10);
const QUIET: Duration = Duration::from_millis(5);
/// Limit of copies per burst; a burst nevertheless has at least 16 packets.
const MOST_COPIES: usize = 3200;
/// Pause between two reads of the count of arrived copies.
const PAUSE: Duration = Duration::from_micros(200);
const RUN_UP: Duration = Duration::from_millis(5);

/// Method of the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// `replicate` at TC ingress.
    Replicate,
    /// One socket receives, and another socket sends to all subscribers by one `sendmmsg`.
    Loop,
    /// The relay makes no copies: the baseline.
    Idle,
}

/// All methods; the last one is the baseline of the others.
const WAYS: [Way; 3] = [Way::Replicate, Way::Loop, Way::Idle];

/// Returns the packets per second of the stream: a rate that the loop takes without loss.
fn rate(subscribers: usize) -> u32 {
    match subscribers {
        0 | 1 => 10_000,
        2..=10 => 3_000,
        _ => 500,
    }
}

/// Measures every combination of payload and number of subscribers.
pub(super) fn run(options: &Options) -> Result<Vec<ReplicateSetting>> {
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

/// Builds the relay in the calling thread's namespace and connects it to a sender and a sink.
/// Returns their namespaces.
fn build() -> Result<(Namespace, Namespace)> {
    let (sender, sink) = (Namespace::new()?, Namespace::new()?);
    for interface in ["eth0", "eth1"] {
        let peer = if interface == "eth0" { &sender } else { &sink };
        link(interface, peer, "eth0")?;
    }
    sender.within(|| ip(&format!("addr add {SOURCE}/64 dev eth0 nodad\n")))?;
    ip(&format!("addr add {RELAY_ADDRESS}/64 dev eth1 nodad\n"))?;
    // The kernel looks up routes for a program only if the interface may forward.
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

/// Writes the subscribers to the maps, and their MAC addresses to the neighbour table.
fn subscribe(datapath: &Datapath, count: usize) -> Result<Vec<Endpoints>> {
    let mut neighbours = String::new();
    let mut all = Vec::new();
    for number in 0..count as u16 {
        let agent_address = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 1, number);
        let endpoints = endpoints(RELAY_ADDRESS, agent_address)?;
        let address_difference = relay::to_agent(&STREAM, &endpoints);
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
            address_difference,
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

/// Bench of one payload and one number of subscribers.
struct Bench<'a> {
    options: &'a Options,
    clock: &'a CpuClock,
    datapath: &'a Datapath,
    subscribers: Vec<Endpoints>,
    rate: u32,
    sender: Sender,
}

/// CPU time of the whole path per packet, nanoseconds.
#[derive(Clone, Copy, Default)]
struct Measured {
    stream_ns: f64,
    burst_ns: f64,
}

impl<'a> Bench<'a> {
    fn run(mut self, payload_bytes: usize, steps: &mut Steps) -> Result<ReplicateSetting> {
        let count = self.subscribers.len();
        let what = format!("{payload_bytes} bytes, {count} subscribers");
        let load = OtherLoad::start(self.clock)?;
        let mut results = ["replicate", "recvmmsg/sendmmsg"].map(|way| ReplicateWay {
            way: way.to_owned(),
            ..ReplicateWay::default()
        });
        for round in 0..self.options.rounds {
            steps.next(format!("{what}, round {}", round + 1))?;
            let pacing = self.pacing()?;
            let mut measured = [Measured::default(); WAYS.len()];
            let mut turns = [0, 1, 2];
            turns.rotate_left(round % WAYS.len());
            for index in turns {
                let way = WAYS[index];
                let outcome = self.measure(way, pacing, results.get_mut(index));
                measured[index] = outcome.with_context(|| format!("Way {way:?}"))?;
            }
            let [.., idle] = measured;
            for (result, it) in results.iter_mut().zip(measured) {
                let per_copy = |ns: f64| ns / count as f64;
                let rounds = &mut result.stream_cpu_ns.rounds;
                rounds.push(per_copy(it.stream_ns - idle.stream_ns));
                let rounds = &mut result.burst_cpu_ns.rounds;
                rounds.push(per_copy(it.burst_ns - idle.burst_ns));
                let rounds = &mut result.burst_path_cpu_ns.rounds;
                rounds.push(per_copy(it.burst_ns));
            }
        }
        let parts: [fn(&mut ReplicateWay) -> &mut Samples; 4] = [
            |it| &mut it.stream_cpu_ns,
            |it| &mut it.burst_cpu_ns,
            |it| &mut it.burst_path_cpu_ns,
            |it| &mut it.full_per_second,
        ];
        let [_, mut reference] = results.clone();
        for part in parts {
            for result in &mut results {
                part(result).summarize(None, Some(part(&mut reference)));
            }
        }
        Ok(ReplicateSetting {
            payload_bytes,
            subscribers: count,
            packets_per_second: self.rate,
            other_load: load.end()?,
            ways: results.into(),
        })
    }

    /// Measures the CPU time of sleeping until each packet is due.
    fn pacing(&self) -> Result<Duration> {
        let before = self.clock.now(None)?;
        idle(self.rate, self.options.stream)?;
        Ok(self.clock.now(None)? - before)
    }

    /// Measures one method in one round.
    fn measure(
        &mut self,
        way: Way,
        pacing: Duration,
        result: Option<&mut ReplicateWay>,
    ) -> Result<Measured> {
        let open = self.open_and_wait(way)?;
        let start = arrived()?;
        let before = self.clock.now(None)?;
        let packets = self.sender.paced(self.rate, self.options.stream)?;
        let copies = packets * self.copies(way);
        settle(start + copies)?;
        let used = (self.clock.now(None)? - before).saturating_sub(pacing);
        let burst_ns = self.bursts(&open)?;
        if let Some(result) = result {
            result.sent += copies;
            result.lost += copies.saturating_sub(arrived()? - start);
            self.full_speed(&open, result)?;
        }
        Ok(Measured {
            stream_ns: used.as_nanos() as f64 / packets as f64,
            burst_ns,
        })
    }

    /// Measures bursts. Returns the CPU time of the whole path per packet, nanoseconds.
    fn bursts(&mut self, open: &Open<'_>) -> Result<f64> {
        // The number of copies per burst hardly depends on the number of subscribers.
        let burst = (MOST_COPIES / self.subscribers.len()).clamp(16, 128);
        let mut used = Duration::ZERO;
        for number in 0..=self.options.bursts {
            let start = open.forwarded();
            let before = self.clock.now(None)?;
            self.sender.burst(burst)?;
            let at = Instant::now();
            while open.is_thread()
                && open.forwarded() < start + burst as u64
                && at.elapsed() < DEADLINE
            {
                thread::sleep(PAUSE);
            }
            // The first burst does not count: it completes earlier work.
            if number > 0 {
                used += self.clock.now(None)? - before;
            }
        }
        let packets = self.options.bursts * burst;
        Ok(used.as_nanos() as f64 / packets as f64)
    }

    fn full_speed(&mut self, open: &Open<'_>, result: &mut ReplicateWay) -> Result<()> {
        let forwarded = || open.forwarded();
        // A program makes its copies within the sender's own system call, so no packet is in
        // flight.
        let delivered = open.is_thread().then_some(&forwarded as &dyn Fn() -> u64);
        self.sender.at_full_speed(RUN_UP, delivered)?;
        let (at, start) = (Instant::now(), arrived()?);
        self.sender
            .at_full_speed(self.options.full_speed, delivered)?;
        let copies = (arrived()? - start) as f64;
        let per_second = copies / at.elapsed().as_secs_f64();
        result.full_per_second.rounds.push(per_second);
        settle(u64::MAX)
    }

    /// Returns the number of copies of each packet.
    fn copies(&self, way: Way) -> u64 {
        match way {
            Way::Idle => 0,
            Way::Replicate | Way::Loop => self.subscribers.len() as u64,
        }
    }

    fn open_and_wait(&mut self, way: Way) -> Result<Open<'a>> {
        let open = self.open(way)?;
        let copies = self.copies(way);
        let start = Instant::now();
        let before = arrived()?;
        while arrived()? - before < copies {
            ensure!(start.elapsed() < DEADLINE, "No copy arrived");
            self.sender.burst(1)?;
            thread::sleep(Duration::from_millis(1));
        }
        settle(u64::MAX)?;
        Ok(open)
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
                Ok(Open::Thread(forwarder))
            }
        }
    }
}

/// A running method; ends when the value is dropped.
enum Open<'a> {
    Nothing,
    Program(&'a Datapath, u32),
    Thread(Forwarder),
}

impl Open<'_> {
    /// Returns true if packets wait for a thread.
    fn is_thread(&self) -> bool {
        matches!(self, Self::Thread(_))
    }

    /// Returns the number of packets that the thread has forwarded; 0 without a thread.
    fn forwarded(&self) -> u64 {
        match self {
            Self::Thread(forwarder) => forwarder.forwarded(),
            Self::Nothing | Self::Program(..) => 0,
        }
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if let Self::Program(datapath, ifindex) = self {
            // If this fails, the copies of the next method include this program's copies, and their
            // number exceeds the expected one.
            let _ = datapath.detach_replicate(*ifindex);
        }
    }
}

/// Returns the number of packets that have arrived at the sink: packets that the sink's end of the
/// link has taken.
fn arrived() -> Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/dev")
        .context("Failed to read the interfaces' counters")?;
    let line = text
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("eth1:"));
    let packets = line.and_then(|line| line.split_whitespace().nth(9)?.parse().ok());
    packets.context("Interface eth1 has no counters")
}

/// Waits until `wanted` packets have arrived, or until no packet is in flight any more.
fn settle(wanted: u64) -> Result<()> {
    let mut count = arrived()?;
    let mut since = Instant::now();
    while count < wanted && since.elapsed() < QUIET {
        thread::sleep(PAUSE);
        let now = arrived()?;
        if now != count {
            (count, since) = (now, Instant::now());
        }
    }
    Ok(())
}
