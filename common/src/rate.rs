//! How often something may happen: token buckets.
//!
//! A bucket is one time, when it would be full again (the generic cell rate algorithm). A token fills in
//! each interval, and a full bucket gives a burst.

use core::time::Duration;

/// Takes a token at `now_ns` from the bucket that is full at `full_ns`; returns when the bucket is full
/// then, or `None` where there is no token. `slack_ns` is the time of all tokens but one.
#[inline(always)]
pub const fn take(full_ns: u64, now_ns: u64, interval_ns: u64, slack_ns: u64) -> Option<u64> {
    let full_ns = if full_ns > now_ns { full_ns } else { now_ns };
    if full_ns - now_ns > slack_ns {
        return None;
    }
    Some(full_ns + interval_ns)
}

/// A bucket with a rate of its own.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    full_ns: u64,
    interval_ns: u64,
    slack_ns: u64,
}

impl Bucket {
    /// A full one: gives `burst` at once, and then one every interval.
    pub const fn new(burst: u32, interval: Duration) -> Self {
        let interval_ns = nanoseconds(interval);
        Self {
            full_ns: 0,
            interval_ns,
            slack_ns: interval_ns.saturating_mul(burst.saturating_sub(1) as u64),
        }
    }

    /// Takes a token; `false` if there is none. `now` is a time since any moment, always the same.
    pub fn take(&mut self, now: Duration) -> bool {
        let now_ns = nanoseconds(now);
        let full_ns = take(self.full_ns, now_ns, self.interval_ns, self.slack_ns);
        self.full_ns = full_ns.unwrap_or(self.full_ns);
        full_ns.is_some()
    }
}

/// Five hundred years fit.
const fn nanoseconds(time: Duration) -> u64 {
    time.as_nanos() as u64
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
