//! Allowances that fill with time (token buckets): of a VM's port, and of a peer.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Timestamp;

/// What one may still do.
#[derive(Debug)]
pub(super) struct Bucket {
    /// Thousandths of what it may do.
    milli: u64,
    filled: Timestamp,
}

impl Bucket {
    /// A full one.
    pub(super) fn full(now: Timestamp, most: u32) -> Self {
        Self {
            milli: u64::from(most) * 1000,
            filled: now,
        }
    }

    /// Takes one; `false` if there is none. `most` come in each `interval`, which is also the burst.
    pub(super) fn take(&mut self, now: Timestamp, most: u32, interval: Duration) -> bool {
        let full = u128::from(most) * 1000;
        let elapsed = now.since(self.filled).as_nanos();
        let more = elapsed.saturating_mul(full) / interval.as_nanos().max(1);
        if more > 0 {
            let filled = u128::from(self.milli).saturating_add(more).min(full);
            self.milli = u64::try_from(filled).unwrap_or(u64::MAX);
            self.filled = now;
        }
        if self.milli < 1000 {
            return false;
        }
        self.milli -= 1000;
        true
    }
}

/// Allowances of peers, by name.
#[derive(Debug, Default)]
pub(super) struct Rates(BTreeMap<String, Bucket>);

/// Peers remembered before those are forgotten that are silent.
const MOST: usize = 1024;
/// How often peers may ask is said for so long.
const MINUTE: Duration = Duration::from_secs(60);

impl Rates {
    /// Takes one of a peer's requests; `false` if it has none left.
    pub(super) fn allow(&mut self, peer: &str, now: Timestamp, per_minute: u32) -> bool {
        if !self.0.contains_key(peer) {
            if self.0.len() >= MOST {
                // Who has not asked for a minute has all of it again.
                self.0.retain(|_, it| now.since(it.filled) < MINUTE);
            }
            self.0
                .insert(peer.to_owned(), Bucket::full(now, per_minute));
        }
        self.0
            .get_mut(peer)
            .is_some_and(|bucket| bucket.take(now, per_minute, MINUTE))
    }
}
