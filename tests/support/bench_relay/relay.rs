//! Measures the cost from a sender to the TAPs of one host.
//!
//! ```text
//!   sender's namespace                     host's namespace
//!   stream and relay  eth0 --- veth --- eth0 --- br0 --- tap0 .. tap15 <-- a reader
//!                                       uplink   MLD snooping, MDB entries, no flooding
//! ```
//!
//! Each round opens every path for a short time, and each round starts with another path. Other load
//! of the machine therefore affects all paths alike. Each path carries three loads in turn:
//!
//! | load | packets | measured |
//! |---|---|---|
//! | stream | constant bitrate that all paths can take; each packet wakes its receiver | CPU time per delivered packet |
//! | bursts | as on a busy host: no wake-up for a single packet, so only the work counts | CPU time per delivered packet |
//! | full speed | as fast as the path takes the packets | packets per second |
//!
//! The sender of the stream sleeps between packets. The bench measures the CPU time of this sleeping
//! separately and subtracts it.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use common::relay::Endpoints;
use lab::bench::{RelaySetting, RelayWay, Samples};

use super::cpu::{CpuClock, OtherLoad};
use super::sender::{self, Sender, idle};
use super::taps::Taps;
use super::ways::{BRIDGE, Open, UPLINK, Way, Ways};
use super::world::{
    self, DESTINATION_PORT, MULTICAST_ADDRESS, Namespace, SOURCE, SOURCE_PORT, bridge, endpoints,
    ip, link,
};
use super::{Options, Steps};

const RELAY_ADDRESS: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
const AGENT_ADDRESS: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10);
/// Queue length of a TAP, packets; the same as for libvirt's TAPs.
const QUEUE: u32 = 1000;
/// Time limit for the first packet of a path.
const DEADLINE: Duration = Duration::from_secs(10);
/// Silence after which no packet is in flight any more.
const QUIET: Duration = Duration::from_millis(5);
/// Same silence while every packet is checked: long, because a slow machine must not miss a packet.
const CHECKED_QUIET: Duration = Duration::from_secs(5);
/// Time at full speed before the measurement.
const RUN_UP: Duration = Duration::from_millis(5);
/// Packets of the unmeasured part of each path, all of which are checked.
const CHECKED: usize = 256;
/// Packets per burst: fewer than any queue holds.
const BURST: usize = 128;
/// Pause between two reads of the count of delivered packets.
const PAUSE: Duration = Duration::from_micros(200);

/// Returns the packets per second of the stream: a rate that the slowest path, socat, takes without
/// loss.
fn rate(taps: usize) -> u32 {
    match taps {
        0 | 1 => 10_000,
        2..=4 => 6_000,
        _ => 3_000,
    }
}

