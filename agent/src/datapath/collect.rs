//! What nobody needs is removed from the maps, and what is worth least where there is little room.
//!
//! Whoever can send to a multicast address makes flows of it without end, by ever new source addresses
//! and ports. Each address has a share of `STREAMS` and each TAP one of `DELIVERED`, which the programs
//! keep to. Here flows make room that are silent: all of them after long, and in a share that is half
//! full after little.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use common::maps::{Delivered, DeliveredKey, Managed, ManagedKey, StreamKey, StreamUsage};

use super::{Datapath, DatapathError, lock};
use crate::proto::Timestamp;

/// Age at which a source and its listener are surely both written.
const SETTLED: Duration = Duration::from_secs(1);
/// A flow of so few packets may be made up.
const FEW_PACKETS: u64 = 2;
/// How long one may be silent where there is little room.
const BRIEF_SILENCE: Duration = Duration::from_secs(10);

/// Packets that had passed into TAPs, by flow.
pub(super) type Passed = BTreeMap<DeliveredKey, u64>;

/// What [`Datapath::collect`] removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Sources of a replaced list or of a listener that is gone.
    pub sources: usize,
    /// Flows of addresses that are not managed, that were silent for too long, or had to make room.
    pub streams: usize,
    /// Flows into TAPs that are gone, or that had to make room.
    pub delivered: usize,
}

impl Datapath {
    /// Removes sources of lists that were replaced or whose listener is gone, flows that are not
    /// managed, silent for longer than `max_silence` or in the way of others, and flows into ports
    /// that are gone. To be called now and then, off the runtime. Reads whole maps.
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
            // A source is written before the listener that its generation belongs to.
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
        let is_full = entries.len() > room / 2;
        let mut by_address: HashMap<ManagedKey, Vec<(StreamKey, StreamUsage)>> = HashMap::new();
        for (key, usage) in entries {
            by_address
                .entry(key.managed())
                .or_default()
                .push((key, usage));
        }
        let mut collected = 0;
        for (address, flows) in &by_address {
            let share = managed
                .get(address)
                .map_or(0, |managed| managed.max_flows.into());
            let mut left = flows.len();
            for key in superfluous(now, flows, share, is_full, max_silence) {
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

    /// Corrects the number of an address's flows, of which some may have been counted while the agent
    /// wrote the entry.
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
        // A program that was just running may have counted a packet into a port that is gone.
        let ports = lock(&self.inner.ports).entries()?;
        let shares: HashMap<u32, usize> = ports
            .into_iter()
            .map(|(ifindex, port)| (ifindex, port.max_flows as usize))
            .collect();
        let gone = self.forget_delivered_if(|ifindex| !shares.contains_key(&ifindex))?;
        // What a gate counts is needed until it is gone.
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

/// Flows of one address that go: those silent for longer than `max_silence`; where the share or all of
/// the map is half full those of few packets; and where the share is full still, those that were silent
/// the longest, down to three quarters.
fn superfluous(
    now: Timestamp,
    flows: &[(StreamKey, StreamUsage)],
    share: usize,
    is_full: bool,
    max_silence: Duration,
) -> Vec<StreamKey> {
    let is_crowded = is_full || flows.len() > share / 2;
    let goes = |usage: &StreamUsage| {
        let silence = now.since(Timestamp(usage.last_ns));
        silence > max_silence
            || is_crowded && usage.packets <= FEW_PACKETS && silence > BRIEF_SILENCE
    };
    let (gone, mut left): (Vec<_>, Vec<_>) = flows.iter().partition(|(_, usage)| goes(usage));
    let mut gone: Vec<StreamKey> = gone.into_iter().map(|(key, _)| key).collect();
    if left.len() >= share {
        left.sort_unstable_by_key(|(_, usage)| usage.last_ns);
        let surplus = left.len() - share * 3 / 4;
        gone.extend(left.iter().take(surplus).map(|(key, _)| *key));
    }
    gone
}

/// Of TAPs whose share is half full: flows that have passed nothing since the last time, and what has
/// passed of the others by now.
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
        flows.get(ifindex).is_some_and(|flows| *flows > share / 2)
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
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;
    const HOUR: Duration = Duration::from_secs(3600);
    const NOW: Timestamp = Timestamp(10_000 * S);

    fn key(source_port: u16) -> StreamKey {
        StreamKey {
            multicast_address: [0xff; 16],
            source: [0x20; 16],
            source_port,
            destination_port: 5004,
            vlan: 0,
            pad: 0,
        }
    }

    fn flow(source_port: u16, packets: u64, silent_s: u64) -> (StreamKey, StreamUsage) {
        let usage = StreamUsage {
            packets,
            last_ns: NOW.0 - silent_s * S,
            ..StreamUsage::default()
        };
        (key(source_port), usage)
    }

    fn gone(flows: &[(StreamKey, StreamUsage)], share: usize, is_full: bool) -> Vec<u16> {
        let gone = superfluous(NOW, flows, share, is_full, HOUR);
        gone.iter().map(|key| key.source_port).collect()
    }

    #[test]
    fn flow_stays_for_an_hour_where_there_is_room() {
        let flows = [flow(1, 1, 3500), flow(2, 9000, 3700)];
        assert_eq!(gone(&flows, 100, false), [2]);
    }

    #[test]
    fn flows_of_few_packets_make_room_in_a_share_or_a_map_that_is_half_full() {
        let flows = [flow(1, 2, 11), flow(2, 3, 11), flow(3, 1, 9)];
        assert_eq!(gone(&flows, 4, false), [1]);
        assert_eq!(gone(&flows, 100, true), [1]);
        assert_eq!(gone(&flows, 100, false), [0; 0]);
    }

    #[test]
    fn a_stream_outlives_any_number_of_made_up_flows() {
        let mut flows: Vec<_> = (0..99).map(|port| flow(port, 50, 1)).collect();
        flows.push(flow(5004, 90_000, 0));
        let gone = gone(&flows, 100, false);
        assert_eq!(gone.len(), 25);
        assert!(!gone.contains(&5004));
    }

    #[test]
    fn flows_of_an_address_that_is_not_managed_go() {
        assert_eq!(gone(&[flow(1, 90_000, 0)], 0, false), [1]);
    }

    fn delivered(ifindex: u32, port: u16, packets: u64) -> (DeliveredKey, Delivered) {
        let stream = key(port);
        let bytes = packets * 100;
        (
            DeliveredKey { ifindex, stream },
            Delivered { packets, bytes },
        )
    }

    #[test]
    fn flow_into_a_crowded_tap_goes_once_it_passes_nothing_between_two_looks() {
        let shares = HashMap::from([(4, 4), (5, 100)]);
        let first = [
            delivered(4, 1, 10),
            delivered(4, 2, 1),
            delivered(4, 3, 1),
            delivered(5, 1, 1),
        ];
        let (silent, passed) = crowding(&first, &shares, &Passed::new());
        assert_eq!(silent, []);
        let mut second = first;
        second[0].1.packets = 11;
        let (silent, passed) = crowding(&second, &shares, &passed);
        assert_eq!(silent, [first[1].0, first[2].0]);
        assert_eq!(passed, Passed::from([(first[0].0, 11)]));
    }
}
