//! Joins on behalf of arriving VMs, and their probes.
//!
//! A probe finds out by which path packets of an address arrive. The kernel's first-packet event
//! ends it, native or relayed (`probe`). The deadline is the time that a multicast tree takes to
//! grow plus a few interarrival times of the flow. [`crate::proto::reception`] decides when to ask
//! a relay, and reports later changes of the path.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{ManagedKey, Origin, Origins};
use common::signal::{Flow, ReceptionMode};
use tracing::info;

use super::{Arrivals, Host, Incoming};
use crate::proto::context::Context;
use crate::proto::filter::Filter;
use crate::proto::host::listeners::Mirror;
use crate::proto::reception::Receptions;
use crate::proto::timer::Timer;
use crate::proto::{Mac, Membership, Output, Timestamp};

/// Packets of a flow that may be lost in a row before the flow counts as missing.
pub(super) const INTERARRIVALS: u32 = 4;
/// Longest part of a deadline for the time between packets.
const INTERARRIVALS_MAX: Duration = Duration::from_secs(3);
/// Shortest time after its last packet for which a flow counts as active, whatever its rate.
const SILENCE_FLOOR: Duration = Duration::from_secs(1);
/// Interarrival times without a packet after which a flow counts as silent.
const SILENT_INTERARRIVALS: u32 = 10;

/// An address joined on behalf of arriving VMs.
#[derive(Debug)]
pub(super) struct Join {
    /// Needs by arrival's record number and MAC of the listening NIC.
    needs: BTreeMap<(u64, Mac), Filter>,
    /// Filter of the host's current membership; the merger of `needs`.
    pub(super) joined: Filter,
    /// Start of the last probe.
    pub(super) since: Timestamp,
    /// Verdict of the last probe; `None` while the probe runs.
    pub(super) reception: Option<ReceptionMode>,
    /// Time from the start of the probe to the verdict.
    pub(super) waited: Duration,
}

/// Operator's view of an address joined on behalf of arriving VMs.
#[derive(Clone, Debug)]
pub struct ReceptionView<'a> {
    /// VLAN and multicast address, filter mode and sources of the join.
    pub membership: Membership,
    /// Path of the address's packets; `None` during the probe.
    pub reception: Option<ReceptionMode>,
    /// Time from the join to the verdict.
    pub waited: Duration,
    /// Names of the domains that need the join.
    pub domains: Vec<&'a str>,
    /// Whether all of the domains run here, so the join waits only for their own Reports.
    pub held: bool,
}

/// Joins by VLAN and multicast address.
#[derive(Debug, Default)]
pub(super) struct Joins(BTreeMap<ManagedKey, Join>);

impl Joins {
    pub(super) fn get(&self, key: &ManagedKey) -> Option<&Join> {
        self.0.get(key)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the number of needs of all joins.
    pub(super) fn needs(&self) -> usize {
        self.0.values().map(|join| join.needs.len()).sum()
    }

    /// Returns true if the joins cover all needs of an arrival.
    pub(super) fn have(&self, incoming: &Incoming) -> bool {
        incoming.needs.iter().all(|((key, mac), filter)| {
            let join = self.0.get(key);
            join.and_then(|join| join.needs.get(&(incoming.number, *mac))) == Some(filter)
        })
    }

    /// Returns true if none of the addresses has a verdict.
    pub(super) fn are_undecided<'a>(&self, mut keys: impl Iterator<Item = &'a ManagedKey>) -> bool {
        keys.all(|key| self.0.get(key).is_none_or(|join| join.reception.is_none()))
    }

