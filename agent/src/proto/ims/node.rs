//! State of a HoA.

use std::time::Duration;

use common::mat::key::Key;
use common::mat::message::Moa;

use super::record::{FreedMoa, Record, Version};
use super::{Now, whole_seconds};
use crate::proto::Timestamp;

/// Limit of quarantined MoAs per HoA; beyond the limit, the MoAs that end first are released.
const MAX_FREED: usize = 64;

/// An address in quarantine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    pub(super) address: [u8; 16],
    pub(super) until: Timestamp,
}

/// State of a HoA.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// Generation of the key; the server refuses older keys.
    pub(super) generation: u32,
    pub(super) key: Key,
    /// Sequence of the last update.
    pub(super) sequence: u64,
    /// MoAs of the mapping; empty for none.
    pub(super) moas: Vec<Moa>,
    /// Lifetime of the mapping at its registration.
    pub(super) lifetime: Duration,
    /// End of the mapping.
    pub(super) until: Timestamp,
    pub(super) freed: Vec<Freed>,
    /// Time of the node's entry in the table of ends.
    pub(super) due: Option<Timestamp>,
    /// Version of the record in the store; `None`: no record is stored.
    pub(super) stored: Option<Version>,
}

/// Result of [`Node::end`].
#[derive(Debug, Default)]
pub(super) struct Over {
    pub(super) contains_mapping: bool,
    /// Addresses that other nodes may register now.
    pub(super) addresses: Vec<[u8; 16]>,
}

impl Node {
    pub(super) fn new(generation: u32, key: Key) -> Self {
        Self {
            generation,
            key,
            sequence: 0,
            moas: Vec::new(),
            lifetime: Duration::ZERO,
            until: Timestamp(0),
            freed: Vec::new(),
            due: None,
            stored: None,
        }
    }

    pub(super) fn version(&self) -> Version {
        Version {
            generation: self.generation,
            sequence: self.sequence,
        }
    }

    /// Returns true if the store has this version of the node.
    pub(super) fn is_stored(&self) -> bool {
        self.stored == Some(self.version())
    }

    /// Returns true if the node has a mapping.
    pub(super) fn lives(&self, now: Timestamp) -> bool {
        !self.moas.is_empty() && self.until > now
    }

    /// Returns the node after an update. Removed addresses stay in quarantine until the former mapping,
    /// and the answers with that mapping, have ended.
    pub(super) fn updated(
        &self,
        sequence: u64,
        moas: Vec<Moa>,
        lifetime: Duration,
        now: Timestamp,
        quarantine: Timestamp,
    ) -> Self {
        let mut node = self.clone();
        node.free(now, quarantine);
        node.freed
            .retain(|freed| !moas.iter().any(|moa| *moa.address == freed.address));
        node.sequence = sequence;
        node.until = now + lifetime;
        node.lifetime = lifetime;
        node.moas = moas;
        node
    }

    /// Returns the node at the start of a new generation.
    pub(super) fn renewed(
        &self,
        generation: u32,
        key: Key,
        now: Timestamp,
        quarantine: Timestamp,
    ) -> Self {
        let mut node = self.clone();
        node.free(now, quarantine);
        node.generation = generation;
        node.key = key;
        node.sequence = 0;
        node
    }

    /// Removes the mapping and quarantines its addresses.
    fn free(&mut self, now: Timestamp, quarantine: Timestamp) {
        self.freed.retain(|freed| freed.until > now);
        let moas = std::mem::take(&mut self.moas);
        if self.until > now {
            let until = self.until.max(quarantine);
            self.freed.extend(moas.iter().map(|moa| Freed {
                address: *moa.address,
                until,
            }));
        }
        if let Some(excess) = self.freed.len().checked_sub(MAX_FREED) {
            self.freed.sort_by_key(|freed| freed.until);
            self.freed.drain(..excess);
        }
    }

    /// Returns true if the mappings of both nodes have an address in common.
    pub(super) fn maps_any_of(&self, other: &Self) -> bool {
        let maps = |address| other.moas.iter().any(|moa| moa.address == address);
        self.moas.iter().any(|moa| maps(moa.address))
    }

    /// Gives all addresses of the other node's mapping up, and the own mapping if it has one of them.
    pub(super) fn yield_to(&mut self, other: &Self) {
        if self.maps_any_of(other) {
            self.moas.clear();
        }
        self.freed
            .retain(|freed| !other.moas.iter().any(|moa| *moa.address == freed.address));
    }

    /// Removes the mapping and the quarantines that have ended.
    pub(super) fn end(&mut self, now: Timestamp) -> Over {
        let mut over = Over::default();
        if !self.moas.is_empty() && self.until <= now {
            over.contains_mapping = true;
            let moas = std::mem::take(&mut self.moas);
            over.addresses
                .extend(moas.into_iter().map(|moa| *moa.address));
        }
        self.freed.retain(|freed| {
            let keep = freed.until > now;
            if !keep {
                over.addresses.push(freed.address);
            }
            keep
        });
        over
    }

    /// Returns the next end of the mapping or of a quarantine.
    pub(super) fn next_end(&self) -> Option<Timestamp> {
        let mapping = (!self.moas.is_empty()).then_some(self.until);
        self.freed.iter().map(|it| it.until).chain(mapping).min()
    }

    /// Returns all addresses closed to other nodes, with their ends.
    pub(super) fn holds(&self) -> impl Iterator<Item = ([u8; 16], Timestamp)> {
        let freed = self.freed.iter().map(|it| (it.address, it.until));
        let moas = self.moas.iter().map(|moa| (*moa.address, self.until));
        freed.chain(moas)
    }

    /// Returns the stored form of the node.
    pub(super) fn record(&self, now: Now) -> Record {
        let wall_ms = |until: Timestamp| {
            let left = until.since(now.monotonic).as_millis();
            now.wall_ms
                .saturating_add(u64::try_from(left).unwrap_or(u64::MAX))
        };
        Record {
            generation: self.generation,
            sequence: self.sequence,
            lifetime_s: whole_seconds(self.lifetime),
            until_ms: wall_ms(self.until),
            moas: self.moas.clone(),
            freed: self
                .freed
                .iter()
                .map(|freed| FreedMoa {
                    address: freed.address.into(),
                    until_ms: wall_ms(freed.until),
                })
                .collect(),
        }
    }

    /// Restores a node. A clock that was set back extends nothing beyond its lifetime.
    pub(super) fn restore(record: Record, key: Key, now: Now, max_lifetime: Duration) -> Self {
        let until = |until_ms: u64, longest: Duration| {
            let left = Duration::from_millis(until_ms.saturating_sub(now.wall_ms));
            now.monotonic + left.min(longest)
        };
        let lifetime = Duration::from_secs(record.lifetime_s.into());
        let stored = Some(record.version());
        Self {
            generation: record.generation,
            key,
            sequence: record.sequence,
            moas: record.moas,
            lifetime,
            until: until(record.until_ms, lifetime),
            freed: record
                .freed
                .into_iter()
                .map(|freed| Freed {
                    address: *freed.address,
                    until: until(freed.until_ms, max_lifetime),
                })
                .collect(),
            due: None,
            stored,
        }
    }
}
