//! When a program lets the one who watches it know that it goes on.
//!
//! The loop of a program asks by itself, each time round, so that a loop that stands still is missed.

use core::time::Duration;

/// The times of the signs of life. Times are those since any moment that stays the same.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    period: Option<Duration>,
    due: Duration,
}

impl Heartbeat {
    /// For one who waits so long for a sign of life; for nobody if there is none. The first is due at
    /// once.
    pub fn new(patience: Option<Duration>) -> Self {
        Self {
            // One may be late without harm.
            period: patience
                .map(|patience| patience / 2)
                .filter(|period| !period.is_zero()),
            due: Duration::ZERO,
        }
    }

    /// Whether to give a sign now; the next one is due after half of the patience.
    pub fn is_due(&mut self, now: Duration) -> bool {
        match self.period {
            Some(period) if now >= self.due => {
                self.due = now.saturating_add(period);
                true
            }
            _ => false,
        }
    }

    /// When the next one is due; never if nobody waits.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.period.map(|_| self.due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn sign_is_given_at_once_and_after_each_half_of_the_patience() {
        let mut heartbeat = Heartbeat::new(Some(seconds(30)));
        assert!(heartbeat.is_due(seconds(1000)));
        assert_eq!(heartbeat.poll_timeout(), Some(seconds(1015)));
        assert!(!heartbeat.is_due(seconds(1000)));
        assert!(!heartbeat.is_due(seconds(1014)));
        assert!(heartbeat.is_due(seconds(1015)));
        assert_eq!(heartbeat.poll_timeout(), Some(seconds(1030)));
    }

    #[test]
    fn loop_that_was_late_gives_one_sign_and_no_burst() {
        let mut heartbeat = Heartbeat::new(Some(seconds(30)));
        assert!(heartbeat.is_due(seconds(0)));
        assert!(heartbeat.is_due(seconds(100)));
        assert!(!heartbeat.is_due(seconds(101)));
        assert_eq!(heartbeat.poll_timeout(), Some(seconds(115)));
    }

    #[test]
    fn nothing_is_due_where_nobody_waits() {
        for patience in [None, Some(Duration::ZERO), Some(Duration::from_nanos(1))] {
            let mut heartbeat = Heartbeat::new(patience);
            assert!(!heartbeat.is_due(seconds(1)));
            assert_eq!(heartbeat.poll_timeout(), None);
        }
    }
}
