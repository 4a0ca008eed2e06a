//! Source: end of the guest's reception.

use std::time::Duration;

use common::signal::CutBasis;

use crate::proto::Timestamp;

/// Maximum delay of the hypervisor's report of the stop.
const STOP_REPORT: Duration = Duration::from_millis(5);

/// End of the guest's reception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Reception ended with the frame of this number, counted by the TAP's gate.
    Number {
        /// Number of the last received frame; 0 for none.
        number: u64,
        /// Whether the guest may have received a later frame.
        overflow: bool,
    },
    /// Reception ended with frame `after`, or with the `had`th later frame up to `until` in the same
    /// queue. Only the flows tell which frames share a queue.
    Among {
        /// Number of the last frame that the guest certainly received.
        after: u64,
        /// Number of further received frames.
        had: u64,
        /// Number of the last frame that the guest may have received.
        until: u64,
    },
    /// Reception ended at this time or later.
    Time(Timestamp),
}

impl Cut {
    pub(super) fn at_stop(stopped: Timestamp) -> Self {
        Self::Time(stopped - STOP_REPORT)
    }

    /// Returns true if the guest received the frame with this number and arrival time.
    pub fn covers(&self, frame: u64, at: Timestamp) -> bool {
        match *self {
            Self::Number { number, .. } => frame <= number,
            Self::Among { after, .. } => frame <= after,
            Self::Time(until) => at < until,
        }
    }

    /// Returns how the source host determined the cut.
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
