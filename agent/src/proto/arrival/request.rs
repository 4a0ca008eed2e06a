//! The source's `AgentRequest` for an arriving domain, and the `AgentResponse`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

use common::group;
use common::maps::{FilterMode, ManagedKey};
use common::signal::{
    AgentRequest, AgentResponse, Code, Flow, Listener, MigrationAbort, Phase, Reason, Reception,
    ReceptionMode,
};
use tracing::{info, warn};

use super::handover::Gates;
use super::joins::Joins;
use super::mdb::Mdb;
use super::queue::Arriving;
use super::stage::{Stage, Told};
use super::{Arrivals, Host, Incoming};
use crate::proto::config::AgentConfig;
use crate::proto::context::Context;
use crate::proto::filter::Filter;
use crate::proto::millis;
use crate::proto::record::Direction;
use crate::proto::{DomainUuid, Output};

/// Answer to a request.
#[derive(Debug)]
pub(super) enum Answer {
    /// The answer waits for verdicts of probes.
    Probing {
        /// Addresses in the order of the request, each with whether the host accepted the listener.
        requested: Vec<(ManagedKey, bool)>,
        /// Accepted addresses without a verdict.
        pending: BTreeSet<ManagedKey>,
    },
    Given(AgentResponse),
}

impl Answer {
    pub(super) fn is_given(&self) -> bool {
        matches!(self, Self::Given(_))
    }

    /// Returns the addresses for whose verdicts the answer waits.
    pub(super) fn pending(&self) -> impl Iterator<Item = &ManagedKey> {
        let pending = match self {
            Self::Probing { pending, .. } => Some(pending),
            Self::Given(_) => None,
        };
        pending.into_iter().flatten()
    }

    /// Makes the answer wait for the verdict on an address.
    pub(super) fn wait_for(&mut self, key: ManagedKey) {
        if let Self::Probing { pending, .. } = self {
            pending.insert(key);
        }
    }

    /// Records the verdict on an address. Returns false if the answer did not wait for that
    /// address.
    pub(super) fn decided(&mut self, key: &ManagedKey) -> bool {
        match self {
            Self::Probing { pending, .. } => pending.remove(key),
            Self::Given(_) => false,
        }
    }
}

impl Incoming {
    fn new(
        cx: &mut Context,
        number: u64,
        peer: &str,
        transaction: u64,
        body: &AgentRequest,
    ) -> Self {
        Self {
            number,
            peer: peer.to_owned(),
            transaction,
            uuid: DomainUuid(body.domain_uuid.into()),
            domain: body.domain_name.clone(),
            macs: body.macs.iter().map(|mac| **mac).collect(),
            vm_transaction: body.vm_transaction,
            started: cx.now,
            token: cx.numbers.next(),
            answer: Answer::Probing {
                requested: Vec::with_capacity(body.listeners.len()),
                pending: BTreeSet::new(),
            },
            stage: Stage::Expected { heard: cx.now },
            told: Told::default(),
            needs: BTreeMap::new(),
            mdb: Mdb::default(),
            gates: Gates::default(),
            claim: None,
        }
    }

    /// Sends the answer if every address has its verdict. Returns false if the answer must wait or
    /// was given.
    pub(super) fn answer_if_decided(&mut self, cx: &mut Context, joins: &Joins) -> bool {
        let requested = match &self.answer {
            Answer::Probing { requested, pending } if pending.is_empty() => requested,
            _ => return false,
        };
        let receptions: Vec<Reception> = requested
            .iter()
            .map(|(key, taken_on)| {
                let join = joins.get(key).filter(|_| *taken_on);
                Reception {
                    vlan: key.vlan,
                    multicast_address: key.multicast_address.into(),
                    mode: join
                        .and_then(|join| join.reception)
                        .unwrap_or(ReceptionMode::Refused),
                    waited_ms: join.map_or(0, |join| millis(join.waited)),
                }
            })
            .collect();
        let response = AgentResponse {
            prefix: prefix_of(cx.config.address, cx.config.prefix_length).into(),
            prefix_length: cx.config.prefix_length,
            agent_address: cx.config.address.octets().into(),
            receptions: receptions.clone(),
            copy_tls: cx.copy_tls.server.is_ok(),
        };
        let signalling = cx.now.since(self.started);
        cx.send(&self.peer, self.transaction, &response.clone().into());
        self.answer = Answer::Given(response);
        cx.records.update(self.number, |record| {
            if record.outcome.is_none() {
                record.phase = Phase::Ready;
            }
            record.signalling = Some(signalling);
            record.receptions = receptions;
        });
        true
    }
}

