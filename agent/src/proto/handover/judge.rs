//! Destination: whether a held packet is replayed.

use std::time::Duration;

use common::signal::{CutBasis, FlowCut, NicCut};

use super::clock::ClockOffset;
use super::matching::{Found, Matcher, Place};
use super::report::Placed;
use crate::proto::Timestamp;

/// So much earlier than the last packet of the source, by the clocks, are packets replayed that
/// only their time places: the destination's path may be so much faster, and the stamps of either
/// end are later than the packet by the time that interrupts take.
pub const MARGIN: Duration = Duration::from_millis(2);
/// The message of a cut was made at most so long after the stop.
const CUT_AGE: Duration = Duration::from_millis(100);

/// What is done with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The guest has had it.
    Drop,
    /// It goes into the TAP.
    Replay {
        /// Whether the guest may have had it.
        doubtful: bool,
    },
}

/// A cut as it came.
pub(super) struct Message<'a> {
    pub(super) nic: &'a NicCut,
    /// When it was sent, by the source's clock.
    pub(super) clock_ns: u64,
    /// When it came.
    pub(super) now: Timestamp,
    /// The source's clock, this message included.
    pub(super) clock: ClockOffset,
}

/// Judges the packets of one flow.
#[derive(Clone, Debug)]
pub(super) struct Judge {
    /// How, without a matcher or an anchor of it.
    by_time: Placed,
    /// From when on packets are replayed that only their time places.
    from: Timestamp,
    /// Until when such may have been delivered.
    doubtful: Timestamp,
    /// When the last packet of the source came there at the earliest.
    last: Timestamp,
    /// Until when more packets may have come there that the guest has had; `None` if there are no
    /// more.
    unsure: Option<Timestamp>,
    matcher: Option<Matcher>,
    /// How the source knows the last packet.
    basis: CutBasis,
    /// Whether a packet has been replayed for its time.
    has_replayed_by_time: bool,
    /// Whether one has been that the guest may have had, although it follows the last packet of the source.
    has_doubted: bool,
}

impl Message<'_> {
    /// The earliest and the latest moment that a time of the source's may have been.
    fn moment(&self, theirs_ns: u64) -> [Timestamp; 2] {
        [self.clock.earliest(theirs_ns), self.clock.latest(theirs_ns)]
            .map(Option::unwrap_or_default)
    }

    /// When the last packet of any flow came at the source.
    fn newest_ns(&self) -> Option<u64> {
        self.nic.flows.iter().map(|flow| flow.last_ns).max()
    }

    fn unsure(&self) -> Option<Timestamp> {
        let [_, sent] = self.moment(self.clock_ns);
        (self.nic.basis != CutBasis::Count).then_some(sent)
    }
}

impl Judge {
    /// For a flow of which the source knows nothing: from when the NIC's last packet came.
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

    /// For a flow that the source knows.
    ///
    /// By time, it goes on where the NIC ended, because the guest has had everything that came
    /// before. A flow that had been silent by then allows for more: half of the silence.
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

    /// Without a cut.
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

    /// Takes note of a packet that was held when the cut came.
    pub(super) fn see(&mut self, fingerprint: Option<u64>, place: Place, at: Timestamp) {
        if let (Some(matcher), Some(fingerprint)) = (&mut self.matcher, fingerprint) {
            matcher.see(fingerprint, place, at);
        }
    }

    /// To be called when all of them have been seen, before they are judged.
    pub(super) fn settle(&mut self) {
        if let Some(matcher) = &mut self.matcher {
            matcher.settle();
        }
    }

    /// To be called when all of them have been judged.
    pub(super) fn go_live(&mut self) {
        if let Some(matcher) = &mut self.matcher {
            matcher.go_live();
        }
    }

    /// Judges a packet; those of one flow in their order.
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

    /// Whether the guest may have had a packet of this time because the cut is too early. The
    /// anchor shows how far the destination's path lags behind.
    fn is_unsure(&self, at: Timestamp) -> bool {
        let anchor = self.matcher.as_ref().and_then(Matcher::anchored_at);
        let lag = anchor.map_or(Duration::ZERO, |anchor| anchor.since(self.last));
        self.unsure.is_some_and(|until| at < until + lag + MARGIN)
    }

    /// Whether a packet of this time is replayed, if nothing else places it.
    pub(super) fn is_due(&self, at: Timestamp) -> bool {
        at >= self.from
    }

    /// Whether the flow is placed by a packet that both ends have.
    pub(super) fn has_anchor(&self) -> bool {
        self.matcher
            .as_ref()
            .is_some_and(|matcher| matcher.anchored_at().is_some())
    }

    /// How the flow was placed.
    pub(super) fn placed(&self) -> Placed {
        if !self.has_anchor() || self.has_replayed_by_time {
            return self.by_time;
        }
        match self.basis {
            CutBasis::Count => Placed::Fingerprint,
            // Too early at most, and nobody had what was replayed.
            CutBasis::Overflow if !self.has_doubted => Placed::Fingerprint,
            CutBasis::Overflow | CutBasis::Time => Placed::Estimate,
        }
    }
}
