//! Offset of the other end's clock.

use std::time::Duration;

use crate::proto::Timestamp;

/// Difference of two clocks, from the time stamps in the other end's messages.
///
/// The transit of a message takes time, so each time stamp gives an upper bound of the difference
/// (local minus remote). The least bound is kept. The least bound exceeds the true difference by the
/// latency of the fastest message. That latency is at most the round-trip time of the connection, which
/// gives a lower bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockOffset {
    least_ns: Option<i128>,
    round_trip: Duration,
}

impl ClockOffset {
    /// Takes the time stamp `theirs_ns` of a message that arrived at `ours`.
    pub fn observe(&mut self, theirs_ns: u64, ours: Timestamp) {
        let difference = i128::from(ours.0) - i128::from(theirs_ns);
        self.least_ns = Some(
            self.least_ns
                .map_or(difference, |least| least.min(difference)),
        );
    }

    /// Takes the least round-trip time of the connection.
    pub fn set_round_trip(&mut self, round_trip: Duration) {
        self.round_trip = round_trip;
    }

    /// Returns an upper bound of the local clock minus the remote clock, nanoseconds. `None` before the
    /// first message.
    pub fn offset(&self) -> Option<i64> {
        self.least_ns.map(saturate)
    }

    /// Returns the latest local time that may correspond to the remote time `theirs_ns`.
    pub fn latest(&self, theirs_ns: u64) -> Option<Timestamp> {
        let ours = i128::from(theirs_ns) + self.least_ns?;
        Some(Timestamp(u64::try_from(ours.max(0)).unwrap_or(u64::MAX)))
    }

    /// Returns the earliest local time that may correspond to the remote time `theirs_ns`.
    pub fn earliest(&self, theirs_ns: u64) -> Option<Timestamp> {
        Some(self.latest(theirs_ns)? - self.round_trip)
    }
}

fn saturate(difference: i128) -> i64 {
    i64::try_from(difference).unwrap_or(if difference < 0 { i64::MIN } else { i64::MAX })
}
