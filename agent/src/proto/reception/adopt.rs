//! Adoption of an earlier agent's kernel state. Addresses received from a relay continue, and their
//! relays are asked again under the same session.

use std::collections::BTreeMap;
use std::time::Duration;

use common::maps::{Managed, ManagedKey, Origins, RelayFlow, RelayFlowKey};
use tracing::info;

use super::session::Session;
use super::{Reception, Receptions, State};
use crate::proto::Output;
use crate::proto::context::Context;
use crate::proto::filter::Filter;

/// Assumed remaining lease of an adopted session.
const ADOPTED_LEASE: Duration = Duration::from_secs(10);

/// Kernel entries found at the start, until an address needs them.
#[derive(Debug, Default)]
pub(super) struct Pinned {
    managed: BTreeMap<ManagedKey, Managed>,
    flows: BTreeMap<ManagedKey, BTreeMap<RelayFlowKey, RelayFlow>>,
}

impl Pinned {
    /// Forgets an address that is no longer watched, so that [`Receptions::adopted`] does not return
    /// the address.
    pub(super) fn forget(&mut self, key: &ManagedKey) {
        self.managed.remove(key);
    }
}

impl Receptions {
    /// Takes the entries of `MANAGED` and `RELAY_FLOWS` that an earlier agent left; called before any
    /// other event.
    pub(in crate::proto) fn pinned(
        &mut self,
        managed: Vec<(ManagedKey, Managed)>,
        flows: Vec<(RelayFlowKey, RelayFlow)>,
    ) {
        let pinned = &mut self.pinned;
        pinned.managed = managed.into_iter().collect();
        for (key, value) in flows {
            let address = value.stream.managed();
            let flows = pinned.flows.entry(address).or_default();
            flows.insert(key, value);
        }
    }

    /// Removes the pinned relayed flows that no listener needs, once all listeners are known. Returns
    /// the addresses that the earlier agent watched.
    pub(in crate::proto) fn adopted(&mut self, cx: &mut Context) -> Vec<ManagedKey> {
        let pinned = std::mem::take(&mut self.pinned);
        for key in pinned.flows.into_values().flat_map(BTreeMap::into_keys) {
            cx.outputs.push_back(Output::RelayFlowRemove(key));
        }
        pinned.managed.into_keys().collect()
    }

    /// Begins the reception of an address in its pinned state; returns `false` if no relay was in use.
    pub(super) fn adopt_reception(
        &mut self,
        cx: &mut Context,
        key: ManagedKey,
        wanted: &Filter,
    ) -> bool {
        let now = cx.now;
        let Some(timing) = cx.config.relay_timing(&key) else {
            return false;
        };
        let Some(flows) = self.pinned.flows.remove(&key) else {
            return false;
        };
        let pinned = self.pinned.managed.get(&key);
        let origins = pinned.and_then(|managed| Origins::from_u8(managed.origins));
        let until = now + timing.settle;
        let state = match origins {
            Some(Origins::Relay) => State::Relay,
            Some(Origins::RelayRecorded) => State::FromRelay { until },
            Some(Origins::Both | Origins::NativeAfterRelay) => State::Both,
            Some(Origins::Native) | None => {
                // The earlier agent was about to release the relay, or the relay's packets never
                // passed.
                self.pinned.flows.insert(key, flows);
                return false;
            }
        };
        let Some(first) = flows.iter().next() else {
            return false;
        };
        let mut session = Session::new(None, first.1.session, now);
        session.address = Some(first.0.relay_address);
        session.answered = Some(now);
        session.lease = ADOPTED_LEASE;
        session.lease_end = now + ADOPTED_LEASE;
        session.flows = flows;
        info!(
            multicast_address = %std::net::Ipv6Addr::from(key.multicast_address),
            flows = session.flows.len(),
            "Relayed flows are taken over"
        );
        let mut reception = Reception::new(now, state);
        reception.why = "an agent before this one asked for it";
        for value in session.flows.values() {
            if let Some(flow) = reception.flow(&value.stream) {
                flow.active = true;
            }
        }
        reception.session = Some(session);
        self.by_address.insert(key, reception);
        self.want(cx, key, wanted.clone());
        self.manage(cx, key, now);
        self.reclaim(cx);
        self.tend(cx, key);
        self.set_reception_timers(cx, key);
        true
    }

    /// Finds the relays of adopted sessions: by the source address of the packets, or the only relay.
    pub(super) fn reclaim(&mut self, cx: &mut Context) {
        let only = match self.relays.relays.as_slice() {
            [relay] => Some(relay.candidate.name.clone()),
            _ => None,
        };
        for reception in self.by_address.values_mut() {
            let Some(session) = &mut reception.session else {
                continue;
            };
            let Some(address) = session.address.filter(|_| session.relay.is_none()) else {
                continue;
            };
            let none = std::collections::BTreeSet::new();
            let relay = self.relays.pick(&none, &cx.links, Some(&address));
            let only = only.clone().filter(|_| !self.relays.any_at(&address));
            if let Some(relay) = relay.or(only) {
                reception.tried.insert(relay.clone());
                session.reclaimed_by(relay, cx.now);
            }
        }
    }
}
