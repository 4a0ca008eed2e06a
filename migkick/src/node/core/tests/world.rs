//! A simulated world: nodes in sites, mapping servers, and a network that loses, duplicates and
//! delays datagrams.
//!
//! A node is in one site. The node receives packets for addresses of its NICs that belong to that
//! site, and sends from such addresses only.

mod ims;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use common::mat::entropy::Entropy;
use common::mat::key::{KEY_BYTES, Party, Secret};
use common::mat::message::{Moa, Outcome};
use common::mat::{IMS_PORT, NODE_PORT};

use crate::node::core::peer::Used;
use crate::node::core::*;

pub(super) const EPOCH_MS: u64 = 1_800_000_000_000;
const SECRET: [u8; KEY_BYTES] = [9; KEY_BYTES];

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
    pub(super) nodes: usize,
    pub(super) servers: usize,
    /// Percent of the datagrams that are lost, duplicated, and delayed by up to 300 ms.
    pub(super) loss: u64,
    pub(super) duplication: u64,
    pub(super) reordering: u64,
    pub(super) dice: Dice,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            nodes: 2,
            servers: 2,
            loss: 0,
            duplication: 0,
            reordering: 0,
            dice: Dice(1),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Datagram {
    pub(super) from: SocketAddrV6,
    pub(super) to: SocketAddrV6,
    pub(super) bytes: Vec<u8>,
}

/// State of a node's kernel, and its actions.
#[derive(Debug, Default)]
pub(super) struct Kernel {
    pub(super) active: Option<Place>,
    pub(super) own: Vec<Place>,
    pub(super) peers: BTreeMap<Ipv6Addr, (Ipv6Addr, Vec<Ipv6Addr>)>,
    /// Peers whose data the kernel holds.
    pub(super) holding: BTreeSet<Ipv6Addr>,
    pub(super) addresses: BTreeMap<u32, BTreeSet<Ipv6Addr>>,
    pub(super) released: Vec<Vec<u8>>,
    pub(super) refused: Vec<Vec<u8>>,
    pub(super) joined: usize,
    pub(super) left: Vec<Place>,
    /// What was to be replaced, in that order.
    pub(super) replaced: Vec<Place>,
    saved: Saved,
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) core: Option<Core>,
    pub(super) kernel: Kernel,
    pub(super) site: u16,
    /// Generation of the node's key.
    pub(super) generation: u32,
    packets: u64,
    pub(super) delivered_gap: Duration,
    /// Address at the destination, once the destination translates packets of the node.
    translated_to: Option<Ipv6Addr>,
}

#[derive(Debug, Default)]
pub(super) struct Server {
    pub(super) down: bool,
    pub(super) skew_ms: u64,
    pub(super) mappings: BTreeMap<Ipv6Addr, (u64, Vec<Moa>, Duration)>,
    pub(super) lookups: usize,
    pub(super) updates: usize,
    pub(super) refuse: Option<Outcome>,
    /// Addresses that somebody else has registered.
    pub(super) squatted: BTreeSet<Ipv6Addr>,
}

pub(super) struct World {
    pub(super) setup: Setup,
    pub(super) now: Duration,
    pub(super) nodes: Vec<Node>,
    pub(super) servers: Vec<Server>,
    queue: BTreeMap<(Duration, u64), Datagram>,
    number: u64,
    pub(super) secret: Secret,
    /// Flows of data, ten packets a second: sender and receiver.
    pub(super) flows: Vec<(usize, usize)>,
    next_data: Duration,
    /// Every datagram so far, for an attacker.
    pub(super) record: Vec<Datagram>,
    pub(super) steps: usize,
    /// Packets that arrived as another node's.
    pub(super) resets: usize,
}

pub(super) fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub(super) fn hoa(node: usize) -> Ipv6Addr {
    Ipv6Addr::new(0xfd5e, 0x6d61, 0x74, 0, 0, 0, 0, 0x10 + node as u16)
}

pub(super) fn moa(node: usize, site: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, site, 0, 0, 0, 0, 0x100 + node as u16)
}

pub(super) fn server(index: usize) -> SocketAddrV6 {
    let address = Ipv6Addr::new(0x2001, 0xdb8, 0xff, 0, 0, 0, 0, index as u16);
    SocketAddrV6::new(address, IMS_PORT, 0, 0)
}

