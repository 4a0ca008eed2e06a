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

/// Judges the packets of one flow.
#[derive(Clone, Debug)]
pub(super) struct Judge {
    /// How, without a matcher or an anchor of it.
    by_time: Placed,
    /// From when on packets are replayed that only their time places.
    from: Timestamp,
    /// Until when such may have been delivered.
    doubtful: Timestamp,
    /// The same of packets that come after those of the source, if the cut may be too early.
    doubtful_matched: Timestamp,
    matcher: Option<Matcher>,
    /// Whether a packet has been replayed for its time.
    has_replayed_by_time: bool,
}

impl Judge {
    /// For a flow of which the source knows nothing: from when the NIC's last packet came.
    pub(super) fn unseen(nic: &NicCut, clock_ns: u64, clock: &ClockOffset) -> Self {
        let newest = newest_ns(nic);
        let from = match newest {
            Some(newest) => early(clock, newest) - MARGIN,
            None => early(clock, clock_ns) - CUT_AGE,
        };
        let doubtful = late(clock, newest.unwrap_or(clock_ns)) + MARGIN;
        Self::by_time(
            Placed::Unseen,
            from,
            doubtful,
            unsure_until(nic, clock_ns, clock),
        )
    }

    /// For a flow that the source knows, in a message that came at `now`.
    ///
    /// By time, it goes on where the NIC ended, because the guest has had everything that came
    /// before. A flow that had been silent by then allows for more: half of the silence.
    pub(super) fn of_flow(
        flow: &FlowCut,
        nic: &NicCut,
        now: Timestamp,
        clock_ns: u64,
        clock: &ClockOffset,
    ) -> Self {
        let newest = newest_ns(nic).unwrap_or(flow.last_ns);
        let silence = Duration::from_nanos(newest.saturating_sub(flow.last_ns));
        let from = early(clock, newest) - MARGIN.max(silence / 2);
        let doubtful = late(clock, flow.last_ns) + MARGIN;
        Self {
            matcher: Some(Matcher::new(&flow.fingerprints, now)),
            ..Self::by_time(
                Placed::Time,
                from,
                doubtful,
                unsure_until(nic, clock_ns, clock),
            )
        }
    }

    /// Without a cut.
    pub(super) fn blind(now: Timestamp, since: Timestamp) -> Self {
        Self::by_time(Placed::Blind, since, now, now)
    }

    fn by_time(
        by_time: Placed,
        from: Timestamp,
        doubtful: Timestamp,
        doubtful_matched: Timestamp,
    ) -> Self {
        Self {
            by_time,
            from,
            doubtful: doubtful.max(doubtful_matched),
            doubtful_matched,
            matcher: None,
            has_replayed_by_time: false,
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
            Found::New => Verdict::Replay {
                doubtful: at < self.doubtful_matched,
            },
            Found::Unknown if self.is_due(at) => {
                self.has_replayed_by_time = true;
                Verdict::Replay {
                    doubtful: at < self.doubtful,
                }
            }
            Found::Unknown => Verdict::Drop,
        }
    }

    /// Whether a packet of this time is replayed, if nothing else places it.
    pub(super) fn is_due(&self, at: Timestamp) -> bool {
        at >= self.from
    }

    /// Whether the flow is placed by a packet that both ends have.
    pub(super) fn has_anchor(&self) -> bool {
        self.matcher.as_ref().is_some_and(Matcher::has_anchor)
    }

    /// How the flow was placed.
    pub(super) fn placed(&self) -> Placed {
        if self.has_anchor() && !self.has_replayed_by_time {
            Placed::Fingerprint
        } else {
            self.by_time
        }
    }
}

/// When the last packet of any flow came at the source.
fn newest_ns(nic: &NicCut) -> Option<u64> {
    nic.flows.iter().map(|flow| flow.last_ns).max()
}

/// Until when a packet may have been delivered although it comes after those of the source.
fn unsure_until(nic: &NicCut, clock_ns: u64, clock: &ClockOffset) -> Timestamp {
    match nic.basis {
        CutBasis::Count => Timestamp::default(),
        CutBasis::Overflow | CutBasis::Time => late(clock, clock_ns),
    }
}

fn early(clock: &ClockOffset, theirs_ns: u64) -> Timestamp {
    clock.earliest(theirs_ns).unwrap_or_default()
}

fn late(clock: &ClockOffset, theirs_ns: u64) -> Timestamp {
    clock.latest(theirs_ns).unwrap_or_default()
}
