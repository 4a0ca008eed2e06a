//! Result of a handover, for the migration's record.

use std::time::Duration;

use common::maps::StreamKey;
use common::signal::NicCut;

/// How the destination host determined where a flow continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// Exactly, by a packet that both ends have.
    Fingerprint,
    /// By a packet that both ends have, but the source host does not know exactly which packet was the
    /// guest's last.
    Estimate,
    /// By time, because no packet is unique at both ends.
    Time,
    /// By time, because the source host did not report the flow.
    Unseen,
    /// Without a report from the source host: all packets since a given time were replayed.
    Blind,
}

/// Result for one flow. Each packet of an aggregated frame counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FlowReport {
    /// Addresses, ports and VLAN of the flow; `None` for all frames that are not IPv6, and for flows
    /// beyond the limit.
    pub stream: Option<StreamKey>,
    /// Placement of the flow; `None` before the cut.
    pub placed: Option<Placed>,
    /// Packets that the guest received at the source host since the start of the recording, as the
    /// source host reports.
    pub delivered: u64,
    /// Packets that the gate held.
    pub held: u64,
    /// Held packets that the guest received at the source host.
    pub dropped: u64,
    /// Packets that entered the TAP.
    pub replayed: u64,
    /// Packets known to be lost: the memory limit was reached, or the TAP accepts no such packet.
    pub lost: u64,
    /// Upper bound of the replayed packets that the guest had received before, unless the flow's two
    /// paths differ by more than [`super::MARGIN`].
    pub duplicates: u64,
    /// Longest time that a replayed packet was held.
    pub longest_held: Duration,
    /// Whether the hold dropped packets before the cut that were due for a replay.
    pub overflow: bool,
}

impl FlowReport {
    /// Records that the flow was not placed exactly after all.
    pub(super) fn doubt(&mut self) {
        if self.placed == Some(Placed::Fingerprint) {
            self.placed = Some(Placed::Estimate);
        }
    }
}

/// Result for the frames of one TAP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HoldReport {
    /// Results of the flows, in order of the flows' first packets.
    pub flows: Vec<FlowReport>,
    /// Frames after the cut that found no room in `HELD`.
    pub lost_in_kernel: u64,
    /// Number of attempts that found the TAP full.
    pub refused: u64,
    /// Packets that still wait for the TAP.
    pub waiting: usize,
    /// Whether frames passed the gate before the gate opened, because this host kept the agent from
    /// running.
    pub has_lapsed: bool,
    /// Frames that found the TAP's queue full until the gate opened.
    pub tap_full: u64,
    /// Frames that found the source host's TAP full since the start of the recording, as the source
    /// host reports.
    pub tap_full_at_source: Option<u64>,
}

impl HoldReport {
    /// Takes a revised cut: the VM received more at the source host, so the additional packets may be
    /// duplicates.
    pub fn revise(&mut self, cut: &NicCut) {
        for flow in &cut.flows {
            let stream = Some(flow.stream());
            // Blindly replayed packets counted as doubtful already.
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
