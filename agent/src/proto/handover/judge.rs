//! Destination: decision whether a held packet is replayed.

use std::time::Duration;

use common::signal::{CutBasis, FlowCut, NicCut};

use super::clock::ClockOffset;
use super::matching::{Found, Matcher, Place};
use super::report::Placed;
use crate::proto::Timestamp;

/// Margin before the source host's last packet, by the clocks. Packets that only time can place are
/// replayed from this much earlier. The destination host's path may be faster by this much, and the
/// time stamps of both ends are late by the interrupt latency.
pub const MARGIN: Duration = Duration::from_millis(2);
/// Maximum time from the stop to the creation of the cut message.
const CUT_AGE: Duration = Duration::from_millis(100);

/// Decision about a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The guest received the packet; the packet is dropped.
    Drop,
    /// The packet goes into the TAP.
    Replay {
        /// Whether the guest may have received the packet.
        doubtful: bool,
    },
}

/// A received cut message.
pub(super) struct Message<'a> {
    pub(super) nic: &'a NicCut,
    /// Send time, by the source host's clock.
    pub(super) clock_ns: u64,
    /// Arrival time of the message.
    pub(super) now: Timestamp,
    /// Offset of the source host's clock, updated by this message.
    pub(super) clock: ClockOffset,
}

/// Judges the packets of one flow.
#[derive(Clone, Debug)]
pub(super) struct Judge {
    /// Placement of the flow without a matcher or an anchor.
    by_time: Placed,
    /// Time from which packets are replayed that only time can place.
    from: Timestamp,
    /// Time until which such packets may have been delivered.
    doubtful: Timestamp,
    /// Earliest arrival of the source host's last packet at the source host.
    last: Timestamp,
    /// Time until which further packets may have arrived at the source host and reached the guest;
    /// `None` if the cut is exact.
    unsure: Option<Timestamp>,
    matcher: Option<Matcher>,
    /// How the source host determined its cut.
    basis: CutBasis,
    /// Whether a packet was replayed by time.
    has_replayed_by_time: bool,
    /// Whether a packet after the source host's last packet was replayed although the guest may have
    /// received that packet.
    has_doubted: bool,
}

impl Message<'_> {
    /// Returns the earliest and the latest local time of a time stamp of the source host.
    fn moment(&self, theirs_ns: u64) -> [Timestamp; 2] {
        [self.clock.earliest(theirs_ns), self.clock.latest(theirs_ns)]
            .map(Option::unwrap_or_default)
    }

    /// Returns the arrival of the latest packet of any flow at the source host.
    fn newest_ns(&self) -> Option<u64> {
        self.nic.flows.iter().map(|flow| flow.last_ns).max()
    }

    fn unsure(&self) -> Option<Timestamp> {
        let [_, sent] = self.moment(self.clock_ns);
        (self.nic.basis != CutBasis::Count).then_some(sent)
    }
}

impl Judge {
    /// Returns the judge of a flow that the source host did not report. Packets count from the arrival
    /// of the NIC's last packet.
    pub(super) fn unseen(message: &Message<'_>) -> Self {
        let newest = message.newest_ns();
        let (last_ns, margin) = newest.map_or((message.clock_ns, CUT_AGE), |ns| (ns, MARGIN));
        let [last, latest] = message.moment(last_ns);
        Self {
            from: last - margin,
            unsure: message.unsure(),
            basis: message.nic.basis,
            ..Self::by_time(Placed::Unseen, last, latest + MARGIN)
        }
    }

