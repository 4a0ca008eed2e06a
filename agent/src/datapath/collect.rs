//! Garbage collection of the maps: removes unneeded entries, and the least valuable ones where room
//! is short.
//!
//! Anybody who can send to a multicast address can create any number of flows, with ever new source
//! addresses and ports. The programs therefore limit the flows of each address in `STREAMS` and of
//! each TAP in `DELIVERED` to a share. This module makes room. In `STREAMS` it removes every flow
//! after a long silence. If the share of the address, or the map, is more than half full, it also
//! removes flows of few packets after a short silence and, at once, flows from sources that no
//! listener wants. In `DELIVERED` it removes the flows without a new packet from TAPs whose share
//! is more than half full.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use common::maps::{
    Address, Delivered, DeliveredKey, FilterMode, Listener, ListenerKey, Managed, ManagedKey,
    Source, SourceKey, StreamKey, StreamUsage,
};

use super::{Datapath, DatapathError, lock};
use crate::proto::Timestamp;

/// Age after which both a source and its listener are certainly written.
const SETTLED: Duration = Duration::from_secs(1);
/// A flow of at most this many packets may be forged.
const FEW_PACKETS: u64 = 2;
/// Permitted silence of such a flow where room is short.
const BRIEF_SILENCE: Duration = Duration::from_secs(10);

/// Packets delivered into TAPs, by flow.
pub(super) type Passed = BTreeMap<DeliveredKey, u64>;

/// What [`Datapath::collect`] removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Sources of replaced lists or of removed listeners.
    pub sources: usize,
    /// Flows of unmanaged addresses, flows silent for too long, and flows removed to make room.
    pub streams: usize,
    /// Flows into removed TAPs, and flows removed to make room.
    pub delivered: usize,
}

impl Datapath {
    /// Removes sources of replaced lists or removed listeners; flows that are unmanaged, silent for
    /// longer than `max_silence`, or superfluous where room is short; and flows into removed ports.
    /// Call this periodically, off the runtime. Reads whole maps.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn collect(
        &self,
        now: Timestamp,
        max_silence: Duration,
    ) -> Result<Collected, DatapathError> {
        Ok(Collected {
            sources: self.collect_sources(now)?,
            streams: self.collect_streams(now, max_silence)?,
            delivered: self.collect_delivered()?,
        })
    }

    fn collect_sources(&self, now: Timestamp) -> Result<usize, DatapathError> {
        let mut collected = 0;
        for (key, source) in self.inner.sources.entries()? {
            // A source is written before the listener with its generation.
            if now.since(Timestamp(source.last_report_ns)) < SETTLED {
                continue;
            }
            let live = self
                .inner
                .listeners
                .get(&key.listener)?
                .is_some_and(|listener| listener.generation == source.generation);
            if !live && self.expire_source(&key, source.last_report_ns)? {
                collected += 1;
            }
        }
        Ok(collected)
    }

    fn collect_streams(
        &self,
        now: Timestamp,
        max_silence: Duration,
    ) -> Result<usize, DatapathError> {
        let managed: HashMap<ManagedKey, Managed> = self.managed()?.into_iter().collect();
        lock(&self.inner.relay_flows).forget_usages_if(|key| !managed.contains_key(&key.managed()));
        let entries = self.inner.streams.entries()?;
        let room = self.inner.capacities.streams as usize;
        let is_full = is_half_full(entries.len(), room);
        let mut by_address: HashMap<ManagedKey, Vec<(StreamKey, StreamUsage)>> = HashMap::new();
        for (key, usage) in entries {
            by_address
                .entry(key.managed())
                .or_default()
                .push((key, usage));
        }
        let share = |address| -> usize {
            let managed = managed.get(address);
            managed.map_or(0, |managed| managed.max_flows.into())
        };
        let is_crowded =
            |address, flows: &[_]| is_full || is_half_full(flows.len(), share(address));
        // The flows of an unmanaged address are removed in any case.
        let mut watched = by_address
            .iter()
            .filter(|(address, _)| managed.contains_key(address));
        let included = if watched.any(|(address, flows)| is_crowded(address, flows)) {
            let (listeners, sources) = (&self.inner.listeners, &self.inner.sources);
            included(&listeners.entries()?, &sources.entries()?)
        } else {
            HashMap::new()
        };
        let mut collected = 0;
        for (address, flows) in &by_address {
            let room = Room {
                share: share(address),
                is_crowded: is_crowded(address, flows),
                included: included.get(address),
            };
            let mut left = flows.len();
            for key in superfluous(now, flows, &room, max_silence) {
                if self.inner.streams.remove(&key)? {
                    collected += 1;
                    left -= 1;
                }
            }
            self.recount(address, left)?;
        }
        for address in managed.keys() {
            if !by_address.contains_key(address) {
                self.recount(address, 0)?;
            }
        }
        Ok(collected)
    }

    /// Corrects the flow count of an address. The count may miss flows that the kernel counted
    /// while the agent wrote the entry.
    fn recount(&self, address: &ManagedKey, flows: usize) -> Result<(), DatapathError> {
        let flows = u32::try_from(flows).unwrap_or(u32::MAX);
        match self.inner.managed.get(address)? {
            Some(known) if known.flows != flows => {
                let value = Managed { flows, ..known };
                self.inner.managed.replace(address, &value)
            }
            _ => Ok(()),
        }
    }

    fn collect_delivered(&self) -> Result<usize, DatapathError> {
        // A program that runs during the removal of a port may still count a packet.
        let ports = lock(&self.inner.ports).entries()?;
        let shares: HashMap<u32, usize> = ports
            .into_iter()
            .map(|(ifindex, port)| (ifindex, port.max_flows as usize))
            .collect();
        let gone = self.forget_delivered_if(|ifindex| !shares.contains_key(&ifindex))?;
        // The counts of a TAP with a gate stay until the gate is removed.
        let gates = self.gates()?;
        let gates: HashSet<u32> = gates.into_iter().map(|(ifindex, ..)| ifindex).collect();
        let mut entries = self.inner.delivered.entries()?;
        entries.retain(|(key, _)| !gates.contains(&key.ifindex));
        let (silent, passed) = crowding(&entries, &shares, &lock(&self.inner.crowded));
        *lock(&self.inner.crowded) = passed;
        let mut forgotten: BTreeMap<u32, u32> = BTreeMap::new();
        for key in silent {
            if self.inner.delivered.remove(&key)? {
                *forgotten.entry(key.ifindex).or_default() += 1;
            }
        }
        let mut collected = gone;
        for (ifindex, flows) in forgotten {
            self.count_forgotten(ifindex, flows)?;
            collected += flows as usize;
        }
        Ok(collected)
    }
}