fn site_of(address: Ipv6Addr) -> u16 {
    address.segments()[2]
}

impl World {
    pub(super) fn new(setup: Setup) -> Self {
        let node = |index: usize| Node {
            core: None,
            kernel: Kernel::default(),
            site: 1 + index as u16,
            generation: 1,
            packets: 0,
            delivered_gap: Duration::ZERO,
            translated_to: None,
        };
        let mut world = Self {
            now: ms(5),
            nodes: (0..setup.nodes).map(node).collect(),
            servers: (0..setup.servers).map(|_| Server::default()).collect(),
            queue: BTreeMap::new(),
            number: 0,
            secret: Secret::new(&SECRET),
            flows: Vec::new(),
            next_data: Duration::ZERO,
            record: Vec::new(),
            steps: 0,
            resets: 0,
            setup,
        };
        for index in 0..world.nodes.len() {
            let site = world.nodes[index].site;
            world.set_address(index, 1, moa(index, site), true);
            world.start(index);
        }
        world
    }

    /// Starts or restarts the program of a node.
    pub(super) fn start(&mut self, index: usize) {
        let identity = Identity {
            hoa: hoa(index),
            home: ("fd5e:6d61:74::".parse().unwrap(), 48),
            key: self
                .secret
                .node(hoa(index).octets(), self.nodes[index].generation),
            servers: (0..self.servers.len()).map(server).collect(),
        };
        let node = &mut self.nodes[index];
        let timing = Timing {
            lifetime: Duration::from_secs(60),
            ..Timing::default()
        };
        let saved = node.kernel.saved;
        node.core = Some(Core::new(identity, timing, saved, EPOCH_MS, entropy()));
        let used: Vec<_> = node
            .kernel
            .peers
            .keys()
            .map(|hoa| (*hoa, used(1)))
            .collect();
        self.nics(index);
        self.input(index, |core, now| core.handle_usage(now, &used));
    }

    pub(super) fn crash(&mut self, index: usize) {
        self.nodes[index].core = None;
    }

    pub(super) fn set_address(&mut self, index: usize, nic: u32, address: Ipv6Addr, set: bool) {
        let addresses = self.nodes[index].kernel.addresses.entry(nic).or_default();
        if set {
            addresses.insert(address);
        } else {
            addresses.remove(&address);
        }
    }

    /// Passes the list of NICs to a node.
    pub(super) fn nics(&mut self, index: usize) {
        let nics = self.nodes[index].kernel.addresses.iter();
        let nics = nics.filter(|(_, addresses)| !addresses.is_empty());
        let nics = nics.map(|(ifindex, addresses)| NicState {
            ifindex: *ifindex,
            addresses: addresses.iter().copied().collect(),
        });
        let nics = nics.collect();
        self.input(index, |core, now| core.handle_nics(now, nics));
    }

    /// Stops or restarts all servers.
    pub(super) fn stop_servers(&mut self, down: bool) {
        for server in &mut self.servers {
            server.down = down;
        }
    }

    /// Prepares the move of a node to a site.
    pub(super) fn prepare(&mut self, index: usize, site: u16) {
        let Some(active) = self.nodes[index].kernel.active else {
            return;
        };
        if active.moa == moa(index, site) {
            return;
        }
        let standby = Place {
            ifindex: 3 - active.ifindex,
            moa: moa(index, site),
        };
        self.set_address(index, standby.ifindex, standby.moa, true);
        self.nics(index);
        self.input(index, |core, now| core.prepare(now, standby));
        self.nodes[index].translated_to = None;
        self.ready(index);
    }

    /// Tells a node that it may move; returns whether the agents may translate.
    pub(super) fn ready(&mut self, index: usize) -> bool {
        let mut standby = None;
        self.input(index, |core, now| {
            standby = core.status(now).standby.filter(|_| core.ready(now));
        });
        let node = &mut self.nodes[index];
        node.translated_to = standby.or(node.translated_to);
        standby.is_some()
    }

    /// Runs a whole move, with an announcement of the guest's kernel.
    pub(super) fn go(&mut self, index: usize, site: u16) {
        self.prepare(index, site);
        self.run(ms(300));
        self.arrive(index, site);
    }

    /// Moves the node, as the hypervisor does; the node's kernel announces the move.
    pub(super) fn arrive(&mut self, index: usize, site: u16) {
        self.ready(index);
        self.nodes[index].site = site;
        self.input(index, Core::handle_announcement);
    }

