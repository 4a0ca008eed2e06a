//! Source: estimate of the empty queue's difference.

use crate::proto::Timestamp;

/// Number of occurrences of the least difference, with reads in between, that prove an empty queue. A
/// queue that is short only by chance is found shorter next time with even odds.
const SURE: u32 = 16;
/// Sufficient number of occurrences if every third sample shows the least difference, as with rare
/// frames, and if no frame arrived since the sample before. On a machine that stalls now and then,
/// samples and frames resume together, before the reader of the frames does.
const SURE_OF_FEW: u32 = 4;
const OF_SAMPLES: u32 = 3;

/// Kernel counters of a TAP, since the TAP's creation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames that QEMU or vhost-net read (`tx_packets`).
    pub taken: u64,
    /// Frames that found the queue full (`tx_dropped`).
    pub dropped: u64,
    /// Frames that QEMU read from a TAP served by vhost-net, since an arbitrary start; `None` if these
    /// reads are not counted.
    pub own: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    pub(super) at: Timestamp,
    /// Number of entered frames, including injected frames.
    pub(super) entered: u64,
    pub(super) counts: Counts,
}

impl Sample {
    /// Returns the frames that entered and were neither dropped nor among the first `taken` reads, plus
    /// the constant.
    pub(super) fn left_of(&self, taken: u64) -> i64 {
        self.entered
            .wrapping_sub(self.counts.dropped)
            .wrapping_sub(taken)
            .cast_signed()
    }
}

/// Statistics of the constant.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Evidence {
    /// Least difference so far, and the read count at its last occurrence.
    pub(super) least: Option<(i64, u64)>,
    /// Number of occurrences of the least difference, with reads in between.
    seen: u32,
    /// Number of occurrences without a new frame since the sample before, and the read count at the
    /// last of these.
    quiet: u32,
    quiet_at: Option<u64>,
    /// Lower bound of the difference when the queue was longest.
    pub(super) greatest: Option<i64>,
    /// Samples with new frames or reads since the sample before.
    samples: u32,
}

impl Evidence {
    pub(super) fn take(&mut self, last: Option<&Sample>, sample: &Sample) {
        let taken = sample.counts.taken;
        let difference = sample.left_of(taken);
        // A drop since the last sample proves a full queue.
        let mut was_full = false;
        let mut is_quiet = false;
        if let Some(last) = last {
            is_quiet = last.entered == sample.entered;
            was_full = last.counts.dropped != sample.counts.dropped;
            let is_moved = (last.entered, last.counts) != (sample.entered, sample.counts);
            self.samples += u32::from(is_moved);
            // Frames that had entered by the sample before are in the queue by this sample.
            let entered = last.entered;
            let at_least = Sample { entered, ..*sample }.left_of(taken);
            self.greatest = self.greatest.max(Some(at_least));
        }
        match self.least {
            Some((least, _)) if difference > least => return,
            Some((least, at)) if difference == least => {
                // A queue that nobody reads also keeps its length.
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

    /// Returns true if the queue was certainly empty at the least difference.
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
