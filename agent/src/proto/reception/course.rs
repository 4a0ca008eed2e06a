//! What the reception of an address does next, from what its flows and its relay session show.

use std::time::Duration;

use common::maps::{Origin, Origins};

use super::{Flow, Reception, Session};
use crate::proto::{RelayTiming, Timestamp};

/// Native losses within so long of each other make the next return to native later.
const MEMORY: Duration = Duration::from_secs(60);
/// Longest that native must hold, unless the configuration asks for more.
const HOLD_MAX: Duration = Duration::from_secs(60);

/// Where the reception of an address stands; see the diagram of [`super`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Native packets pass.
    Native,
    /// Native packets pass and are recorded: none has come yet, or none lately. With `ask_at` a
    /// relay is asked then, else when a flow is silent.
    Doubtful { ask_at: Option<Timestamp> },
    /// A relay is asked, and the first copy of each packet passes.
    Both,
    /// Relayed packets pass and are recorded: native was silent.
    ToRelay { until: Timestamp },
    /// Relayed packets pass.
    Relay,
    /// Relayed packets pass and are recorded: native is back, or the relay is silent.
    FromRelay { until: Timestamp },
    /// Native packets pass unless a relayed copy has passed.
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

    /// When it goes on by itself.
    pub(super) fn deadline(self) -> Option<Timestamp> {
        match self {
            Self::Doubtful { ask_at } => ask_at,
            Self::ToRelay { until } | Self::FromRelay { until } | Self::ToNative { until } => {
                Some(until)
            }
            Self::Native | Self::Both | Self::Relay => None,
        }
    }

    /// Whether a relay is to send.
    pub(super) fn wants_relay(self) -> bool {
        !matches!(
            self,
            Self::Native | Self::Doubtful { .. } | Self::ToNative { .. }
        )
    }
}

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Into another state; why, for the operator.
    Enter(State, &'static str),
    /// The relay's packets stay away: the next relay, if there is one that was not tried.
    FailOver(&'static str),
    /// Neither way brings anything: wait for the next packet.
    Idle,
}

impl Reception {
    /// Returns what is to be done now. To be called until it is `None`.
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
            // Native copies of what a relay has brought just now may still come.
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
            // A source that has fallen silent shows neither that native comes nor that it is whole.
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

    /// Whether a flow has been silent for half of what makes it silent.
    fn is_doubtful(&self, now: Timestamp, floor: Duration) -> bool {
        self.live_flows().any(|flow| {
            flow.is_judged(Origin::Native)
                && now.since(flow.native.last) > flow.threshold(Origin::Native, floor) / 2
        })
    }

    /// Whether native reception needs no relay.
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

    /// Whether the relay of the session brings any flow.
    pub(super) fn is_delivered(&self, now: Timestamp, floor: Duration) -> bool {
        let Some(session) = self.session.as_ref().filter(|s| s.answered.is_some()) else {
            return false;
        };
        self.flows
            .values()
            .any(|flow| flow.is_fresh(Origin::Relay, session.began, now, floor))
    }

    /// Whether the relay has brought packets and brings none any more.
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

    /// Whether native is behind in a flow that the relay brings.
    fn lags(&self, now: Timestamp, floor: Duration) -> bool {
        let began = self.session.as_ref().map_or(now, |session| session.began);
        self.flows
            .values()
            .any(|flow| flow.is_fresh(Origin::Relay, began, now, floor) && flow.lags(floor))
    }

    fn can_fail_over(&self) -> bool {
        !self.exhausted && self.standby.is_none() && self.swap.is_none()
    }

    /// Begins to look whether native is whole.
    pub(super) fn begin_window(&mut self, now: Timestamp) {
        self.stable_since = now;
        for flow in self.flows.values_mut() {
            flow.set_mark();
        }
    }

    /// Native was there and is not: the more often lately, the longer it must hold next time.
    fn native_lost(&mut self, now: Timestamp) {
        let lately = self.turned.is_some_and(|at| now.since(at) < MEMORY);
        self.failures = if lately { self.failures + 1 } else { 0 };
        self.turned = Some(now);
    }

    /// How long native must be whole.
    fn hold(&self, timing: &RelayTiming) -> Duration {
        timing
            .hold
            .saturating_mul(1 << self.failures.min(10))
            .min(HOLD_MAX.max(timing.hold))
    }

    /// When a native packet is taken for its return at the earliest.
    fn retry_at(&self, timing: &RelayTiming) -> Timestamp {
        match self.failures {
            0 => self.entered,
            _ => self.entered + self.hold(timing) / 2,
        }
    }
}

impl Session {
    /// What is left of the lease.
    pub(super) fn lease_left(&self, now: Timestamp) -> Duration {
        self.lease_end.since(now)
    }
}