    /// Joins an address for an arrival and probes it, unless the source says that no flow is
    /// active.
    pub(super) fn probe(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        incoming: &mut Incoming,
        key: ManagedKey,
        flows: &[Flow],
    ) {
        let now = cx.now;
        let mut known = true;
        let join = self.0.entry(key).or_insert_with(|| {
            known = false;
            Join {
                needs: BTreeMap::new(),
                joined: Filter::nothing(),
                since: now,
                reception: None,
                waited: Duration::ZERO,
            }
        });
        let needs = incoming.needing(&key);
        let needs = needs.map(|(mac, filter)| ((incoming.number, mac), filter.clone()));
        join.needs.extend(needs);
        let active = flows.iter().filter_map(active_interarrival).min();
        let probing = known && join.reception.is_none();
        if active.is_none() && !probing {
            if join.reception != Some(ReceptionMode::Native) {
                join.reception = Some(ReceptionMode::Idle);
            }
            join.waited = Duration::ZERO;
        } else if let Some(interarrival) = active {
            if !probing {
                join.since = now;
                join.reception = None;
            }
            let patience = (interarrival * INTERARRIVALS).min(INTERARRIVALS_MAX);
            let deadline = now + cx.config.timing.tree_budget + patience;
            let set = cx.timers.get(Timer::Probe(key));
            cx.timers.set(
                Timer::Probe(key),
                set.map_or(deadline, |set| set.max(deadline)),
            );
        }
        if join.reception.is_none() {
            incoming.answer.wait_for(key);
        }
        // A restarted watch reports the next packet, which proves that reception continues.
        let anew = !known || join.reception.is_none();
        let active: Vec<Flow> = flows
            .iter()
            .filter(|flow| active_interarrival(flow).is_some())
            .cloned()
            .collect();
        let wanted = self.wanted(cx, host.mirror, &key);
        host.receptions
            .receive_for_arrival(cx, key, &active, anew, wanted);
        self.join(cx, host, key);
    }

    /// Sets the host's membership to the merger of all needs of the address.
    fn join(&mut self, cx: &mut Context, host: &mut Host<'_>, key: ManagedKey) {
        let Some(join) = self.0.get_mut(&key) else {
            return;
        };
        let merged = Filter::merge(join.needs.values());
        if merged != join.joined {
            cx.outputs.push_back(Output::Join(merged.membership(key)));
            join.joined = merged;
            self.refresh_filter(cx, host.mirror, host.receptions, key);
        }
    }

    /// Removes an arrival's need of an address. Removing the last need ends the join.
    pub(super) fn release(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        number: u64,
        key: ManagedKey,
        mac: Mac,
    ) {
        let Some(join) = self.0.get_mut(&key) else {
            return;
        };
        join.needs.remove(&(number, mac));
        if !join.needs.is_empty() {
            self.join(cx, host, key);
            return;
        }
        self.0.remove(&key);
        cx.timers.stop(Timer::Probe(key));
        cx.outputs.push_back(Output::Leave(key));
        self.unmanage_unneeded(cx, host.mirror, host.receptions, key);
    }

    fn wanted(&self, cx: &Context, mirror: &Mirror, key: &ManagedKey) -> Filter {
        if cx.config.relay_timing(key).is_none() {
            return Filter::nothing();
        }
        let joined = self.0.get(key).map(|join| join.joined.clone());
        let wanted: Vec<Filter> = mirror.filters(key).chain(joined).collect();
        Filter::merge(wanted.iter())
    }

    fn refresh_filter(
        &self,
        cx: &mut Context,
        mirror: &Mirror,
        receptions: &mut Receptions,
        key: ManagedKey,
    ) {
        let wanted = self.wanted(cx, mirror, &key);
        receptions.want(cx, key, wanted);
    }

    fn unmanage_unneeded(
        &self,
        cx: &mut Context,
        mirror: &Mirror,
        receptions: &mut Receptions,
        key: ManagedKey,
    ) {
        if mirror.has_listener(&key) || self.0.contains_key(&key) {
            self.refresh_filter(cx, mirror, receptions, key);
        } else {
            receptions.forget(cx, key);
        }
    }

