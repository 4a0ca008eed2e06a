//! The arriving VM itself: its TAPs, its arrival, and its own Reports, which end the joins.
//!
//! A Report that the VM sends by itself (its NIC announces itself after the switch) does not show
//! that the querier has it: only one that answers a General Query sent after the arrival does.
//!
//! The TAP is there from the start of the copy, but nobody reads it until the VM runs, and a full
//! TAP keeps its oldest frames, which the VM has had at the source. So its gate holds them back
//! (`handover`); a TAP without a gate gets the streams from the pause on only.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddrV6;
use std::time::Duration;

use common::maps::{ListenerKey, ManagedKey};
use common::signal::{MigrationProgress, Phase};
use tracing::{debug, info};

use super::{Agent, Filter, Incoming, millis};
use crate::proto::listener::listener_key;
use crate::proto::record::Outcome;
use crate::proto::refusal::Refusal;
use crate::proto::timer::Timer;
use crate::proto::{DomainUuid, Mac, Output, Timestamp};

/// How often an arrived VM's entries are read while it should answer a Query.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How long after the Query Response Interval they are still read.
const POLL_MARGIN: Duration = Duration::from_secs(2);
/// When MDB entries are first made again: the bridge refuses temporary ones for a port that is not
/// up yet, and drops them when it goes down, as a TAP does while it is being set up.
pub(super) const MDB_RENEWAL_FIRST: Duration = Duration::from_millis(20);
/// How often they are renewed at least; they last a membership interval of the bridge.
pub(crate) const MDB_RENEWAL_LAST: Duration = Duration::from_secs(60);
/// Arrivals remembered for VMs that still ask for progress.
const REMEMBERED: usize = 100;

/// VMs that have arrived, for the answers to their questions.
#[derive(Debug, Default)]
pub(in crate::proto) struct Arrivals {
    last: VecDeque<(DomainUuid, u64, MigrationProgress)>,
}

impl Arrivals {
    fn remember(&mut self, uuid: DomainUuid, transaction: u64, progress: MigrationProgress) {
        self.last
            .retain(|(known, of, _)| *known != uuid || *of != transaction);
        self.last.push_back((uuid, transaction, progress));
        if self.last.len() > REMEMBERED {
            self.last.pop_front();
        }
    }

    fn find(&self, uuid: &DomainUuid, transaction: u64) -> Option<&MigrationProgress> {
        self.last
            .iter()
            .find(|(known, of, _)| known == uuid && *of == transaction)
            .map(|(_, _, progress)| progress)
    }
}

impl Incoming {
    /// Whether the VM no longer runs at its source.
    pub(super) fn is_switched_to(&self) -> bool {
        let told = self.progress.as_ref().map(|progress| progress.phase);
        self.arrived.is_some() || matches!(told, Some(Phase::Switching | Phase::Completed))
    }
}

