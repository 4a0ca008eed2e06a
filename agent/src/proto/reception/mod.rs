//! How each watched multicast address is received: natively, from a relay, or both for a while.
//!
//! An address that a local VM listens to, or that is joined for an arriving one, has one
//! `Reception`. It alone writes `MANAGED`. Where a relay is configured it watches the flows for
//! ever, asks a relay when native packets stay away, and lets it go when they are back:
//!
//! ```text
//!            half the threshold             silent, or none after `relay.delay`
//!  Native ----------------------> Doubtful -----------------------------------> Both <-----+
//!   ^  ^                             |                                    |  ^    |         |
//!   |  +---- native packets ---------+      native is whole for `hold` ---+  |    | native  |
//!   |                                              |                         |    | silent, |
//!   |            settle                            v      lags again         |    | relay   |
//!   +----------------------------------------- ToNative ---------------------+    | sends   |
//!                                                                                 v         |
//!    a native packet, or the relay is silent                     settle        ToRelay      |
//!  FromRelay <---------------------------------- Relay <--------------------------+         |
//!      |  ^                                                                       |         |
//!      |  +------------------------ the relay is silent --------------------------+         |
//!      +--------------------------------- settle -------------------------------------------+
//! ```
//!
//! | state | [`Origins`] | why nothing is lost or doubled |
//! |---|---|---|
//! | `Native` | `Native` | no relay sends |
//! | `Doubtful` | `Both` | what comes natively is recorded before a relay is asked |
//! | `Both` | `Both` | the first copy passes |
//! | `ToRelay` | `RelayRecorded` | a native packet that came just before has its relayed copy dropped |
//! | `Relay` | `Relay` | native was silent for longer than the ways' delays differ |
//! | `FromRelay` | `RelayRecorded` | what passes is recorded before a native copy may pass |
//! | `ToNative` | `NativeAfterRelay` | a packet whose relayed copy has passed is dropped |
//!
//! A flow that neither way brings has stopped at its source: the relay goes on being asked, idle,
//! and the flow's next packet, by whichever way, starts the watch again.
//!
//! | module | holds |
//! |---|---|
//! | `course` | what comes next, from flows and session |
//! | `flow` | one flow by both ways |
//! | `watch` | reading the flows |
//! | `session` | sessions with relays: asking, renewing, their end |
//! | `judge` | whether what a relay announces can be true |
//! | `takeover` | the next relay |
//! | `relays` | the relays, their connections, whose turn it is |
//! | `adopt` | what an agent before this one has left |
//! | `view` | what the operator sees |

mod adopt;
mod course;
mod flow;
mod judge;
mod relays;
mod session;
mod takeover;
mod view;
mod watch;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use common::backoff::Backoff;
use common::maps::{ManagedKey, Origins, StreamKey};
use common::signal;
use tracing::info;

use super::context::Context;
use super::filter::{Filter, is_routable};
use super::timer::Timer;
use super::{Output, Timestamp};

use adopt::Pinned;
use course::{State, Step};
use flow::Flow;
use relays::Relays;
use session::Session;
pub use view::{Mode, ModeView, RelayView, SessionView};

/// Flows of one address that are watched.
const MAX_FLOWS: usize = 256;
/// Steps that one look at the flows may take.
const MAX_STEPS: usize = 4;

/// The receptions, the reading of their flows, and the relays.
///
/// Each method that is told of something may change how addresses are received;
/// [`Receptions::poll_change`] gives the changes.
#[derive(Debug, Default)]
pub(super) struct Receptions {
    by_address: BTreeMap<ManagedKey, Reception>,
    relays: Relays,
    changes: VecDeque<Changed>,
    /// Token of the flows that were asked for last.
    token: Option<u64>,
    pinned: Pinned,
}

/// How an address is received from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) key: ManagedKey,
    pub(super) mode: signal::ReceptionMode,
}

/// How one address is received.
#[derive(Debug)]
struct Reception {
    state: State,
    entered: Timestamp,
    /// Since when the flows' first packets raise events.
    since: Timestamp,
    /// Since when native packets are waited for.
    probed_since: Timestamp,
    /// When its flows are to be read again.
    watch_at: Option<Timestamp>,
    /// Why it is as it is.
    why: &'static str,
    /// What is wanted of the address, by all who want it.
    filter: Filter,
    flows: BTreeMap<StreamKey, Flow>,
    /// Neither way brings anything.
    idle: bool,
    /// `Both` was entered because native came back.
    returning: bool,
    /// Since when native has been whole.
    stable_since: Timestamp,
    /// Times that native was lost again soon, and when it was last found or lost.
    failures: u32,
    turned: Option<Timestamp>,
    /// The session whose flows pass, or the first one that is asked for.
    session: Option<Session>,
    /// Until when relayed packets have passed, at the latest.
    relayed_until: Timestamp,
    /// The session that is to take over.
    standby: Option<Session>,
    /// Token of the look at the old session's last packets before the standby takes over.
    swap: Option<u64>,
    /// Relays asked since one last sent.
    tried: BTreeSet<String>,
    /// No relay is left to try.
    exhausted: bool,
    /// Time until relays are asked again that could not be, or refused.
    backoff: Backoff,
    retry: Option<Timestamp>,
}

