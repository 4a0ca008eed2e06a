//! What is known of a HoA.

use std::time::Duration;

use common::mat::key::Key;
use common::mat::message::Moa;

use super::record::{FreedMoa, Record};
use super::{Now, whole_seconds};
use crate::proto::Timestamp;

/// MoAs in quarantine of one HoA; of more, those that end first are given free.
const MAX_FREED: usize = 64;

/// An address that a node no longer has, and nobody else may have yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    pub(super) address: [u8; 16],
    pub(super) until: Timestamp,
}

/// What is known of a HoA.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// Of its key; older keys are refused.
    pub(super) generation: u32,
    pub(super) key: Key,
    /// Of the last update.
    pub(super) sequence: u64,
    /// The mapping; empty for none.
    pub(super) moas: Vec<Moa>,
    /// How long the mapping was to live when it came.
    pub(super) lifetime: Duration,
    /// When it ends.
    pub(super) until: Timestamp,
    pub(super) freed: Vec<Freed>,
    /// Where it stands in the table of ends.
    pub(super) due: Option<Timestamp>,
}

/// What has ended.
#[derive(Debug, Default)]
pub(super) struct Over {
    pub(super) contains_mapping: bool,
    /// Addresses that others may have now.
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
        }
    }

    /// Whether there is a mapping.
    pub(super) fn lives(&self, now: Timestamp) -> bool {
        !self.moas.is_empty() && self.until > now
    }

    /// The node with an update taken in. Addresses that it no longer has are in quarantine until its
    /// old mapping, and the answers that named it, are over.
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

    /// The node at the beginning of a new generation.
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

    /// Takes the mapping away and puts its addresses in quarantine.
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

    /// Forgets what is over.
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

    /// When something ends next.
    pub(super) fn next_end(&self) -> Option<Timestamp> {
        let mapping = (!self.moas.is_empty()).then_some(self.until);
        self.freed.iter().map(|it| it.until).chain(mapping).min()
    }

    /// All addresses that nobody else may have, and until when.
    pub(super) fn holds(&self) -> impl Iterator<Item = ([u8; 16], Timestamp)> {
        let freed = self.freed.iter().map(|it| (it.address, it.until));
        let moas = self.moas.iter().map(|moa| (*moa.address, self.until));
        freed.chain(moas)
    }

    /// Its stored form.
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

    /// From its stored form. A clock that went back prolongs nothing beyond its lifetime.
    pub(super) fn restore(record: Record, key: Key, now: Now, max_lifetime: Duration) -> Self {
        let until = |until_ms: u64, longest: Duration| {
            let left = Duration::from_millis(until_ms.saturating_sub(now.wall_ms));
            now.monotonic + left.min(longest)
        };
        let lifetime = Duration::from_secs(record.lifetime_s.into());
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
        }
    }
}
