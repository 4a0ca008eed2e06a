//! A simulated world: two hosts with agent, kernel and hypervisor; a network that loses, duplicates and
//! reorders datagrams; and one VM that requests a migration.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use common::maps::{
    BridgeNumber, Forward, ForwardKey, Listener, ListenerKey, ManagedKey, Origin, Querier,
    QuerierKey, Translation, TranslationKey,
};
use common::signal::PORT;

use crate::proto::*;

pub(in crate::proto) const UUID: DomainUuid = DomainUuid([7; 16]);
/// Another domain on the same host.
pub(in crate::proto) const OTHER_UUID: DomainUuid = DomainUuid([8; 16]);
pub(in crate::proto) const MAC: Mac = [0x52, 0x54, 0, 0, 0, 1];
pub(super) const TRANSACTION: u64 = 4711;
/// MAC of the NIC without an address before the migration.
pub(in crate::proto) const IDLE_MAC: Mac = [0x52, 0x54, 0, 0, 0, 2];
/// MAC of another node on the link.
pub(in crate::proto) const OTHER_MAC: Mac = [2, 0, 0, 0, 0, 9];
/// Addresses of the VM at the two hosts.
pub(in crate::proto) const MOAS: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x77),
    Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x88),
];
const NAMES: [&str; 2] = ["vms1", "vms2"];
const UPLINK: u32 = 2;
/// Start time of a simulation.
pub(super) const START: Timestamp = Timestamp(1_000_000_000_000);

/// Deterministic random numbers for the network.
#[derive(Clone, Debug)]
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) addresses: u16,
    /// Percentages of datagrams that are lost, duplicated, and delayed by up to 300 ms.
    pub(super) loss: u64,
    pub(super) duplication: u64,
    pub(super) reordering: u64,
    pub(super) dice: Dice,
    /// Growth time of the multicast tree at the destination host; `None` if the tree never grows.
    pub(super) tree: Option<Duration>,
    /// Whether a Report without changes raises an event.
    pub(super) refresh_events: bool,
    /// Whether an operator requests the migration instead of the VM.
    pub(super) by_operator: bool,
    /// Whether somebody else starts the migration in libvirt, with the hook at the destination host.
    pub(super) by_hook: bool,
    /// Delay until another node on the destination host's link claims the VM's new address.
    pub(super) taken: Option<Duration>,
    /// Reaction to that claim.
    pub(super) disputed: Dispute,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            addresses: 3,
            loss: 0,
            duplication: 0,
            reordering: 0,
            dice: Dice(1),
            tree: Some(Duration::from_millis(20)),
            refresh_events: false,
            by_operator: false,
            by_hook: false,
            taken: None,
            disputed: Dispute::GoOn,
        }
    }
}

#[derive(Debug)]
pub(super) enum Event {
    Datagram {
        host: usize,
        bytes: Vec<u8>,
    },
    ToVm {
        host: usize,
        bytes: Vec<u8>,
    },
    Connected {
        by: usize,
    },
    Frame {
        to: usize,
        epoch: u64,
        bytes: Vec<u8>,
    },
    Datapath {
        host: usize,
        event: DatapathEvent,
    },
    Gate {
        host: usize,
        event: GateEvent,
    },
    Address {
        host: usize,
        event: AddressEvent,
    },
    Packet {
        host: usize,
        key: ManagedKey,
    },
    Migration {
        epoch: u64,
        step: usize,
    },
    Restart {
        host: usize,
    },
    /// libvirt's hook ends, or times out.
    Hooked,
    /// End of the hypervisor's search for a migration to follow.
    FollowMigration {
        until: Timestamp,
    },
    VmTimer,
    VmReport {
        answer: bool,
    },
    Query,
}

/// State of a host's kernel.
#[derive(Debug, Default)]
pub(super) struct Kernel {
    pub(super) joins: BTreeMap<ManagedKey, Membership>,
    pub(super) managed: BTreeMap<ManagedKey, Timestamp>,
    pub(super) mdb: BTreeSet<(u32, ManagedKey)>,
    pub(super) listeners: BTreeMap<ListenerKey, Listener>,
    pub(super) ports: BTreeMap<u32, Port>,
    pub(super) domains: BTreeMap<DomainUuid, Domain>,
    pub(super) pruned: Vec<ManagedKey>,
    pub(super) gates: BTreeMap<u32, SimGate>,
    pub(super) watched: BTreeSet<Ipv6Addr>,
    pub(super) forwards: BTreeMap<ForwardKey, Forward>,
    pub(super) translations: BTreeMap<TranslationKey, Translation>,
}

