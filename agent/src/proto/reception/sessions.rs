//! Sessions with relays: request, renewal, end.
//!
//! The transaction of the first `RelayRequest` identifies a session; a repeated request renews the
//! lease. If a relay is unreachable while its packets still arrive, the agent waits for the end of the
//! lease: the relay's kernel forwards without the relay's agent, which may restart meanwhile.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::time::Duration;

use common::backoff::Backoff;
use common::maps::{ManagedKey, RelayFlow, RelayFlowKey};
use common::signal::{Code, KnownFlow, Reason, RelayRelease, RelayRequest, RelayResponse};
use tracing::{debug, warn};

use super::Receptions;
use super::session::{ANSWER_TIMEOUT, Place, Session};
use crate::proto::Output;
use crate::proto::context::Context;
use crate::proto::refusal::bounded;
use crate::proto::timer::Timer;

/// Delay before relays that refused or were unreachable are asked again.
pub(super) const ASK_AGAIN: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
/// Shortest and longest lease that the agent accepts.
pub(super) const LEASE: [Duration; 2] = [Duration::from_millis(300), Duration::from_secs(3600)];
/// Limit of known flows in a request.
const MAX_KNOWN: usize = 64;

impl Receptions {
    /// Handles the session timer of an address.
    pub(in crate::proto) fn session_due(&mut self, cx: &mut Context, key: ManagedKey) {
        self.tend(cx, key);
        self.look(cx, key);
    }

    /// Maintains the sessions of an address: requests, renews, gives up. Called after every change of a
    /// session or relay, and by the session timer.
    pub(in crate::proto) fn tend(&mut self, cx: &mut Context, key: ManagedKey) {
        let now = cx.now;
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        if !reception.state.wants_relay() {
            cx.timers.stop(Timer::Session(key));
            return;
        }
        for place in [Place::Standby, Place::Session] {
            self.tend_one(cx, key, place);
        }
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        if reception.session.is_none() && reception.retry.is_none_or(|at| now >= at) {
            reception.retry = None;
            self.ask_next(cx, key);
        }
        self.set_session_timer(cx, key);
    }

    fn tend_one(&mut self, cx: &mut Context, key: ManagedKey, place: Place) {
        let now = cx.now;
        let Some(session) = self.session(key, place) else {
            return;
        };
        let up = session
            .relay
            .as_deref()
            .is_some_and(|relay| cx.is_up(relay));
        let Some(session) = self.session_mut(key, place) else {
            return;
        };
        if session.answered.is_none() {
            if !up || session.is_overdue(now) {
                let relay = session.relay.clone().unwrap_or_default();
                let why = if up {
                    let seconds = ANSWER_TIMEOUT.as_secs();
                    format!("Relay {relay} does not answer within {seconds} s")
                } else {
                    format!("Relay {relay} is down")
                };
                self.session_failed(cx, key, place, &why);
            }
            return;
        }
        if session.is_overdue(now) {
            session.asked = None;
        }
        if up && session.asked.is_none() && now >= session.renew_at {
            self.request(cx, key, place);
        }
        let (settle, floor) = cx
            .config
            .relay
            .map_or((Duration::ZERO, Duration::ZERO), |t| (t.settle, t.silence));
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        let delivered = place == Place::Session && reception.is_delivered(now, floor);
        let Some(session) = self.session_mut(key, place) else {
            return;
        };
        if now >= session.lease_end + settle && delivered {
            // Only the relay's kernel knows the end of its lease; arriving packets prove that the relay
            // still sends.
            session.lease_end = now + session.lease / 3;
        } else if now >= session.lease_end + settle {
            self.session_failed(cx, key, place, "The lease of the relay has ended");
        } else if place == Place::Session && now >= session.last_third() {
            self.fail_over(cx, key, "its lease ends and it does not answer");
        }
    }

    pub(super) fn set_session_timer(&mut self, cx: &mut Context, key: ManagedKey) {
        let now = cx.now;
        let Some(reception) = self.by_address.get(&key) else {
            return;
        };
        let settle = cx.config.relay.map_or(Duration::ZERO, |t| t.settle);
        let sessions = reception.session.iter().chain(&reception.standby);
        let dues = sessions.flat_map(|session| {
            let overdue = session.asked.map(|asked| asked + ANSWER_TIMEOUT);
            let answered = session.answered.map(|_| {
                [
                    session.renew_at,
                    session.last_third(),
                    session.lease_end + settle,
                ]
            });
            overdue.into_iter().chain(answered.into_iter().flatten())
        });
        // A past deadline was handled already, or waits for the relay's connection.
        let due = dues.chain(reception.retry).filter(|due| *due > now).min();
        match due {
            Some(due) => cx.timers.set(Timer::Session(key), due),
            None => cx.timers.stop(Timer::Session(key)),
        }
    }

