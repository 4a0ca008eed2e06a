//! Allowances: requests per source address, and work that unknown senders can cause.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::net::Ipv6Addr;
use std::time::Duration;

use super::Hoa;
use crate::proto::Timestamp;

const SECOND_NS: u64 = 1_000_000_000;
/// Time between two searches of a full source table for removable entries.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);
/// Number of shares of an allowance for unknown sources.
const SHARES: usize = 64;
/// Number of remembered requests for the detection of repeats; a power of two.
const REMEMBERED: usize = 1 << 16;

/// A token bucket, stored as the time at which the bucket is full again (generic cell rate algorithm).
#[derive(Clone, Copy, Debug)]
struct Bucket(Timestamp);

/// Capacity and refill rate of a bucket.
#[derive(Clone, Copy, Debug)]
struct Rate {
    /// Time per token, nanoseconds.
    interval_ns: u64,
    /// Time for all tokens except one.
    slack: Duration,
}

impl Rate {
    fn new(per_second: u32, burst: u32) -> Self {
        let interval_ns = SECOND_NS / u64::from(per_second.max(1));
        Self {
            interval_ns,
            slack: Duration::from_nanos(interval_ns.saturating_mul(u64::from(burst.max(1)) - 1)),
        }
    }
}

impl Bucket {
    fn take(&mut self, now: Timestamp, rate: Rate) -> bool {
        let full = self.0.max(now);
        let allowed = full.since(now) <= rate.slack;
        if allowed {
            self.0 = full + Duration::from_nanos(rate.interval_ns);
        }
        allowed
    }
}

/// A token bucket with its rate.
#[derive(Debug)]
pub(super) struct Allowance {
    bucket: Bucket,
    rate: Rate,
}

impl Allowance {
    pub(super) fn new(per_second: u32, burst: u32) -> Self {
        Self {
            bucket: Bucket(Timestamp(0)),
            rate: Rate::new(per_second, burst),
        }
    }

    pub(super) fn take(&mut self, now: Timestamp) -> bool {
        self.bucket.take(now, self.rate)
    }
}

/// An allowance for all sources, plus a reserved share per 64-bit prefix. Prefixes with the same hash
/// have one share together.
#[derive(Debug)]
pub(super) struct Shared {
    shares: Vec<Allowance>,
    /// Tokens beyond the shares.
    rest: Allowance,
    /// Random hash, so no sender can choose a prefix to collide with.
    hasher: RandomState,
}

impl Shared {
    pub(super) fn new(share_per_second: u32, rest_per_second: u32) -> Self {
        let share = || Allowance::new(share_per_second, share_per_second);
        Self {
            shares: (0..SHARES).map(|_| share()).collect(),
            rest: Allowance::new(rest_per_second, rest_per_second),
            hasher: RandomState::new(),
        }
    }

    /// Takes a token for a source; returns false if none is left.
    pub(super) fn take(&mut self, now: Timestamp, source: Ipv6Addr) -> bool {
        let prefix = source.to_bits() >> 64;
        let place = self.hasher.hash_one(prefix) as usize % SHARES;
        let share = self.shares.get_mut(place);
        share.is_some_and(|share| share.take(now)) || self.rest.take(now)
    }
}

/// The source table is full.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Full;

/// Allowances by source address.
#[derive(Debug)]
pub(super) struct Sources {
    buckets: HashMap<Ipv6Addr, Bucket>,
    rate: Rate,
    capacity: usize,
    swept: Option<Timestamp>,
}

impl Sources {
    pub(super) fn new(per_second: u32, burst: u32, capacity: usize) -> Self {
        Self {
            buckets: HashMap::new(),
            rate: Rate::new(per_second, burst),
            capacity,
            swept: None,
        }
    }

    /// Takes a token of a source; returns false if none is left.
    pub(super) fn take(&mut self, now: Timestamp, source: Ipv6Addr) -> Result<bool, Full> {
        if let Some(bucket) = self.buckets.get_mut(&source) {
            return Ok(bucket.take(now, self.rate));
        }
        if self.buckets.len() >= self.capacity {
            let again = self.swept.is_none_or(|it| now.since(it) >= SWEEP_INTERVAL);
            if again {
                self.swept = Some(now);
                // A full bucket carries no information.
                self.buckets.retain(|_, bucket| bucket.0 > now);
            }
            if self.buckets.len() >= self.capacity {
                return Err(Full);
            }
        }
        let mut bucket = Bucket(now);
        let allowed = bucket.take(now, self.rate);
        self.buckets.insert(source, bucket);
        Ok(allowed)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.buckets.len()
    }
}

/// Recently seen requests. A request replaces another at random, by the random number in the request; a
/// replaced request counts as new.
#[derive(Debug)]
pub(super) struct Repeats(Box<[u64]>);

impl Default for Repeats {
    fn default() -> Self {
        Self(vec![0; REMEMBERED].into_boxed_slice())
    }
}

impl Repeats {
    /// Returns true if the request was seen before, and remembers the request.
    pub(super) fn is_repeated(&mut self, hoa: &Hoa, transaction: u64) -> bool {
        let (halves, _) = hoa.as_chunks::<8>();
        let tag = halves.iter().fold(transaction, |tag, half| {
            (tag ^ u64::from_ne_bytes(*half))
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29)
        });
        let place = (tag >> 32) as usize % REMEMBERED;
        self.0
            .get_mut(place)
            .is_some_and(|slot| std::mem::replace(slot, tag) == tag)
    }
}