/// State of a TAP's gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SimGate {
    Records,
    Holds,
    Replays,
}

#[derive(Debug)]
pub(super) struct Host {
    pub(super) agent: Option<Agent>,
    pub(super) kernel: Kernel,
    seed: u64,
    pub(super) next_ifindex: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum VmState {
    Requesting,
    Waiting,
    Over(Result<(), String>),
}

pub(super) struct Pair {
    pub(super) setup: Setup,
    pub(super) now: Timestamp,
    pub(super) hosts: [Host; 2],
    pub(super) queue: BTreeMap<(Timestamp, u64), Event>,
    pub(super) sequence: u64,
    pub(super) link_epoch: u64,
    linked: bool,
    /// Host of the VM, and whether the VM is stopped for the switch.
    pub(super) vm_host: usize,
    pub(super) vm_paused: bool,
    pub(super) vm: VmState,
    pub(super) steps: usize,
    pub(super) migration_epoch: u64,
    pub(super) migrating: bool,
    pub(super) starts: usize,
    pub(super) replies: Vec<CommandReply>,
    hooked: bool,
    pub(super) left_at: BTreeMap<ManagedKey, Timestamp>,
    pub(super) answered_at: Option<Timestamp>,
}

/// Number of each agent's bridge.
pub(in crate::proto) const BRIDGE: BridgeNumber = BridgeNumber(3);

/// Returns an address on the link of that bridge.
pub(in crate::proto) fn on_link(address: Ipv6Addr) -> LinkAddress {
    LinkAddress {
        bridge: BRIDGE,
        address,
    }
}

pub(in crate::proto) fn key(number: u16) -> ManagedKey {
    ManagedKey {
        vlan: 0,
        bridge: BRIDGE,
        multicast_address: Ipv6Addr::new(0xff3e, 0, 0, 0, 0, 0, 1, number).octets(),
    }
}

pub(in crate::proto) fn peer(name: &str) -> Peer {
    Peer {
        name: name.to_owned(),
        connect_uri: format!("qemu+tcp://{name}/system"),
        migrate_uri: String::new(),
    }
}

pub(in crate::proto) fn config(host: usize) -> AgentConfig {
    AgentConfig {
        name: NAMES[host].to_owned(),
        peers: vec![peer(NAMES[1 - host])],
        address: format!("2001:db8:{}::10", host + 1).parse().unwrap(),
        prefix_length: 64,
        bridge: BRIDGE,
        policy: Policy::allow_all(),
        limits: Limits::default(),
        timing: Timing::default(),
        relay: None,
        handover: true,
        unicast: UnicastTiming::default(),
        copy: CopyConfig::default(),
    }
}

/// Returns the TAP of a domain's other NIC.
pub(super) fn idle(target_dev: &str) -> String {
    format!("{target_dev}i")
}

pub(super) fn domain(running: bool, target_dev: &str) -> Domain {
    Domain {
        uuid: UUID,
        name: "viewer".to_owned(),
        running,
        interfaces: [(target_dev.to_owned(), MAC), (idle(target_dev), IDLE_MAC)]
            .into_iter()
            .map(|(target_dev, mac)| DomainInterface {
                target_dev,
                mac,
                vhost: false,
            })
            .collect(),
    }
}

pub(super) fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

impl Pair {
    fn config(&self, host: usize) -> AgentConfig {
        let mut config = config(host);
        config.unicast.disputed = self.setup.disputed;
        config
    }

