//! State machine of an address's reception, driven by flows and the relay session.

use std::time::Duration;

use common::maps::{Origin, Origins};

use super::{Flow, Reception, Session};
use crate::proto::{RelayTiming, Timestamp};

/// Native losses within this time of each other lengthen the next hold time.
const MEMORY: Duration = Duration::from_secs(60);
/// Limit of the hold time, unless the configuration asks for more.
const HOLD_MAX: Duration = Duration::from_secs(60);

/// State of an address's reception; see the diagram of [`super`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Native packets pass.
    Native,
    /// Native packets pass and are recorded, because none arrived yet or none arrived lately. With
    /// `ask_at`, a relay is asked at that time, else once a flow is silent.
    Doubtful { ask_at: Option<Timestamp> },
    /// A relay is asked; the first copy of each packet passes.
    Both,
    /// Relayed packets pass and are recorded, because native was silent.
    ToRelay { until: Timestamp },
    /// Relayed packets pass.
    Relay,
    /// Relayed packets pass and are recorded, because native returned or the relay is silent.
    FromRelay { until: Timestamp },
    /// Native packets pass unless a relayed copy passed.
    ToNative { until: Timestamp },
}

impl State {
    pub(super) fn origins(self) -> Origins {
        match self {
            Self::Native => Origins::Native,
            Self::Doubtful { .. } | Self::Both => Origins::Both,
            Self::ToRelay { .. } | Self::FromRelay { .. } => Origins::RelayRecorded,
            Self::Relay => Origins::Relay,
            Self::ToNative { .. } => Origins::NativeAfterRelay,
        }
    }

    /// Returns the time at which the state ends by itself.
    pub(super) fn deadline(self) -> Option<Timestamp> {
        match self {
            Self::Doubtful { ask_at } => ask_at,
            Self::ToRelay { until } | Self::FromRelay { until } | Self::ToNative { until } => {
                Some(until)
            }
            Self::Native | Self::Both | Self::Relay => None,
        }
    }

    /// Returns true if a relay must send in this state.
    pub(super) fn wants_relay(self) -> bool {
        !matches!(
            self,
            Self::Native | Self::Doubtful { .. } | Self::ToNative { .. }
        )
    }
}

