//! Reception of each watched multicast address: native, from a relay, or both for a while.
//!
//! Each address that a local VM listens to, or that is joined for an arriving VM, has one `Reception`.
//! No other code writes `MANAGED`. If a relay is configured, the `Reception` watches the flows
//! permanently, asks a relay when native packets stay away, and releases the relay when native packets
//! return:
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
//! | `Doubtful` | `Both` | native packets are recorded before a relay is asked |
//! | `Both` | `Both` | the first copy passes |
//! | `ToRelay` | `RelayRecorded` | the relayed copy of a native packet that just passed is dropped |
//! | `Relay` | `Relay` | native was silent for longer than the difference of the paths' delays |
//! | `FromRelay` | `RelayRecorded` | passing packets are recorded before a native copy may pass |
//! | `ToNative` | `NativeAfterRelay` | a packet is dropped if its relayed copy passed |
//!
//! A flow that neither path brings has stopped at its source. The relay session stays, idle, and the
//! flow's next packet on either path starts the watch again.
//!
//! | module | holds |
//! |---|---|
//! | `course` | next state, from flows and session |
//! | `flow` | one flow on both paths |
//! | `watch` | reading of the flows |
//! | `session` | sessions with relays: request, renewal, end |
//! | `judge` | plausibility of a relay's announcement |
//! | `takeover` | failover to the next relay |
//! | `relays` | relays, their connections, round robin |
//! | `adopt` | sessions that an earlier agent left |
//! | `view` | view for the operator |

mod adopt;
mod course;
mod flow;
mod judge;
mod relays;
mod session;
mod sessions;
mod takeover;
mod view;
mod watch;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use common::backoff::Backoff;
use common::group;
use common::maps::{ManagedKey, Origins, StreamKey};
use common::signal;
use tracing::info;

use super::context::Context;
use super::filter::Filter;
use super::timer::Timer;
use super::{Output, Timestamp};

use adopt::Pinned;
use course::{State, Step};
use flow::Flow;
use relays::Relays;
use session::Session;
pub use view::{Mode, ModeView, RelayView, SessionView};

/// Limit of watched flows per address.
const MAX_FLOWS: usize = 256;
/// Limit of state transitions per run of the state machine.
const MAX_STEPS: usize = 4;

/// All receptions, the reading of their flows, and the relays.
///
/// Methods that take an event may change how addresses are received; [`Receptions::poll_change`]
/// returns the changes.
#[derive(Debug, Default)]
pub(super) struct Receptions {
    by_address: BTreeMap<ManagedKey, Reception>,
    relays: Relays,
    changes: VecDeque<Changed>,
    /// Token of the last request for flows.
    token: Option<u64>,
    pinned: Pinned,
}

/// New mode of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) key: ManagedKey,
    pub(super) mode: signal::ReceptionMode,
}

/// Reception of one address.
#[derive(Debug)]
struct Reception {
    state: State,
    entered: Timestamp,
    /// Time from which first packets of flows raise events.
    since: Timestamp,
    /// Start of the wait for native packets.
    probed_since: Timestamp,
    /// Time of the next reading of the flows.
    watch_at: Option<Timestamp>,
    /// Reason for the current state, for the operator.
    why: &'static str,
    /// Union of the filters of listeners and arriving VMs.
    filter: Filter,
    flows: BTreeMap<StreamKey, Flow>,
    /// Neither path brings packets.
    idle: bool,
    /// `Both` was entered because native packets returned.
    returning: bool,
    /// Start of the current window in which native reception must be whole.
    stable_since: Timestamp,
    /// Number of native losses in short sequence, and time of the last loss or return.
    failures: u32,
    turned: Option<Timestamp>,
    /// The session whose flows pass, or the first session being set up.
    session: Option<Session>,
    /// Latest time at which relayed packets passed.
    relayed_until: Timestamp,
    /// The next session, ready to replace `session`.
    standby: Option<Session>,
    /// Token of the last reading of the old session's flows before the standby takes over.
    swap: Option<u64>,
    /// Relays asked since a relay last sent packets.
    tried: BTreeSet<String>,
    /// No untried relay is left.
    exhausted: bool,
    /// Delay until relays that refused or were unreachable are asked again.
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
            backoff: sessions::ASK_AGAIN,
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
    /// Returns which copies of an address's packets pass; `None` for an unwatched address.
    pub(super) fn origins(&self, key: &ManagedKey) -> Option<Origins> {
        let reception = self.by_address.get(key)?;
        Some(reception.state.origins())
    }

    /// Returns the next mode change that the agent has not handled.
    pub(super) fn poll_change(&mut self) -> Option<Changed> {
        self.changes.pop_front()
    }

    /// Starts reception for the first local listener of an address. Here and below, `wanted` is the
    /// union of the filters of listeners and arriving VMs.
    pub(super) fn receive(&mut self, cx: &mut Context, key: ManagedKey, wanted: Filter) {
        if !self.by_address.contains_key(&key) && group::is_routable(&key.multicast_address) {
            let delay = cx.config.relay.map(|timing| timing.silence);
            self.begin_reception(cx, key, delay, wanted);
        }
    }

    /// Starts reception for an arriving VM, which received these flows at the source host. If `anew` is
    /// true, the next packet of each flow raises an event.
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
                    bridge: key.bridge,
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

    /// Takes a new union of filters for an address; relays get a new request.
    pub(super) fn want(&mut self, cx: &mut Context, key: ManagedKey, wanted: Filter) {
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        // `wanted` is empty while a listener's new source list is incomplete: sources are reported
        // before the listener.
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

    /// Runs the state machine of an address until it settles.
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
            // Flows that raise no more events were noticed already.
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

    /// Queues the mode of an address for those who wait for a final mode.
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
mod tests;