    /// Returns the judge of a reported flow.
    ///
    /// By time, the flow continues where the NIC's reception ended, because the guest received
    /// everything before. A flow that was silent at that time gets more margin: half of the silence.
    pub(super) fn of_flow(flow: &FlowCut, message: &Message<'_>) -> Self {
        let newest = message.newest_ns().unwrap_or(flow.last_ns);
        let silence = Duration::from_nanos(newest.saturating_sub(flow.last_ns));
        let [end, _] = message.moment(newest);
        let [last, latest] = message.moment(flow.last_ns);
        Self {
            from: end - MARGIN.max(silence / 2),
            unsure: message.unsure(),
            basis: message.nic.basis,
            matcher: Some(Matcher::new(&flow.fingerprints, message.now)),
            ..Self::by_time(Placed::Time, last, latest + MARGIN)
        }
    }

    /// Returns the judge for a handover without a cut.
    pub(super) fn blind(now: Timestamp, since: Timestamp) -> Self {
        Self::by_time(Placed::Blind, since, now)
    }

    fn by_time(by_time: Placed, last: Timestamp, doubtful: Timestamp) -> Self {
        Self {
            by_time,
            from: last,
            doubtful,
            last,
            unsure: None,
            matcher: None,
            basis: CutBasis::Time,
            has_replayed_by_time: false,
            has_doubted: false,
        }
    }

    /// Records a packet that was held at the cut.
    pub(super) fn see(&mut self, fingerprint: Option<u64>, place: Place, at: Timestamp) {
        if let (Some(matcher), Some(fingerprint)) = (&mut self.matcher, fingerprint) {
            matcher.see(fingerprint, place, at);
        }
    }

    /// Called after all held packets were seen, before the first judgement.
    pub(super) fn settle(&mut self) {
        if let Some(matcher) = &mut self.matcher {
            matcher.settle();
        }
    }

    /// Called after all held packets were judged.
    pub(super) fn go_live(&mut self) {
        if let Some(matcher) = &mut self.matcher {
            matcher.go_live();
        }
    }

    /// Judges a packet; called in order of arrival per flow.
    pub(super) fn judge(
        &mut self,
        fingerprint: Option<u64>,
        place: Place,
        at: Timestamp,
    ) -> Verdict {
        let found = match (&mut self.matcher, fingerprint) {
            (Some(matcher), Some(fingerprint)) => matcher.judge(fingerprint, place, at),
            _ => Found::Unknown,
        };
        match found {
            Found::Delivered => Verdict::Drop,
            Found::New => {
                let doubtful = self.is_unsure(at);
                self.has_doubted |= doubtful;
                Verdict::Replay { doubtful }
            }
            Found::Unknown if self.is_due(at) => {
                self.has_replayed_by_time = true;
                Verdict::Replay {
                    doubtful: at < self.doubtful || self.is_unsure(at),
                }
            }
            Found::Unknown => Verdict::Drop,
        }
    }

    /// Returns true if the guest may have received a packet of this time because the cut is too early.
    /// The anchor shows how far the destination host's path lags behind.
    fn is_unsure(&self, at: Timestamp) -> bool {
        let anchor = self.matcher.as_ref().and_then(Matcher::anchored_at);
        let lag = anchor.map_or(Duration::ZERO, |anchor| anchor.since(self.last));
        self.unsure.is_some_and(|until| at < until + lag + MARGIN)
    }

    /// Returns true if a packet of this time is replayed when only time can place the packet.
    pub(super) fn is_due(&self, at: Timestamp) -> bool {
        at >= self.from
    }

    /// Returns true if a packet present at both ends places the flow.
    pub(super) fn has_anchor(&self) -> bool {
        self.matcher
            .as_ref()
            .is_some_and(|matcher| matcher.anchored_at().is_some())
    }

    /// Returns how the flow was placed.
    pub(super) fn placed(&self) -> Placed {
        if !self.has_anchor() || self.has_replayed_by_time {
            return self.by_time;
        }
        match self.basis {
            CutBasis::Count => Placed::Fingerprint,
            // The cut is at most too early, and the guest received none of the replayed packets.
            CutBasis::Overflow if !self.has_doubted => Placed::Fingerprint,
            CutBasis::Overflow | CutBasis::Time => Placed::Estimate,
        }
    }
}
