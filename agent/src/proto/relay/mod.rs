//! The relay's protocol without I/O: sessions with agents, and the flows sent to the agents.
//!
//! One session serves one (agent, multicast address), whatever number of VMs listen there. A
//! `RelayRequest` opens the session; the transaction of that request identifies the session, and a
//! lease limits its life:
//!
//! ```text
//!          RelayRequest                neighbour resolved
//!  (none) --------------> Resolving ------------------------> Serving --.
//!    ^  \                    |                                 ^  |  ^  | RelayRequest (renewal),
//!    |   `- refused: RelayRelease                              |  |  `--' new source or port:
//!    |                       | unreachable: RelayRelease       |  |       RelayResponse
//!    |                       |              RelayRequest of the|  |
//!    |                       v              agent with that    |  | RelayRelease, lease over
//!    `-----------------------+------------  address            |  |
//!    ^                                                         |  |
//!    `---- lease over ---- Adopted ----------------------------'  |
//!    `------------------------------------------------------------'
//! ```
//!
//! The relay joins and writes the maps before the `RelayResponse` goes out. A request with another
//! transaction takes over the session and its ports. A restarted relay finds subscribers in the maps,
//! but not the names of their agents. The relay serves such sessions as `Adopted` until the agents ask
//! again or the leases end.
//!
//! Like [`crate::proto::Agent`], [`RelayServer`] takes inputs through `handle_*` and returns outputs
//! from [`RelayServer::poll_output`].
//!
//! | module | holds |
//! |---|---|
//! | `dialogue` | messages from and to agents |
//! | `session` | sessions: request, renewal, release, expiry |
//! | `request` | checks of a request |
//! | `flow` | subscribers of each flow: the entries of the maps |
//! | `stream` | known addresses, flows and subscribers |
//! | `adopt` | state that an earlier relay left |
//! | `ports` | choice of the ports |
//! | `policy`, `refusal` | permissions, and the sentences of refusals |

mod adopt;
mod dialogue;
mod flow;
mod io;
pub mod policy;
mod ports;
mod refusal;
mod request;
mod session;
mod stream;
#[cfg(any(test, fuzzing))]
pub(in crate::proto) mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv6Addr};

use common::maps::{Address, ManagedKey, NO_BRIDGE, Origin, StreamKey, SubscriberKey};

pub use io::*;
pub use policy::Rule;

use super::filter::Filter;
use super::timer::TimerTable;
use super::{DatapathEvent, Membership, PeerEvent, Timestamp};
use ports::{PortTable, Ports};
use refusal::Refusal;
use stream::{FlowNumbers, Group};

/// A deadline of the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// End of the lease of the session with this number.
    Lease(u64),
    /// Time of the next reading of `STREAMS`.
    Measure,
}

/// A session: one multicast address for one agent.
#[derive(Debug)]
struct Session {
    /// The agent and its transaction; `None` for an adopted session.
    owner: Option<Owner>,
    multicast_address: Address,
    filter: Filter,
    agent_address: Address,
    since: Timestamp,
    lease_end: Timestamp,
    /// The `RelayResponse` waits until the agent's neighbour entry is resolved.
    resolving: bool,
    flows: BTreeMap<StreamKey, SessionFlow>,
}

/// Agent and transaction of a session.
#[derive(Debug)]
struct Owner {
    agent: String,
    transaction: u64,
    /// Flows named in the last request. A flow that was dropped for its silence is not subscribed again
    /// while the agent keeps naming the flow.
    named: BTreeSet<StreamKey>,
}

/// Ports and map entry of one flow of a session.
#[derive(Clone, Copy, Debug)]
struct SessionFlow {
    ports: Ports,
    key: SubscriberKey,
}

/// State machine of one relay.
#[derive(Debug)]
pub struct RelayServer {
    config: RelayConfig,
    /// Time of the current input.
    now: Timestamp,
    outputs: VecDeque<RelayOutput>,
    timers: TimerTable<Timer>,
    /// Connected agents, with the addresses that they dialed from, if known.
    connected: BTreeMap<String, Option<Ipv6Addr>>,
    sessions: BTreeMap<u64, Session>,
    next_session: u64,
    names: BTreeMap<(String, Address), u64>,
    /// Joined multicast addresses.
    groups: BTreeMap<Address, Group>,
    flow_numbers: FlowNumbers,
    ports: PortTable,
    /// Sessions by agent address.
    neighbours: BTreeMap<Address, BTreeSet<u64>>,
    counters: RelayCounters,
}

impl RelayServer {
    /// Creates a relay without sessions.
    pub fn new(config: RelayConfig) -> Self {
        Self {
            config,
            now: Timestamp::default(),
            outputs: VecDeque::new(),
            timers: TimerTable::default(),
            connected: BTreeMap::new(),
            sessions: BTreeMap::new(),
            next_session: 1,
            names: BTreeMap::new(),
            groups: BTreeMap::new(),
            flow_numbers: FlowNumbers::default(),
            ports: PortTable::default(),
            neighbours: BTreeMap::new(),
            counters: RelayCounters::default(),
        }
    }

