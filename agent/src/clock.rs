//! The clock of the eBPF programs' timestamps: `CLOCK_MONOTONIC` (`bpf_ktime_get_ns`).

use nix::time::{ClockId, clock_gettime};

use crate::value::Timestamp;

/// Returns the current time; 0 if the kernel refuses, which never happens for this clock.
pub fn now() -> Timestamp {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Timestamp(0), |time| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or_default();
        let nanoseconds = u64::try_from(time.tv_nsec()).unwrap_or_default();
        Timestamp(
            seconds
                .saturating_mul(1_000_000_000)
                .saturating_add(nanoseconds),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_does_not_go_back() {
        let first = now();
        assert!(first > Timestamp(0));
        assert!(now() >= first);
    }
}
