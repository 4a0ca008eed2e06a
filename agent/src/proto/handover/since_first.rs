//! Counters of the kernel that began before anybody looked at them.

/// How far a counter has gone since it was first looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct SinceFirst(Option<u64>);

impl SinceFirst {
    /// Looks at the counter, which shows `total`, and returns how far the counter has gone since the first
    /// look.
    pub fn look(&mut self, total: u64) -> u64 {
        total.saturating_sub(*self.0.get_or_insert(total))
    }

    /// How far the counter had gone when it showed `total`; `None` if nobody has looked yet.
    pub fn at(&self, total: u64) -> Option<u64> {
        Some(total.saturating_sub(self.0?))
    }

    /// Whether nobody has looked yet.
    pub fn is_new(&self) -> bool {
        self.0.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_counter_had_before_the_first_look_does_not_count() {
        let mut counter = SinceFirst::default();
        assert!(counter.is_new());
        assert_eq!(counter.at(40), None);
        assert_eq!(counter.look(40), 0);
        assert_eq!(counter.look(42), 2);
        assert_eq!(counter.at(43), Some(3));
        assert!(!counter.is_new());
    }
}
