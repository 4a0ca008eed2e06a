//! A simulated world with relays: one source, the native path to the agent's host, relays with their
//! own paths, and the host's kernel, which sees every packet.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{
    CopyCounts, Managed, ManagedKey, Origin, Origins, RelayFlow, RelayFlowKey, StreamKey,
};
use common::signal::{PeerMessage, RelayResponse};

use super::fixture::TAP;
use super::pair::{BRIDGE, Dice, MAC, UUID, config, key, ms};
use super::relay_network::flow_key;
use crate::proto::*;

/// Time between two packets of the source.
pub(in crate::proto) const INTERVAL: Duration = Duration::from_micros(2000);
/// Delay from the agent to a relay, and of the return path.
pub(super) const SIGNALLING_DELAY: Duration = Duration::from_millis(2);

/// State and behaviour of a relay.
#[derive(Clone, Debug)]
pub(in crate::proto) struct RelayDouble {
    pub(in crate::proto) name: String,
    /// Whether the relay's process runs.
    pub(in crate::proto) runs: bool,
    /// Whether the relay's kernel sends within the leases.
    pub(in crate::proto) sends: bool,
    /// Whether the relay receives the stream.
    pub(in crate::proto) receives: bool,
    pub(in crate::proto) refuses: bool,
    /// Change of an honest answer into a lie.
    pub(in crate::proto) lie: Option<fn(&mut RelayResponse)>,
    /// Delay from the source through the relay to the agent.
    pub(in crate::proto) delay: Duration,
    pub(in crate::proto) requests: Vec<u64>,
    /// Sources of the last request.
    pub(in crate::proto) asked_for: Vec<[u8; 16]>,
    pub(in crate::proto) released: Vec<u64>,
    pub(super) key: RelayFlowKey,
    pub(super) transaction: Option<u64>,
    pub(super) lease_end: Timestamp,
    pub(super) connected: bool,
}

#[derive(Debug)]
pub(super) enum Event {
    Emit,
    Native {
        sequence: u64,
    },
    Relayed {
        key: RelayFlowKey,
        sequence: u64,
    },
    ToRelay {
        relay: usize,
        bytes: Vec<u8>,
    },
    ToAgent {
        relay: usize,
        bytes: Vec<u8>,
    },
    Connected {
        relay: usize,
    },
    Datapath(DatapathEvent),
    /// A delayed output of a slow host.
    Late(Output),
}

/// State of the host's kernel.
#[derive(Debug, Default)]
pub(in crate::proto) struct Kernel {
    pub(in crate::proto) managed: BTreeMap<ManagedKey, (Timestamp, Origins)>,
    pub(in crate::proto) flows: BTreeMap<RelayFlowKey, RelayFlow>,
    pub(super) streams: BTreeMap<StreamKey, Stream>,
    pub(super) copies: BTreeMap<u64, (u64, CopyCounts)>,
}

pub(in crate::proto) struct World {
    pub(in crate::proto) agent: Agent,
    pub(in crate::proto) now: Timestamp,
    pub(in crate::proto) kernel: Kernel,
    pub(in crate::proto) relays: Vec<RelayDouble>,
    /// Whether the network carries the stream to the host.
    pub(in crate::proto) native: bool,
    pub(in crate::proto) native_delay: Duration,
    /// Whether the source sends.
    pub(in crate::proto) sends: bool,
    pub(in crate::proto) interval: Duration,
    /// Delay until the kernel sees an output.
    pub(in crate::proto) late: Duration,
    /// Number of deliveries of each packet to the VM, from the VM's first Report on.
    pub(in crate::proto) delivered: BTreeMap<u64, u32>,
    pub(in crate::proto) answers: Vec<(Timestamp, PeerMessage)>,
    pub(in crate::proto) origins_seen: Vec<Origins>,
    /// Number of flow readings.
    pub(in crate::proto) reads: usize,
    pub(in crate::proto) config: AgentConfig,
    pub(super) sent: u64,
    pub(super) dice: Dice,
    queue: BTreeMap<(Timestamp, u64), Event>,
    number: u64,
}

