//! The downtime limit of a migration, which grows until the copy of memory converges.
//!
//! QEMU copies memory in passes; each pass copies what the VM wrote during the previous one. QEMU
//! stops the VM for the last pass as soon as that pass would take no longer than the downtime
//! limit. A low limit keeps the pause short, but the copy of a VM that writes faster than the limit
//! allows never ends. The limit therefore starts low and doubles while passes go by:
//!
//! ```text
//!  pass    1 . . . . . .|. . . . . .|. . . . . .|. . .
//!  limit   50 ms        | 100 ms    | 200 ms    | 300 ms: the maximum
//! ```

use std::time::Duration;

/// Passes over memory between two doublings. A copy that converges usually needs fewer.
const PASSES: u64 = 6;

/// The downtime limit of one migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DowntimeLimit {
    limit: Duration,
    most: Duration,
    /// Pass in which the limit was set; `None` before the job has a limit.
    set: Option<u64>,
}

impl DowntimeLimit {
    /// Creates a limit that starts at `least` and grows up to `most`, or stays at `least` if `most`
    /// is less.
    pub fn new(least: Duration, most: Duration) -> Self {
        Self {
            limit: least,
            most: most.max(least),
            set: None,
        }
    }

    /// Returns the current limit.
    pub fn least(&self) -> Duration {
        self.limit
    }

    /// Returns the limit to set in pass `iteration` (from 1), or `None` if the limit is unchanged.
    /// The first call always returns a limit.
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
