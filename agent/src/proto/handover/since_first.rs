//! Kernel counters that started before the first reading.

/// Increase of a counter since its first reading.
#[derive(Clone, Copy, Debug, Default)]
pub struct SinceFirst(Option<u64>);

impl SinceFirst {
    /// Takes the counter's value `total` and returns the increase since the first call.
    pub fn look(&mut self, total: u64) -> u64 {
        total.saturating_sub(*self.0.get_or_insert(total))
    }

    /// Returns the increase at the value `total`; `None` before the first reading.
    pub fn at(&self, total: u64) -> Option<u64> {
        Some(total.saturating_sub(self.0?))
    }

    /// Returns true before the first reading.
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
