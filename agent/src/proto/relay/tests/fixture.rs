//! The relay under test, the kernel's maps as the relay's outputs leave them, and the messages to
//! agents.

use std::collections::{BTreeMap, BTreeSet};

use common::maps::{
    FilterMode, ManagedKey, NO_BRIDGE, Origin, RelayStream, StreamKey, StreamUsage, Subscriber,
    SubscriberKey,
};
use common::relay::{Endpoints, FIRST_PORT, FIRST_RELAY_PORT, is_neutral};
use common::signal::{KnownFlow, PeerMessage, Reason, RelayRelease, RelayRequest, RelayResponse};

use crate::proto::relay::*;
use crate::proto::{DatapathEvent, Membership, PeerEvent, Stream};
use std::net::Ipv6Addr;
use std::time::Duration;

pub(super) const LEASE: Duration = Duration::from_secs(30);
/// Lifetime of a session without renewal.
pub(super) const HELD: Duration = Duration::from_secs(40);

pub(super) fn address(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

pub(super) fn group(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0x77, number)
}

pub(super) fn agent_address(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, number)
}

pub(super) fn source(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, number)
}

pub(super) fn key(group: Ipv6Addr) -> ManagedKey {
    managed_key(&group.octets())
}

pub(super) fn stream(group: Ipv6Addr, source: Ipv6Addr, port: u16) -> StreamKey {
    StreamKey {
        multicast_address: group.octets(),
        source: source.octets(),
        source_port: port,
        destination_port: 5004,
        vlan: 0,
        bridge: NO_BRIDGE,
    }
}

pub(super) fn known(stream: &StreamKey) -> KnownFlow {
    KnownFlow {
        source: stream.source.into(),
        source_port: stream.source_port,
        destination_port: stream.destination_port,
    }
}

pub(super) fn request(group: Ipv6Addr, agent: Ipv6Addr) -> RelayRequest {
    RelayRequest {
        multicast_address: group.octets().into(),
        filter_mode: FilterMode::Exclude as u8,
        sources: Vec::new(),
        agent_address: agent.octets().into(),
        flows: Vec::new(),
    }
}

pub(super) fn config() -> RelayConfig {
    RelayConfig {
        name: "relay1".to_owned(),
        address: address("2001:db8:5::5"),
        policy: vec![Rule {
            agents: vec!["vms*".try_into().unwrap()],
            multicast_addresses: vec!["ff00::/8".to_owned().try_into().unwrap()],
            agent_addresses: vec!["2001:db8:2::/48".to_owned().try_into().unwrap()],
        }],
        limits: RelayLimits::default(),
        lease: LEASE,
        flow_silence: Duration::from_secs(600),
        measure_interval: Duration::from_secs(5),
    }
}

/// State of the kernel.
#[derive(Debug, Default)]
pub(super) struct Kernel {
    pub(super) streams: BTreeMap<StreamKey, RelayStream>,
    pub(super) subscribers: BTreeMap<SubscriberKey, Subscriber>,
    pub(super) joined: BTreeMap<ManagedKey, Membership>,
    pub(super) managed: BTreeSet<ManagedKey>,
    pub(super) neighbours: BTreeSet<Ipv6Addr>,
    /// Usage entries left over from a former subscriber.
    used: BTreeSet<SubscriberKey>,
}

