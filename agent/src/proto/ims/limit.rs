//! Allowances: how many requests a source address may make, and how much work strangers may cause.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::net::Ipv6Addr;
use std::time::Duration;

use super::Hoa;
use crate::proto::Timestamp;

const SECOND_NS: u64 = 1_000_000_000;
/// How long a full table of sources is not searched again for entries that can go.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);
/// Shares of an allowance that is for sources of which nothing is known.
const SHARES: usize = 64;
/// Requests that are remembered, to know repeated ones. A power of two.
const REMEMBERED: usize = 1 << 16;

/// A token bucket as one time: when it would be full again (the generic cell rate algorithm).
#[derive(Clone, Copy, Debug)]
struct Bucket(Timestamp);

/// What a bucket holds and how fast it fills.
#[derive(Clone, Copy, Debug)]
struct Rate {
    /// Time of one token, nanoseconds.
    interval_ns: u64,
    /// Time of all tokens but one.
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

/// One allowance.
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

/// An allowance for all, besides a share for each prefix of 64 bits, which others cannot use up. Prefixes
/// that fall together by chance have one share.
#[derive(Debug)]
pub(super) struct Shared {
    shares: Vec<Allowance>,
    /// What a prefix may take beyond its share.
    rest: Allowance,
    /// Nobody can choose with whom to fall together.
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

    /// Whether there is work to be done for the source once more.
    pub(super) fn take(&mut self, now: Timestamp, source: Ipv6Addr) -> bool {
        let prefix = source.to_bits() >> 64;
        let place = self.hasher.hash_one(prefix) as usize % SHARES;
        let share = self.shares.get_mut(place);
        share.is_some_and(|share| share.take(now)) || self.rest.take(now)
    }
}

/// There is no room for another source.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Full;

/// An allowance for each source address.
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

    /// Whether the source may ask once more.
    pub(super) fn take(&mut self, now: Timestamp, source: Ipv6Addr) -> Result<bool, Full> {
        if let Some(bucket) = self.buckets.get_mut(&source) {
            return Ok(bucket.take(now, self.rate));
        }
        if self.buckets.len() >= self.capacity {
            let again = self.swept.is_none_or(|it| now.since(it) >= SWEEP_INTERVAL);
            if again {
                self.swept = Some(now);
                // A bucket that is full says no more than one that is not there.
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

/// Requests that were seen lately. One takes the place of another by chance, as the random number in
/// it falls; what is forgotten so is taken for new.
#[derive(Debug)]
pub(super) struct Repeats(Box<[u64]>);

impl Default for Repeats {
    fn default() -> Self {
        Self(vec![0; REMEMBERED].into_boxed_slice())
    }
}

impl Repeats {
    /// Whether the request was seen; it is from now on.
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