    /// Returns the verdict that a packet implies, or `None` if the eBPF programs drop packets of
    /// that origin or the known verdict is at least as good.
    pub(super) fn verdict_of(
        &self,
        receptions: &Receptions,
        key: &ManagedKey,
        origin: Origin,
    ) -> Option<ReceptionMode> {
        let passing = receptions.origins(key).unwrap_or_default() as u8;
        let (mode, bit) = match origin {
            Origin::Native => (ReceptionMode::Native, Origins::PASS_NATIVE),
            Origin::Relay => (ReceptionMode::Relay, Origins::PASS_RELAY),
        };
        let better = match self.0.get(key)?.reception {
            Some(ReceptionMode::Native) => false,
            Some(ReceptionMode::Relay) => origin == Origin::Native,
            _ => true,
        };
        (better && passing & bit != 0).then_some(mode)
    }

    /// Records a verdict. Returns false if the address is not joined.
    pub(super) fn decide(
        &mut self,
        cx: &mut Context,
        key: ManagedKey,
        mode: ReceptionMode,
        at: Timestamp,
    ) -> bool {
        let Some(join) = self.0.get_mut(&key) else {
            return false;
        };
        if join.reception.is_some_and(|known| known != mode) {
            info!(
                vlan = key.vlan,
                multicast_address = %Ipv6Addr::from(key.multicast_address),
                ?mode,
                "Reception has changed"
            );
        }
        join.reception = Some(mode);
        join.waited = at.since(join.since);
        cx.timers.stop(Timer::Probe(key));
        true
    }
}

impl Arrivals {
    /// Returns the joins for the operator.
    pub(in crate::proto) fn views(&self) -> impl Iterator<Item = ReceptionView<'_>> {
        self.joins.0.iter().map(|(key, join)| {
            let incoming = || {
                let needs = join.needs.keys();
                needs.filter_map(|(number, _)| self.incoming.get(*number))
            };
            let mut domains: Vec<_> = incoming().map(|it| it.domain.as_str()).collect();
            domains.dedup();
            ReceptionView {
                membership: join.joined.membership(*key),
                reception: join.reception,
                waited: join.waited,
                domains,
                held: incoming().all(|incoming| incoming.stage.arrived().is_some()),
            }
        })
    }

    /// Returns true if the address is joined for an arriving VM.
    pub(in crate::proto) fn has_joined(&self, key: &ManagedKey) -> bool {
        self.joins.get(key).is_some()
    }

    /// Returns the merged filter of listeners and arriving VMs for an address, to the extent that
    /// relays need it.
    pub(in crate::proto) fn wanted(
        &self,
        cx: &Context,
        mirror: &Mirror,
        key: &ManagedKey,
    ) -> Filter {
        self.joins.wanted(cx, mirror, key)
    }

    /// Passes the merged filter of an address to the receptions after a possible change.
    pub(in crate::proto) fn refresh_filter(
        &self,
        cx: &mut Context,
        host: &mut Host<'_>,
        key: ManagedKey,
    ) {
        self.joins
            .refresh_filter(cx, host.mirror, host.receptions, key);
    }

    /// Stops watching an address unless a listener or an arriving VM needs it.
    pub(in crate::proto) fn unmanage_unneeded(
        &self,
        cx: &mut Context,
        host: &mut Host<'_>,
        key: ManagedKey,
    ) {
        self.joins
            .unmanage_unneeded(cx, host.mirror, host.receptions, key);
    }
}

/// Returns the interarrival time of a flow that is active at the source, or `None` if the flow is
/// silent.
fn active_interarrival(flow: &Flow) -> Option<Duration> {
    let silent = Duration::from_millis(flow.silent_ms);
    let interarrival = 1_000_000_000_000_u64
        .checked_div(flow.rate_mpps)
        .map(Duration::from_nanos);
    let Some(interarrival) = interarrival else {
        // A flow with a single packet has no rate; the floor alone decides.
        return (silent <= SILENCE_FLOOR).then_some(SILENCE_FLOOR);
    };
    let patience = (interarrival * SILENT_INTERARRIVALS).max(SILENCE_FLOOR);
    (silent <= patience).then_some(interarrival)
}