    pub(super) fn new(setup: Setup) -> Self {
        let host = |host: usize| Host {
            agent: None,
            kernel: Kernel::default(),
            seed: host as u64,
            next_ifindex: 10 + 10 * u32::try_from(host).unwrap(),
        };
        let mut pair = Self {
            setup,
            now: START,
            hosts: [host(0), host(1)],
            queue: BTreeMap::new(),
            sequence: 0,
            link_epoch: 0,
            linked: false,
            vm_host: 0,
            vm_paused: false,
            vm: VmState::Requesting,
            steps: 0,
            migration_epoch: 0,
            migrating: false,
            starts: 0,
            replies: Vec::new(),
            hooked: false,
            left_at: BTreeMap::new(),
            answered_at: None,
        };
        pair.add_domain(0, true);
        for number in 0..pair.setup.addresses {
            pair.report(0, key(number), pair.now);
        }
        for host in 0..2 {
            pair.hosts[host].agent = Some(Agent::new(pair.config(host), host as u64));
            pair.boot(host);
        }
        if pair.setup.by_operator {
            pair.vm = VmState::Over(Ok(()));
            let command = Command::Migrate {
                domain: "viewer".to_owned(),
                destination: "vms2".to_owned(),
            };
            pair.input(0, |agent, now| agent.handle_command(now, 1, command));
        } else if pair.setup.by_hook {
            pair.vm = VmState::Over(Ok(()));
            let command = Command::Prepare {
                uuid: UUID,
                domain: "viewer".to_owned(),
                source: "vms1".to_owned(),
            };
            pair.after(ms(5000), Event::Hooked);
            pair.input(1, |agent, now| agent.handle_command(now, 1, command));
        } else {
            pair.after(ms(1), Event::VmTimer);
        }
        pair.after(ms(30_000), Event::Query);
        pair
    }

    /// Runs until `end`, or until `stop` returns true before an event.
    pub(super) fn run(&mut self, end: Duration, stop: impl Fn(&Self) -> bool) {
        let end = START + end;
        while !stop(self) && self.step(end) {}
    }

    fn step(&mut self, end: Timestamp) -> bool {
        let event = self.queue.first_key_value().map(|((at, _), _)| *at);
        let timer = |host: usize| {
            let agent = self.hosts[host].agent.as_ref()?;
            Some((agent.poll_timeout()?, host))
        };
        let timer = timer(0).into_iter().chain(timer(1)).min();
        let next = event.into_iter().chain(timer.map(|(at, _)| at)).min();
        let Some(next) = next.filter(|next| *next <= end) else {
            return false;
        };
        self.now = self.now.max(next);
        if let Some((_, host)) = timer.filter(|(at, _)| event.is_none_or(|event| *at < event)) {
            self.input(host, Agent::handle_timeout);
        } else if let Some((_, event)) = self.queue.pop_first() {
            self.steps += 1;
            self.handle(event);
        }
        true
    }

    pub(super) fn after(&mut self, delay: Duration, event: Event) {
        self.sequence += 1;
        self.queue.insert((self.now + delay, self.sequence), event);
    }

    /// Kills an agent's process and restarts the agent after a while.
    pub(super) fn crash(&mut self, host: usize) {
        if self.hosts[host].agent.take().is_none() {
            return;
        }
        // The kernel drops the memberships of closed sockets.
        self.hosts[host].kernel.joins.clear();
        self.hosts[host].kernel.watched.clear();
        self.break_link();
        self.after(ms(300), Event::Restart { host });
    }

    pub(super) fn break_link(&mut self) {
        self.link_epoch += 1;
        if !std::mem::take(&mut self.linked) {
            return;
        }
        for host in 0..2 {
            self.link_down(host);
        }
    }

    pub(super) fn link_down(&mut self, host: usize) {
        let peer = NAMES[1 - host];
        let reason = format!("Peer {peer} closed the connection");
        self.input(host, |agent, now| {
            agent.handle_peer(now, peer, PeerEvent::Down { reason });
        });
    }

    /// Makes the running copy never complete.
    pub(super) fn stall(&mut self) {
        self.queue
            .retain(|_, event| !matches!(event, Event::Migration { .. }));
    }

    /// Lets libvirt's migration fail.
    pub(super) fn fail_migration(&mut self) {
        if !std::mem::take(&mut self.migrating) {
            return;
        }
        self.migration_epoch += 1;
        if self.vm_host == 1 {
            // Too late: the VM runs at the destination host, only the source host never hears so.
            self.remove_domain(0);
        } else {
            self.remove_domain(1);
            self.vm_paused = false;
            let resumed = HypervisorEvent::Resumed {
                uuid: UUID,
                migrated: false,
                at: self.now,
            };
            self.hypervisor(0, resumed);
        }
        let result = Err("Connection to the destination was reset".to_owned());
        self.hypervisor(0, HypervisorEvent::MigrationEnded { uuid: UUID, result });
    }

