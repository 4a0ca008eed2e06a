//! The cut from the samples: the number of the last frame that the guest received.

use super::{AHEAD, Path, Placement};
use crate::proto::Timestamp;
use crate::proto::handover::cut::Cut;
use crate::proto::handover::evidence::Sample;

impl Placement {
    pub(super) fn cut(&self, stopped: Timestamp, settled: bool) -> Cut {
        let (_, is_known) = self.undelivered();
        let delivered = self.delivered();
        let (Some((least, _)), Some(greatest)) = (self.evidence.least, self.evidence.greatest)
        else {
            return self.at_stop(stopped);
        };
        let is_sure = self.evidence.is_sure();
        let is_certain = is_sure && is_known && settled;
        if self.queues > 1 {
            // Frames that QEMU held back of a queue may be old.
            let is_found = is_sure && is_known;
            let cut = is_found.then(|| self.cut_of_several(least, delivered, settled));
            return cut.flatten().unwrap_or_else(|| self.at_stop(stopped));
        }
        if !is_sure && self.evidence.is_mostly_empty() {
            return self.at_stop(stopped);
        }
        let ahead = if self.path == Path::Vhost { AHEAD } else { 0 };
        let full = greatest.saturating_sub_unsigned(self.capacity + ahead);
        let (number, exact) = self.reach(if is_sure { least } else { full }, delivered);
        Cut::Number {
            number: self.ceiling.map_or(number, |ceiling| number.min(ceiling)),
            overflow: !(is_certain && exact),
        }
    }

    /// Returns the cut if at least `delivered` frames were delivered, in any order, and `least` is the
    /// difference of empty queues. If the reads after a sample are at least QEMU's final reads, the VM
    /// ran at the sample.
    fn cut_of_several(&self, least: i64, delivered: u64, settled: bool) -> Option<Cut> {
        let last = self.history.back()?;
        let was_empty = |sample: &&Sample| {
            sample.left_of(sample.counts.taken) == least && sample.counts.taken <= delivered
        };
        let sample = self.history.iter().rev().find(was_empty)?;
        let after = self
            .ceiling
            .map_or(sample.entered, |it| it.min(sample.entered));
        let had = delivered - sample.counts.taken;
        let is_certain = settled && self.is_probed;
        Some(match self.ceiling {
            Some(until)
                if is_certain
                    && had > 0
                    && after < until
                    && last.counts.dropped == sample.counts.dropped =>
            {
                Cut::Among { after, had, until }
            }
            _ => Cut::Number {
                number: after,
                overflow: !(is_certain && had == 0),
            },
        })
    }

    /// Returns the number of the last of `delivered` frames, if `constant` is the difference of an
    /// empty queue, and whether no later frame can have been the last.
    pub(super) fn reach(&self, constant: i64, delivered: u64) -> (u64, bool) {
        let left = |sample: &Sample| sample.left_of(delivered).saturating_sub(constant);
        // If a sample's frames and no others were delivered, the last of them may have been dropped.
        let before = self.history.iter().rposition(|sample| left(sample) < 0);
        let at = || self.history.iter().rposition(|sample| left(sample) == 0);
        let mut later = self
            .history
            .iter()
            .skip(before.or_else(at).unwrap_or(usize::MAX));
        let Some(sample) = later.next() else {
            return (0, false);
        };
        let number = sample.entered.saturating_add(left(sample).unsigned_abs());
        // Frames that had entered by a sample have reached the queue, or its end, by the next.
        let mut reached = later.skip_while(|later| later.entered < number);
        let next = reached.nth(1);
        (
            number,
            next.is_some_and(|next| next.counts.dropped == sample.counts.dropped),
        )
    }
}
