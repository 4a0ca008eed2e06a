//! Destination: state of each flow of a TAP.

use std::collections::HashMap;

use common::maps::StreamKey;

use super::judge::{Judge, Verdict};
use super::matching::Place;
use super::report::FlowReport;
use crate::proto::Timestamp;

/// Limit of distinguished flows. Packets of further flows are placed by time.
const FLOWS: usize = 4096;

/// Flows of a TAP, each with a constant index.
#[derive(Debug, Default)]
pub(super) struct Flows {
    states: Vec<FlowState>,
    index: HashMap<Option<StreamKey>, usize>,
}

/// Counters and judge of one flow.
#[derive(Debug)]
pub(super) struct FlowState {
    pub(super) report: FlowReport,
    /// Arrival time of the newest packet that was dropped before the cut.
    pub(super) let_go: Option<Timestamp>,
    /// Judge of the flow; `None` before the cut.
    judge: Option<Judge>,
}

impl Flows {
    /// Returns the index of a flow; adds a new flow with a copy of `judge`.
    pub(super) fn find_or_add(
        &mut self,
        stream: Option<StreamKey>,
        judge: Option<&Judge>,
    ) -> usize {
        let has_room = self.states.len() < FLOWS;
        let stream = stream.filter(|stream| has_room || self.index.contains_key(&Some(*stream)));
        let next = self.states.len();
        let index = *self.index.entry(stream).or_insert(next);
        if index == next {
            self.states.push(FlowState::new(stream, judge.cloned()));
        }
        index
    }

    pub(super) fn get_mut(&mut self, index: usize) -> Option<&mut FlowState> {
        self.states.get_mut(index)
    }

    pub(super) fn judge_mut(&mut self, index: usize) -> Option<&mut Judge> {
        self.states.get_mut(index)?.judge.as_mut()
    }

    /// Assigns a judge to every flow: the cut's judges, with the number of packets delivered at the
    /// source host, and a copy of `unseen` for all other flows.
    pub(super) fn set_judges(
        &mut self,
        judges: impl Iterator<Item = (StreamKey, u64, Judge)>,
        unseen: &Judge,
    ) {
        for (stream, delivered, judge) in judges {
            let index = self.find_or_add(Some(stream), None);
            if let Some(state) = self.states.get_mut(index)
                && state.report.stream == Some(stream)
            {
                state.report.delivered = delivered;
                state.judge = Some(judge);
            }
        }
        for state in &mut self.states {
            state.judge.get_or_insert_with(|| unseen.clone());
        }
    }

    /// Called after the judges have seen all held packets.
    pub(super) fn settle(&mut self) {
        for state in &mut self.states {
            if let Some(judge) = &mut state.judge {
                judge.settle();
                state.report.overflow = state
                    .let_go
                    .is_some_and(|at| !judge.has_anchor() && judge.is_due(at));
            }
        }
    }

    /// Called after the judges have judged all held packets.
    pub(super) fn go_live(&mut self) {
        for state in &mut self.states {
            if let Some(judge) = &mut state.judge {
                judge.go_live();
            }
        }
    }

    pub(super) fn reports(&self) -> Vec<FlowReport> {
        self.states.iter().map(FlowState::report).collect()
    }
}

impl FlowState {
    fn new(stream: Option<StreamKey>, judge: Option<Judge>) -> Self {
        Self {
            report: FlowReport {
                stream,
                ..FlowReport::default()
            },
            let_go: None,
            judge,
        }
    }

    fn report(&self) -> FlowReport {
        FlowReport {
            placed: self.judge.as_ref().map(Judge::placed),
            ..self.report.clone()
        }
    }

    /// Judges and counts a packet; returns true for a replay.
    pub(super) fn replays(
        &mut self,
        fingerprint: Option<u64>,
        place: Place,
        at: Timestamp,
    ) -> bool {
        let Some(judge) = &mut self.judge else {
            return false;
        };
        match judge.judge(fingerprint, place, at) {
            Verdict::Drop => {
                self.report.dropped += 1;
                false
            }
            Verdict::Replay { doubtful } => {
                self.report.duplicates += u64::from(doubtful);
                true
            }
        }
    }
}
