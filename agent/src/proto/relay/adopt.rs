//! Adoption of an earlier relay's kernel state: sessions without an owner, or removal.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

use common::group;
use common::maps::{Address, FilterMode, MAX_SUBSCRIBERS, StreamKey, Subscriber, SubscriberKey};
use common::relay::{Endpoints, FIRST_PORT, FIRST_RELAY_PORT, is_neutral};
use tracing::info;

use super::stream::{FlowNumbers, Served, StreamState};
use super::{
    Adopted, Filter, Ports, RelayOutput, RelayServer, Session, SessionFlow, Timer, Timestamp,
};

/// A valid subscriber entry.
struct Found {
    key: SubscriberKey,
    value: Subscriber,
}

impl RelayServer {
    pub(super) fn adopt(&mut self, adopted: Adopted) {
        let Adopted {
            streams,
            subscribers,
            managed,
            joined,
        } = adopted;
        let mut by_flow: BTreeMap<u32, Vec<Found>> = BTreeMap::new();
        let mut useless: Vec<SubscriberKey> = Vec::new();
        for (key, value) in subscribers {
            // Entries of another relay address and expired entries are useless.
            if value.relay_address == self.config.address.octets()
                && Timestamp(value.lease_end_ns) > self.now
            {
                by_flow
                    .entry(key.flow)
                    .or_default()
                    .push(Found { key, value });
            } else {
                useless.push(key);
            }
        }
        let any_source: BTreeSet<Address> =
            joined.iter().map(|key| key.multicast_address).collect();
        let mut found: BTreeMap<(Address, Address), Vec<(StreamKey, Found)>> = BTreeMap::new();
        let mut used = BTreeSet::new();
        let mut kept: BTreeMap<StreamKey, (u32, u32)> = BTreeMap::new();
        for (stream, value) in streams {
            let mut subscribers = 0;
            for it in by_flow.remove(&value.flow).unwrap_or_default() {
                if it.key.index < value.subscribers.min(MAX_SUBSCRIBERS)
                    && is_own(&stream, &it.value)
                {
                    subscribers = subscribers.max(it.key.index + 1);
                    found
                        .entry((stream.multicast_address, it.value.agent_address))
                        .or_default()
                        .push((stream, it));
                } else {
                    useless.push(it.key);
                }
            }
            if subscribers == 0 {
                self.outputs.push_back(RelayOutput::StreamRemove(stream));
            } else {
                used.insert(value.flow);
                kept.insert(stream, (value.flow, value.subscribers));
            }
        }
        useless.extend(by_flow.into_values().flatten().map(|it| it.key));
        self.flow_numbers = FlowNumbers::adopted(used);
        for ((multicast_address, agent_address), flows) in found {
            let filter = adopted_filter(any_source.contains(&multicast_address), &flows);
            self.adopt_session(
                multicast_address,
                agent_address,
                filter,
                flows,
                &kept,
                &mut useless,
            );
        }
        self.trim_adopted(&kept);
        for key in useless {
            self.outputs.push_back(RelayOutput::SubscriberRemove(key));
        }
        for key in joined.into_iter().chain(managed.iter().copied()) {
            if key.vlan != 0 || !self.groups.contains_key(&key.multicast_address) {
                self.outputs.push_back(RelayOutput::Leave(key));
            }
        }
        for key in managed {
            if key.vlan != 0 || !self.groups.contains_key(&key.multicast_address) {
                self.outputs.push_back(RelayOutput::Unmanage(key));
            }
        }
        if !self.sessions.is_empty() {
            info!(sessions = self.sessions.len(), "Sessions adopted");
            self.measure();
        }
    }

