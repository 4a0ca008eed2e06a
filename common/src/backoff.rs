//! Delays that double until a longest one.

use core::time::Duration;

/// The delay before the next attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    next: Duration,
    first: Duration,
    last: Duration,
}

impl Backoff {
    /// Delays from the first to the longest.
    pub const fn new(first: Duration, last: Duration) -> Self {
        Self {
            next: first,
            first,
            last,
        }
    }

    /// The delay to wait now; the next is twice as long.
    pub fn delay(&mut self) -> Duration {
        let delay = self.next;
        self.next = doubled(delay, self.last);
        delay
    }

    /// Whether no attempt has failed yet.
    pub fn is_first(&self) -> bool {
        self.next == self.first
    }

    /// Starts anew, after an attempt that succeeded.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

/// A repetition whose distances double.
#[derive(Clone, Copy, Debug)]
pub struct Repeat {
    /// When the next one is due.
    pub next: Duration,
    /// How many there were.
    pub times: u32,
    distance: Duration,
}

impl Repeat {
    /// Due now, and again after the distance.
    pub const fn new(now: Duration, distance: Duration) -> Self {
        Self {
            next: now,
            times: 0,
            distance,
        }
    }

    /// Whether one is due; if so, the next is further away, `most` at most.
    pub fn is_due(&mut self, now: Duration, most: Duration) -> bool {
        if now < self.next {
            return false;
        }
        self.next = now + self.distance;
        self.distance = doubled(self.distance, most);
        self.times += 1;
        true
    }
}

fn doubled(delay: Duration, most: Duration) -> Duration {
    (delay * 2).min(most)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn delays_double_until_the_longest_and_start_anew() {
        let mut backoff = Backoff::new(ms(200), ms(500));
        assert!(backoff.is_first());
        assert_eq!(
            [(); 4].map(|()| backoff.delay()),
            [200, 400, 500, 500].map(ms)
        );
        assert!(!backoff.is_first());
        backoff.reset();
        assert_eq!(backoff.delay(), ms(200));
    }

    #[test]
    fn repetition_is_due_at_once_and_at_distances_that_double() {
        let mut repeat = Repeat::new(ms(0), ms(100));
        let due: [bool; 8] =
            [0, 99, 100, 299, 300, 549, 550, 800].map(|at| repeat.is_due(ms(at), ms(250)));
        assert_eq!(due, [true, false, true, false, true, false, true, true]);
        assert_eq!(repeat.times, 5);
    }
}
