//! Token buckets: for a VM's port, and for a peer.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Timestamp;

/// A token bucket.
#[derive(Debug)]
pub(super) struct Bucket {
    /// Thousandths of a token.
    milli: u64,
    filled: Timestamp,
}

impl Bucket {
    /// Creates a bucket with `most` tokens.
    pub(super) fn full(now: Timestamp, most: u32) -> Self {
        Self {
            milli: u64::from(most) * 1000,
            filled: now,
        }
    }

    /// Takes one token; returns false if none is left. `most` tokens are added per `interval`; `most`
    /// is also the burst.
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

/// Token buckets of peers, by name.
#[derive(Debug, Default)]
pub(super) struct Rates(BTreeMap<String, Bucket>);

/// Number of remembered peers above which silent peers are forgotten.
const MOST: usize = 1024;
/// Interval of a peer's rate limit.
const MINUTE: Duration = Duration::from_secs(60);

impl Rates {
    /// Takes one of a peer's tokens; returns false if none is left.
    pub(super) fn allow(&mut self, peer: &str, now: Timestamp, per_minute: u32) -> bool {
        if !self.0.contains_key(peer) {
            if self.0.len() >= MOST {
                // After a minute without requests, the bucket of a peer is full again.
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
