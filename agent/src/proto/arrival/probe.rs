//! Joins by proxy and their probes.
//!
//! A probe asks which way packets of an address come. The kernel's first-packet event of either
//! origin ends it; the deadline is what a tree may take to grow plus a few times what its flow takes
//! from one packet to the next. When a relay is asked is for [`crate::proto::reception`] to know,
//! which also tells how the address is received later.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{ManagedKey, Origin, Origins, StreamKey};
use common::signal::{Flow, ReceptionMode};
use tracing::info;

use super::{Agent, Filter};
use crate::proto::timer::Timer;
use crate::proto::{Mac, Membership, Output, Stream, Timestamp};

/// Packets of a flow that may be missed in a row before it counts as missing.
const INTERARRIVALS: u32 = 4;
/// Longest part of a deadline that is there for the time between packets.
const INTERARRIVALS_MAX: Duration = Duration::from_secs(3);
/// A flow is active for this long after its last packet, however fast it was.
const SILENCE_FLOOR: Duration = Duration::from_secs(1);
/// A flow is silent after this many of its interarrival times without a packet.
const SILENT_INTERARRIVALS: u32 = 10;

/// An address joined by proxy.
#[derive(Debug)]
pub(in crate::proto) struct Entry {
    /// Who needs it: an arrival's number and the NIC that listens.
    pub(super) needs: BTreeMap<(u64, Mac), Filter>,
    /// What the host has joined with.
    pub(in crate::proto) joined: Filter,
    /// When the last probe began.
    pub(super) since: Timestamp,
    /// Its verdict; `None` while it runs.
    pub(super) reception: Option<ReceptionMode>,
    /// How long it took.
    pub(super) waited: Duration,
}

/// An address joined by proxy, for the operator.
#[derive(Clone, Debug)]
pub struct ReceptionView<'a> {
    /// VLAN and multicast address, filter mode and sources of the join.
    pub membership: Membership,
    /// How it is received; `None` while it is probed.
    pub reception: Option<ReceptionMode>,
    /// From the join to the verdict.
    pub waited: Duration,
    /// Names of the domains that it is joined for.
    pub domains: Vec<&'a str>,
    /// Whether each of those runs here, and the join waits for their own Reports.
    pub held: bool,
}

