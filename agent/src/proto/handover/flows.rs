//! Destination: what is known of each flow of a TAP.

use std::collections::HashMap;

use common::maps::StreamKey;

use super::judge::{Judge, Verdict};
use super::matching::Place;
use super::report::FlowReport;
use crate::proto::Timestamp;

/// Most flows that are told apart. The packets of further ones are placed by time.
const FLOWS: usize = 4096;

/// The flows of a TAP, each by an index that does not change.
#[derive(Debug, Default)]
pub(super) struct Flows {
    states: Vec<FlowState>,
    index: HashMap<Option<StreamKey>, usize>,
}

/// What is known of one flow.
#[derive(Debug)]
pub(super) struct FlowState {
    pub(super) report: FlowReport,
    /// When the newest packet came that was let go before the cut.
    pub(super) let_go: Option<Timestamp>,
    /// `None` before the cut.
    judge: Option<Judge>,
}

impl Flows {
    /// Index of a flow, which is made if need be, with a copy of `judge`.
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

    /// Gives every flow its judge: those of the cut, with the packets that the source says were
    /// delivered, and a copy of `unseen` to all others.
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

    /// To be called when the judges have seen all held packets.
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

    /// To be called when they have judged them all.
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

    /// Judges a packet, and counts it. Returns whether it is to be replayed.
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
