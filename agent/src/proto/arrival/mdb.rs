//! Entries of the bridge's multicast database (MDB) for arriving VMs.

use std::collections::BTreeSet;
use std::time::Duration;

use common::maps::{ListenerKey, ManagedKey, SourceKey};

use super::{Arrivals, Host, Incoming};
use crate::proto::context::Context;
use crate::proto::filter::Filter;
use crate::proto::host::inventory::Inventory;
use crate::proto::host::listeners::listener_key;
use crate::proto::timer::Timer;
use crate::proto::{Mac, MdbEntry, Output};

/// Delay of the first renewal. The bridge refuses temporary entries for a port that is down, and
/// drops them when a port goes down, which a TAP does during its setup.
const RENEWAL_FIRST: Duration = Duration::from_millis(20);
/// Longest delay between renewals. An entry lasts for the bridge's membership interval.
pub(crate) const MDB_RENEWAL_LAST: Duration = Duration::from_secs(60);

/// Ifindex of the TAP, and the address of the entry.
pub(super) type Place = (u32, ManagedKey);

/// MDB entries of an arrival.
#[derive(Debug)]
pub(super) struct Mdb {
    pub(super) made: BTreeSet<Place>,
    /// Delay before the next renewal; doubles up to [`MDB_RENEWAL_LAST`].
    renewal: Duration,
}

impl Default for Mdb {
    fn default() -> Self {
        Self {
            made: BTreeSet::new(),
            renewal: RENEWAL_FIRST,
        }
    }
}

impl Incoming {
    /// Adds the new entries that are due, and schedules a renewal of all entries soon.
    pub(super) fn begin_mdb(&mut self, cx: &mut Context, ports: &[(u32, Mac)]) {
        let mut new = self.mdb_entries(ports);
        new.retain(|(place, _)| !self.mdb.made.contains(place));
        if !new.is_empty() {
            self.add_mdb(cx, new);
            self.mdb.renewal = RENEWAL_FIRST;
            let renewal = cx.now + RENEWAL_FIRST;
            cx.timers.set(Timer::MdbRenewal(self.number), renewal);
        }
    }

    /// Adds all entries again that are due, and doubles the renewal delay.
    pub(super) fn renew_mdb(&mut self, cx: &mut Context, ports: &[(u32, Mac)]) {
        let entries = self.mdb_entries(ports);
        if entries.is_empty() {
            return;
        }
        self.add_mdb(cx, entries);
        self.mdb.renewal = (self.mdb.renewal * 2).min(MDB_RENEWAL_LAST);
        let renewal = cx.now + self.mdb.renewal;
        cx.timers.set(Timer::MdbRenewal(self.number), renewal);
    }

    fn mdb_entries(&self, ports: &[(u32, Mac)]) -> Vec<(Place, Filter)> {
        let of_nic = |mac: Mac| {
            let needs = self.needs.iter();
            needs.filter(move |((_, needing), _)| *needing == mac)
        };
        ports
            .iter()
            .filter(|(ifindex, _)| self.is_switched_to() || self.gates.hold(*ifindex))
            .flat_map(|(ifindex, mac)| {
                of_nic(*mac).map(move |((key, _), filter)| ((*ifindex, *key), filter.clone()))
            })
            .collect()
    }

    fn add_mdb(&mut self, cx: &mut Context, entries: Vec<(Place, Filter)>) {
        for ((ifindex, key), filter) in entries {
            self.mdb.made.insert((ifindex, key));
            let membership = filter.membership(key);
            cx.outputs.push_back(Output::MdbAdd {
                ifindex,
                membership,
            });
        }
    }
}

impl Arrivals {
    pub(in crate::proto) fn renew_mdb(
        &mut self,
        cx: &mut Context,
        inventory: &Inventory,
        number: u64,
    ) {
        if let Some(incoming) = self.incoming.get_mut(number) {
            let ports = self.taps.of(inventory, incoming);
            incoming.renew_mdb(cx, &ports);
        }
    }
}

impl Host<'_> {
    /// Removes an entry made for an arrival, unless the VM behind the port has reported the address
    /// itself.
    pub(super) fn delete_mdb(&self, cx: &mut Context, (ifindex, key): Place) {
        let listens = self.mirror.get(&listener_key(ifindex, &key)).is_some();
        if !listens {
            self.delete_entry(cx, MdbEntry::of_all_sources(ifindex, key));
        }
    }

    /// Removes the bridge's entries for refused listeners and sources, because a bridge with too
    /// many entries stops snooping.
    pub(in crate::proto) fn reports_refused(
        &self,
        cx: &mut Context,
        listeners: &[ListenerKey],
        sources: &[SourceKey],
    ) {
        for listener in listeners {
            self.delete_mdb(cx, (listener.ifindex, listener.managed()));
        }
        for SourceKey { listener, source } in sources {
            let all = MdbEntry::of_all_sources(listener.ifindex, listener.managed());
            let source = Some(*source);
            self.delete_entry(cx, MdbEntry { source, ..all });
        }
    }

    /// Removes an entry. The bridge itself removes the entries of a vanished port.
    fn delete_entry(&self, cx: &mut Context, entry: MdbEntry) {
        if self.inventory.ports.contains_key(&entry.ifindex) {
            cx.outputs.push_back(Output::MdbDelete(entry));
        }
    }
}
