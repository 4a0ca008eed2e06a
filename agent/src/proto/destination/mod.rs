//! Migrations that arrive at this host.
//!
//! Each address that an arriving VM needs has one [`Entry`], shared by all VMs that need it:
//!
//! ```text
//!            AgentRequest                          first packet
//!   (none) ---------------> Joining -> Probing -------------------> Native or Relay
//!                                        |  | silent at the source too        ^ ^ ^
//!                                        |  +-------------------------> Idle -+ | |
//!                                        | deadline                             | |
//!                                        +----------------------> Unreachable --+ |
//!                                        | refused by the kernel                  |
//!                                        +----------------------> Refused --------+
//!
//!   any --- the VM runs here ---> Held --- its Report answers a Query, or it left,
//!                                          or a listening interval has passed ---> Released
//!   any --- abort, VM gone, or nothing heard any more ---------------------------> Released
//! ```
//!
//! A domain that somebody else moves is noticed by libvirt's hook, and its source asked to ask
//! (`notice`).
//!
//! Joining and probing begin at once for all addresses, so a request takes as long as its slowest
//! probe. A join ends when the last VM that needs it releases it.

mod arrival;
mod claim;
mod ending;
mod handover;
mod notice;
mod probe;
mod tap;
mod translate;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::maps::{FilterMode, ManagedKey};
use common::signal::{
    AgentRequest, AgentResponse, Flow, MAX_TEXT_BYTES, MigrationAbort, MigrationProgress, NicCut,
    Phase, Reception, ReceptionMode,
};
use tracing::{info, warn};

use super::filter::{Filter, is_routable};
use super::handover::ClockOffset;
use super::record::Direction;
use super::refusal::{Refusal, bounded};
use super::source::millis;
use super::timer::Timer;
use super::{Agent, DomainUuid, Mac, Output, Timestamp};

pub(super) use arrival::Arrivals;
pub(crate) use arrival::MDB_RENEWAL_LAST;
pub(super) use notice::Preparation;
pub(super) use probe::Entry;
pub use probe::ReceptionView;
pub(super) use translate::Translating;

use claim::Claim;
use handover::ArrivalGate;

/// NICs of one domain.
const MAX_MACS: usize = 64;

/// An arriving domain.
#[derive(Debug)]
pub(super) struct Incoming {
    peer: String,
    transaction: u64,
    uuid: DomainUuid,
    domain: String,
    macs: Vec<Mac>,
    vm_transaction: Option<u64>,
    started: Timestamp,
    /// Addresses of the request, in its order, and whether each was taken on.
    requested: Vec<(ManagedKey, bool)>,
    /// Addresses still being probed for the answer.
    pending: BTreeSet<ManagedKey>,
    /// The answer's token for flows that are known here already.
    token: u64,
    response: Option<AgentResponse>,
    /// What is still held for it: the address, and the NIC that listens to it.
    needs: BTreeMap<(ManagedKey, Mac), Filter>,
    /// MDB entries made for it.
    mdb: BTreeSet<(u32, ManagedKey)>,
    /// Time until they are made again.
    mdb_renewal: Duration,
    progress: Option<MigrationProgress>,
    /// When the source was first heard to switch.
    switching: Option<Timestamp>,
    /// What is known of the source's clock.
    clock: ClockOffset,
    gates: BTreeMap<u32, ArrivalGate>,
    /// What the source has said of a TAP after its first cut, while frames are replayed.
    revised: BTreeMap<u32, NicCut>,
    /// The address that it is going to have here.
    claim: Option<Claim>,
    aborted: Option<String>,
    /// It has begun to come: its TAPs are, or were, here.
    begun: bool,
    last_heard: Timestamp,
    arrived: Option<Timestamp>,
    /// First General Query after the arrival, by VLAN.
    queried: BTreeMap<u16, Timestamp>,
    /// Until when answers to the last Query are looked for.
    poll_until: Timestamp,
}