    fn adopt_session(
        &mut self,
        multicast_address: Address,
        agent_address: Address,
        filter: Filter,
        flows: Vec<(StreamKey, Found)>,
        kept: &BTreeMap<StreamKey, (u32, u32)>,
        useless: &mut Vec<SubscriberKey>,
    ) {
        let number = self.next_session;
        self.next_session += 1;
        // The agent may not have noticed yet that the relay is back.
        let lease_end = self.lease_from_now();
        let mut session = Session {
            owner: None,
            multicast_address,
            filter,
            agent_address,
            since: self.now,
            lease_end,
            resolving: false,
            flows: BTreeMap::new(),
        };
        let mut adopted = Vec::new();
        for (stream, it) in flows {
            let ports = Ports {
                relay: it.value.relay_port,
                agent: it.value.agent_port,
            };
            // Two agents may have requested the same address; the relay sends each flow there once.
            let is_full = session.flows.len() >= self.config.limits.flows_per_session;
            if is_full
                || session.flows.contains_key(&stream)
                || !self.ports.take_given(&agent_address, ports)
            {
                useless.push(it.key);
                continue;
            }
            let flow = SessionFlow { ports, key: it.key };
            session.flows.insert(stream, flow);
            adopted.push((stream, it.key.index));
        }
        self.insert_session(number, session);
        self.timers.set(Timer::Lease(number), lease_end);
        let now = self.now;
        if let Some(group) = self.groups.get_mut(&multicast_address) {
            for &(stream, index) in &adopted {
                let Some((flow, _)) = kept.get(&stream) else {
                    continue;
                };
                let state = group
                    .streams
                    .entry(stream)
                    .or_insert_with(|| StreamState::new(now, true));
                let served = state.served.get_or_insert_with(|| Served {
                    flow: *flow,
                    subscribers: Vec::new(),
                });
                let index = usize::try_from(index).unwrap_or(usize::MAX);
                if served.subscribers.len() <= index {
                    served.subscribers.resize(index + 1, None);
                }
                if let Some(slot) = served.subscribers.get_mut(index) {
                    *slot = Some(number);
                }
            }
        }
        for (stream, _) in adopted {
            self.write_subscriber(number, &stream, false);
        }
        self.resolve(number);
    }

    /// Writes the stream entries whose subscribers changed.
    fn trim_adopted(&mut self, kept: &BTreeMap<StreamKey, (u32, u32)>) {
        for (key, (flow, subscribers)) in kept {
            let served = self
                .groups
                .get(&key.multicast_address)
                .and_then(|group| group.streams.get(key)?.served.as_ref());
            match served.map(Served::value) {
                Some(value) if value.subscribers == *subscribers => {}
                Some(value) => {
                    self.outputs
                        .push_back(RelayOutput::StreamSet { key: *key, value });
                }
                // No subscriber of the flow was valid.
                None => {
                    self.outputs.push_back(RelayOutput::StreamRemove(*key));
                    self.flow_numbers.release(*flow);
                }
            }
        }
    }
}

/// Returns true if a relay wrote the entry for this flow.
fn is_own(stream: &StreamKey, value: &Subscriber) -> bool {
    let endpoints = Endpoints {
        relay_address: value.relay_address,
        relay_port: value.relay_port,
        agent_address: value.agent_address,
        agent_port: value.agent_port,
    };
    stream.vlan == 0
        && group::is_routable(&stream.multicast_address)
        && !group::is_multicast(&value.agent_address)
        && value.relay_port >= FIRST_RELAY_PORT
        && value.agent_port >= FIRST_PORT
        && is_neutral(stream, &endpoints)
}

/// Returns an approximate filter, since the maps do not hold filters. A kernel membership for any
/// source proves an EXCLUDE request. Without such a membership, the sources are the sources of the
/// flows.
fn adopted_filter(any_source: bool, flows: &[(StreamKey, Found)]) -> Filter {
    if any_source {
        Filter {
            mode: FilterMode::Exclude,
            sources: BTreeSet::new(),
        }
    } else {
        Filter {
            mode: FilterMode::Include,
            sources: flows
                .iter()
                .map(|(stream, _)| Ipv6Addr::from(stream.source))
                .collect(),
        }
    }
}