/// Measures every combination of payload and number of TAPs.
pub(super) fn run(options: &Options) -> Result<Vec<RelaySetting>> {
    let sender = build()?;
    let endpoints = endpoints(RELAY_ADDRESS, AGENT_ADDRESS)?;
    let ways = Ways::load(endpoints)?;
    let clock = CpuClock::new()?;
    let settings = options.payloads.len() * options.taps.len();
    let mut steps = Steps::of(settings * options.rounds);
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

/// Builds the host in the calling thread's namespace and connects it to a sender. Returns the
/// sender's namespace.
fn build() -> Result<Namespace> {
    world::no_bridge_netfilter()?;
    ip(&format!(
        "link add {BRIDGE} type bridge mcast_snooping 1 mcast_mld_version 2 mcast_querier 1\n\
         link set {BRIDGE} up\naddr add {AGENT_ADDRESS}/64 dev {BRIDGE} nodad\n"
    ))?;
    let sender = Namespace::new()?;
    link(UPLINK, &sender, "eth0")?;
    // Only the bridge has addresses, and therefore the route to multicast addresses.
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

/// Opens TAPs that receive the stream by MDB entries and nothing that the bridge floods.
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

/// Senders of the native stream and of the relayed stream.
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

/// Bench of one payload and one number of TAPs.
struct Bench<'a> {
    options: &'a Options,
    clock: &'a CpuClock,
    ways: &'a Ways,
    taps: Taps,
    count: u64,
    rate: u32,
    senders: Senders,
}

impl<'a> Bench<'a> {
    fn run(mut self, payload_bytes: usize, steps: &mut Steps) -> Result<RelaySetting> {
        let what = format!("{payload_bytes} bytes, {} TAPs", self.count);
        let load = OtherLoad::start(self.clock)?;
        let mut results: Vec<RelayWay> = Way::ALL
            .iter()
            .map(|&way| RelayWay {
                way: way.name().to_owned(),
                original_source: true,
                ..RelayWay::default()
            })
            .collect();
        for round in 0..self.options.rounds {
            steps.next(format!("{what}, round {}", round + 1))?;
            let pacing = self.pacing()?;
            let mut turns: Vec<_> = Way::ALL.into_iter().zip(&mut results).collect();
            turns.rotate_left(round % Way::ALL.len());
            for (way, result) in turns {
                let outcome = self.measure(way, round == 0, pacing, result);
                outcome.with_context(|| format!("Way {}", way.name()))?;
            }
        }
        let of = |way: Way| {
            let found = Way::ALL.iter().zip(&results).find(|(it, _)| **it == way);
            found.map(|(_, it)| it.clone()).unwrap_or_default()
        };
        let (native, userspace) = (of(Way::Native), of(Way::Userspace));
        let parts: [fn(&mut RelayWay) -> &mut Samples; 3] = [
            |it| &mut it.stream_cpu_ns,
            |it| &mut it.burst_cpu_ns,
            |it| &mut it.full_per_second,
        ];
        for part in parts {
            let (mut native, mut userspace) = (native.clone(), userspace.clone());
            for result in &mut results {
                part(result).summarize(Some(part(&mut native)), Some(part(&mut userspace)));
            }
        }
        Ok(RelaySetting {
            payload_bytes,
            taps: self.count as usize,
            packets_per_second: self.rate,
            other_load: load.end()?,
            ways: results,
        })
    }

    /// Opens a path and sends packets until the path delivers.
    fn open(&mut self, way: Way) -> Result<Open<'a>> {
        let open = self.ways.open(way)?;
        let before = self.taps.delivered();
        let start = Instant::now();
        let mut next = start;
        while self.taps.delivered() - before < self.count {
            let now = Instant::now();
            ensure!(now - start < DEADLINE, "Nothing was delivered");
            if now >= next {
                self.sender(way).burst(1)?;
                next = now + Duration::from_millis(2);
            }
            thread::sleep(Duration::from_micros(100));
        }
        Ok(open)
    }

    fn sender(&mut self, way: Way) -> &mut Sender {
        if way.is_relayed() {
            &mut self.senders.relayed
        } else {
            &mut self.senders.native
        }
    }

    /// Waits until the TAPs have delivered `wanted` packets, or until no packet is in flight any
    /// more.
    fn settle(&self, wanted: u64) {
        self.settle_within(wanted, QUIET);
    }

    /// Like `settle`, with `quiet` as the silence after which no packet is in flight any more.
    fn settle_within(&self, wanted: u64, quiet: Duration) {
        let mut delivered = self.taps.delivered();
        let mut since = Instant::now();
        while delivered < wanted && since.elapsed() < quiet {
            thread::sleep(PAUSE);
            let now = self.taps.delivered();
            if now != delivered {
                (delivered, since) = (now, Instant::now());
            }
        }
    }

    /// Measures the CPU time of sleeping until each packet is due.
    fn pacing(&self) -> Result<Duration> {
        let before = self.clock.now(None)?;
        idle(self.rate, self.options.stream)?;
        Ok(self.clock.now(None)? - before)
    }

    /// Measures one path in one round. The first round also checks all packets of an unmeasured
    /// part.
    fn measure(
        &mut self,
        way: Way,
        is_first: bool,
        pacing: Duration,
        result: &mut RelayWay,
    ) -> Result<()> {
        let open = self.open(way)?;
        self.settle(u64::MAX);
        self.taps.forget_checks();
        if is_first {
            self.taps.check_all(true);
            for _ in 0..CHECKED / BURST {
                let wanted = self.taps.delivered() + BURST as u64 * self.count;
                self.sender(way).burst(BURST)?;
                self.settle_within(wanted, CHECKED_QUIET);
            }
            self.taps.check_all(false);
        }
        self.stream(way, &open, pacing, result)?;
        self.bursts(way, &open, result)?;
        self.full_speed(way, result)?;
        let checks = self.taps.checks();
        result.checked += checks.checked;
        result.wrong += checks.wrong;
        result.original_source &= checks.other_source == 0;
        Ok(())
    }

    fn stream(
        &mut self,
        way: Way,
        open: &Open<'_>,
        pacing: Duration,
        result: &mut RelayWay,
    ) -> Result<()> {
        let (rate, time) = (self.rate, self.options.stream);
        let start = self.taps.delivered();
        let before = self.clock.now(open.process())?;
        let sent = self.sender(way).paced(rate, time)? * self.count;
        self.settle(start + sent);
        let used = (self.clock.now(open.process())? - before).saturating_sub(pacing);
        let delivered = self.taps.delivered() - start;
        ensure!(delivered > 0, "Nothing was delivered at {rate} packets/s");
        let per_packet = used.as_nanos() as f64 / delivered as f64;
        result.stream_cpu_ns.rounds.push(per_packet);
        result.sent += sent;
        result.lost += sent.saturating_sub(delivered);
        Ok(())
    }

    /// Measures bursts. The reader waits until a burst is in the queues of the TAPs, so no single
    /// packet wakes the reader.
    fn bursts(&mut self, way: Way, open: &Open<'_>, result: &mut RelayWay) -> Result<()> {
        // socat does not tell when it has forwarded a burst, so the reader does not wait.
        self.taps.hold(way != Way::Socat);
        let outcome = self.held_bursts(way, open, result);
        self.taps.hold(false);
        outcome
    }

    fn held_bursts(&mut self, way: Way, open: &Open<'_>, result: &mut RelayWay) -> Result<()> {
        let (mut used, mut delivered) = (Duration::ZERO, 0);
        for number in 0..=self.options.bursts {
            let (start, forwarded) = (self.taps.delivered(), open.forwarded());
            let before = self.clock.now(open.process())?;
            self.sender(way).burst(BURST)?;
            let at = Instant::now();
            while open
                .forwarded()
                .is_some_and(|it| Some(it) < forwarded.map(|it| it + BURST as u64))
                && at.elapsed() < QUIET
            {
                thread::sleep(PAUSE);
            }
            self.taps.take();
            self.settle(start + BURST as u64 * self.count);
            // The first burst does not count: it completes earlier work and wakes the reader.
            if number > 0 {
                used += self.clock.now(open.process())? - before;
                delivered += self.taps.delivered() - start;
            }
        }
        ensure!(delivered > 0, "Nothing was delivered of bursts");
        let per_packet = used.as_nanos() as f64 / delivered as f64;
        result.burst_cpu_ns.rounds.push(per_packet);
        Ok(())
    }

    fn full_speed(&mut self, way: Way, result: &mut RelayWay) -> Result<()> {
        let sender = match way.is_relayed() {
            true => &mut self.senders.relayed,
            false => &mut self.senders.native,
        };
        let (taps, count) = (&self.taps, self.count);
        let delivered = || taps.delivered() / count;
        let mut run = |time| sender.at_full_speed(time, Some(&delivered));
        run(RUN_UP)?;
        let (at, start) = (Instant::now(), taps.delivered());
        run(self.options.full_speed)?;
        let delivered = (taps.delivered() - start) as f64;
        let per_second = delivered / at.elapsed().as_secs_f64();
        result.full_per_second.rounds.push(per_second);
        self.settle(u64::MAX);
        Ok(())
    }
}
