//! From a sender to the TAPs of one host.
//!
//! ```text
//!   sender's namespace                     host's namespace
//!   stream and relay  eth0 --- veth --- eth0 --- br0 --- tap0 .. tap15 <-- a reader
//!                                       uplink   MLD snooping, MDB entries, no flooding
//! ```
//!
//! Each round opens every way in turn, another one first each time. On each it measures the CPU
//! time per delivered packet at a rate that all ways can take, and then the packets delivered per
//! second while the sender sends as fast as it can.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use common::relay::Endpoints;
use lab::bench::{RelayRound, RelaySetting, RelayWay, median, ratio};

use super::cpu::CpuClock;
use super::sender::{self, Sender};
use super::taps::{Checks, Taps};
use super::ways::{BRIDGE, Open, UPLINK, Way, Ways};
use super::world::{
    self, DESTINATION_PORT, MULTICAST_ADDRESS, Namespace, SOURCE, SOURCE_PORT, bridge, endpoints,
    ip, link,
};
use super::{Options, Steps};

const RELAY_ADDRESS: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
const AGENT_ADDRESS: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10);
/// Packets that a TAP holds, as libvirt's do.
const QUEUE: u32 = 1000;
/// How long a way may take to deliver its first packet.
const DEADLINE: Duration = Duration::from_secs(10);
/// Silence after which nothing is under way any more.
const QUIET: Duration = Duration::from_millis(20);
/// Start of sending as fast as possible that is not counted.
const RUN_UP: Duration = Duration::from_millis(30);
/// Packets that are all checked, on each way once.
const CHECKED: usize = 200;

/// Packets per second at which the slowest way, socat, is at about half of what it can do.
fn rate(taps: usize) -> u32 {
    match taps {
        0 | 1 => 16_000,
        2..=4 => 8_000,
        _ => 3_000,
    }
}

/// Measures all settings.
pub fn run(options: &Options) -> Result<Vec<RelaySetting>> {
    let sender = build()?;
    let endpoints = endpoints(RELAY_ADDRESS, AGENT_ADDRESS)?;
    let ways = Ways::load(endpoints)?;
    let clock = CpuClock::new()?;
    let settings = options.payloads.len() * options.taps.len();
    let mut steps = Steps::of(settings * options.rounds * Way::ALL.len());
    let mut results = Vec::new();
    for &payload_bytes in &options.payloads {
        for &taps in &options.taps {
            let bench = Bench {
                options,
                clock: &clock,
                ways: &ways,
                taps: open_taps(taps)?,
                count: taps as u64,
                rate: rate(taps),
                senders: senders(&sender, &endpoints, payload_bytes)?,
            };
            results.push(bench.run(payload_bytes, &mut steps)?);
        }
    }
    Ok(results)
}

/// Joins the calling thread's namespace, the host's, with that of a sender.
fn build() -> Result<Namespace> {
    ip(&format!(
        "link add {BRIDGE} type bridge mcast_snooping 1 mcast_mld_version 2 mcast_querier 1\n\
         link set {BRIDGE} up\naddr add {AGENT_ADDRESS}/64 dev {BRIDGE} nodad\n"
    ))?;
    let sender = Namespace::new()?;
    link(UPLINK, &sender, "eth0")?;
    // Addresses are the bridge's alone, and so is the route to multicast addresses.
    world::sysctl(&format!("{UPLINK}/disable_ipv6"), "1")?;
    ip(&format!("link set {UPLINK} master {BRIDGE}\n"))?;
    let mac = world::mac(BRIDGE)?;
    sender.within(|| {
        ip(&format!(
            "addr add {RELAY_ADDRESS}/64 dev eth0 nodad\naddr add {SOURCE}/128 dev eth0 nodad\n\
             neigh replace {AGENT_ADDRESS} lladdr {mac} dev eth0 nud permanent\n"
        ))
    })?;
    Ok(sender)
}

/// Opens TAPs that get the stream, and nothing that the bridge floods.
fn open_taps(count: usize) -> Result<Taps> {
    let names: Vec<String> = (0..count).map(|number| format!("tap{number}")).collect();
    let taps = Taps::open(&names)?;
    let mut links = String::new();
    let mut ports = String::new();
    for name in &names {
        world::sysctl(&format!("{name}/disable_ipv6"), "1")?;
        links += &format!("link set {name} txqueuelen {QUEUE} master {BRIDGE} up\n");
        ports += &format!(
            "link set dev {name} mcast_flood off\n\
             mdb add dev {BRIDGE} port {name} grp {MULTICAST_ADDRESS} permanent\n"
        );
    }
    ip(&links)?;
    bridge(&ports)?;
    Ok(taps)
}

/// What sends natively, and what sends as a relay does.
struct Senders {
    native: Sender,
    relayed: Sender,
}

fn senders(sender: &Namespace, endpoints: &Endpoints, payload_bytes: usize) -> Result<Senders> {
    let address = |address: Ipv6Addr, port| SocketAddrV6::new(address, port, 0, 0);
    let to = address(MULTICAST_ADDRESS, DESTINATION_PORT);
    let native = sender.within(|| sender::socket("eth0", address(SOURCE, SOURCE_PORT), to))?;
    let from = address(RELAY_ADDRESS, endpoints.relay_port);
    let to = address(AGENT_ADDRESS, endpoints.agent_port);
    let relayed = sender.within(|| sender::socket("eth0", from, to))?;
    Ok(Senders {
        native: Sender::new(native, payload_bytes),
        relayed: Sender::new(relayed, payload_bytes),
    })
}