pub(in crate::proto) fn stream_key() -> StreamKey {
    StreamKey {
        multicast_address: key(1).multicast_address,
        source: [0x20; 16],
        source_port: 5004,
        destination_port: 5004,
        vlan: 0,
        bridge: BRIDGE,
    }
}

pub(in crate::proto) fn relay_address(relay: usize) -> [u8; 16] {
    let mut address = [0; 16];
    address[0] = 0x20;
    address[15] = 0x10 + u8::try_from(relay).unwrap();
    address
}

impl World {
    /// Returns a host with a multicast network and the given number of relays, without listeners.
    pub(in crate::proto) fn new(relays: usize, native_ms: u64, relay_ms: u64) -> Self {
        let config = AgentConfig {
            relay: Some(RelayTiming::default()),
            handover: false,
            ..config(0)
        };
        let double = |number: usize| RelayDouble {
            name: format!("relay{number}"),
            runs: true,
            sends: true,
            receives: true,
            refuses: false,
            lie: None,
            delay: ms(relay_ms),
            requests: Vec::new(),
            asked_for: Vec::new(),
            released: Vec::new(),
            key: flow_key(number, &config),
            transaction: None,
            lease_end: Timestamp(0),
            connected: false,
        };
        let mut world = Self {
            agent: Agent::new(config.clone(), 1),
            now: Timestamp(1_000_000_000_000),
            kernel: Kernel::default(),
            relays: (0..relays).map(double).collect(),
            native: true,
            late: Duration::ZERO,
            native_delay: ms(native_ms),
            sends: true,
            interval: INTERVAL,
            delivered: BTreeMap::new(),
            answers: Vec::new(),
            origins_seen: Vec::new(),
            reads: 0,
            config,
            sent: 0,
            dice: Dice(7),
            queue: BTreeMap::new(),
            number: 0,
        };
        world.after(ms(1), Event::Emit);
        world.start();
        world.run(ms(50));
        world
    }

    fn start(&mut self) {
        let managed = self
            .kernel
            .managed
            .iter()
            .map(|(key, (since, origins))| {
                let value = Managed::new(since.0, *origins, u16::MAX);
                (*key, value)
            })
            .collect();
        let flows = self.kernel.flows.iter().map(|(k, v)| (*k, *v)).collect();
        self.input(|agent, now| agent.handle_pinned(now, managed, flows));
        let candidates: Vec<_> = self
            .relays
            .iter()
            .enumerate()
            .map(|(number, relay)| RelayCandidate {
                name: relay.name.clone(),
                address: format!("[{}]:47411", Ipv6Addr::from(relay_address(number))),
                found_by: "servers".to_owned(),
            })
            .collect();
        self.input(|agent, now| agent.handle_relays(now, candidates));
        self.input(|agent, now| {
            agent.handle_peer(now, "vms2", PeerEvent::Up { from: None });
            agent.handle_hypervisor(now, HypervisorEvent::Connected);
        });
    }

    /// Lets a VM of this host listen.
    pub(in crate::proto) fn listen(&mut self) {
        let now = self.now;
        let port = Port {
            bridge: BRIDGE,
            ifindex: TAP,
            name: "vnet0".to_owned(),
            mac: [0xfe, MAC[1], MAC[2], MAC[3], MAC[4], MAC[5]],
        };
        self.input(|agent, now| agent.handle_port(now, PortEvent::Added(port)));
        self.datapath(DatapathEvent::Listener {
            change: common::event::Change::Updated,
            key: super::fixture::listener_key(TAP, key(1)),
            value: super::fixture::listener(now, common::maps::FilterMode::Exclude),
        });
        self.delivered.clear();
    }

    pub(in crate::proto) fn datapath(&mut self, event: DatapathEvent) {
        self.input(|agent, now| agent.handle_datapath(now, event));
    }