    /// Asks the next untried relay, or retries later if there is none.
    fn ask_next(&mut self, cx: &mut Context, key: ManagedKey) {
        let Some(reception) = self.by_address.get(&key) else {
            return;
        };
        let Some(relay) = self.relays.pick(&reception.tried, &cx.links, None) else {
            self.ask_later(cx, key);
            return;
        };
        self.begin_session(cx, key, Place::Session, relay);
    }

    fn ask_later(&mut self, cx: &mut Context, key: ManagedKey) {
        let now = cx.now;
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        reception.tried.clear();
        reception.exhausted = true;
        reception.retry = Some(now + reception.backoff.delay());
        if let Some(reasons) = self.relays.complaint(now) {
            warn!(
                multicast_address = %Ipv6Addr::from(key.multicast_address),
                reasons,
                "No relay can be had; what does not come natively is missing"
            );
        }
    }

    pub(super) fn begin_session(
        &mut self,
        cx: &mut Context,
        key: ManagedKey,
        place: Place,
        relay: String,
    ) {
        let transaction = cx.numbers.next();
        let now = cx.now;
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        reception.tried.insert(relay.clone());
        let session = Session::new(Some(relay), transaction, now);
        match place {
            Place::Session => reception.session = Some(session),
            Place::Standby => reception.standby = Some(session),
        }
        self.request(cx, key, place);
    }

    /// Sends a new request to the relays of an address after a change of the wanted filter.
    pub(super) fn request_again(&mut self, cx: &mut Context, key: ManagedKey) {
        for place in [Place::Session, Place::Standby] {
            let session = self.session(key, place);
            if session.is_some_and(|session| session.relay.is_some()) {
                self.request(cx, key, place);
            }
        }
        self.set_session_timer(cx, key);
    }

    fn request(&mut self, cx: &mut Context, key: ManagedKey, place: Place) {
        let now = cx.now;
        let agent_address = cx.config.address.octets();
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        let filter = reception.filter.clone();
        let flows = reception
            .flows
            .iter()
            .filter(|(flow, state)| flow.source_port != 0 && !state.stopped)
            .take(MAX_KNOWN)
            .map(|(flow, _)| KnownFlow {
                source: flow.source.into(),
                source_port: flow.source_port,
                destination_port: flow.destination_port,
            })
            .collect();
        let request = RelayRequest {
            multicast_address: key.multicast_address.into(),
            filter_mode: filter.mode as u8,
            sources: filter.sources.iter().map(|s| s.octets().into()).collect(),
            agent_address: agent_address.into(),
            flows,
        };
        let Some(session) = self.session_mut(key, place) else {
            return;
        };
        if session.filters[0] != filter {
            session.filters.swap(0, 1);
            session.filters[0] = filter;
        }
        session.asked.get_or_insert(now);
        let transaction = session.transaction;
        if let Some(relay) = session.relay.clone() {
            cx.send(&relay, transaction, &request.into());
        }
    }

    fn find_session(&self, relay: &str, transaction: u64) -> Option<(ManagedKey, Place)> {
        let is = |session: &Option<Session>| {
            session
                .as_ref()
                .is_some_and(|session| session.is_with(relay, transaction))
        };
        self.by_address.iter().find_map(|(key, it)| {
            if is(&it.session) {
                Some((*key, Place::Session))
            } else {
                is(&it.standby).then_some((*key, Place::Standby))
            }
        })
    }

    /// Handles a relay's answer: the relay joined and sends, or found a new flow.
    pub(super) fn relay_responded(
        &mut self,
        cx: &mut Context,
        relay: &str,
        transaction: u64,
        response: &RelayResponse,
    ) {
        let now = cx.now;
        let Some((key, place)) = self.find_session(relay, transaction) else {
            // The relay has not heard yet that the session ended.
            let reason = Reason::new(Code::RELEASED, "This session has ended");
            cx.send(relay, transaction, &RelayRelease(reason).into());
            return;
        };
        let flows = match self.judge(cx, key, place, response) {
            Ok(flows) => flows,
            Err(lie) => {
                cx.counters.relay_lies += 1;
                let why = format!("Relay {relay} announces {lie}");
                self.session_failed(cx, key, place, &why);
                self.tend(cx, key);
                self.look(cx, key);
                return;
            }
        };
        let Some(session) = self.session_mut(key, place) else {
            return;
        };
        session.answered.get_or_insert(now);
        session.asked = None;
        session.lease = Duration::from_millis(response.lease_ms).clamp(LEASE[0], LEASE[1]);
        session.lease_end = now + session.lease;
        session.renew_at = now + session.lease / 3;
        session.address = Some(*response.relay_address);
        match place {
            Place::Session => self.set_flows(cx, key, flows),
            Place::Standby => session.flows = flows,
        }
        if let Some(reception) = self.by_address.get_mut(&key) {
            reception.backoff.reset();
            if place == Place::Session && reception.swap.is_none() {
                // The relay answers again, so the standby is unnecessary unless packets stay away.
                let floor = cx.config.relay.map_or(Duration::ZERO, |t| t.silence);
                if reception.is_delivered(now, floor) {
                    self.drop_standby(cx, key, "The first relay answers again");
                }
            }
        }
        self.relays.answered(relay);
        self.look(cx, key);
        self.set_session_timer(cx, key);
    }