impl Agent {
    pub(in crate::proto) fn reception_views(&self) -> impl Iterator<Item = ReceptionView<'_>> {
        self.entries.iter().map(|(key, entry)| {
            let incoming = || {
                entry
                    .needs
                    .keys()
                    .filter_map(|(number, _)| self.incoming.get(number))
            };
            let mut domains: Vec<_> = incoming().map(|i| i.domain.as_str()).collect();
            domains.dedup();
            ReceptionView {
                membership: entry.joined.membership(*key),
                reception: entry.reception,
                waited: entry.waited,
                domains,
                held: incoming().all(|incoming| incoming.arrived.is_some()),
            }
        })
    }

    /// Joins an address for an arrival and finds out how it is received.
    pub(super) fn probe(&mut self, number: u64, key: ManagedKey, flows: &[Flow]) {
        let now = self.cx.now;
        let Some(incoming) = self.incoming.get_mut(&number) else {
            return;
        };
        let needs = incoming
            .needs
            .range((key, [0; 6])..=(key, [0xff; 6]))
            .map(|((_, mac), filter)| ((number, *mac), filter.clone()));
        let mut known = true;
        let entry = self.entries.entry(key).or_insert_with(|| {
            known = false;
            Entry {
                needs: BTreeMap::new(),
                joined: Filter {
                    mode: common::maps::FilterMode::Include,
                    sources: std::collections::BTreeSet::new(),
                },
                since: now,
                reception: None,
                waited: Duration::ZERO,
            }
        });
        entry.needs.extend(needs);
        let active = flows.iter().filter_map(active_interarrival).min();
        let probing = known && entry.reception.is_none();
        if active.is_none() && !probing {
            if entry.reception != Some(ReceptionMode::Native) {
                entry.reception = Some(ReceptionMode::Idle);
            }
            entry.waited = Duration::ZERO;
        } else if let Some(interarrival) = active {
            if !probing {
                entry.since = now;
                entry.reception = None;
            }
            let patience = (interarrival * INTERARRIVALS).min(INTERARRIVALS_MAX);
            let deadline = now + self.cx.config.timing.tree_budget + patience;
            let set = self.cx.timers.get(Timer::Probe(key));
            self.cx.timers.set(
                Timer::Probe(key),
                set.map_or(deadline, |set| set.max(deadline)),
            );
        }
        if entry.reception.is_none() {
            incoming.pending.insert(key);
        }
        // Watched anew, so that the next packet proves that reception goes on.
        let anew = !known || entry.reception.is_none();
        let active: Vec<Flow> = flows
            .iter()
            .filter(|flow| active_interarrival(flow).is_some())
            .cloned()
            .collect();
        let wanted = self.wanted(&key);
        self.receptions
            .receive_for_arrival(&mut self.cx, key, &active, anew, wanted);
        self.join(key);
    }

    /// Makes the host's membership what those who need the address want together.
    pub(super) fn join(&mut self, key: ManagedKey) {
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        let merged = Filter::merge(entry.needs.values());
        if merged != entry.joined {
            self.cx
                .outputs
                .push_back(Output::Join(merged.membership(key)));
            entry.joined = merged;
            self.refresh_filter(key);
        }
    }

    /// Takes an arrival's need of an address away; the last one's ends the join.
    pub(super) fn release(&mut self, number: u64, key: ManagedKey, mac: Mac) {
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        entry.needs.remove(&(number, mac));
        if !entry.needs.is_empty() {
            self.join(key);
            return;
        }
        self.entries.remove(&key);
        self.cx.timers.stop(Timer::Probe(key));
        self.cx.outputs.push_back(Output::Leave(key));
        self.unmanage_unneeded(key);
    }

    pub(in crate::proto) fn first_packet(
        &mut self,
        flow: &StreamKey,
        origin: Origin,
        at: Timestamp,
    ) {
        let key = flow.managed();
        if let Some(entry) = self.entries.get(&key)
            && entry.joined.accepts(&flow.source)
            && at >= entry.since
        {
            self.packet_came(key, origin, at);
        }
    }

    /// A packet of an address came: the probe is decided unless its copies do not pass.
    fn packet_came(&mut self, key: ManagedKey, origin: Origin, at: Timestamp) {
        let passing = self.receptions.origins(&key).unwrap_or_default() as u8;
        let (mode, bit) = match origin {
            Origin::Native => (ReceptionMode::Native, Origins::PASS_NATIVE),
            Origin::Relay => (ReceptionMode::Relay, Origins::PASS_RELAY),
        };
        let known = self.entries.get(&key).and_then(|entry| entry.reception);
        let better = match known {
            Some(ReceptionMode::Native) => false,
            Some(ReceptionMode::Relay) => origin == Origin::Native,
            _ => true,
        };
        if better && passing & bit != 0 {
            self.decide(key, mode, at);
        }
    }

    /// The reception of an address has changed.
    pub(in crate::proto) fn reception_changed(&mut self, key: ManagedKey, mode: ReceptionMode) {
        let known = self.entries.get(&key).and_then(|entry| entry.reception);
        if known.is_some_and(|known| known != mode) {
            self.decide(key, mode, self.cx.now);
        }
    }

    /// Asks for the flows of all addresses being probed.
    pub(in crate::proto) fn read_probed_streams(&mut self) {
        for incoming in self.incoming.values() {
            if !incoming.pending.is_empty() {
                self.cx.outputs.push_back(Output::ReadStreams {
                    token: incoming.token,
                    keys: incoming.pending.iter().copied().collect(),
                });
            }
        }
    }

    /// Takes in the flows of addresses that were received here before the request: one that has
    /// had a packet within its interarrival time, or since the probe began, needs no other proof.
    pub(in crate::proto) fn streams_read(&mut self, token: u64, streams: &[(StreamKey, Stream)]) {
        let asked = self
            .incoming
            .values()
            .any(|incoming| incoming.token == token);
        if !asked {
            return;
        }
        for (flow, stream) in streams {
            let key = flow.managed();
            for origin in [Origin::Native, Origin::Relay] {
                let usage = stream.by(origin);
                let recent = Duration::from_nanos(usage.interarrival_ns) * INTERARRIVALS;
                let last = Timestamp(usage.last_ns);
                let fresh = usage.packets > 1 && self.cx.now.since(last) <= recent;
                if let Some(entry) = self.entries.get(&key)
                    && (fresh || last >= entry.since)
                    && entry.reception.is_none()
                    && entry.joined.accepts(&flow.source)
                {
                    self.packet_came(key, origin, self.cx.now);
                }
            }
        }
    }

    pub(in crate::proto) fn probe_timed_out(&mut self, key: ManagedKey) {
        self.decide(key, ReceptionMode::Unreachable, self.cx.now);
    }

    /// A join, or what belongs to it, could not be made.
    pub(in crate::proto) fn join_failed(&mut self, key: ManagedKey) {
        let probing = |entry: &Entry| entry.reception.is_none();
        if self.entries.get(&key).is_some_and(probing) {
            self.decide(key, ReceptionMode::Refused, self.cx.now);
        }
    }

    fn decide(&mut self, key: ManagedKey, mode: ReceptionMode, at: Timestamp) {
        let Some(entry) = self.entries.get_mut(&key) else {
            return;
        };
        if entry.reception.is_some_and(|known| known != mode) {
            info!(
                vlan = key.vlan,
                multicast_address = %Ipv6Addr::from(key.multicast_address),
                ?mode,
                "Reception has changed"
            );
        }
        entry.reception = Some(mode);
        entry.waited = at.since(entry.since);
        self.cx.timers.stop(Timer::Probe(key));
        let waiting: Vec<u64> = self
            .incoming
            .iter_mut()
            .filter_map(|(number, incoming)| incoming.pending.remove(&key).then_some(*number))
            .collect();
        for number in waiting {
            self.answer_if_decided(number);
        }
    }
}

/// Returns the time between two packets of a flow that is active at the source.
fn active_interarrival(flow: &Flow) -> Option<Duration> {
    let silent = Duration::from_millis(flow.silent_ms);
    let interarrival = 1_000_000_000_000_u64
        .checked_div(flow.rate_mpps)
        .map(Duration::from_nanos);
    let Some(interarrival) = interarrival else {
        // One packet so far: active for as long as the floor says.
        return (silent <= SILENCE_FLOOR).then_some(SILENCE_FLOOR);
    };
    let patience = (interarrival * SILENT_INTERARRIVALS).max(SILENCE_FLOOR);
    (silent <= patience).then_some(interarrival)
}