impl Arrivals {
    /// Handles the source's request for the arrival of a domain.
    pub(in crate::proto) fn requested(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        (peer, transaction): (&str, u64),
        body: AgentRequest,
    ) {
        let uuid = DomainUuid(body.domain_uuid.into());
        if let Some(known) = self.incoming.of_transaction_mut(peer, transaction) {
            known.heard(cx);
            if let Answer::Given(response) = &known.answer {
                cx.send(peer, transaction, &response.clone().into());
                self.preparations.prepared(cx, uuid, known.number);
            }
            return;
        }
        let may_come = self
            .check_arrival(cx, host, peer, uuid, &body)
            .and_then(|()| self.check_rate(cx, peer, transaction))
            .and_then(|()| {
                let arriving = self.incoming.iter();
                let arriving = arriving.filter(|it| it.stage.arrived().is_none());
                let arriving = arriving.map(|it| Arriving {
                    peer: &it.peer,
                    uuid: it.uuid,
                });
                let (asked, name) = (Arriving { peer, uuid }, &body.domain_name);
                let arriving = arriving.collect::<Vec<_>>();
                self.queue
                    .take_turn(cx, &arriving, asked, transaction, name)
            });
        match may_come {
            Ok(true) => {}
            Ok(false) => return,
            Err(refusal) => {
                let reason = refusal.reason();
                warn!(peer, domain = %body.domain_name, %reason, "Arrival is refused");
                self.preparations.refused_here(cx, peer, uuid, &reason.text);
                cx.send(peer, transaction, &MigrationAbort(reason).into());
                return;
            }
        }
        // A new transaction means that the source gave up the previous one. The gates stay closed
        // and move to the new arrival.
        let replaced = self.incoming.of_domain_mut(uuid);
        let replaced = replaced.map(|it| (it.number, std::mem::take(&mut it.gates)));
        let (replaced, gates) = replaced.unzip();
        let number = self.admit(cx, host, (peer, transaction), body, gates);
        if let Some(replaced) = replaced {
            let anew = Reason::new(Code::OTHER_MIGRATION, "The source asked anew");
            self.undo(cx, host, replaced, &anew);
        }
        let domain = host.inventory.domains.get(&uuid);
        if domain.is_some_and(|domain| domain.running) {
            self.runs_here(cx, host, uuid, cx.now);
        }
        if let Some(incoming) = self.incoming.get_mut(number) {
            incoming.heard(cx);
            if incoming.answer_if_decided(cx, &self.joins) {
                self.preparations.prepared(cx, uuid, number);
            }
        }
    }

    /// Accepts a request: joins and probes its addresses. Returns the number of the new record.
    fn admit(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        (peer, transaction): (&str, u64),
        body: AgentRequest,
        gates: Option<Gates>,
    ) -> u64 {
        let (name, uuid) = (&body.domain_name, DomainUuid(body.domain_uuid.into()));
        let direction = Direction::Incoming;
        let number = cx.records.begin(cx.now, direction, uuid, name, peer);
        info!(peer, domain = %name, number, listeners = body.listeners.len(), "Domain is to arrive");
        let mut incoming = Incoming::new(cx, number, peer, transaction, &body);
        incoming.gates = gates.unwrap_or_default();
        let flows = self.take_on(&cx.config, &mut incoming, body.listeners);
        let known: Vec<ManagedKey> = flows
            .keys()
            .filter(|key| self.joins.get(key).is_some() || host.mirror.has_listener(key))
            .copied()
            .collect();
        for (key, flows) in flows {
            self.joins.probe(cx, host, &mut incoming, key, &flows);
        }
        if !known.is_empty() {
            let token = incoming.token;
            cx.outputs
                .push_back(Output::ReadStreams { token, keys: known });
        }
        self.incoming.insert(incoming);
        self.ports_changed(cx, host);
        number
    }

    /// Selects the listeners that the host accepts within its limits, and returns the flows of
    /// their addresses.
    fn take_on(
        &self,
        config: &AgentConfig,
        incoming: &mut Incoming,
        listeners: Vec<Listener>,
    ) -> BTreeMap<ManagedKey, Vec<Flow>> {
        let limits = &config.limits;
        let of_peer = self.joins_of(&incoming.peer);
        let mut flows: BTreeMap<ManagedKey, Vec<Flow>> = BTreeMap::new();
        for (index, listener) in listeners.into_iter().enumerate() {
            let key = ManagedKey {
                vlan: listener.vlan,
                bridge: config.bridge,
                multicast_address: *listener.multicast_address,
            };
            let has_room = flows.contains_key(&key)
                || self.joins.get(&key).is_some()
                || (self.joins.len() + flows.len() < limits.joins
                    && of_peer + flows.len() < limits.joins_per_peer);
            let filter = filter_of(&listener).filter(|filter| {
                (filter.mode == FilterMode::Exclude || !filter.sources.is_empty())
                    && index < limits.listeners_per_domain
                    && filter.sources.len() <= limits.sources_per_listener
                    && group::is_routable(&key.multicast_address)
                    && key.vlan < 4095
                    && has_room
            });
            if let Answer::Probing { requested, .. } = &mut incoming.answer {
                requested.push((key, filter.is_some()));
            }
            if let Some(filter) = filter {
                incoming.needs.insert((key, *listener.mac), filter);
                flows.entry(key).or_default().extend(listener.flows);
            }
        }
        flows
    }

    /// Returns the number of addresses joined for domains of a peer.
    fn joins_of(&self, peer: &str) -> usize {
        let of_peer = self.incoming.iter().filter(|it| it.peer == peer);
        let keys = of_peer.flat_map(|it| it.needs.keys()).map(|(key, _)| key);
        keys.collect::<BTreeSet<_>>().len()
    }
}

/// Returns the filter of a listener, or `None` if its filter mode is invalid.
fn filter_of(listener: &Listener) -> Option<Filter> {
    let sources = listener.sources.iter();
    Some(Filter {
        mode: FilterMode::from_u8(listener.filter_mode)?,
        sources: sources.map(|source| Ipv6Addr::from(**source)).collect(),
    })
}

fn prefix_of(address: Ipv6Addr, length: u8) -> [u8; 16] {
    let host_bits = 128_u32.saturating_sub(u32::from(length));
    let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
    (u128::from(address) & mask).to_be_bytes()
}
