//! Reading, writing and expiry of the state in the maps.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::atomic::Ordering;

use common::counter::Counter;
use common::maps::{
    Listener, ListenerKey, Managed, ManagedKey, Origins, Port, PortUsage, Querier, QuerierKey,
    Source, SourceKey, StreamKey,
};

use super::table::Table;
use super::{Datapath, DatapathError, lock, map_error};
use crate::proto::{DatapathEvent, Stream, Timestamp};

/// Limits of one VM's port, enforced by the eBPF programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most listeners: multicast addresses over all VLANs.
    pub listeners: u32,
    /// Most sources over all listeners of the port.
    pub sources: u32,
    /// Most MLD Reports per second.
    pub reports_per_second: u32,
    /// Most signalling datagrams per second to the agent.
    pub datagrams_per_second: u32,
    /// Most flows of the port in `DELIVERED`.
    pub flows: u32,
}

impl Datapath {
    /// Returns one listener, `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`], as for all these methods.
    pub fn listener(&self, key: &ListenerKey) -> Result<Option<Listener>, DatapathError> {
        self.inner.listeners.get(key)
    }

    /// Returns one source of a listener, `None` if there is none.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn source(&self, key: &SourceKey) -> Result<Option<Source>, DatapathError> {
        self.inner.sources.get(key)
    }

    /// Returns all listeners. Reads a whole map.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn listeners(&self) -> Result<Vec<(ListenerKey, Listener)>, DatapathError> {
        self.inner.listeners.entries()
    }

    /// Returns all sources, including stale ones (see [`Listener::generation`]). Reads a whole map.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn sources(&self) -> Result<Vec<(SourceKey, Source)>, DatapathError> {
        self.inner.sources.entries()
    }

    /// Returns the queriers heard on the uplinks.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn queriers(&self) -> Result<Vec<(QuerierKey, Querier)>, DatapathError> {
        self.inner.queriers.entries()
    }

    /// Returns the complete state that the protocol mirrors, as [`DatapathEvent::Snapshot`]. Reads
    /// whole maps.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn snapshot(&self) -> Result<DatapathEvent, DatapathError> {
        Ok(DatapathEvent::Snapshot {
            listeners: self.listeners()?,
            sources: self.sources()?,
            queriers: self.queriers()?,
        })
    }

    /// Returns all flows with at least one packet. Reads whole maps.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn all_streams(&self) -> Result<Vec<(StreamKey, Stream)>, DatapathError> {
        let mut streams: BTreeMap<StreamKey, Stream> = BTreeMap::new();
        for (key, usage) in self.inner.streams.entries()? {
            streams.entry(key).or_default().native = usage;
        }
        for (key, usage) in lock(&self.inner.relay_flows).usages()? {
            streams.entry(key).or_default().relay = usage;
        }
        streams.retain(|_, stream| stream.native.packets + stream.relay.packets > 0);
        Ok(streams.into_iter().collect())
    }

    /// Watches the streams of an address, and sets which copies of their packets pass. The first
    /// packet of each flow and origin from `since` on raises an event.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`], for instance if `MANAGED` is full.
    pub fn manage(
        &self,
        key: &ManagedKey,
        since: Timestamp,
        origins: Origins,
    ) -> Result<(), DatapathError> {
        let known = self.inner.managed.get(key)?;
        let value = Managed {
            flows: known.map_or(0, |known| known.flows),
            ..Managed::new(since.0, origins, self.inner.flows_per_address)
        };
        self.inner.managed.insert(key, &value)
    }

    /// Stops watching an address. The next [`Datapath::collect`] removes its flows.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn unmanage(&self, key: &ManagedKey) -> Result<(), DatapathError> {
        self.inner.managed.remove(key).map(drop)
    }

    /// Returns the watched addresses with their settings.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn managed(&self) -> Result<Vec<(ManagedKey, Managed)>, DatapathError> {
        self.inner.managed.entries()
    }

    /// Returns the counters that are not zero, summed over the CPUs.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>, DatapathError> {
        let mut counters = Vec::new();
        for &counter in Counter::ALL {
            let value = self.counter(counter)?;
            if value > 0 {
                counters.push((counter.as_str(), value));
            }
        }
        Ok(counters)
    }

    /// Returns one counter, summed over the CPUs.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn counter(&self, counter: Counter) -> Result<u64, DatapathError> {
        let values = self
            .inner
            .counters
            .get(&(counter as u32), 0)
            .map_err(|error| map_error("COUNTERS", error))?;
        let finished = self
            .inner
            .finished
            .get(counter as usize)
            .map_or(0, |value| value.load(Ordering::Relaxed));
        Ok(values.iter().sum::<u64>() + finished)
    }

    /// Counts an outcome of a Report that userspace finished.
    pub(super) fn count(&self, counter: Counter) {
        if let Some(value) = self.inner.finished.get(counter as usize) {
            value.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the usage of a port. `listeners` and `sources` are current numbers, without expired
    /// ones.
    ///
    /// # Errors
    ///
    /// [`DatapathError::NoPort`], [`DatapathError::Map`].
    pub fn usage(&self, ifindex: u32) -> Result<PortUsage, DatapathError> {
        let port = lock(&self.inner.ports)
            .get(&ifindex)?
            .ok_or(DatapathError::NoPort(ifindex))?;
        let mut usage = self.inner.usage.get(&ifindex)?.unwrap_or_default();
        usage.listeners = usage.listeners.wrapping_sub(port.expired_listeners);
        usage.sources = usage.sources.wrapping_sub(port.expired_sources);
        Ok(usage)
    }

    /// Returns the usage of every port, as [`DatapathEvent::Usage`].
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn usage_events(&self) -> Result<Vec<DatapathEvent>, DatapathError> {
        let ports = lock(&self.inner.ports).entries()?;
        Ok(ports
            .into_iter()
            .filter_map(|(ifindex, _)| {
                let usage = self.usage(ifindex).ok()?;
                Some(DatapathEvent::Usage { ifindex, usage })
            })
            .collect())
    }

    /// Removes each listener that was not reported after the time given with it, with its sources,
    /// and counts both as expired. Returns the removed listeners. One call for many is cheaper: it
    /// reads the map of sources once, and only if one of the listeners has sources.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn expire(
        &self,
        expired: &[(ListenerKey, u64)],
    ) -> Result<Vec<ListenerKey>, DatapathError> {
        let mut removed = Vec::new();
        let mut with_sources = HashSet::new();
        for (key, last_report_ns) in expired {
            if let Some(listener) =
                take_unless_newer(&self.inner.listeners, key, *last_report_ns, |listener| {
                    listener.last_report_ns
                })?
            {
                self.count_expired(key.ifindex, 1, 0)?;
                removed.push(*key);
                if listener.source_count > 0 {
                    with_sources.insert(*key);
                }
            }
        }
        if !with_sources.is_empty() {
            for (key, source) in self.inner.sources.entries()? {
                if with_sources.contains(&key.listener) {
                    self.expire_source(&key, source.last_report_ns)?;
                }
            }
        }
        Ok(removed)
    }

    /// Removes a source that was not reported after this time, and counts it as expired. The kernel
    /// owns [`Listener::source_count`] and continues to count the source until a Report replaces
    /// the list.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn expire_source(
        &self,
        key: &SourceKey,
        last_report_ns: u64,
    ) -> Result<bool, DatapathError> {
        let taken = take_unless_newer(&self.inner.sources, key, last_report_ns, |source| {
            source.last_report_ns
        })?;
        if taken.is_some() {
            self.count_expired(key.listener.ifindex, 0, 1)?;
        }
        Ok(taken.is_some())
    }

    /// Writes the limits of a port; the counts stay.
    pub(super) fn set_limits(&self, ifindex: u32, limits: &Limits) -> Result<(), DatapathError> {
        let ports = lock(&self.inner.ports);
        let port = Port {
            max_listeners: limits.listeners,
            max_sources: limits.sources,
            reports_per_second: limits.reports_per_second,
            datagrams_per_second: limits.datagrams_per_second,
            max_flows: limits.flows,
            ..ports.get(&ifindex)?.unwrap_or_default()
        };
        ports.insert(&ifindex, &port)
    }

    /// Adds to the expired entries of a port. A negative number accounts for entries that the agent
    /// itself adds, because the kernel does not count those.
    pub(super) fn count_expired(
        &self,
        ifindex: u32,
        listeners: i32,
        sources: i32,
    ) -> Result<(), DatapathError> {
        let ports = lock(&self.inner.ports);
        let Some(mut port) = ports.get(&ifindex)? else {
            return Ok(());
        };
        port.expired_listeners = port.expired_listeners.wrapping_add_signed(listeners);
        port.expired_sources = port.expired_sources.wrapping_add_signed(sources);
        ports.insert(&ifindex, &port)
    }

    /// Adds to the number of flows of a port that were removed from `DELIVERED`.
    pub(super) fn count_forgotten(&self, ifindex: u32, flows: u32) -> Result<(), DatapathError> {
        let ports = lock(&self.inner.ports);
        let Some(mut port) = ports.get(&ifindex)? else {
            return Ok(());
        };
        port.forgotten_flows = port.forgotten_flows.wrapping_add(flows);
        ports.insert(&ifindex, &port)
    }

    /// Returns the limits of a port, and its usage as in [`Datapath::usage`].
    pub(super) fn port(&self, ifindex: u32) -> Result<Option<(Port, PortUsage)>, DatapathError> {
        let port = lock(&self.inner.ports).get(&ifindex)?;
        port.map(|port| Ok((port, self.usage(ifindex)?)))
            .transpose()
    }

    pub(super) fn forget_port(&self, ifindex: u32) -> Result<(), DatapathError> {
        self.forget_ports_if(|known| known == ifindex)
    }

    pub(super) fn forget_ports_except(&self, ports: &[u32]) -> Result<(), DatapathError> {
        let ports: BTreeSet<u32> = ports.iter().copied().collect();
        self.forget_ports_if(|known| !ports.contains(&known))
    }

    /// Removes gates, limits, usage, listeners, sources and delivery counts of the ports selected
    /// by `gone`.
    pub(super) fn forget_ports_if(&self, gone: impl Fn(u32) -> bool) -> Result<(), DatapathError> {
        lock(&self.inner.gates).clear_if(&gone)?;
        self.forget_delivered_if(&gone)?;
        let ports = lock(&self.inner.ports);
        let mut known: BTreeMap<u32, bool> = BTreeMap::new();
        for (ifindex, _) in ports.remove_if(|ifindex| gone(*ifindex))? {
            known.insert(ifindex, true);
        }
        for (ifindex, usage) in self.inner.usage.remove_if(|ifindex| gone(*ifindex))? {
            known.insert(ifindex, usage.reports > 0);
        }
        if !known.values().any(|&reported| reported) {
            return Ok(());
        }
        let (listeners, sources) = (&self.inner.listeners, &self.inner.sources);
        listeners.remove_if(|key| gone(key.ifindex))?;
        sources.remove_if(|key| gone(key.listener.ifindex))?;
        Ok(())
    }

    pub(super) fn forget_queriers(&self, ifindex: u32) -> Result<(), DatapathError> {
        let queriers = &self.inner.queriers;
        queriers.remove_if(|key| key.ifindex == ifindex).map(drop)
    }
}

/// Removes an entry unless it was reported after this time. The kernel may refresh the entry
/// between the check and the removal; the removed value shows that, and the entry is added again.
fn take_unless_newer<K: aya::Pod, V: aya::Pod>(
    table: &Table<K, V>,
    key: &K,
    last_report_ns: u64,
    reported_at: impl Fn(&V) -> u64,
) -> Result<Option<V>, DatapathError> {
    match table.get(key)? {
        Some(value) if reported_at(&value) <= last_report_ns => {}
        _ => return Ok(None),
    }
    let Some(value) = table.take(key)? else {
        return Ok(None);
    };
    // If the kernel has added the key again in the meantime, it has counted the new entry, and the
    // old one is removed.
    if reported_at(&value) > last_report_ns && table.insert_new(key, &value)? {
        return Ok(None);
    }
    Ok(Some(value))
}