    /// Kills the agent and restarts the agent after a while.
    pub(in crate::proto) fn restart(&mut self, away: Duration) {
        for relay in &mut self.relays {
            relay.connected = false;
        }
        let end = self.now + away;
        self.pass_packets(end);
        let now = self.now;
        self.agent = Agent::new(self.config.clone(), now.0);
        self.start();
        let port = Port {
            bridge: BRIDGE,
            ifindex: TAP,
            name: "vnet0".to_owned(),
            mac: MAC,
        };
        let snapshot = DatapathEvent::Snapshot {
            listeners: vec![(
                super::fixture::listener_key(TAP, key(1)),
                super::fixture::listener(now, common::maps::FilterMode::Exclude),
            )],
            sources: vec![],
            queriers: vec![],
        };
        self.input(|agent, now| agent.handle_port(now, PortEvent::Added(port)));
        self.datapath(snapshot);
        self.input(Agent::handle_adopted);
    }

    /// Ends a relay's process; the relay's kernel continues.
    pub(in crate::proto) fn stop_relay(&mut self, relay: usize) {
        self.relays[relay].runs = false;
        self.disconnect(relay);
    }

    pub(in crate::proto) fn disconnect(&mut self, relay: usize) {
        if std::mem::take(&mut self.relays[relay].connected) {
            let name = self.relays[relay].name.clone();
            let reason = format!("Agent `{name}` broke the connection");
            self.input(|agent, now| agent.handle_peer(now, &name, PeerEvent::Down { reason }));
        }
    }

    pub(in crate::proto) fn mode(&self) -> reception::Mode {
        self.agent.view().modes().next().unwrap().mode
    }

    /// Returns the numbers of lost and duplicated packets, without packets in flight.
    pub(in crate::proto) fn losses(&self) -> (usize, usize) {
        let arrived = || self.delivered.range(..self.sent.saturating_sub(20));
        let lost = arrived().filter(|(_, times)| **times == 0).count();
        let doubled = arrived().filter(|(_, times)| **times > 1).count();
        (lost, doubled)
    }

    /// Forgets deliveries, except for packets in flight.
    pub(in crate::proto) fn forget(&mut self) {
        self.run(ms(100));
        let from = self.sent.saturating_sub(20);
        self.delivered.retain(|sequence, _| *sequence > from);
    }

