//! What a handover came to, for the migration's record.

use std::time::Duration;

use common::maps::StreamKey;
use common::signal::NicCut;

/// How the destination found where a flow goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// By a packet that both ends have: exactly.
    Fingerprint,
    /// The same, but the source does not know exactly which was the last that the guest has had.
    Estimate,
    /// By time, because no packet could be told from all others at both ends.
    Time,
    /// By time, because the source knows nothing of the flow.
    Unseen,
    /// Without a word of the source: all that came since a given time was replayed.
    Blind,
}

/// What became of one flow. Packets of a frame that stands for several count one by one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowReport {
    /// The flow; `None` for all frames that are not IPv6, and flows beyond the limit.
    pub stream: Option<StreamKey>,
    /// How it was placed; `None` before the cut.
    pub placed: Option<Placed>,
    /// Packets that the guest has had at the source since the recording began, as the source says.
    pub delivered: u64,
    /// Packets that were held.
    pub held: u64,
    /// Held packets that the guest has had at the source.
    pub dropped: u64,
    /// Packets that went into the TAP.
    pub replayed: u64,
    /// Packets known to be lost: they had to make room, or the TAP takes none such.
    pub lost: u64,
    /// At most so many of the replayed ones has the guest had before, unless the flow's two paths
    /// are further apart than [`super::MARGIN`].
    pub duplicates: u64,
    /// Longest time that a replayed packet was held.
    pub longest_held: Duration,
    /// Whether packets were let go before the cut that should have been replayed.
    pub overflow: bool,
}

impl FlowReport {
    /// Takes in that the flow was not placed exactly after all.
    pub(super) fn doubt(&mut self) {
        if self.placed == Some(Placed::Fingerprint) {
            self.placed = Some(Placed::Estimate);
        }
    }
}

/// What became of the frames of one TAP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HoldReport {
    /// Its flows, in the order in which they came.
    pub flows: Vec<FlowReport>,
    /// Frames after the cut that found no room in `HELD`.
    pub lost_in_kernel: u64,
    /// How often the TAP was full.
    pub refused: u64,
    /// Packets that wait for the TAP.
    pub waiting: usize,
    /// Whether frames have passed the gate before it opened, because this host kept the agent from running.
    pub has_lapsed: bool,
    /// Frames that found the queue of the TAP full until the gate opened.
    pub tap_full: u64,
    /// The same at the source, since the recording began, as the source says.
    pub tap_full_at_source: Option<u64>,
}

impl HoldReport {
    /// Takes in that the source has found later that its VM had had more: so many may be doubled.
    pub fn revise(&mut self, cut: &NicCut) {
        for flow in &cut.flows {
            let stream = Some(flow.stream());
            // What was replayed blindly was doubted at once.
            let is_of =
                |it: &&mut FlowReport| it.stream == stream && it.placed != Some(Placed::Blind);
            for report in self.flows.iter_mut().filter(is_of) {
                let more = flow.delivered.saturating_sub(report.delivered);
                report.duplicates += more;
                report.delivered += more;
                if more > 0 {
                    report.doubt();
                }
            }
        }
    }
}
