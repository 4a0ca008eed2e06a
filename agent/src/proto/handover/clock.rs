//! What the clock of the other end shows.

use std::time::Duration;

use crate::proto::Timestamp;

/// Difference of two clocks, from times that one end has written into its messages.
///
/// A message takes some time, so each gives an upper limit of the difference (ours minus theirs),
/// of which the least is kept. It exceeds the truth by the latency of the fastest message. That is
/// at most the round-trip time of the connection, which makes a lower limit of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockOffset {
    least_ns: Option<i128>,
    round_trip: Duration,
}

impl ClockOffset {
    /// Takes in the time `theirs_ns` of a message that came at `ours`.
    pub fn observe(&mut self, theirs_ns: u64, ours: Timestamp) {
        let difference = i128::from(ours.0) - i128::from(theirs_ns);
        self.least_ns = Some(
            self.least_ns
                .map_or(difference, |least| least.min(difference)),
        );
    }

    /// Takes in the least round-trip time of the connection, if known.
    pub fn set_round_trip(&mut self, round_trip: Duration) {
        self.round_trip = round_trip;
    }

    /// Our clock minus theirs, nanoseconds, an upper limit. `None` before the first message.
    pub fn offset(&self) -> Option<i64> {
        self.least_ns.map(saturate)
    }

    /// The latest moment of our clock that may have been `theirs_ns` of theirs.
    pub fn latest(&self, theirs_ns: u64) -> Option<Timestamp> {
        let ours = i128::from(theirs_ns) + self.least_ns?;
        Some(Timestamp(u64::try_from(ours.max(0)).unwrap_or(u64::MAX)))
    }

    /// The earliest one.
    pub fn earliest(&self, theirs_ns: u64) -> Option<Timestamp> {
        Some(self.latest(theirs_ns)? - self.round_trip)
    }
}

fn saturate(difference: i128) -> i64 {
    i64::try_from(difference).unwrap_or(if difference < 0 { i64::MIN } else { i64::MAX })
}