    pub(in crate::proto) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let event = self.queue.first_key_value().map(|((at, _), _)| *at);
            let timer = self.agent.poll_timeout();
            let Some(next) = event.into_iter().chain(timer).min().filter(|at| *at <= end) else {
                break;
            };
            self.now = self.now.max(next);
            if timer.is_some_and(|timer| event.is_none_or(|event| timer < event)) {
                self.input(Agent::handle_timeout);
            } else if let Some((_, event)) = self.queue.pop_first() {
                self.handle(event);
            }
        }
        self.now = end;
    }

    /// Runs until a condition holds.
    pub(in crate::proto) fn run_until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        for _ in 0..120_000 {
            if holds(self) {
                return;
            }
            self.run(ms(1));
        }
        panic!(
            "{what} never came: {:?}",
            self.agent.view().modes().collect::<Vec<_>>()
        );
    }

    /// Delivers packets while no agent runs.
    fn pass_packets(&mut self, end: Timestamp) {
        while let Some(((at, _), _)) = self.queue.first_key_value()
            && *at <= end
            && let Some(((at, _), event)) = self.queue.pop_first()
        {
            self.now = at;
            if matches!(
                event,
                Event::Emit | Event::Native { .. } | Event::Relayed { .. }
            ) {
                self.handle(event);
            }
        }
        self.queue
            .retain(|_, event| !matches!(event, Event::Datapath(_)));
        self.now = end;
    }

    pub(super) fn after(&mut self, delay: Duration, event: Event) {
        self.number += 1;
        self.queue.insert((self.now + delay, self.number), event);
    }

    pub(in crate::proto) fn input(&mut self, input: impl FnOnce(&mut Agent, Timestamp)) {
        input(&mut self.agent, self.now);
        while let Some(output) = self.agent.poll_output() {
            self.output(output);
        }
    }

    fn relay_by_name(&self, name: &str) -> Option<usize> {
        self.relays.iter().position(|relay| relay.name == name)
    }

    fn output(&mut self, output: Output) {
        match output {
            Output::Connect { peer } => {
                if let Some(relay) = self.relay_by_name(&peer) {
                    self.after(ms(5), Event::Connected { relay });
                }
            }
            Output::Frame { peer, bytes } => match self.relay_by_name(&peer) {
                Some(relay) => self.after(SIGNALLING_DELAY, Event::ToRelay { relay, bytes }),
                None => {
                    let (_, message) = PeerMessage::decode(&bytes).unwrap();
                    self.answers.push((self.now, message));
                }
            },
            Output::Manage { .. } | Output::ReadStreams { .. } if !self.late.is_zero() => {
                self.after(self.late, Event::Late(output));
            }
            output => self.perform_now(output),
        }
    }

    fn perform_now(&mut self, output: Output) {
        match output {
            Output::Manage {
                key,
                since,
                origins,
            } => {
                self.kernel.managed.insert(key, (since, origins));
                self.origins_seen.push(origins);
            }
            Output::Unmanage(key) => {
                self.kernel.managed.remove(&key);
            }
            Output::RelayFlowSet { key, value } => {
                self.kernel.flows.insert(key, value);
            }
            Output::RelayFlowRemove(key) => {
                self.kernel.flows.remove(&key);
            }
            Output::ReadStreams { token, keys } => {
                self.reads += 1;
                let streams = self.kernel.streams.iter();
                let streams = streams
                    .filter(|(key, _)| keys.contains(&key.managed()))
                    .map(|(key, value)| (*key, *value))
                    .collect();
                let event = DatapathEvent::Streams { token, streams };
                self.after(Duration::from_micros(300), Event::Datapath(event));
            }
            _ => {}
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Late(output) => self.perform_now(output),
            Event::Emit => self.emit(),
            Event::Native { sequence } => self.packet(stream_key(), Origin::Native, sequence),
            Event::Relayed { key, sequence } => {
                if let Some(flow) = self.kernel.flows.get(&key) {
                    self.packet(flow.stream, Origin::Relay, sequence);
                }
            }
            Event::ToRelay { relay, bytes } => self.relay_hears(relay, &bytes),
            Event::ToAgent { relay, bytes } => {
                if self.relays[relay].connected {
                    let name = self.relays[relay].name.clone();
                    self.input(|agent, now| {
                        agent.handle_peer(now, &name, PeerEvent::Frame(bytes.into()));
                    });
                }
            }
            Event::Connected { relay } => {
                let name = self.relays[relay].name.clone();
                self.relays[relay].connected = self.relays[relay].runs;
                let event = if self.relays[relay].runs {
                    PeerEvent::Up { from: None }
                } else {
                    let reason = format!("Agent `{name}` cannot be reached");
                    PeerEvent::Down { reason }
                };
                self.input(|agent, now| agent.handle_peer(now, &name, event));
            }
            Event::Datapath(event) => self.datapath(event),
        }
    }

    /// Plays the source host's request for an arriving VM.
    pub(in crate::proto) fn request(&mut self) {
        let mut flow = crate::proto::arrival::tests::flow(0);
        flow.source = stream_key().source.into();
        let listener = crate::proto::arrival::tests::listener(
            1,
            common::maps::FilterMode::Exclude,
            &[],
            vec![flow],
        );
        let request = crate::proto::arrival::tests::request(UUID, vec![listener]);
        let bytes = PeerMessage::from(request).encode(1);
        self.input(|agent, now| agent.handle_peer(now, "vms2", PeerEvent::Frame(bytes.into())));
    }
}
