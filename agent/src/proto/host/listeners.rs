//! Mirror of the kernel's `LISTENERS` and `LISTENER_SOURCES`, and their ageing.
//!
//! The maps are authoritative. The mirror follows their events, so the listeners of a port are
//! available without a lookup in the kernel. The mirror also detects entries older than the Multicast
//! Address Listening Interval of their VLAN's querier (RFC 9777 §9.4). Such an entry is read again
//! before the entry expires, because a Report that only refreshes an entry does not always raise an
//! event.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{
    Address, BridgeNumber, FilterMode, Listener, ListenerKey, ManagedKey, Network, Querier,
    QuerierKey, Source, SourceKey,
};

use super::watch::Watch;
use crate::proto::Timestamp;
use crate::proto::filter::Filter;
use crate::proto::querier::Queriers;

/// Time between two checks of an entry that was read again and still exists.
const RECHECK: Duration = Duration::from_secs(1);
/// Limit of entries per check.
const BATCH: usize = 1024;

/// A listener, for the operator and for a departing domain.
#[derive(Clone, Debug)]
pub struct ListenerView<'a> {
    /// Port, VLAN and multicast address.
    pub key: ListenerKey,
    /// Value of the listener in `LISTENERS`.
    pub value: &'a Listener,
    /// Source list of the listener's current generation.
    pub sources: Vec<Ipv6Addr>,
}

impl ListenerView<'_> {
    pub(in crate::proto) fn filter(&self) -> Option<Filter> {
        let filter = Filter {
            mode: FilterMode::from_u8(self.value.filter_mode)?,
            sources: self.sources.iter().copied().collect(),
        };
        // An INCLUDE filter without sources means a leave (RFC 9777 §4.2).
        (filter.mode == FilterMode::Exclude || !filter.sources.is_empty()).then_some(filter)
    }
}

/// Returns the key of an address's listener at a port.
pub(in crate::proto) fn listener_key(ifindex: u32, key: &ManagedKey) -> ListenerKey {
    ListenerKey {
        ifindex,
        vlan: key.vlan,
        bridge: key.bridge,
        multicast_address: key.multicast_address,
    }
}

/// Effect of the kernel's events on other modules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proto) enum Effect {
    /// An address has its first listener.
    Appeared(ManagedKey),
    /// The last listener of a routable address is gone.
    Vanished {
        key: ManagedKey,
        /// Whether the querier knows: the VM sent a leave, or no Report for the listening interval.
        told: bool,
    },
    /// The union of filters of an address may have changed.
    Wanted(ManagedKey),
    /// A listener reported.
    Reported(ListenerKey),
    /// A listener left.
    Left(ListenerKey),
    /// A General Query arrived.
    Queried { network: Network, at: Timestamp },
    /// Events of the kernel may be lost.
    EventsLost,
}