impl Reception {
    fn new(now: Timestamp, state: State) -> Self {
        Self {
            state,
            entered: now,
            since: now,
            probed_since: now,
            watch_at: None,
            why: "",
            filter: Filter::nothing(),
            flows: BTreeMap::new(),
            idle: false,
            returning: false,
            stable_since: now,
            failures: 0,
            turned: None,
            session: None,
            relayed_until: Timestamp::default(),
            standby: None,
            swap: None,
            tried: BTreeSet::new(),
            exhausted: false,
            backoff: session::ASK_AGAIN,
            retry: None,
        }
    }

    fn flow(&mut self, key: &StreamKey) -> Option<&mut Flow> {
        let room = self.flows.len() < MAX_FLOWS;
        match self.flows.entry(*key) {
            std::collections::btree_map::Entry::Occupied(entry) => Some(entry.into_mut()),
            std::collections::btree_map::Entry::Vacant(entry) => {
                room.then(|| entry.insert(Flow::default()))
            }
        }
    }
}

impl Receptions {
    /// Which copies of an address's packets pass.
    pub(super) fn origins(&self, key: &ManagedKey) -> Option<Origins> {
        let reception = self.by_address.get(key)?;
        Some(reception.state.origins())
    }

    /// Returns the next change that the agent does not know yet.
    pub(super) fn poll_change(&mut self) -> Option<Changed> {
        self.changes.pop_front()
    }

    /// A local VM is the first to listen to an address. Here and below `wanted` is what listeners and
    /// arriving VMs want together.
    pub(super) fn receive(&mut self, cx: &mut Context, key: ManagedKey, wanted: Filter) {
        if !self.by_address.contains_key(&key) && is_routable(&key.multicast_address) {
            let delay = cx.config.relay.map(|timing| timing.silence);
            self.begin_reception(cx, key, delay, wanted);
        }
    }

    /// An address is joined for an arriving VM, which received these flows at its source. `anew`
    /// is whether its next packet is to raise an event.
    pub(super) fn receive_for_arrival(
        &mut self,
        cx: &mut Context,
        key: ManagedKey,
        flows: &[signal::Flow],
        anew: bool,
        wanted: Filter,
    ) {
        let now = cx.now;
        let timing = cx.config.relay_timing(&key);
        let known = self.by_address.contains_key(&key);
        if !known {
            self.begin_reception(cx, key, timing.map(|timing| timing.delay), wanted);
        }
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        if timing.is_some() {
            for flow in flows.iter().filter(|flow| flow.destination_port != 0) {
                let key = StreamKey {
                    multicast_address: key.multicast_address,
                    source: *flow.source,
                    source_port: flow.source_port,
                    destination_port: flow.destination_port,
                    vlan: 0,
                    pad: 0,
                };
                if let Some(flow) = reception.flow(&key) {
                    flow.expected = true;
                    flow.active = true;
                }
            }
        }
        let Some(timing) = timing.filter(|_| known && anew && reception.state == State::Native)
        else {
            if known && anew {
                self.manage(cx, key, now);
            }
            return;
        };
        reception.probed_since = now;
        let ask_at = Some(now + timing.delay);
        self.enter(cx, key, State::Doubtful { ask_at }, "");
    }

    fn begin_reception(
        &mut self,
        cx: &mut Context,
        key: ManagedKey,
        delay: Option<Duration>,
        wanted: Filter,
    ) {
        let now = cx.now;
        if self.adopt_reception(cx, key, &wanted) {
            return;
        }
        let delay = delay.filter(|_| cx.config.relay_timing(&key).is_some());
        let state = delay.map_or(State::Native, |delay| State::Doubtful {
            ask_at: Some(now + delay),
        });
        let reception = Reception::new(now, state);
        self.by_address.insert(key, reception);
        self.want(cx, key, wanted);
        self.manage(cx, key, now);
        self.set_reception_timers(cx, key);
    }

