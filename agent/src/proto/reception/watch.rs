//! Reading of the flows: the kernel's first-packet events, and its counters, read periodically while a
//! flow may fall silent or return.

use std::collections::BTreeSet;
use std::time::Duration;

use common::maps::{ManagedKey, Origin, StreamKey};

use super::course::State;
use super::{Reception, Receptions};
use crate::proto::context::Context;
use crate::proto::timer::Timer;
use crate::proto::{Output, RelayTiming, Stream, Timestamp};

/// Longest interval between two readings of slow flows.
const WATCH_LAST: Duration = Duration::from_secs(5);

impl Reception {
    /// Returns the delay until the next reading of the flows; `None` if first-packet events suffice.
    fn watch_in(&self, now: Timestamp, timing: &RelayTiming) -> Option<Duration> {
        let floor = timing.silence;
        match self.state {
            State::Native => self
                .flows
                .values()
                .filter(|flow| {
                    !flow.stopped
                        && (flow.is_judged(Origin::Native)
                            || flow.is_fresh(Origin::Native, Timestamp(0), now, floor))
                })
                .map(|flow| flow.threshold(Origin::Native, floor) / 4)
                .min()
                .map(|quarter| quarter.clamp(timing.watch_interval, WATCH_LAST)),
            State::Both
                if self.standby.is_none()
                    && (self.idle || self.flows.is_empty() && self.session.is_none()) =>
            {
                None
            }
            _ => Some(timing.watch_interval),
        }
    }
}

impl Receptions {
    /// Handles the first packet of a flow on one path since its address became managed.
    pub(in crate::proto) fn packet(
        &mut self,
        cx: &mut Context,
        flow: &StreamKey,
        origin: Origin,
        at: Timestamp,
    ) {
        let key = flow.managed();
        if cx.config.relay_timing(&key).is_none() {
            return;
        }
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        if !reception.filter.accepts(&flow.source) {
            return;
        }
        reception.idle = false;
        if let Some(flow) = reception.flow(flow) {
            flow.stopped = false;
            match origin {
                Origin::Native => flow.native.came(at),
                Origin::Relay => flow.relayed.came(at),
            }
        }
        self.look(cx, key);
    }

    /// Handles the read flows of watched addresses. Returns `false` if somebody else requested the
    /// reading.
    pub(in crate::proto) fn streams_read(
        &mut self,
        cx: &mut Context,
        token: u64,
        streams: &[(StreamKey, Stream)],
    ) -> bool {
        let Some(timing) = cx.config.relay else {
            return false;
        };
        let swapping = self
            .by_address
            .iter()
            .find(|(_, reception)| reception.swap == Some(token))
            .map(|(key, _)| *key);
        let watched = self.token.take_if(|asked| *asked == token);
        if watched.is_none() && swapping.is_none() {
            return false;
        }
        let mut read = BTreeSet::new();
        for (key, stream) in streams {
            let address = key.managed();
            let Some(reception) = self.by_address.get_mut(&address) else {
                continue;
            };
            read.insert(address);
            let answered = reception
                .session
                .as_ref()
                .is_some_and(|session| session.answered.is_some());
            let since = reception.probed_since;
            // No relay carries fragments or protocols other than UDP; such packets always pass
            // natively.
            if key.destination_port == 0 {
                continue;
            }
            if reception.filter.accepts(&key.source)
                && let Some(flow) = reception.flow(key)
            {
                let stopped = flow.stopped;
                flow.read(stream, timing.silence, answered, since);
                let goes_on = stopped && !flow.stopped;
                reception.idle &= !goes_on;
            }
        }
        if let Some(key) = swapping {
            self.swap(cx, key);
            read.insert(key);
        }
        for key in read {
            self.look(cx, key);
        }
        true
    }

    /// Requests a reading of the flows that may fall silent or return.
    pub(in crate::proto) fn watch(&mut self, cx: &mut Context) {
        let now = cx.now;
        let Some(timing) = cx.config.relay else {
            return;
        };
        // A busy host may answer later than the interval. Only one request is outstanding.
        if self.token.is_some() && !self.by_address.is_empty() {
            cx.timers.set(Timer::Watch, now + timing.watch_interval);
            return;
        }
        let mut keys = Vec::new();
        let mut unwatched = Vec::new();
        let mut next: Option<Timestamp> = None;
        for (key, reception) in &mut self.by_address {
            if key.vlan != 0 {
                continue;
            }
            let due = reception.watch_in(now, &timing).map(|wait| now + wait);
            if due.is_none() && reception.watch_at.is_some() {
                unwatched.push(*key);
            }
            if reception.watch_at.is_none_or(|at| now >= at) && due.is_some() {
                keys.push(*key);
                reception.watch_at = due;
            } else if due.is_none() {
                reception.watch_at = None;
            }
            next = next.into_iter().chain(reception.watch_at).min();
        }
        // The next packet of a flow that is no longer read must raise an event. Packets that arrive
        // before the kernel has the new entry raise no event, so one more reading follows.
        for key in unwatched {
            self.manage(cx, key, now);
            keys.push(key);
        }
        if let Some(next) = next {
            cx.timers.set(Timer::Watch, next);
        }
        if !keys.is_empty() {
            let token = cx.numbers.next();
            self.token = Some(token);
            cx.outputs.push_back(Output::ReadStreams { token, keys });
        }
    }

    /// Schedules the next reading of an address's flows.
    pub(super) fn watch_soon(&mut self, cx: &mut Context, key: ManagedKey) {
        let now = cx.now;
        let Some(timing) = cx.config.relay_timing(&key) else {
            return;
        };
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        let wait = reception.watch_in(now, &timing);
        let sooner = match (wait, reception.watch_at) {
            // One more reading follows the re-enabled events.
            (None, at) => at.map(|_| now + timing.watch_interval),
            (Some(wait), None) => Some(now + wait),
            (Some(wait), Some(at)) => Some(at.min(now + wait)),
        };
        if let Some(at) = sooner {
            reception.watch_at = Some(at);
            cx.timers.set_earlier(Timer::Watch, at);
        }
    }
}
