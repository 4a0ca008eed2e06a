//! Timing of watchdog notifications (`WatchdogSec=` of systemd).
//!
//! The main loop of a program polls the heartbeat each time round, so a stuck loop misses its
//! notification.

use core::time::Duration;

/// Schedule of the notifications. Times count from an arbitrary fixed moment.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    period: Option<Duration>,
    due: Duration,
}

impl Heartbeat {
    /// A schedule for a watchdog with the timeout `patience`, without notifications for `None`. The
    /// first notification is due at once.
    pub fn new(patience: Option<Duration>) -> Self {
        Self {
            // Half of the timeout, so that one notification may be late.
            period: patience
                .map(|patience| patience / 2)
                .filter(|period| !period.is_zero()),
            due: Duration::ZERO,
        }
    }

    /// Returns whether to send a notification now; the next one is due after half the timeout.
    pub fn is_due(&mut self, now: Duration) -> bool {
        match self.period {
            Some(period) if now >= self.due => {
                self.due = now.saturating_add(period);
                true
            }
            _ => false,
        }
    }

    /// Time of the next notification; `None` without a watchdog.
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