/// What an arrived domain listens to as its source said, but has not answered for here yet.
pub(in crate::proto) fn held_for<'a>(
    arrivals: &'a BTreeMap<u64, Incoming>,
    uuid: &DomainUuid,
) -> impl Iterator<Item = (ManagedKey, Mac, &'a Filter)> + use<'a> {
    let newest = arrivals.values().rev().find(|it| it.uuid == *uuid);
    newest
        .filter(|incoming| incoming.arrived.is_some())
        .into_iter()
        .flat_map(|incoming| &incoming.needs)
        .map(|((key, mac), filter)| (*key, *mac, filter))
}

impl Agent {
    /// Gives the TAPs of arriving VMs their MDB entries, as soon as they are there and due.
    pub(in crate::proto) fn ports_changed(&mut self) {
        self.lend_taps();
        let numbers: Vec<u64> = self.incoming.keys().copied().collect();
        for number in numbers {
            let Some(incoming) = self.incoming.get(&number) else {
                continue;
            };
            let begun = self.has_begun(incoming);
            self.hold_arrival(number);
            let Some(incoming) = self.incoming.get(&number) else {
                continue;
            };
            let entries = self.mdb_entries(incoming);
            let new: Vec<_> = entries
                .into_iter()
                .filter(|(place, _)| !incoming.mdb.contains(place))
                .collect();
            if !new.is_empty() {
                self.add_mdb(number, new);
                self.renew_mdb_soon(number);
            }
            if begun && let Some(incoming) = self.incoming.get_mut(&number) {
                incoming.begun = true;
            }
        }
        self.expect_claims();
        self.translate_left();
    }

    pub(in crate::proto) fn renew_mdb(&mut self, number: u64) {
        let Some(incoming) = self.incoming.get(&number) else {
            return;
        };
        let entries = self.mdb_entries(incoming);
        if entries.is_empty() {
            return;
        }
        self.add_mdb(number, entries);
        if let Some(incoming) = self.incoming.get_mut(&number) {
            let delay = (incoming.mdb_renewal * 2).min(MDB_RENEWAL_LAST);
            incoming.mdb_renewal = delay;
            self.cx
                .timers
                .set(Timer::MdbRenewal(number), self.cx.now + delay);
        }
    }

    /// Renews MDB entries soon, and from then on less and less often.
    fn renew_mdb_soon(&mut self, number: u64) {
        if let Some(incoming) = self.incoming.get_mut(&number) {
            incoming.mdb_renewal = MDB_RENEWAL_FIRST;
            let renewal = self.cx.now + MDB_RENEWAL_FIRST;
            self.cx.timers.set(Timer::MdbRenewal(number), renewal);
        }
    }

    fn mdb_entries(&self, incoming: &Incoming) -> Vec<((u32, ManagedKey), Filter)> {
        let ports = self
            .inventory
            .ports_of_arrival(&incoming.uuid, &incoming.macs);
        let of_nic = |mac: Mac| {
            incoming
                .needs
                .iter()
                .filter(move |((_, needing), _)| *needing == mac)
        };
        ports
            .into_iter()
            .filter(|(ifindex, _)| incoming.is_switched_to() || incoming.is_held(*ifindex))
            .flat_map(|(ifindex, mac)| {
                of_nic(mac).map(move |((key, _), filter)| ((ifindex, *key), filter.clone()))
            })
            .collect()
    }

    fn add_mdb(&mut self, number: u64, entries: Vec<((u32, ManagedKey), Filter)>) {
        let Some(incoming) = self.incoming.get_mut(&number) else {
            return;
        };
        for ((ifindex, key), filter) in entries {
            incoming.mdb.insert((ifindex, key));
            let membership = filter.membership(key);
            self.cx.outputs.push_back(Output::MdbAdd {
                ifindex,
                membership,
            });
        }
    }

    pub(in crate::proto) fn incoming_domain(&mut self, uuid: DomainUuid, running: bool) {
        if running {
            self.arrived(uuid, self.cx.now);
        }
    }

    /// The VM runs here.
    pub(in crate::proto) fn arrived(&mut self, uuid: DomainUuid, at: Timestamp) {
        let Some(number) = self.incoming_of(uuid) else {
            return;
        };
        let interval = self.longest_interval(number);
        let Some(incoming) = self.incoming.get_mut(&number) else {
            return;
        };
        if incoming.arrived.is_some() {
            return;
        }
        info!(domain = %incoming.domain, number, "Domain has arrived");
        incoming.arrived = Some(at);
        self.cx.timers.stop(Timer::Unused(number));
        self.cx
            .timers
            .set(Timer::Hold(number), self.cx.now + interval);
        self.cx.records.end(number, at, Outcome::Completed);
        self.note_arrival(number);
        self.ports_changed();
        self.renew_mdb(number);
        self.expect_cut(number);
        self.claim_arrived(number);
        self.finish_if_released(number);
    }

    /// Remembers what a VM that asks is to be answered.
    pub(super) fn note_arrival(&mut self, number: u64) {
        let Some(incoming) = self.incoming.get(&number) else {
            return;
        };
        let (Some(transaction), Some(at)) = (incoming.vm_transaction, incoming.arrived) else {
            return;
        };
        let told = incoming.progress.as_ref();
        let progress = MigrationProgress {
            phase: Phase::Completed,
            processed_bytes: told.map_or(0, |told| told.processed_bytes),
            total_bytes: told.map_or(0, |told| told.total_bytes),
            elapsed_ms: told
                .filter(|told| told.phase == Phase::Completed)
                .map_or(millis(at.since(incoming.started)), |told| told.elapsed_ms),
            vm_pause_ms: told.and_then(|told| told.vm_pause_ms),
            clock_ns: None,
        };
        self.arrivals.remember(incoming.uuid, transaction, progress);
    }

    /// Answers `MigrationReady` of a VM that has moved to here. That its datagram came in by its
    /// TAP shows that it runs. `false` if this is no such VM.
    pub(in crate::proto) fn answer_arrival(
        &mut self,
        ifindex: u32,
        transaction: u64,
        to: SocketAddrV6,
    ) -> bool {
        let arriving = self.incoming.values().find(|incoming| {
            incoming.vm_transaction == Some(transaction)
                && self
                    .inventory
                    .ports_of_arrival(&incoming.uuid, &incoming.macs)
                    .iter()
                    .any(|(port, _)| *port == ifindex)
        });
        let uuid = match arriving {
            Some(incoming) => {
                let uuid = incoming.uuid;
                self.arrived(uuid, self.cx.now);
                uuid
            }
            None => match self.inventory.domain_of_port(ifindex) {
                Some(domain) => domain.uuid,
                None => return false,
            },
        };
        let Some(progress) = self.arrivals.find(&uuid, transaction).cloned() else {
            return false;
        };
        self.cx.tell(to, transaction, &progress.into());
        true
    }

    /// A domain left this host: a migration that failed, or a VM that was held for.
    pub(in crate::proto) fn incoming_domain_gone(&mut self, uuid: DomainUuid) {
        while let Some(number) = self.incoming_of(uuid) {
            let Some(incoming) = self.incoming.get(&number) else {
                return;
            };
            if incoming.arrived.is_some() {
                self.gone_after_arrival(number);
                continue;
            }
            let refusal = Refusal::GoneBeforeArrival {
                domain: incoming.domain.clone(),
                agent: self.cx.config.name.clone(),
            };
            self.undo_and_tell(number, &refusal);
        }
    }

    /// A domain is gone that was held for. If its source took the migration back, it ran here only
    /// by mistake.
    pub(super) fn gone_after_arrival(&mut self, number: u64) {
        let Some(incoming) = self.incoming.get(&number) else {
            return;
        };
        debug!(domain = %incoming.domain, "Domain is gone while it was held for");
        if let Some(reason) = incoming.aborted.clone() {
            self.cx
                .records
                .end(number, self.cx.now, Outcome::Failed(reason));
        }
        self.undo(number, "");
    }

    pub(in crate::proto) fn query_came(&mut self, vlan: u16, at: Timestamp) {
        let until = self.cx.now + self.mirror.queriers().response_interval(vlan, at) + POLL_MARGIN;
        for (number, incoming) in &mut self.incoming {
            if incoming.arrived.is_some_and(|arrived| at > arrived) {
                incoming.queried.entry(vlan).or_insert(at);
                incoming.poll_until = until;
                self.cx
                    .timers
                    .set_earlier(Timer::Poll(*number), self.cx.now + POLL_INTERVAL);
            }
        }
    }

    /// Reads what an arrived VM should have answered for; the event may have been lost, or not
    /// raised because nothing has changed.
    pub(in crate::proto) fn poll_answers(&mut self, number: u64) {
        let Some(incoming) = self.incoming.get(&number) else {
            return;
        };
        let ports = self
            .inventory
            .ports_of_arrival(&incoming.uuid, &incoming.macs);
        let listeners: Vec<ListenerKey> = incoming
            .needs
            .keys()
            .filter_map(|(key, mac)| {
                let (ifindex, _) = ports.iter().find(|(_, of)| of == mac)?;
                Some(listener_key(*ifindex, key))
            })
            .collect();
        if self.cx.now < incoming.poll_until {
            self.cx
                .timers
                .set(Timer::Poll(number), self.cx.now + POLL_INTERVAL);
        }
        if !listeners.is_empty() {
            self.cx.outputs.push_back(Output::ReadListeners {
                listeners,
                sources: Vec::new(),
            });
        }
    }

    /// A listener's state came in: if it answers a Query after the arrival, the join is over.
    pub(in crate::proto) fn arrived_vm_reported(&mut self, listener: &ListenerKey) {
        let Some(value) = self.mirror.get(listener) else {
            return;
        };
        let answered = Timestamp(value.last_answer_ns);
        let key = listener.managed();
        self.release_where(listener.ifindex, key, |incoming| {
            incoming
                .queried
                .get(&key.vlan)
                .is_some_and(|queried| answered > *queried)
        });
    }

    /// A listener left: its VM does not want the address any more.
    pub(in crate::proto) fn arrived_vm_left(&mut self, listener: &ListenerKey) {
        self.release_where(listener.ifindex, listener.managed(), |_| true);
    }

    fn release_where(
        &mut self,
        ifindex: u32,
        key: ManagedKey,
        condition: impl Fn(&Incoming) -> bool,
    ) {
        let Some(entry) = self.entries.get(&key) else {
            return;
        };
        let over: Vec<(u64, Mac)> = entry
            .needs
            .keys()
            .filter(|(number, mac)| {
                self.incoming.get(number).is_some_and(|incoming| {
                    incoming.arrived.is_some()
                        && condition(incoming)
                        && self
                            .inventory
                            .ports_of_arrival(&incoming.uuid, &incoming.macs)
                            .contains(&(ifindex, *mac))
                })
            })
            .copied()
            .collect();
        for (number, mac) in over {
            if let Some(incoming) = self.incoming.get_mut(&number) {
                incoming.needs.remove(&(key, mac));
                // The VM's own Report renews the bridge's entry from now on.
                incoming.mdb.remove(&(ifindex, key));
            }
            self.release(number, key, mac);
            self.finish_if_released(number);
        }
    }

    /// The VM came, but never answered for what is left: nothing more is to be expected.
    pub(in crate::proto) fn hold_timed_out(&mut self, number: u64) {
        if let Some(incoming) = self.incoming.get(&number) {
            info!(
                domain = %incoming.domain,
                left = incoming.needs.len(),
                "Domain never answered for some addresses; their joins end"
            );
        }
        let Some(incoming) = self.drop_incoming(number) else {
            return;
        };
        for (ifindex, key) in &incoming.mdb {
            self.delete_mdb(*ifindex, *key);
        }
        for (key, mac) in incoming.needs.into_keys() {
            self.release(number, key, mac);
        }
    }

    fn finish_if_released(&mut self, number: u64) {
        let done = |incoming: &Incoming| {
            incoming.needs.is_empty() && incoming.arrived.is_some() && incoming.response.is_some()
        };
        if self.incoming.get(&number).is_some_and(done)
            && let Some(incoming) = self.incoming.get(&number)
        {
            // Kept until the hold ends: the source may still tell how long the VM was paused.
            debug!(domain = %incoming.domain, "Nothing is held for the domain any more");
            self.cx.timers.stop(Timer::Poll(number));
            self.cx.timers.stop(Timer::MdbRenewal(number));
        }
    }

    /// The longest listening interval of the VLANs that an arrival needs.
    fn longest_interval(&self, number: u64) -> Duration {
        let vlans: BTreeMap<u16, ()> = self
            .incoming
            .get(&number)
            .into_iter()
            .flat_map(|incoming| incoming.needs.keys())
            .map(|(key, _)| (key.vlan, ()))
            .collect();
        let interval = |vlan| self.mirror.queriers().listening_interval(vlan, self.cx.now);
        vlans
            .keys()
            .map(|vlan| interval(*vlan))
            .max()
            .unwrap_or_else(|| interval(0))
    }
}

#[cfg(test)]
#[path = "../tests/arrival.rs"]
mod tests;