/// Returns the wanted sources of each address that has listeners, all of them in INCLUDE mode.
fn included(
    listeners: &[(ListenerKey, Listener)],
    sources: &[(SourceKey, Source)],
) -> HashMap<ManagedKey, HashSet<Address>> {
    let mut included: HashMap<ManagedKey, HashSet<Address>> = HashMap::new();
    let mut excluding = HashSet::new();
    for (key, listener) in listeners {
        match FilterMode::from_u8(listener.filter_mode) {
            Some(FilterMode::Include) => drop(included.entry(key.managed()).or_default()),
            Some(FilterMode::Exclude) | None => drop(excluding.insert(key.managed())),
        }
    }
    included.retain(|key, _| !excluding.contains(key));
    for (SourceKey { listener, source }, _) in sources {
        if let Some(included) = included.get_mut(&listener.managed()) {
            included.insert(*source);
        }
    }
    included
}

/// Room for the flows of one address.
struct Room<'a> {
    /// Most flows of the address.
    share: usize,
    /// Whether more than half of the share, or of the map, is taken.
    is_crowded: bool,
    /// Wanted sources; `None` means any source.
    included: Option<&'a HashSet<Address>>,
}

fn is_half_full(flows: usize, share: usize) -> bool {
    flows > share / 2
}

/// Returns the flows of one address to remove: flows silent for longer than `max_silence`; where
/// room is short, flows of unwanted sources and silent flows of few packets; and if the share is
/// still full, the flows silent the longest, down to three quarters of the share.
fn superfluous(
    now: Timestamp,
    flows: &[(StreamKey, StreamUsage)],
    room: &Room<'_>,
    max_silence: Duration,
) -> Vec<StreamKey> {
    let is_wanted = |source: &Address| room.included.is_none_or(|it| it.contains(source));
    let goes = |key: &StreamKey, usage: &StreamUsage| {
        let silence = now.since(Timestamp(usage.last_ns));
        let is_brief = usage.packets <= FEW_PACKETS && silence > BRIEF_SILENCE;
        silence > max_silence || room.is_crowded && (is_brief || !is_wanted(&key.source))
    };
    let (gone, mut left): (Vec<_>, Vec<_>) =
        flows.iter().partition(|(key, usage)| goes(key, usage));
    let mut gone: Vec<StreamKey> = gone.into_iter().map(|(key, _)| key).collect();
    if left.len() >= room.share {
        left.sort_unstable_by_key(|(_, usage)| usage.last_ns);
        let surplus = left.len() - room.share * 3 / 4;
        gone.extend(left.iter().take(surplus).map(|(key, _)| *key));
    }
    gone
}

/// For TAPs whose share is more than half full: returns the flows without a new packet since the
/// last call, and the packet counts of the other flows.
fn crowding(
    entries: &[(DeliveredKey, Delivered)],
    shares: &HashMap<u32, usize>,
    before: &Passed,
) -> (Vec<DeliveredKey>, Passed) {
    let mut flows: HashMap<u32, usize> = HashMap::new();
    for (key, _) in entries {
        *flows.entry(key.ifindex).or_default() += 1;
    }
    let is_crowded = |ifindex: &u32| {
        let share = shares.get(ifindex).copied().unwrap_or_default();
        flows
            .get(ifindex)
            .is_some_and(|flows| is_half_full(*flows, share))
    };
    let mut silent = Vec::new();
    let mut passed = Passed::new();
    for (key, delivered) in entries {
        if !is_crowded(&key.ifindex) {
            continue;
        }
        if before.get(key) == Some(&delivered.packets) {
            silent.push(*key);
        } else {
            passed.insert(*key, delivered.packets);
        }
    }
    (silent, passed)
}

#[cfg(test)]
mod tests;