impl Agent {
    pub(super) fn on_agent_request(&mut self, peer: &str, transaction: u64, body: AgentRequest) {
        let uuid = DomainUuid(body.domain_uuid.into());
        let known = self
            .incoming
            .iter()
            .find(|(_, incoming)| incoming.transaction == transaction && incoming.peer == peer);
        if let Some((number, incoming)) = known {
            let (number, response) = (*number, incoming.response.clone());
            self.heard_of(number);
            if let Some(response) = response {
                self.send(peer, transaction, &response.into());
                self.prepared(uuid, number);
            }
            return;
        }
        if let Err(refusal) = self.check_arrival(peer, uuid, &body) {
            let reason = bounded(&refusal.to_string());
            warn!(peer, domain = %bounded(&body.domain_name), %reason, "Arrival is refused");
            self.not_prepared(uuid, &reason);
            self.send(peer, transaction, &MigrationAbort { reason }.into());
            return;
        }
        // The source asks with another transaction: it has given up the one before.
        let replaced = self.incoming_of(uuid);
        let gates = replaced
            .and_then(|number| self.incoming.get_mut(&number))
            .map(|replaced| std::mem::take(&mut replaced.gates))
            .unwrap_or_default();
        let number = self.admit(peer, transaction, uuid, body, gates);
        if let Some(replaced) = replaced {
            self.undo(replaced, "The source asked anew");
        }
        if self.inventory.domains.get(&uuid).is_some_and(|d| d.running) {
            self.arrived(uuid, self.now);
        }
        self.heard_of(number);
        self.answer_if_decided(number);
    }

    fn check_arrival(
        &self,
        peer: &str,
        uuid: DomainUuid,
        body: &AgentRequest,
    ) -> Result<(), Refusal> {
        let agent = self.config.name.clone();
        let field = |field| Err(Refusal::BadField { field });
        if body.domain_name.is_empty() || body.domain_name.len() > MAX_TEXT_BYTES {
            return field("domain_name");
        }
        if body.macs.len() > MAX_MACS {
            return field("macs");
        }
        let domain = body.domain_name.clone();
        if !self.config.policy.allows_arrival(peer, &domain) {
            let peer = peer.to_owned();
            return Err(Refusal::Arrival {
                agent,
                domain,
                peer,
            });
        }
        let mut limit = self.config.limits.incoming;
        let mut of_all = 0;
        let mut of_peer = 0;
        for incoming in self.incoming.values() {
            if incoming.uuid == uuid {
                if incoming.peer != peer && incoming.arrived.is_none() {
                    let peer = incoming.peer.clone();
                    return Err(Refusal::AlreadyArriving {
                        domain,
                        agent,
                        peer,
                    });
                }
            } else if incoming.arrived.is_none() {
                of_all += 1;
                of_peer += usize::from(incoming.peer == peer);
            }
        }
        if of_all < limit {
            limit = self.config.limits.incoming_per_peer;
            if of_peer < limit {
                return Ok(());
            }
        }
        Err(Refusal::TooManyIncoming { agent, limit })
    }

    /// Takes on what a request asks for. `gates` are closed for the domain already.
    fn admit(
        &mut self,
        peer: &str,
        transaction: u64,
        uuid: DomainUuid,
        body: AgentRequest,
        gates: BTreeMap<u32, ArrivalGate>,
    ) -> u64 {
        let name = &body.domain_name;
        let number = self
            .records
            .begin(self.now, Direction::Incoming, uuid, name, peer);
        info!(peer, domain = %name, number, listeners = body.listeners.len(), "Domain is to arrive");
        let incoming = Incoming {
            peer: peer.to_owned(),
            transaction,
            uuid,
            domain: body.domain_name,
            macs: body.macs.iter().map(|mac| **mac).collect(),
            vm_transaction: body.vm_transaction,
            started: self.now,
            requested: Vec::with_capacity(body.listeners.len()),
            pending: BTreeSet::new(),
            token: self.numbers.next(),
            response: None,
            needs: BTreeMap::new(),
            mdb: BTreeSet::new(),
            mdb_renewal: arrival::MDB_RENEWAL_FIRST,
            progress: None,
            switching: None,
            clock: ClockOffset::default(),
            gates,
            revised: BTreeMap::new(),
            claim: None,
            aborted: None,
            begun: false,
            last_heard: self.now,
            arrived: None,
            queried: BTreeMap::new(),
            poll_until: Timestamp::default(),
        };
        let token = incoming.token;
        self.incoming.insert(number, incoming);

        let limits = self.config.limits;
        let mut flows: BTreeMap<ManagedKey, Vec<Flow>> = BTreeMap::new();
        for (index, listener) in body.listeners.into_iter().enumerate() {
            let key = ManagedKey {
                vlan: listener.vlan,
                pad: 0,
                multicast_address: *listener.multicast_address,
            };
            let has_room = flows.contains_key(&key)
                || self.entries.contains_key(&key)
                || self.entries.len() + flows.len() < limits.joins;
            let filter = FilterMode::from_u8(listener.filter_mode)
                .map(|mode| Filter {
                    mode,
                    sources: listener
                        .sources
                        .iter()
                        .map(|source| std::net::Ipv6Addr::from(**source))
                        .collect(),
                })
                .filter(|filter| {
                    (filter.mode == FilterMode::Exclude || !filter.sources.is_empty())
                        && index < limits.listeners_per_domain
                        && filter.sources.len() <= limits.sources_per_listener
                        && is_routable(&key.multicast_address)
                        && key.vlan < 4095
                        && has_room
                });
            let Some(incoming) = self.incoming.get_mut(&number) else {
                break;
            };
            incoming.requested.push((key, filter.is_some()));
            if let Some(filter) = filter {
                incoming.needs.insert((key, *listener.mac), filter);
                flows.entry(key).or_default().extend(listener.flows);
            }
        }
        let known: Vec<ManagedKey> = flows
            .keys()
            .filter(|key| self.entries.contains_key(key) || self.mirror.has_listener(key))
            .copied()
            .collect();
        for (key, flows) in flows {
            self.probe(number, key, &flows);
        }
        if !known.is_empty() {
            self.outputs
                .push_back(Output::ReadStreams { token, keys: known });
        }
        self.ports_changed();
        number
    }

