//! The relay's protocol without I/O: sessions with agents, and the flows that are sent to them.
//!
//! A session is (agent, multicast address), whatever number of VMs listen there. It is asked for by
//! `RelayRequest`, whose transaction names it, and lives by its lease:
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
//! Everything is joined and written to the maps before the `RelayResponse` goes out. A request with
//! another transaction takes the session over, with its ports. A relay that is restarted finds
//! subscribers in the maps, but not the names of their agents: it goes on serving them as `Adopted`
//! until their agents ask again or their leases are over.
//!
//! As [`crate::proto::Agent`], [`RelayServer`] takes inputs by `handle_*` and gives outputs by
//! [`RelayServer::poll_output`].
//!
//! | module | holds |
//! |---|---|
//! | `dialogue` | what agents say, and are told |
//! | `session` | sessions: asked for, renewed, released, expired |
//! | `request` | what is checked of a request |
//! | `flow` | who is sent what: the entries of the maps |
//! | `stream` | addresses, flows and subscribers as they are known |
//! | `adopt` | what an earlier relay has left |
//! | `ports` | choice of the ports |
//! | `policy`, `refusal` | who may, and the sentences for those who may not |

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

use common::maps::{Address, ManagedKey, Origin, StreamKey, SubscriberKey};

pub use io::*;
pub use policy::Rule;

use super::filter::Filter;
use super::timer::TimerTable;
use super::{DatapathEvent, Membership, PeerEvent, Timestamp};
use ports::{PortTable, Ports};
use refusal::Refusal;
use stream::{FlowNumbers, Group};

/// One deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    /// The lease of a session is over.
    Lease(u64),
    /// The streams are to be measured.
    Measure,
}

/// One session.
#[derive(Debug)]
struct Session {
    /// `None` for an adopted one.
    owner: Option<Owner>,
    multicast_address: Address,
    filter: Filter,
    agent_address: Address,
    since: Timestamp,
    lease_end: Timestamp,
    /// The agent waits for its `RelayResponse` until the neighbour is resolved.
    resolving: bool,
    flows: BTreeMap<StreamKey, SessionFlow>,
}

/// Who a session belongs to.
#[derive(Debug)]
struct Owner {
    agent: String,
    transaction: u64,
    /// Flows that the last request named: what was given up for its silence is not taken up again
    /// because the agent goes on naming it.
    named: BTreeSet<StreamKey>,
}

/// A flow of a session.
#[derive(Clone, Copy, Debug)]
struct SessionFlow {
    ports: Ports,
    key: SubscriberKey,
}

/// The protocol of one relay.
#[derive(Debug)]
pub struct RelayServer {
    config: RelayConfig,
    /// Time of the input being handled.
    now: Timestamp,
    outputs: VecDeque<RelayOutput>,
    timers: TimerTable<Timer>,
    /// Agents that are connected, and where from, as far as that is known.
    connected: BTreeMap<String, Option<Ipv6Addr>>,
    sessions: BTreeMap<u64, Session>,
    next_session: u64,
    names: BTreeMap<(String, Address), u64>,
    /// By multicast address.
    groups: BTreeMap<Address, Group>,
    flow_numbers: FlowNumbers,
    ports: PortTable,
    /// Sessions by agent address.
    neighbours: BTreeMap<Address, BTreeSet<u64>>,
    counters: RelayCounters,
}

impl RelayServer {
    /// Creates a relay that serves nobody.
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

    /// Takes in, once and before anything else, what an earlier relay has left in the kernel.
    /// What nobody needs is given up.
    pub fn handle_adopted(&mut self, now: Timestamp, adopted: Adopted) {
        self.begin(now);
        self.adopt(adopted);
    }

    /// Takes in what happened on the connection to an agent.
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
            // Its streams go on until their leases end: it may come back.
            PeerEvent::Down { .. } => {
                self.connected.remove(peer);
            }
            PeerEvent::Frame(bytes) => {
                // A frame proves the connection, should its `Up` be overtaken.
                self.connected.entry(peer.to_owned()).or_default();
                self.on_frame(peer, &bytes);
            }
        }
    }

    /// Takes in what the kernel programs report: first packets, streams that were read, and what
    /// could not be done. Other events do not concern a relay.
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

    /// Takes in whether the kernel knows the way to an agent; answers [`RelayOutput::Resolve`].
    pub fn handle_neighbour(
        &mut self,
        now: Timestamp,
        agent_address: Ipv6Addr,
        result: Result<(), String>,
    ) {
        self.begin(now);
        self.neighbour_known(agent_address, result);
    }

    /// Does what is due at `now`. Calls before [`Self::poll_timeout`] do nothing.
    pub fn handle_timeout(&mut self, now: Timestamp) {
        self.begin(now);
        while let Some(timer) = self.timers.expire(self.now) {
            match timer {
                Timer::Lease(number) => self.lease_over(number),
                Timer::Measure => self.measure(),
            }
        }
    }

    /// Returns the next thing to do; `None` when nothing is left.
    pub fn poll_output(&mut self) -> Option<RelayOutput> {
        self.outputs.pop_front()
    }

    /// Returns when to call [`Self::handle_timeout`], if ever.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        self.timers.next()
    }

    /// The sessions.
    pub fn sessions(&self) -> impl Iterator<Item = SessionView<'_>> {
        self.sessions.values().map(|session| self.view(session))
    }

    /// The memberships held.
    pub fn memberships(&self) -> impl Iterator<Item = Membership> + '_ {
        self.groups
            .iter()
            .map(|(address, group)| group.filter.membership(managed_key(address)))
    }

    /// The agents that are connected.
    pub fn connected_agents(&self) -> impl Iterator<Item = &str> {
        self.connected.keys().map(String::as_str)
    }

    /// What was not done.
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

/// The address as it is watched and joined: relayed flows are untagged.
fn managed_key(multicast_address: &Address) -> ManagedKey {
    ManagedKey {
        vlan: 0,
        pad: 0,
        multicast_address: *multicast_address,
    }
}