    /// Stops watching an address that nobody needs.
    pub(super) fn forget(&mut self, cx: &mut Context, key: ManagedKey) {
        if self.by_address.contains_key(&key) {
            self.end_sessions(cx, key, "Nobody listens any more");
            self.by_address.remove(&key);
            cx.timers.stop(Timer::Reception(key));
            cx.timers.stop(Timer::Session(key));
        }
        self.pinned.forget(&key);
        cx.outputs.push_back(Output::Unmanage(key));
    }

    /// Writes `MANAGED`.
    fn manage(&mut self, cx: &mut Context, key: ManagedKey, since: Timestamp) {
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        reception.since = since;
        let origins = reception.state.origins();
        cx.outputs.push_back(Output::Manage {
            key,
            since,
            origins,
        });
    }

    /// Listeners or arriving VMs want something else of an address; a relay hears of that.
    pub(super) fn want(&mut self, cx: &mut Context, key: ManagedKey, wanted: Filter) {
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        // Sources of a new list are told before the list itself.
        if wanted == reception.filter || wanted == Filter::nothing() {
            return;
        }
        reception.filter = wanted;
        let filter = &reception.filter;
        reception
            .flows
            .retain(|flow, _| filter.accepts(&flow.source));
        if reception.session.is_some() || reception.standby.is_some() {
            self.request_again(cx, key);
        }
    }

    /// Does what an address's flows and session ask for.
    pub(super) fn look(&mut self, cx: &mut Context, key: ManagedKey) {
        let Some(timing) = cx.config.relay_timing(&key) else {
            return;
        };
        for _ in 0..MAX_STEPS {
            let now = cx.now;
            let Some(reception) = self.by_address.get_mut(&key) else {
                return;
            };
            match reception.step(now, &timing) {
                None => break,
                Some(Step::Enter(state, why)) => self.enter(cx, key, state, why),
                Some(Step::FailOver(why)) => self.fail_over(cx, key, why),
                Some(Step::Idle) => {
                    reception.idle = true;
                    reception.why = "the source is silent";
                }
            }
        }
        self.look_at_standby(cx, key);
        self.set_reception_timers(cx, key);
    }

    fn enter(&mut self, cx: &mut Context, key: ManagedKey, state: State, why: &'static str) {
        let now = cx.now;
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        let before = (reception.state, reception.mode());
        reception.state = state;
        reception.entered = now;
        reception.why = why;
        reception.idle = false;
        match state {
            State::Both => {
                reception.returning = matches!(before.0, State::FromRelay { .. });
                reception.begin_window(now);
            }
            State::Native if matches!(before.0, State::ToNative { .. }) => {
                reception.turned = Some(now);
            }
            _ => {}
        }
        let mode = reception.mode();
        let told = |mode| matches!(mode, Mode::Relay | Mode::Both);
        if mode != before.1 && (told(mode) || told(before.1)) {
            let address = std::net::Ipv6Addr::from(key.multicast_address);
            info!(multicast_address = %address, mode = mode.as_str(), why, "Reception has changed");
        }
        let since = match state {
            // What raises no event any more has been noticed already.
            State::Doubtful { .. } if before.0 == State::Native => reception.since,
            State::Relay | State::ToNative { .. } => reception.since,
            _ => now,
        };
        let origins = before.0.origins();
        if origins != state.origins() || since != reception.since {
            self.manage(cx, key, since);
        }
        if state == State::Native {
            self.end_sessions(cx, key, "Native reception is stable");
        }
        self.note_mode(key);
        self.tend(cx, key);
        self.set_reception_timers(cx, key);
    }

    /// Tells those who wait for an address how it is received.
    fn note_mode(&mut self, key: ManagedKey) {
        let mode = match self.by_address.get(&key).map(Reception::mode) {
            Some(Mode::Native) => signal::ReceptionMode::Native,
            Some(Mode::Relay) => signal::ReceptionMode::Relay,
            _ => return,
        };
        self.changes.push_back(Changed { key, mode });
    }

    fn set_reception_timers(&mut self, cx: &mut Context, key: ManagedKey) {
        let deadline = self
            .by_address
            .get(&key)
            .and_then(|reception| reception.state.deadline());
        match deadline {
            Some(deadline) => cx.timers.set(Timer::Reception(key), deadline),
            None => cx.timers.stop(Timer::Reception(key)),
        }
        self.watch_soon(cx, key);
    }
}

#[cfg(test)]
#[path = "../tests/relay_session.rs"]
mod session_tests;
#[cfg(test)]
#[path = "../tests/reception.rs"]
mod tests;
