//! The longest pause that QEMU may aim at, which grows until the copy of the memory converges.
//!
//! QEMU copies memory in passes, each of what the VM has written during the one before, and stops
//! the VM for the last pass once that would take no longer than the limit. A low limit is a short
//! pause, but a VM that writes faster than the limit allows is copied for ever. So the limit begins
//! low, and doubles while passes go by that do not end it:
//!
//! ```text
//!  pass    1 . . . . . .|. . . . . .|. . . . . .|. . .
//!  limit   50 ms        | 100 ms    | 200 ms    | 300 ms: the most
//! ```

use std::time::Duration;

/// Passes over memory before the limit is doubled. One that converges at all mostly does in fewer.
const PASSES: u64 = 6;

/// The limit of one migration, as its passes go by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DowntimeLimit {
    limit: Duration,
    most: Duration,
    /// Pass in which it was set; none before it is set in the job.
    set: Option<u64>,
}

impl DowntimeLimit {
    /// From `least` on, up to `most`, which counts as no less than `least`.
    pub fn new(least: Duration, most: Duration) -> Self {
        Self {
            limit: least,
            most: most.max(least),
            set: None,
        }
    }

    /// Where it begins.
    pub fn least(&self) -> Duration {
        self.limit
    }

    /// What to set in the pass that runs now (counted from 1), if that is something new. The first
    /// call always says it.
    pub fn next(&mut self, iteration: u64) -> Option<Duration> {
        match self.set {
            Some(_) if self.limit >= self.most => return None,
            Some(set) if iteration < set.saturating_add(PASSES) => return None,
            Some(_) => self.limit = self.limit.saturating_mul(2).min(self.most),
            None => {}
        }
        self.set = Some(iteration);
        Some(self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn limit_is_set_once_while_passes_are_few() {
        let mut limit = DowntimeLimit::new(ms(50), ms(300));
        assert_eq!(limit.next(1), Some(ms(50)));
        for pass in [1, 2, 6] {
            assert_eq!(limit.next(pass), None, "in pass {pass}");
        }
    }

    #[test]
    fn limit_doubles_up_to_the_most_while_the_copy_does_not_converge() {
        let mut limit = DowntimeLimit::new(ms(50), ms(300));
        let steps: Vec<_> = (1..100)
            .filter_map(|pass| Some((pass, limit.next(pass)?)))
            .collect();
        let expected = [(1, 50), (7, 100), (13, 200), (19, 300)];
        assert_eq!(steps, expected.map(|(pass, it)| (pass, ms(it))));
    }

    #[test]
    fn most_below_the_beginning_is_the_beginning() {
        let mut limit = DowntimeLimit::new(ms(500), ms(300));
        assert_eq!(limit.next(1), Some(ms(500)));
        assert_eq!(limit.next(100), None);
    }
}