pub(super) struct Bench {
    pub(super) relay: RelayServer,
    pub(super) now: Timestamp,
    pub(super) kernel: Kernel,
    /// Messages to agents that no test has examined.
    pub(super) frames: Vec<(String, u64, PeerMessage)>,
    /// Result of resolving the next hop to an agent.
    pub(super) reachable: Result<(), String>,
    /// Reason for failing joins; `None` if joins succeed.
    pub(super) join_failure: Option<String>,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self::with(config())
    }

    pub(super) fn with(config: RelayConfig) -> Self {
        Self {
            relay: RelayServer::new(config),
            now: Timestamp(1_000_000_000_000),
            kernel: Kernel::default(),
            frames: Vec::new(),
            reachable: Ok(()),
            join_failure: None,
        }
    }

    /// Starts another relay process with the same kernel.
    pub(super) fn restart(&mut self) {
        self.restart_with(config());
    }

    pub(super) fn restart_with(&mut self, config: RelayConfig) {
        self.relay = RelayServer::new(config);
        let any_source = |membership: &&Membership| {
            membership.filter_mode == FilterMode::Exclude && membership.sources.is_empty()
        };
        let adopted = Adopted {
            streams: self.kernel.streams.iter().map(|(k, v)| (*k, *v)).collect(),
            subscribers: self
                .kernel
                .subscribers
                .iter()
                .map(|(k, v)| (*k, *v))
                .collect(),
            managed: self.kernel.managed.iter().copied().collect(),
            joined: self
                .kernel
                .joined
                .values()
                .filter(any_source)
                .map(|membership| membership.key)
                .collect(),
        };
        // Sockets and resolved next hops end with the process.
        self.kernel
            .joined
            .retain(|_, membership| any_source(&&*membership));
        self.kernel.neighbours.clear();
        self.relay.handle_adopted(self.now, adopted);
        self.settle();
    }

    pub(super) fn ask(&mut self, agent: &str, transaction: u64, request: &RelayRequest) {
        let frame = PeerMessage::from(request.clone()).encode(transaction);
        self.relay
            .handle_peer(self.now, agent, PeerEvent::Frame(frame.into()));
        self.settle();
    }

    /// Sends a request and returns the expected response.
    pub(super) fn serve(
        &mut self,
        agent: &str,
        transaction: u64,
        request: &RelayRequest,
    ) -> RelayResponse {
        self.frames.clear();
        self.ask(agent, transaction, request);
        self.response(agent, transaction)
    }

    /// Sends a request and returns the sentence of the expected refusal.
    pub(super) fn refused(&mut self, agent: &str, request: &RelayRequest) -> String {
        self.frames.clear();
        self.ask(agent, 99, request);
        match self.frames.pop() {
            Some((peer, 99, PeerMessage::RelayRelease(RelayRelease(reason)))) => {
                assert_eq!(peer, agent);
                reason.text
            }
            other => panic!("{other:?}"),
        }
    }

    /// Returns the only message to an agent, a response.
    pub(super) fn response(&mut self, agent: &str, transaction: u64) -> RelayResponse {
        match std::mem::take(&mut self.frames).as_slice() {
            [(peer, number, PeerMessage::RelayResponse(response))] => {
                assert_eq!((peer.as_str(), *number), (agent, transaction));
                response.clone()
            }
            other => panic!("{other:?}"),
        }
    }

    pub(super) fn release(&mut self, agent: &str, transaction: u64) {
        let reason = "no listener left".to_owned();
        let frame =
            PeerMessage::from(RelayRelease(Reason::unspecified(reason))).encode(transaction);
        self.relay
            .handle_peer(self.now, agent, PeerEvent::Frame(frame.into()));
        self.settle();
    }

    pub(super) fn packet(&mut self, stream: &StreamKey) {
        let event = DatapathEvent::FirstPacket {
            key: *stream,
            origin: Origin::Native,
            at: self.now,
        };
        self.relay.handle_datapath(self.now, event);
        self.settle();
    }

    /// Lets the relay read these counts.
    pub(super) fn read(&mut self, streams: &[(StreamKey, Stream)]) {
        let event = DatapathEvent::Streams {
            token: 0,
            streams: streams.to_vec(),
        };
        self.relay.handle_datapath(self.now, event);
        self.settle();
    }

    /// Returns a stream that flows now at the given rate, Mbit/s.
    pub(super) fn flowing(&self, megabits: u64) -> Stream {
        Stream {
            native: StreamUsage {
                packets: 1000,
                bytes: 1_000_000,
                last_ns: self.now.0,
                interarrival_ns: 8_000_000 / megabits,
                ..StreamUsage::default()
            },
            ..Stream::default()
        }
    }

    pub(super) fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.relay.poll_timeout().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.relay.handle_timeout(self.now);
            self.settle();
        }
        self.now = end;
    }

    /// Performs the relay's outputs and checks the consistency.
    pub(super) fn settle(&mut self) {
        while let Some(output) = self.relay.poll_output() {
            self.perform(output);
        }
        self.check();
    }

    fn perform(&mut self, output: RelayOutput) {
        match output {
            RelayOutput::Frame { peer, bytes } => {
                let (transaction, message) = PeerMessage::decode(&bytes).unwrap();
                self.frames.push((peer, transaction, message));
            }
            RelayOutput::Join(membership) => {
                let key = membership.key;
                match self.join_failure.clone() {
                    Some(reason) => {
                        let event = DatapathEvent::Failed { key, reason };
                        self.relay.handle_datapath(self.now, event);
                    }
                    None => drop(self.kernel.joined.insert(key, membership)),
                }
            }
            RelayOutput::Leave(key) => drop(self.kernel.joined.remove(&key)),
            RelayOutput::Manage { key, .. } => drop(self.kernel.managed.insert(key)),
            RelayOutput::Unmanage(key) => drop(self.kernel.managed.remove(&key)),
            RelayOutput::StreamSet { key, value } => {
                assert!(
                    (0..value.subscribers).any(|index| {
                        let flow = value.flow;
                        self.kernel
                            .subscribers
                            .contains_key(&SubscriberKey { flow, index })
                    }),
                    "a flow counts subscribers that are written"
                );
                self.kernel.streams.insert(key, value);
            }
            RelayOutput::StreamRemove(key) => drop(self.kernel.streams.remove(&key)),
            RelayOutput::SubscriberSet {
                key,
                value,
                reset_usage,
                ..
            } => {
                if reset_usage {
                    self.kernel.used.insert(key);
                } else {
                    assert!(
                        self.kernel.used.contains(&key)
                            || self.kernel.subscribers.contains_key(&key)
                    );
                }
                self.kernel.subscribers.insert(key, value);
            }
            RelayOutput::SubscriberRemove(key) => {
                self.kernel.used.remove(&key);
                self.kernel.subscribers.remove(&key);
            }
            RelayOutput::Resolve { agent_address } => {
                self.kernel.neighbours.insert(agent_address);
                let result = self.reachable.clone();
                self.relay.handle_neighbour(self.now, agent_address, result);
            }
            RelayOutput::Forget { agent_address } => {
                assert!(self.kernel.neighbours.remove(&agent_address));
            }
            RelayOutput::ReadStreams { keys } => assert!(!keys.is_empty()),
        }
    }

    /// Asserts that sessions, joins and map entries agree.
    fn check(&self) {
        let mut subscribers = BTreeMap::new();
        let mut ports = BTreeSet::new();
        let mut groups = BTreeSet::new();
        let mut neighbours = BTreeSet::new();
        let mut streams: BTreeMap<StreamKey, u32> = BTreeMap::new();
        for session in self.relay.sessions() {
            groups.insert(key(session.multicast_address));
            neighbours.insert(session.agent_address);
            assert!(session.flows.len() <= self.relay.config.limits.flows_per_session);
            for flow in &session.flows {
                let entry = self.kernel.subscribers.get(&flow.key).expect("an entry");
                let endpoints = Endpoints {
                    relay_address: self.relay.config.address.octets(),
                    relay_port: flow.relay_port,
                    agent_address: session.agent_address.octets(),
                    agent_port: flow.agent_port,
                };
                assert!(is_neutral(&flow.stream, &endpoints));
                assert!(flow.agent_port >= FIRST_PORT);
                assert!(flow.relay_port >= FIRST_RELAY_PORT);
                assert_eq!(entry.agent_port, flow.agent_port);
                assert_eq!(entry.relay_port, flow.relay_port);
                assert_eq!(entry.agent_address, session.agent_address.octets());
                if session.agent.is_some() {
                    assert_eq!(entry.lease_end_ns, session.lease_end.0);
                }
                let own = (session.agent_address, flow.relay_port, flow.agent_port);
                assert!(ports.insert(own), "ports are used once");
                assert!(subscribers.insert(flow.key, flow.stream).is_none());
                let last = streams.entry(flow.stream).or_default();
                *last = (*last).max(flow.key.index + 1);
                let value = self.kernel.streams.get(&flow.stream).expect("a flow");
                assert_eq!(value.flow, flow.key.flow);
            }
        }
        assert!(self.kernel.subscribers.keys().eq(subscribers.keys()));
        let counted = self
            .kernel
            .streams
            .iter()
            .map(|(key, it)| (*key, it.subscribers));
        assert!(counted.eq(streams), "no index beyond the last in use");
        let numbers: BTreeSet<u32> = self.kernel.streams.values().map(|it| it.flow).collect();
        assert_eq!(numbers.len(), self.kernel.streams.len());
        assert_eq!(self.kernel.managed, groups);
        if self.join_failure.is_none() {
            assert!(self.kernel.joined.keys().eq(groups.iter()));
            for membership in self.relay.memberships() {
                assert_eq!(self.kernel.joined.get(&membership.key), Some(&membership));
            }
        }
        assert_eq!(self.kernel.neighbours, neighbours);
        assert_eq!(self.relay.ports.in_use(), ports.len());
    }
}