    pub(super) fn input(&mut self, host: usize, input: impl FnOnce(&mut Agent, Timestamp)) {
        let Some(agent) = self.hosts[host].agent.as_mut() else {
            return;
        };
        input(agent, self.now);
        let outputs: Vec<_> = std::iter::from_fn(|| agent.poll_output()).collect();
        for output in outputs {
            self.output(host, output);
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Datagram { host, bytes } => {
                let Some(port) = self.hosts[host].kernel.ports.keys().next().copied() else {
                    return;
                };
                let from = SocketAddrV6::new("fe80::1".parse().unwrap(), PORT, 0, 3);
                self.input(host, |agent, now| {
                    agent.handle_datagram(now, port, from, &bytes);
                });
            }
            Event::ToVm { host, bytes } => {
                if host == self.vm_host && !self.vm_paused {
                    self.vm_hears(&bytes);
                }
            }
            Event::Connected { by } => {
                if self.hosts.iter().all(|host| host.agent.is_some()) {
                    self.linked = true;
                    for host in 0..2 {
                        self.input(host, |agent, now| {
                            agent.handle_peer(now, NAMES[1 - host], PeerEvent::Up { from: None });
                        });
                    }
                } else {
                    self.link_down(by);
                }
            }
            Event::Frame { to, epoch, bytes } => {
                if epoch == self.link_epoch {
                    self.input(to, |agent, now| {
                        agent.handle_peer(now, NAMES[1 - to], PeerEvent::Frame(bytes.into()));
                    });
                }
            }
            Event::Datapath { host, event } => {
                self.input(host, |agent, now| agent.handle_datapath(now, event));
            }
            Event::Gate { host, event } => {
                if let GateEvent::Opened { ifindex, .. } = event {
                    self.hosts[host].kernel.gates.remove(&ifindex);
                }
                self.input(host, |agent, now| agent.handle_gate(now, event));
            }
            Event::Address { host, event } => {
                let heard = match event {
                    AddressEvent::Heard { address, .. } | AddressEvent::Spoke { address } => {
                        self.hosts[host].kernel.watched.contains(&address)
                    }
                    AddressEvent::Own { .. }
                    | AddressEvent::Forwarded { .. }
                    | AddressEvent::Translated { .. } => true,
                };
                if heard {
                    self.input(host, |agent, now| agent.handle_address(now, BRIDGE, event));
                }
            }
            Event::Packet { host, key } => {
                let kernel = &self.hosts[host].kernel;
                let since = kernel.managed.get(&key);
                let joined = kernel.joins.contains_key(&key) || host == self.vm_host;
                if let Some(since) = since.filter(|_| joined) {
                    let at = self.now.max(*since);
                    let (key, _) = self.stream(&key);
                    let event = DatapathEvent::FirstPacket {
                        key,
                        origin: Origin::Native,
                        at,
                    };
                    self.input(host, |agent, now| agent.handle_datapath(now, event));
                }
            }
            Event::Migration { epoch, step } => {
                if epoch == self.migration_epoch && self.migrating {
                    self.migrate(step);
                }
            }
            Event::Restart { host } => {
                self.hosts[host].seed += 100;
                let seed = self.hosts[host].seed;
                self.hosts[host].agent = Some(Agent::new(self.config(host), seed));
                self.boot(host);
            }
            Event::Hooked => {
                if !std::mem::replace(&mut self.hooked, true) {
                    self.begin_migration();
                }
            }
            Event::FollowMigration { until } => self.follow(until),
            Event::VmTimer => self.vm_speaks(),
            Event::VmReport { answer } => {
                if answer && self.vm_host == 1 {
                    self.answered_at.get_or_insert(self.now);
                }
                for number in 0..self.setup.addresses {
                    self.report(self.vm_host, key(number), self.now);
                }
            }
            Event::Query => {
                let key = QuerierKey {
                    ifindex: UPLINK,
                    vlan: 0,
                    bridge: BRIDGE,
                };
                let value = Querier {
                    last_query_ns: self.now.0,
                    address: [0xfe; 16],
                    query_interval_ms: 125_000,
                    query_response_interval_ms: 10_000,
                    robustness: 2,
                    mld_version: 2,
                    pad: [0; 3],
                };
                for host in 0..2 {
                    let event = DatapathEvent::Query { key, value };
                    self.input(host, |agent, now| agent.handle_datapath(now, event));
                }
                if !self.vm_paused {
                    self.after(ms(1500), Event::VmReport { answer: true });
                }
                self.after(ms(125_000), Event::Query);
            }
        }
    }
}