    /// Adopts the kernel state of an earlier relay, and removes unused entries. Called once, before any
    /// other input.
    pub fn handle_adopted(&mut self, now: Timestamp, adopted: Adopted) {
        self.begin(now);
        self.adopt(adopted);
    }

    /// Handles an event of an agent's connection.
    pub fn handle_peer(&mut self, now: Timestamp, peer: &str, event: PeerEvent) {
        self.begin(now);
        match event {
            PeerEvent::Up { from } => {
                let from = from.and_then(|address| match address {
                    IpAddr::V6(address) => Some(address),
                    IpAddr::V4(_) => None,
                });
                self.connected.insert(peer.to_owned(), from);
            }
            // Streams continue until the leases end, since the agent may reconnect.
            PeerEvent::Down { .. } => {
                self.connected.remove(peer);
            }
            PeerEvent::Frame(bytes) => {
                // A frame proves the connection, even if the frame overtakes its `Up`.
                self.connected.entry(peer.to_owned()).or_default();
                self.on_frame(peer, &bytes);
            }
        }
    }

    /// Handles an event of the eBPF programs: first packets, read streams and failures. A relay ignores
    /// all other events.
    pub fn handle_datapath(&mut self, now: Timestamp, event: DatapathEvent) {
        self.begin(now);
        match event {
            DatapathEvent::FirstPacket {
                key,
                origin: Origin::Native,
                at,
            } => self.stream_seen(&key, at),
            DatapathEvent::Streams { streams, .. } => self.streams_read(&streams),
            DatapathEvent::Failed { key, reason } => self.address_failed(key, &reason),
            _ => {}
        }
    }

    /// Handles the result of [`RelayOutput::Resolve`]: whether the kernel has the next hop to an agent.
    pub fn handle_neighbour(
        &mut self,
        now: Timestamp,
        agent_address: Ipv6Addr,
        result: Result<(), String>,
    ) {
        self.begin(now);
        self.neighbour_known(agent_address, result);
    }

    /// Runs all timers due at `now`. Calls before [`Self::poll_timeout`] have no effect.
    pub fn handle_timeout(&mut self, now: Timestamp) {
        self.begin(now);
        while let Some(timer) = self.timers.expire(self.now) {
            match timer {
                Timer::Lease(number) => self.lease_over(number),
                Timer::Measure => self.measure(),
            }
        }
    }

    /// Returns the next output; `None` if none is left.
    pub fn poll_output(&mut self) -> Option<RelayOutput> {
        self.outputs.pop_front()
    }

    /// Returns the time of the next [`Self::handle_timeout`]; `None` if no timer is armed.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        self.timers.next()
    }

    /// Returns a view of every session, adopted ones included.
    pub fn sessions(&self) -> impl Iterator<Item = SessionView<'_>> {
        self.sessions.values().map(|session| self.view(session))
    }

    /// Returns the joined memberships.
    pub fn memberships(&self) -> impl Iterator<Item = Membership> + '_ {
        self.groups
            .iter()
            .map(|(address, group)| group.filter.membership(managed_key(address)))
    }

    /// Returns the names of the connected agents.
    pub fn connected_agents(&self) -> impl Iterator<Item = &str> {
        self.connected.keys().map(String::as_str)
    }

    /// Returns the counters of refusals and expiries.
    pub fn counters(&self) -> RelayCounters {
        self.counters
    }

    fn begin(&mut self, now: Timestamp) {
        self.now = self.now.max(now);
    }

    fn view<'a>(&self, session: &'a Session) -> SessionView<'a> {
        let rate = |stream: &StreamKey| {
            self.groups
                .get(&session.multicast_address)
                .map_or(0, |group| group.bits_per_second(stream))
        };
        SessionView {
            agent: session.owner.as_ref().map(|owner| owner.agent.as_str()),
            transaction: session.owner.as_ref().map(|owner| owner.transaction),
            multicast_address: session.multicast_address.into(),
            filter_mode: session.filter.mode,
            sources: &session.filter.sources,
            agent_address: session.agent_address.into(),
            since: session.since,
            lease_end: session.lease_end,
            flows: session
                .flows
                .iter()
                .map(|(stream, flow)| FlowView {
                    stream: *stream,
                    relay_port: flow.ports.relay,
                    agent_port: flow.ports.agent,
                    key: flow.key,
                    bits_per_second: rate(stream),
                })
                .collect(),
        }
    }
}

/// Returns the key of an address as managed and joined. Relayed flows are untagged.
fn managed_key(multicast_address: &Address) -> ManagedKey {
    ManagedKey {
        vlan: 0,
        bridge: NO_BRIDGE,
        multicast_address: *multicast_address,
    }
}
