//! Source: what is known of the length of a TAP's queue.

use crate::proto::Timestamp;

/// The queue was empty when it was found at its shortest so often, with frames read in between: a
/// queue that is only short by chance is next found shorter as often as not.
const SURE: u32 = 16;
/// So often suffices if it is found so in every third sample, as where frames are few, and if no frame had
/// come since the sample before: on a machine that stands still now and then, samples and frames come together
/// when it goes on, before what reads the frames.
const SURE_OF_FEW: u32 = 4;
const OF_SAMPLES: u32 = 3;

/// What the kernel counts at a TAP, since it exists.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames that QEMU or vhost-net has read (`tx_packets`).
    pub taken: u64,
    /// Frames that found the queue full (`tx_dropped`).
    pub dropped: u64,
    /// Frames that QEMU has read of a TAP that vhost-net serves, since some beginning; `None` where that is
    /// not counted.
    pub own: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) at: Timestamp,
    /// Frames entered, sent ones included.
    pub(super) entered: u64,
    pub(super) counts: Counts,
}

impl Sample {
    /// Frames that have entered and neither been dropped nor been among the first `taken`, plus the
    /// constant.
    pub(super) fn left_of(&self, taken: u64) -> i64 {
        self.entered
            .wrapping_sub(self.counts.dropped)
            .wrapping_sub(taken)
            .cast_signed()
    }
}

/// What is known of the constant.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Evidence {
    /// Least difference so far, and frames read when it was last seen.
    pub(super) least: Option<(i64, u64)>,
    /// How often it was seen, with frames read in between.
    seen: u32,
    /// The same when no frame had come since the sample before, and frames read when it was last so.
    quiet: u32,
    quiet_at: Option<u64>,
    /// Difference when the queue was longest, at least.
    pub(super) greatest: Option<i64>,
    /// Samples before which frames had come or been read, after the first.
    samples: u32,
}

impl Evidence {
    pub(super) fn take(&mut self, last: Option<&Sample>, sample: &Sample) {
        let taken = sample.counts.taken;
        let difference = sample.left_of(taken);
        // Whether frames were dropped since the last sample: then the queue was full.
        let mut was_full = false;
        let mut is_quiet = false;
        if let Some(last) = last {
            is_quiet = last.entered == sample.entered;
            was_full = last.counts.dropped != sample.counts.dropped;
            let is_moved = (last.entered, last.counts) != (sample.entered, sample.counts);
            self.samples += u32::from(is_moved);
            // What had entered by the sample before was in the queue by this one.
            let entered = last.entered;
            let at_least = Sample { entered, ..*sample }.left_of(taken);
            self.greatest = self.greatest.max(Some(at_least));
        }
        match self.least {
            Some((least, _)) if difference > least => return,
            Some((least, at)) if difference == least => {
                // A queue that nobody reads keeps its length, too.
                self.seen += u32::from(at != taken && !was_full);
            }
            _ => {
                self.seen = u32::from(!was_full);
                (self.quiet, self.quiet_at) = (0, None);
            }
        }
        if is_quiet && !was_full && self.quiet_at != Some(taken) {
            self.quiet += 1;
            self.quiet_at = Some(taken);
        }
        self.least = Some((difference, taken));
    }

    /// Whether the queue was empty when it was shortest.
    pub(super) fn is_sure(&self) -> bool {
        self.seen >= SURE || self.quiet >= SURE_OF_FEW && self.is_mostly_empty()
    }

    pub(super) fn is_mostly_empty(&self) -> bool {
        self.seen * OF_SAMPLES >= self.samples
    }

    pub(super) fn is_longer_than_least(&self, sample: &Sample) -> bool {
        self.least
            .is_some_and(|(least, _)| sample.left_of(sample.counts.taken) > least)
    }
}
