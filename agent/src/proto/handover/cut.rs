//! Source: where the guest's reception ended.

use std::time::Duration;

use common::signal::CutBasis;

use crate::proto::Timestamp;

/// Time that the hypervisor's report of the stop may take.
const STOP_REPORT: Duration = Duration::from_millis(5);

/// Where the guest's reception ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// With the frame of this number among those that entered the TAP.
    Number {
        /// The number, 0 for none.
        number: u64,
        /// Whether it may have been a later one.
        overflow: bool,
    },
    /// With that of `after`, or with the `had`th of those up to `until` that are of its queue: which they
    /// are, only their flows can tell.
    Among {
        /// The number of the last frame that is known to have been had.
        after: u64,
        /// How many more were.
        had: u64,
        /// Number of the last that may have been.
        until: u64,
    },
    /// At this moment at the earliest.
    Time(Timestamp),
}

impl Cut {
    pub(super) fn at_stop(stopped: Timestamp) -> Self {
        Self::Time(stopped - STOP_REPORT)
    }

    /// Whether the guest has had a frame of that number, which came at that time.
    pub fn covers(&self, frame: u64, at: Timestamp) -> bool {
        match *self {
            Self::Number { number, .. } => frame <= number,
            Self::Among { after, .. } => frame <= after,
            Self::Time(until) => at < until,
        }
    }

    /// How it is known.
    pub fn basis(&self) -> CutBasis {
        match self {
            Self::Number {
                overflow: false, ..
            } => CutBasis::Count,
            Self::Number { overflow: true, .. } | Self::Among { .. } => CutBasis::Overflow,
            Self::Time(_) => CutBasis::Time,
        }
    }
}