    /// Returns the source of a node's packets: DstAgent translates them while the node does not
    /// know that it has moved.
    fn source(&self, index: usize) -> Option<Ipv6Addr> {
        let node = &self.nodes[index];
        let active = node.kernel.active.map(|it| it.moa);
        active
            .into_iter()
            .chain(node.translated_to)
            .find(|source| self.holder(*source) == Some(index))
    }

    pub(super) fn run(&mut self, duration: Duration) {
        let end = self.now + duration;
        while self.step(end) {}
        self.now = end;
    }

    /// Runs the next event before `end`; returns whether there was one.
    pub(super) fn step(&mut self, end: Duration) -> bool {
        let datagram = self.queue.first_key_value().map(|((at, _), _)| *at);
        let timers = (0..self.nodes.len()).filter_map(|index| {
            let core = self.nodes[index].core.as_ref()?;
            Some((core.poll_timeout()?, index))
        });
        let timer = timers.min();
        let times = [datagram, timer.map(|(at, _)| at), Some(self.next_data)];
        let Some(next) = times.into_iter().flatten().min().filter(|at| *at <= end) else {
            return false;
        };
        self.steps += 1;
        assert!(self.steps < 2_000_000, "busy at {next:?}");
        self.now = self.now.max(next);
        if self.next_data == next {
            self.next_data = next + ms(100);
            self.data();
        } else if datagram == Some(next) {
            if let Some((_, datagram)) = self.queue.pop_first() {
                self.arrives(datagram);
            }
        } else if let Some((_, index)) = timer {
            self.input(index, Core::handle_timeout);
        }
        true
    }

    fn data(&mut self) {
        for (from, to) in self.flows.clone() {
            let node = &mut self.nodes[from];
            node.packets += 1;
            let packets = node.packets;
            let holds = node.kernel.holding.contains(&hoa(to));
            if node.kernel.peers.contains_key(&hoa(to)) && !holds {
                let used = [(hoa(to), used(packets))];
                self.input(from, |core, now| core.handle_usage(now, &used));
            } else {
                self.send_frame(from, to, vec![1]);
            }
            self.resets += usize::from(self.is_mistaken(from, to));
            let delivers = self.delivers(from, to);
            let gap = &mut self.nodes[from].delivered_gap;
            *gap = if delivers {
                Duration::ZERO
            } else {
                *gap + ms(100)
            };
        }
    }

    /// An application sends a packet without an entry in the data path.
    pub(super) fn send_frame(&mut self, from: usize, to: usize, frame: Vec<u8>) {
        self.input(from, |core, now| core.handle_held(now, hoa(to), frame));
    }

    /// Whether the receiving kernel would take a packet for another node's, and end the session.
    pub(super) fn is_mistaken(&self, from: usize, to: usize) -> bool {
        let sender = &self.nodes[from].kernel;
        let target = sender.peers.get(&hoa(to)).map(|it| it.0);
        let arrives = target.and_then(|it| self.holder(it)) == Some(to)
            && self.source(from).is_some()
            && !sender.holding.contains(&hoa(to));
        arrives && !self.delivers(from, to)
    }

    /// Whether a packet would reach the application at the receiver.
    pub(super) fn delivers(&self, from: usize, to: usize) -> bool {
        let (sender, receiver) = (&self.nodes[from], &self.nodes[to]);
        let Some(source) = self.source(from) else {
            return false;
        };
        let Some((target, _)) = sender.kernel.peers.get(&hoa(to)) else {
            return false;
        };
        let taken = receiver.kernel.peers.get(&hoa(from));
        !sender.kernel.holding.contains(&hoa(to))
            && self.holder(*target) == Some(to)
            && receiver.kernel.own.iter().any(|it| it.moa == *target)
            && taken.is_some_and(|(_, from)| from.contains(&source))
    }

    /// Whether data flows in both directions between the active addresses.
    pub(super) fn is_settled(&self, one: usize, other: usize) -> bool {
        let to_active = |from: usize, to: usize| {
            let active = self.nodes[to].kernel.active.map(|it| it.moa);
            let peer = self.nodes[from].kernel.peers.get(&hoa(to));
            active.is_some() && peer.map(|it| it.0) == active && self.delivers(from, to)
        };
        to_active(one, other) && to_active(other, one)
    }

