//! Numbers nobody else has, and limits of rates.

use std::hash::Hasher;
use std::time::Duration;

use common::mat::seal::NONCE_BYTES;

/// Nonces and transactions: SipHash-2-4 of a counter under a key that each start of the node draws
/// anew, so that no nonce comes twice.
#[derive(Debug)]
pub(super) struct Random {
    key: (u64, u64),
    counter: u64,
}

impl Random {
    pub(super) fn new(seed: u128) -> Self {
        Self {
            key: ((seed >> 64) as u64, seed as u64),
            counter: 0,
        }
    }

    /// A new transaction.
    pub(super) fn number(&mut self) -> u64 {
        self.counter = self.counter.wrapping_add(1);
        #[allow(
            deprecated,
            reason = "the only SipHash with a key in std; deprecated for hash tables, not for this"
        )]
        let mut hasher = std::hash::SipHasher::new_with_keys(self.key.0, self.key.1);
        hasher.write_u64(self.counter);
        hasher.finish()
    }

    /// A new nonce.
    pub(super) fn nonce(&mut self) -> [u8; NONCE_BYTES] {
        let mut nonce = [0; NONCE_BYTES];
        let (words, _) = nonce.as_chunks_mut::<8>();
        for word in words {
            *word = self.number().to_be_bytes();
        }
        nonce
    }
}

/// So many at once, then one every interval.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    most: u32,
    interval: Duration,
    tokens: u32,
    filled: Duration,
}

impl Bucket {
    pub(super) const fn new(most: u32, interval: Duration) -> Self {
        Self {
            most,
            interval,
            tokens: most,
            filled: Duration::ZERO,
        }
    }

    /// Whether one more may go.
    pub(super) fn take(&mut self, now: Duration) -> bool {
        let gone = now.saturating_sub(self.filled).as_nanos() / self.interval.as_nanos().max(1);
        let new = u32::try_from(gone).unwrap_or(u32::MAX);
        if new > 0 {
            self.tokens = self.tokens.saturating_add(new).min(self.most);
            self.filled = if self.tokens == self.most {
                now
            } else {
                self.filled + self.interval * new
            };
        }
        let allowed = self.tokens > 0;
        self.tokens -= u32::from(allowed);
        allowed
    }
}

/// Distances of a repetition, which double.
#[derive(Clone, Copy, Debug)]
pub(super) struct Repeat {
    /// When it is due.
    pub(super) next: Duration,
    /// How often it has been done.
    pub(super) times: u32,
    distance: Duration,
}

impl Repeat {
    pub(super) fn new(now: Duration, distance: Duration) -> Self {
        Self {
            next: now,
            times: 0,
            distance,
        }
    }

    /// Whether it is due; if so, the next time is further away.
    pub(super) fn is_due(&mut self, now: Duration, most: Duration) -> bool {
        if now < self.next {
            return false;
        }
        self.next = now + self.distance;
        self.distance = (self.distance * 2).min(most);
        self.times += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn nonces_do_not_come_twice() {
        let mut one = Random::new(1);
        let mut other = Random::new(2);
        let nonces: BTreeSet<_> = (0..1000)
            .flat_map(|_| [one.nonce(), other.nonce()])
            .collect();
        assert_eq!(nonces.len(), 2000);
    }

    #[test]
    fn bucket_lets_a_burst_pass_and_then_the_rate() {
        let mut bucket = Bucket::new(3, Duration::from_millis(100));
        let mut passed = |ms| bucket.take(Duration::from_millis(ms));
        assert_eq!([0; 4].map(&mut passed), [true, true, true, false]);
        assert_eq!(
            [99, 100, 199, 200].map(&mut passed),
            [false, true, false, true]
        );
        assert_eq!([10_000; 4].map(&mut passed), [true, true, true, false]);
    }
}