/// Transition or action that the flows and the session require.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Enter another state, for the given reason.
    Enter(State, &'static str),
    /// Ask the next untried relay, because the packets of the current relay stay away.
    FailOver(&'static str),
    /// Wait for the next packet, because neither path brings packets.
    Idle,
}

impl Reception {
    /// Returns the next step. Callers repeat the call until the result is `None`.
    pub(super) fn step(&mut self, now: Timestamp, timing: &RelayTiming) -> Option<Step> {
        let floor = timing.silence;
        let settled = now + timing.settle;
        match self.state {
            State::Native => self
                .is_doubtful(now, floor)
                .then_some(Step::Enter(State::Doubtful { ask_at: None }, "")),
            State::Doubtful { ask_at } => {
                let silent = self
                    .live_flows()
                    .any(|flow| flow.is_silent(Origin::Native, now, floor));
                if silent {
                    self.native_lost(now);
                    Some(Step::Enter(State::Both, "native is silent"))
                } else if ask_at.is_some_and(|at| now >= at) {
                    Some(Step::Enter(State::Both, "no native packet has come"))
                } else {
                    self.is_proven(now, floor, ask_at.is_some())
                        .then_some(Step::Enter(State::Native, "native packets come"))
                }
            }
            State::Both => self.step_of_both(now, timing),
            State::ToRelay { until } => {
                if self.is_relay_silent(now, floor) {
                    Some(Step::Enter(
                        State::FromRelay { until: settled },
                        "the relay's packets have stopped",
                    ))
                } else {
                    (now >= until).then_some(Step::Enter(State::Relay, "native is silent"))
                }
            }
            State::Relay => {
                if self.is_relay_silent(now, floor) {
                    Some(Step::Enter(
                        State::FromRelay { until: settled },
                        "the relay's packets have stopped",
                    ))
                } else {
                    (self.native_since(self.entered) && now >= self.retry_at(timing)).then_some(
                        Step::Enter(
                            State::FromRelay { until: settled },
                            "native packets come again",
                        ),
                    )
                }
            }
            State::FromRelay { until } => {
                if now >= until {
                    Some(Step::Enter(State::Both, self.why))
                } else {
                    (self.is_relay_silent(now, floor) && self.can_fail_over())
                        .then_some(Step::FailOver("its packets have stopped"))
                }
            }
            State::ToNative { until } => {
                if self.lags(now, floor) {
                    self.native_lost(now);
                    Some(Step::Enter(State::Both, "native is silent again"))
                } else {
                    (now >= until).then_some(Step::Enter(State::Native, "native is stable"))
                }
            }
        }
    }

    fn step_of_both(&mut self, now: Timestamp, timing: &RelayTiming) -> Option<Step> {
        let floor = timing.silence;
        let Some(answered) = self.session.as_ref().and_then(|s| s.answered) else {
            // Native copies of recently relayed packets may still arrive.
            let until = self.relayed_until + timing.settle;
            let state = match until > now {
                true => State::ToNative { until },
                false => State::Native,
            };
            return self
                .is_proven(now, floor, true)
                .then_some(Step::Enter(state, "native packets come"));
        };
        let began = self.session.as_ref().map_or(now, |session| session.began);
        let waited = now.since(answered.max(self.entered));
        let delivered = self.is_delivered(now, floor);
        let native = self
            .flows
            .values()
            .any(|flow| flow.is_fresh(Origin::Native, Timestamp(0), now, floor));
        if delivered {
            self.exhausted = false;
        }
        let mut missing = false;
        for flow in self.flows.values_mut().filter(|flow| !flow.stopped) {
            let dead = !flow.is_fresh(Origin::Native, Timestamp(0), now, floor)
                && !flow.is_fresh(Origin::Relay, began, now, floor);
            let quiet = waited >= flow.quiet(floor);
            if !dead || !(quiet || flow.is_given_up(began, now, floor)) {
                continue;
            }
            if flow.active && !delivered && !self.exhausted {
                missing = true;
            } else {
                flow.stop();
            }
        }
        if missing && self.can_fail_over() {
            return Some(Step::FailOver("it sends nothing"));
        }
        if delivered && !native {
            if now.since(self.entered) < floor {
                return None;
            }
            if self.returning {
                self.native_lost(now);
            }
            let until = now + timing.settle;
            return Some(Step::Enter(State::ToRelay { until }, "native is silent"));
        }
        if self.lags(now, floor) {
            self.begin_window(now);
            return None;
        }
        if native && now.since(self.stable_since) >= self.hold(timing) {
            // A stopped flow proves neither that native packets arrive nor that native is whole.
            let whole = self.flows.values().all(Flow::is_whole);
            if whole && self.native_since(self.stable_since) {
                let until = now + timing.settle;
                return Some(Step::Enter(State::ToNative { until }, "native is stable"));
            }
            self.begin_window(now);
        }
        let waiting = self.live_flows().next().is_some();
        (!native && !delivered && !waiting && !missing && !self.idle && self.standby.is_none())
            .then_some(Step::Idle)
    }

    fn live_flows(&self) -> impl Iterator<Item = &Flow> {
        self.flows.values().filter(|flow| !flow.stopped)
    }

    /// Returns true if a flow was silent for half of its silence threshold.
    fn is_doubtful(&self, now: Timestamp, floor: Duration) -> bool {
        self.live_flows().any(|flow| {
            flow.is_judged(Origin::Native)
                && now.since(flow.native.last) > flow.threshold(Origin::Native, floor) / 2
        })
    }

    /// Returns true if native reception needs no relay.
    fn is_proven(&self, now: Timestamp, floor: Duration, probing: bool) -> bool {
        if self.is_doubtful(now, floor) {
            return false;
        }
        if !probing {
            return true;
        }
        let came = |flow: &Flow| flow.is_fresh(Origin::Native, self.probed_since, now, floor);
        let mut expected = self.live_flows().filter(|flow| flow.expected).peekable();
        if expected.peek().is_some() {
            expected.all(came)
        } else {
            self.flows.values().any(came)
        }
    }

    fn native_since(&self, since: Timestamp) -> bool {
        self.flows.values().any(|flow| flow.native.last > since)
    }

    /// Returns true if the relay of the session brings any flow.
    pub(super) fn is_delivered(&self, now: Timestamp, floor: Duration) -> bool {
        let Some(session) = self.session.as_ref().filter(|s| s.answered.is_some()) else {
            return false;
        };
        self.flows
            .values()
            .any(|flow| flow.is_fresh(Origin::Relay, session.began, now, floor))
    }

    /// Returns true if the relay brings no packets, although the relay did before or should by now.
    pub(super) fn is_relay_silent(&self, now: Timestamp, floor: Duration) -> bool {
        let Some(session) = self.session.as_ref().filter(|s| !s.flows.is_empty()) else {
            return true;
        };
        let waited = now.since(session.began);
        let given_up = |flow: &Flow| {
            flow.is_given_up(session.began, now, floor)
                || flow.active && !flow.stopped && waited >= flow.quiet(floor)
        };
        !self.is_delivered(now, floor) && self.flows.values().any(given_up)
    }

    /// Returns true if native is behind the relay in a flow that the relay brings.
    fn lags(&self, now: Timestamp, floor: Duration) -> bool {
        let began = self.session.as_ref().map_or(now, |session| session.began);
        self.flows
            .values()
            .any(|flow| flow.is_fresh(Origin::Relay, began, now, floor) && flow.lags(floor))
    }

    fn can_fail_over(&self) -> bool {
        !self.exhausted && self.standby.is_none() && self.swap.is_none()
    }

    /// Starts a window in which native must be whole.
    pub(super) fn begin_window(&mut self, now: Timestamp) {
        self.stable_since = now;
        for flow in self.flows.values_mut() {
            flow.set_mark();
        }
    }

    /// Records a loss of native reception. Frequent losses lengthen the next hold time.
    fn native_lost(&mut self, now: Timestamp) {
        let lately = self.turned.is_some_and(|at| now.since(at) < MEMORY);
        self.failures = if lately { self.failures + 1 } else { 0 };
        self.turned = Some(now);
    }

    /// Returns the time for which native must be whole.
    fn hold(&self, timing: &RelayTiming) -> Duration {
        timing
            .hold
            .saturating_mul(1 << self.failures.min(10))
            .min(HOLD_MAX.max(timing.hold))
    }

    /// Returns the earliest time at which a native packet counts as a return.
    fn retry_at(&self, timing: &RelayTiming) -> Timestamp {
        match self.failures {
            0 => self.entered,
            _ => self.entered + self.hold(timing) / 2,
        }
    }
}

impl Session {
    /// Returns the remaining time of the lease.
    pub(super) fn lease_left(&self, now: Timestamp) -> Duration {
        self.lease_end.since(now)
    }
}
