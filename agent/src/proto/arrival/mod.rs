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
//! What a source says of a domain has to be what libvirt says of it (`check`). How many arrive at once
//! is bounded; others wait (`queue`). Until libvirt says whose the TAPs are, `tap` does. A domain that
//! somebody else moves is noticed by libvirt's hook, and its source asked to ask (`notice`).
//!
//! Joining and probing begin at once for all addresses, so a request takes as long as its slowest
//! probe. A join ends when the last VM that needs it releases it.

mod arrival;
mod check;
mod claim;
mod ending;
mod handover;
mod left;
mod notice;
mod probe;
mod queue;
mod tap;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::maps::{FilterMode, ManagedKey};
use common::signal::{
    AgentRequest, AgentResponse, Flow, MigrationAbort, MigrationProgress, NicCut, Phase, Reception,
    ReceptionMode,
};
use tracing::{info, warn};

use super::filter::{Filter, is_routable};
use super::handover::ClockOffset;
use super::record::Direction;
use super::refusal::bounded;
use super::timer::Timer;
use super::{Agent, DomainUuid, Mac, Output, Timestamp, millis};

pub(crate) use arrival::MDB_RENEWAL_LAST;
pub(super) use arrival::{Arrivals, held_for};
pub(super) use notice::Preparations;
pub(super) use probe::Entry;
pub use probe::ReceptionView;
use queue::Arriving;
pub(super) use queue::Queue;
pub use queue::WaitingView;

use claim::Claim;
pub(super) use claim::claimant;
use handover::ArrivalGate;

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
    /// When the source last said that the VM is being copied.
    ran: Option<Timestamp>,
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
                self.cx.send(peer, transaction, &response.into());
                self.preparations.prepared(&mut self.cx, uuid, number);
            }
            return;
        }
        let may_come = self
            .check_arrival(peer, uuid, &body)
            .and_then(|()| self.check_rate(peer, transaction))
            .and_then(|()| {
                let arriving = self.incoming.values().filter(|it| it.arrived.is_none());
                let arriving = arriving.map(|it| Arriving {
                    peer: &it.peer,
                    uuid: it.uuid,
                });
                let (asked, name) = (Arriving { peer, uuid }, &body.domain_name);
                let arriving = arriving.collect::<Vec<_>>();
                self.queue
                    .take_turn(&mut self.cx, &arriving, asked, transaction, name)
            });
        match may_come {
            Ok(true) => {}
            Ok(false) => return,
            Err(refusal) => {
                let reason = bounded(&refusal.to_string());
                warn!(peer, domain = %body.domain_name, %reason, "Arrival is refused");
                self.preparations
                    .refused_here(&mut self.cx, peer, uuid, &reason);
                self.cx
                    .send(peer, transaction, &MigrationAbort { reason }.into());
                return;
            }
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
            self.arrived(uuid, self.cx.now);
        }
        self.heard_of(number);
        self.answer_if_decided(number);
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
            .cx
            .records
            .begin(self.cx.now, Direction::Incoming, uuid, name, peer);
        info!(peer, domain = %name, number, listeners = body.listeners.len(), "Domain is to arrive");
        let incoming = Incoming {
            peer: peer.to_owned(),
            transaction,
            uuid,
            domain: body.domain_name,
            macs: body.macs.iter().map(|mac| **mac).collect(),
            vm_transaction: body.vm_transaction,
            started: self.cx.now,
            requested: Vec::with_capacity(body.listeners.len()),
            pending: BTreeSet::new(),
            token: self.cx.numbers.next(),
            response: None,
            needs: BTreeMap::new(),
            mdb: BTreeSet::new(),
            mdb_renewal: arrival::MDB_RENEWAL_FIRST,
            progress: None,
            switching: None,
            ran: None,
            clock: ClockOffset::default(),
            gates,
            revised: BTreeMap::new(),
            claim: None,
            aborted: None,
            begun: false,
            last_heard: self.cx.now,
            arrived: None,
            queried: BTreeMap::new(),
            poll_until: Timestamp::default(),
        };
        let token = incoming.token;
        self.incoming.insert(number, incoming);

        let limits = self.cx.config.limits;
        let of_peer = self.joins_of(peer);
        let mut flows: BTreeMap<ManagedKey, Vec<Flow>> = BTreeMap::new();
        for (index, listener) in body.listeners.into_iter().enumerate() {
            let key = ManagedKey {
                vlan: listener.vlan,
                pad: 0,
                multicast_address: *listener.multicast_address,
            };
            let has_room = flows.contains_key(&key)
                || self.entries.contains_key(&key)
                || (self.entries.len() + flows.len() < limits.joins
                    && of_peer + flows.len() < limits.joins_per_peer);
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
            self.cx
                .outputs
                .push_back(Output::ReadStreams { token, keys: known });
        }
        self.ports_changed();
        number
    }

    /// Returns how many addresses are joined for domains of a peer.
    fn joins_of(&self, peer: &str) -> usize {
        let of_peer = |number: &u64| {
            let incoming = self.incoming.get(number);
            incoming.is_some_and(|incoming| incoming.peer == peer)
        };
        let entries = self.entries.values();
        entries
            .filter(|entry| entry.needs.keys().any(|(number, _)| of_peer(number)))
            .count()
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
            prefix: prefix_of(self.cx.config.address, self.cx.config.prefix_length).into(),
            prefix_length: self.cx.config.prefix_length,
            agent_address: self.cx.config.address.octets().into(),
            receptions: receptions.clone(),
            copy_tls: self.cx.copy_tls.server.is_ok(),
        };
        let signalling = self.cx.now.since(incoming.started);
        let (peer, transaction) = (incoming.peer.clone(), incoming.transaction);
        let uuid = incoming.uuid;
        self.cx.send(&peer, transaction, &response.clone().into());
        if let Some(incoming) = self.incoming.get_mut(&number) {
            incoming.response = Some(response);
        }
        self.cx.records.update(number, |record| {
            if record.outcome.is_none() {
                record.phase = Phase::Ready;
            }
            record.signalling = Some(signalling);
            record.receptions = receptions;
        });
        self.preparations.prepared(&mut self.cx, uuid, number);
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
        incoming.last_heard = self.cx.now;
        let expiry = self.cx.now + self.cx.config.timing.unused_join_expiry;
        self.cx.timers.set(Timer::Unused(number), expiry);
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