/// Work on entries that may be too old.
#[derive(Debug, Default)]
pub(in crate::proto) struct Due {
    /// Listeners to read again.
    pub(in crate::proto) read_listeners: Vec<ListenerKey>,
    /// Sources to read again.
    pub(in crate::proto) read_sources: Vec<SourceKey>,
    /// Listeners that were read again and are still too old, with the time of their last Report.
    pub(in crate::proto) expire_listeners: Vec<(ListenerKey, u64)>,
    /// Sources that were read again and are still too old, with the time of their last Report.
    pub(in crate::proto) expire_sources: Vec<(SourceKey, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Aged {
    Listener(ListenerKey),
    Source(SourceKey),
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    due: Timestamp,
    /// Whether the entry was read again since the entry became too old.
    asked: bool,
}

/// Mirror of the kernel's listeners, sources and queriers.
#[derive(Debug, Default)]
pub(in crate::proto) struct Mirror {
    listeners: BTreeMap<ListenerKey, Entry<Listener>>,
    sources: BTreeMap<SourceKey, Entry<Source>>,
    queriers: Queriers,
    ports_by_address: BTreeMap<ManagedKey, BTreeSet<u32>>,
    ageing: BTreeSet<(Timestamp, Aged)>,
    pub(super) watch: Watch,
}

impl Mirror {
    /// Returns the queriers of the networks.
    pub(in crate::proto) fn queriers(&self) -> &Queriers {
        &self.queriers
    }

    /// Records a Query. An entry ages by the interval at the time of its Report, or by a longer
    /// interval from a later Query.
    pub(super) fn update_querier(&mut self, key: QuerierKey, value: Querier) {
        let now = Timestamp(value.last_query_ns);
        let before = self.queriers.listening_interval(key.network(), now);
        self.queriers.heard(key, value);
        let after = self.queriers.listening_interval(key.network(), now);
        if after <= before {
            return;
        }
        let ageing = &mut self.ageing;
        let mut postpone = |item, due: &mut Timestamp, last_report_ns| {
            let later = Timestamp(last_report_ns) + after;
            if later > *due {
                ageing.remove(&(*due, item));
                *due = later;
                ageing.insert((later, item));
            }
        };
        for (listener, entry) in &mut self.listeners {
            if listener.network() == key.network() {
                let item = Aged::Listener(*listener);
                postpone(item, &mut entry.due, entry.value.last_report_ns);
            }
        }
        for (source, entry) in &mut self.sources {
            if source.listener.network() == key.network() {
                let item = Aged::Source(*source);
                postpone(item, &mut entry.due, entry.value.last_report_ns);
            }
        }
    }

    /// Returns the time at which an entry with the given last Report is too old.
    fn due(&self, network: Network, last_report_ns: u64) -> Timestamp {
        let reported = Timestamp(last_report_ns);
        reported + self.queriers.listening_interval(network, reported)
    }

    /// Records a listener's state; returns true for the first listener of an address.
    pub(super) fn update_listener(&mut self, key: ListenerKey, value: Listener) -> bool {
        let mut due = self.due(key.network(), value.last_report_ns);
        let old = self.listeners.get(&key);
        if old.is_some_and(|old| old.value.last_report_ns > value.last_report_ns) {
            return false;
        }
        if let Some(old) = old {
            self.ageing.remove(&(old.due, Aged::Listener(key)));
        }
        let asked = old.is_some_and(|old| old.asked && old.value == value);
        if asked {
            due = old.map_or(due, |old| old.due);
        }
        let new = old.is_none();
        self.ageing.insert((due, Aged::Listener(key)));
        self.listeners.insert(key, Entry { value, due, asked });
        if !new {
            return false;
        }
        let address = key.managed();
        let ports = self.ports_by_address.entry(address).or_default();
        ports.insert(key.ifindex);
        ports.len() == 1
    }

    /// Records a source's state.
    pub(super) fn update_source(&mut self, key: SourceKey, value: Source) {
        let mut due = self.due(key.listener.network(), value.last_report_ns);
        let old = self.sources.get(&key);
        if let Some(old) = old {
            self.ageing.remove(&(old.due, Aged::Source(key)));
        }
        let asked = old.is_some_and(|old| old.asked && old.value == value);
        if asked {
            due = old.map_or(due, |old| old.due);
        }
        self.ageing.insert((due, Aged::Source(key)));
        self.sources.insert(key, Entry { value, due, asked });
    }

    /// Removes a listener and its sources; returns the address if the listener was the last one.
    pub(super) fn remove_listener(&mut self, key: &ListenerKey) -> Option<ManagedKey> {
        let entry = self.listeners.remove(key)?;
        self.ageing.remove(&(entry.due, Aged::Listener(*key)));
        let sources: Vec<_> = self.sources_of(key).map(|(source, _)| *source).collect();
        for source in &sources {
            self.remove_source(source);
        }
        let address = key.managed();
        let ports = self.ports_by_address.get_mut(&address)?;
        ports.remove(&key.ifindex);
        if !ports.is_empty() {
            return None;
        }
        self.ports_by_address.remove(&address);
        Some(address)
    }

    /// Removes a source from its listener's list and from the ageing queue.
    pub(super) fn remove_source(&mut self, key: &SourceKey) {
        if let Some(entry) = self.sources.remove(key) {
            self.ageing.remove(&(entry.due, Aged::Source(*key)));
        }
    }

    /// Returns true if any port listens to an address.
    pub(in crate::proto) fn has_listener(&self, key: &ManagedKey) -> bool {
        self.ports_by_address.contains_key(key)
    }

    /// Returns the filters of all listeners of an address.
    pub(in crate::proto) fn filters(&self, key: &ManagedKey) -> impl Iterator<Item = Filter> {
        self.ports_by_address
            .get(key)
            .into_iter()
            .flatten()
            .filter_map(|ifindex| {
                let listener = listener_key(*ifindex, key);
                self.view(&listener, self.get(&listener)?).filter()
            })
    }

    /// Returns the state of a listener.
    pub(in crate::proto) fn get(&self, key: &ListenerKey) -> Option<&Listener> {
        self.listeners.get(key).map(|entry| &entry.value)
    }

    /// Returns the listeners of one port.
    pub(in crate::proto) fn of_port(&self, ifindex: u32) -> impl Iterator<Item = ListenerView<'_>> {
        let bound = |byte, number| ListenerKey {
            ifindex,
            vlan: number,
            bridge: BridgeNumber(number),
            multicast_address: [byte; 16],
        };
        self.listeners
            .range(bound(0, 0)..=bound(0xff, u16::MAX))
            .map(|(key, entry)| self.view(key, &entry.value))
    }

    /// Returns all listeners.
    pub(in crate::proto) fn iter(&self) -> impl Iterator<Item = ListenerView<'_>> {
        self.listeners
            .iter()
            .map(|(key, entry)| self.view(key, &entry.value))
    }