    /// Returns the node that has an address at the site of its route.
    pub(super) fn holder(&self, address: Ipv6Addr) -> Option<usize> {
        self.nodes.iter().position(|node| {
            let mut addresses = node.kernel.addresses.values();
            node.site == site_of(address) && addresses.any(|it| it.contains(&address))
        })
    }

    pub(super) fn send(&mut self, datagram: Datagram) {
        let Setup {
            loss,
            duplication,
            reordering,
            ..
        } = self.setup;
        let dice = &mut self.setup.dice;
        let copies = 1 + u64::from(dice.roll(100) < duplication);
        for _ in 0..copies {
            let dice = &mut self.setup.dice;
            if dice.roll(100) < loss {
                continue;
            }
            let late = dice.roll(100) < reordering;
            let delay = 5 + if late { dice.roll(300) } else { 0 };
            self.number += 1;
            let at = (self.now + ms(delay), self.number);
            self.queue.insert(at, datagram.clone());
        }
    }

    fn arrives(&mut self, datagram: Datagram) {
        let index = (0..self.servers.len()).find(|it| server(*it) == datagram.to);
        if let Some(index) = index {
            return self.serve(index, &datagram);
        }
        if datagram.to.port() != NODE_PORT {
            return;
        }
        let local = *datagram.to.ip();
        if let Some(index) = self.holder(local) {
            let received = Received {
                local,
                from: datagram.from,
                bytes: datagram.bytes,
            };
            if self.nodes[index]
                .kernel
                .own
                .iter()
                .any(|it| it.moa == local)
            {
                self.input(index, |core, now| core.handle_datagram(now, received));
            }
        }
    }

    pub(super) fn input(&mut self, index: usize, input: impl FnOnce(&mut Core, Duration)) {
        let Some(core) = self.nodes[index].core.as_mut() else {
            return;
        };
        input(core, self.now);
        let outputs: Vec<_> = std::iter::from_fn(|| core.poll_output()).collect();
        for output in outputs {
            self.output(index, output);
        }
    }

    fn output(&mut self, index: usize, output: Output) {
        let kernel = &mut self.nodes[index].kernel;
        match output {
            Output::Transmit { from, to, bytes } => {
                let from = SocketAddrV6::new(from, NODE_PORT, 0, 0);
                let datagram = Datagram { from, to, bytes };
                if self.holder(*from.ip()) == Some(index) {
                    self.record.push(datagram.clone());
                    self.send(datagram);
                }
            }
            Output::SetActive(place) => kernel.active = Some(place),
            Output::SetOwn(own) => kernel.own = own,
            Output::SetPeer { hoa, to, from } => {
                kernel.holding.remove(&hoa);
                kernel.peers.insert(hoa, (to, from));
            }
            Output::HoldPeer { hoa, from } => {
                kernel.holding.insert(hoa);
                let to = kernel.peers.get(&hoa).map(|it| it.0);
                let to = to.unwrap_or(Ipv6Addr::UNSPECIFIED);
                kernel.peers.insert(hoa, (to, from));
            }
            Output::RemovePeer(hoa) => {
                kernel.holding.remove(&hoa);
                kernel.peers.remove(&hoa);
            }
            Output::Release(frame) => kernel.released.push(frame),
            Output::Refuse(frame) => kernel.refused.push(frame),
            Output::PathChanged => {}
            Output::Join => kernel.joined += 1,
            Output::Leave(place) => kernel.left.push(place),
            Output::RemoveAddress(place) => {
                self.set_address(index, place.ifindex, place.moa, false);
                self.nics(index);
            }
            Output::Replace(place) => kernel.replaced.push(place),
            Output::Save(saved) => kernel.saved = saved,
        }
    }
}

/// Random numbers for a node, as from its kernel.
pub(super) fn entropy() -> Entropy {
    Entropy::new(|bytes| getrandom::fill(bytes).is_ok())
}

/// Nonces of the servers; the nonces of nodes have another form.
pub(super) fn nonce(number: u64) -> [u8; 24] {
    let mut nonce = [0; 24];
    nonce[..8].copy_from_slice(&number.to_be_bytes());
    nonce
}

fn used(packets: u64) -> Used {
    Used {
        packets,
        bytes: packets * 100,
        idle: Some(Duration::ZERO),
    }
}
