//! Limits of rates.

use std::time::Duration;

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