    /// Returns the keys of all listeners and sources.
    pub(super) fn keys(&self) -> (BTreeSet<ListenerKey>, BTreeSet<SourceKey>) {
        (
            self.listeners.keys().copied().collect(),
            self.sources.keys().copied().collect(),
        )
    }

    /// Returns the time at which [`Self::expire`] has work.
    pub(super) fn next_due(&self) -> Option<Timestamp> {
        self.ageing.first().map(|(due, _)| *due)
    }

    /// Selects the entries that are too old: first for another reading, then, if unchanged, for expiry.
    pub(super) fn expire(&mut self, now: Timestamp) -> Due {
        let mut due = Due::default();
        let expired: Vec<_> = self
            .ageing
            .range(..=(now, Aged::Source(LAST_SOURCE)))
            .take(BATCH)
            .copied()
            .collect();
        for item in expired {
            self.ageing.remove(&item);
            let later = now + RECHECK;
            self.ageing.insert((later, item.1));
            match item.1 {
                Aged::Listener(key) => {
                    let Some(entry) = self.listeners.get_mut(&key) else {
                        continue;
                    };
                    entry.due = later;
                    if entry.asked {
                        due.expire_listeners.push((key, entry.value.last_report_ns));
                    }
                    entry.asked = true;
                    due.read_listeners.push(key);
                }
                Aged::Source(key) => {
                    let Some(entry) = self.sources.get_mut(&key) else {
                        continue;
                    };
                    entry.due = later;
                    if entry.asked {
                        due.expire_sources.push((key, entry.value.last_report_ns));
                    }
                    entry.asked = true;
                    due.read_sources.push(key);
                }
            }
        }
        due
    }

    fn view<'a>(&'a self, key: &ListenerKey, value: &'a Listener) -> ListenerView<'a> {
        let sources = self
            .sources_of(key)
            .filter(|(_, source)| source.generation == value.generation)
            .map(|(key, _)| Ipv6Addr::from(key.source))
            .collect();
        ListenerView {
            key: *key,
            value,
            sources,
        }
    }

    fn sources_of(&self, listener: &ListenerKey) -> impl Iterator<Item = (&SourceKey, &Source)> {
        let bound = |byte| SourceKey {
            listener: *listener,
            source: [byte; 16],
        };
        self.sources
            .range(bound(0)..=bound(0xff))
            .map(|(key, entry)| (key, &entry.value))
    }
}

const LAST_ADDRESS: Address = [0xff; 16];
const LAST_SOURCE: SourceKey = SourceKey {
    listener: ListenerKey {
        ifindex: u32::MAX,
        vlan: u16::MAX,
        bridge: BridgeNumber(u16::MAX),
        multicast_address: LAST_ADDRESS,
    },
    source: LAST_ADDRESS,
};

#[cfg(test)]
mod tests;