    /// Sends the answer as soon as every address has its verdict.
    fn answer_if_decided(&mut self, number: u64) {
        let Some(incoming) = self.incoming.get(&number) else {
            return;
        };
        if !incoming.pending.is_empty() || incoming.response.is_some() {
            return;
        }
        let receptions: Vec<Reception> = incoming
            .requested
            .iter()
            .map(|(key, taken_on)| {
                let entry = self.entries.get(key).filter(|_| *taken_on);
                Reception {
                    vlan: key.vlan,
                    multicast_address: key.multicast_address.into(),
                    mode: entry
                        .and_then(|entry| entry.reception)
                        .unwrap_or(ReceptionMode::Refused),
                    waited_ms: entry.map_or(0, |entry| millis(entry.waited)),
                }
            })
            .collect();
        let response = AgentResponse {
            prefix: prefix_of(self.config.address, self.config.prefix_length).into(),
            prefix_length: self.config.prefix_length,
            agent_address: self.config.address.octets().into(),
            receptions: receptions.clone(),
        };
        let signalling = self.now.since(incoming.started);
        let (peer, transaction) = (incoming.peer.clone(), incoming.transaction);
        let uuid = incoming.uuid;
        self.send(&peer, transaction, &response.clone().into());
        if let Some(incoming) = self.incoming.get_mut(&number) {
            incoming.response = Some(response);
        }
        self.records.update(number, |record| {
            if record.outcome.is_none() {
                record.phase = Phase::Ready;
            }
            record.signalling = Some(signalling);
            record.receptions = receptions;
        });
        self.prepared(uuid, number);
    }

    /// Notes a sign of life of an arrival's source.
    fn heard_of(&mut self, number: u64) {
        let Some(incoming) = self.incoming.get_mut(&number) else {
            return;
        };
        if incoming.arrived.is_some() {
            return;
        }
        incoming.aborted = None;
        incoming.last_heard = self.now;
        let expiry = self.now + self.config.timing.unused_join_expiry;
        self.timers.set(Timer::Unused(number), expiry);
    }

    fn incoming_by_transaction(&self, peer: &str, transaction: u64) -> Option<u64> {
        self.incoming
            .iter()
            .find(|(_, incoming)| incoming.transaction == transaction && incoming.peer == peer)
            .map(|(number, _)| *number)
    }

    /// Returns the newest arrival of a domain.
    fn incoming_of(&self, uuid: DomainUuid) -> Option<u64> {
        self.incoming
            .iter()
            .rev()
            .find(|(_, incoming)| incoming.uuid == uuid)
            .map(|(number, _)| *number)
    }

    /// Whether a domain is expected or held for, so that its transaction may yet become known.
    pub(super) fn expects(&self, uuid: &DomainUuid) -> bool {
        self.incoming_of(*uuid).is_some()
    }
}

fn prefix_of(address: std::net::Ipv6Addr, length: u8) -> [u8; 16] {
    let host_bits = 128_u32.saturating_sub(u32::from(length));
    let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
    (u128::from(address) & mask).to_be_bytes()
}

#[cfg(test)]
#[path = "../tests/destination.rs"]
pub(super) mod tests;