    /// Replaces the flows of an address's session, also in the kernel.
    pub(super) fn set_flows(
        &mut self,
        cx: &mut Context,
        key: ManagedKey,
        flows: BTreeMap<RelayFlowKey, RelayFlow>,
    ) {
        let now = cx.now;
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        let Some(session) = reception.session.as_mut() else {
            return;
        };
        if !session.flows.is_empty() {
            reception.relayed_until = now;
        }
        for old in session.flows.keys() {
            if !flows.contains_key(old) {
                cx.outputs.push_back(Output::RelayFlowRemove(*old));
            }
        }
        for (flow, value) in &flows {
            if session.flows.get(flow) != Some(value) {
                cx.outputs.push_back(Output::RelayFlowSet {
                    key: *flow,
                    value: *value,
                });
            }
        }
        session.flows = flows;
    }

    /// Handles a refusal, or the end of a session by the relay.
    pub(super) fn relay_released(
        &mut self,
        cx: &mut Context,
        relay: &str,
        transaction: u64,
        reason: &Reason,
    ) {
        let Some((key, place)) = self.find_session(relay, transaction) else {
            return;
        };
        cx.counters.relay_refusals += 1;
        let why = format!("Relay {relay} refuses: {}", bounded(&reason.text));
        let Some(session) = self.session_mut(key, place) else {
            return;
        };
        // The relay needs no RELAY RELEASE, since the relay ended the session.
        session.relay = None;
        if self.relays.failed(relay, &why, cx.now) {
            warn!(relay, %reason, code = %reason.code, "Relay refuses");
        }
        self.session_failed(cx, key, place, &why);
        self.tend(cx, key);
        self.look(cx, key);
    }

    /// Ends a session against the agent's will.
    fn session_failed(&mut self, cx: &mut Context, key: ManagedKey, place: Place, why: &str) {
        let now = cx.now;
        debug!(multicast_address = %Ipv6Addr::from(key.multicast_address), why, "Relay session is over");
        if let Some(relay) = self.session(key, place).and_then(|s| s.relay.clone()) {
            let untold = self.relays.failed(&relay, why, now);
            if untold {
                warn!(relay, why, "Relay is given up");
            }
        }
        match place {
            Place::Standby => self.drop_standby(cx, key, why),
            Place::Session => {
                self.set_flows(cx, key, BTreeMap::new());
                let Some(reception) = self.by_address.get_mut(&key) else {
                    return;
                };
                reception.swap = None;
                let session = reception.session.take();
                self.release_session(cx, session, why);
                // A ready standby takes over at once.
                self.promote(cx, key);
            }
        }
    }

    pub(super) fn drop_standby(&mut self, cx: &mut Context, key: ManagedKey, why: &str) {
        if let Some(reception) = self.by_address.get_mut(&key) {
            let standby = reception.standby.take();
            self.release_session(cx, standby, why);
        }
    }

    pub(super) fn release_session(
        &mut self,
        cx: &mut Context,
        session: Option<Session>,
        why: &str,
    ) {
        if let Some(session) = session
            && let Some(relay) = session.relay
        {
            let reason = Reason::new(Code::RELEASED, bounded(why));
            cx.send(&relay, session.transaction, &RelayRelease(reason).into());
        }
    }

    /// Releases all relays of an address.
    pub(super) fn end_sessions(&mut self, cx: &mut Context, key: ManagedKey, why: &str) {
        self.drop_standby(cx, key, why);
        let swapping = self
            .by_address
            .get_mut(&key)
            .is_some_and(|reception| reception.swap.take().is_some());
        if !swapping {
            self.set_flows(cx, key, BTreeMap::new());
        }
        if let Some(reception) = self.by_address.get_mut(&key) {
            reception.tried.clear();
            reception.exhausted = false;
            reception.retry = None;
            reception.backoff.reset();
            for flow in reception.flows.values_mut() {
                flow.relayed.restart();
            }
            let session = reception.session.take();
            self.release_session(cx, session, why);
        }
    }
}