/// One setting.
struct Bench<'a> {
    options: &'a Options,
    clock: &'a CpuClock,
    ways: &'a Ways,
    taps: Taps,
    count: u64,
    rate: u32,
    senders: Senders,
}

impl Bench<'_> {
    fn run(mut self, payload_bytes: usize, steps: &mut Steps) -> Result<RelaySetting> {
        let mut rounds = vec![Vec::new(); Way::ALL.len()];
        let mut checks = Vec::new();
        for round in 0..self.options.rounds {
            for turn in 0..Way::ALL.len() {
                let index = (round + turn) % Way::ALL.len();
                let (way, rounds) = (Way::ALL[index], &mut rounds[index]);
                steps.next(format!(
                    "{payload_bytes} bytes, {} TAPs, round {}: {}",
                    self.count,
                    round + 1,
                    way.name()
                ))?;
                let (result, checked) = self
                    .round(way, round == 0)
                    .with_context(|| format!("Way {}", way.name()))?;
                rounds.push(result);
                checks.push((way, checked));
            }
        }
        let of = |way: Way| Way::ALL.iter().zip(&rounds).find(|(it, _)| **it == way);
        let cpu = |way| {
            of(way)
                .into_iter()
                .flat_map(|(_, it)| it)
                .map(|it| it.cpu_ns)
        };
        let most = |way| {
            let rounds = of(way).into_iter().flat_map(|(_, it)| it);
            rounds.map(|it| it.delivered_per_second)
        };
        let ways = Way::ALL.iter().zip(&rounds).map(|(&way, rounds)| {
            let checks = || checks.iter().filter(|(it, _)| *it == way).map(|(_, it)| it);
            RelayWay {
                way: way.name().to_owned(),
                rounds: rounds.clone(),
                cpu_ns: median(cpu(way)),
                cpu_to_native: ratio(cpu(way), cpu(Way::Native)),
                cpu_to_userspace: ratio(cpu(way), cpu(Way::Userspace)),
                delivered_per_second: median(most(way)),
                rate_to_native: ratio(most(way), most(Way::Native)),
                checked: checks().map(|it| it.checked).sum(),
                wrong: checks().map(|it| it.wrong).sum(),
                original_source: checks().all(|it| it.other_source == 0),
            }
        });
        Ok(RelaySetting {
            payload_bytes,
            taps: self.count as usize,
            packets_per_second: self.rate,
            ways: ways.collect(),
        })
    }

    fn round(&mut self, way: Way, thorough: bool) -> Result<(RelayRound, Checks)> {
        let ways = self.ways;
        let open = ways.open(way)?;
        self.taps.forget_checks();
        self.wait_for_first(way)?;
        if thorough {
            self.taps.check_all(true);
            for _ in 0..CHECKED / 20 {
                self.sender(way).burst(20)?;
                self.settle();
            }
            self.taps.check_all(false);
        }
        let (cpu_ns, lost) = self.cpu_time(way, &open)?;
        let delivered_per_second = self.most(way)?;
        let checks = self.taps.checks();
        Ok((
            RelayRound {
                cpu_ns,
                lost,
                delivered_per_second,
            },
            checks,
        ))
    }

    fn sender(&mut self, way: Way) -> &mut Sender {
        if way.is_relayed() {
            &mut self.senders.relayed
        } else {
            &mut self.senders.native
        }
    }

    fn wait_for_first(&mut self, way: Way) -> Result<()> {
        let before = self.taps.delivered();
        let start = Instant::now();
        while self.taps.delivered() - before < self.count {
            ensure!(start.elapsed() < DEADLINE, "Nothing was delivered");
            self.sender(way).burst(1)?;
            thread::sleep(Duration::from_millis(2));
        }
        self.settle();
        Ok(())
    }

    /// Waits until nothing is under way.
    fn settle(&self) {
        let mut delivered = self.taps.delivered();
        let mut since = Instant::now();
        while since.elapsed() < QUIET {
            thread::sleep(QUIET / 4);
            let now = self.taps.delivered();
            if now != delivered {
                (delivered, since) = (now, Instant::now());
            }
        }
    }

    /// CPU time per delivered packet in nanoseconds, and packets lost.
    fn cpu_time(&mut self, way: Way, open: &Open<'_>) -> Result<(f64, u64)> {
        let (rate, time) = (self.rate, self.options.paced);
        let delivered = self.taps.delivered();
        let before = self.clock.now(open.process())?;
        let sent = self.sender(way).paced(rate, time)?;
        self.settle();
        let used = self.clock.now(open.process())? - before;
        let delivered = self.taps.delivered() - delivered;
        ensure!(delivered > 0, "Nothing was delivered at {rate} packets/s");
        let lost = (sent * self.count).saturating_sub(delivered);
        Ok((used.as_nanos() as f64 / delivered as f64, lost))
    }

    /// Packets delivered each second while the sender sends as fast as it can.
    fn most(&mut self, way: Way) -> Result<f64> {
        let time = self.options.flat_out;
        self.sender(way).flat_out(Instant::now() + RUN_UP)?;
        let (start, delivered) = (Instant::now(), self.taps.delivered());
        self.sender(way).flat_out(start + time)?;
        let delivered = self.taps.delivered() - delivered;
        let per_second = delivered as f64 / start.elapsed().as_secs_f64();
        self.settle();
        Ok(per_second)
    }
}
