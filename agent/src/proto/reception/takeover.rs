//! Failover to the next relay. `RELAY_FLOWS` holds the flows of one session at a time, because copies
//! of one packet from two relays are indistinguishable. So the next relay is asked while the old flows
//! stay, and takes over when the old flows bring no more packets:
//!
//! ```text
//!   session silent, or its lease ends          answered            session is silent
//!  (none) ----------------------> standby asked -------> standby ready -------+
//!                                                            ^                v
//!                            a packet came meanwhile: back   +--- flows removed, counters read
//!                                                                             | nothing came
//!                                                                             v
//!                                                              the standby's flows are set
//! ```

use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{ManagedKey, RelayFlowKey};
use tracing::info;

use super::Receptions;
use super::course::State;
use super::session::Place;
use crate::proto::Output;
use crate::proto::context::Context;

impl Receptions {
    /// Asks the next relay, which takes over when the session brings no more packets.
    pub(super) fn fail_over(&mut self, cx: &mut Context, key: ManagedKey, why: &'static str) {
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        if reception.standby.is_some() || reception.swap.is_some() {
            return;
        }
        let Some(session) = &reception.session else {
            reception.exhausted = true;
            return;
        };
        let relay = session.relay.clone();
        if let Some(relay) = &relay {
            reception.tried.insert(relay.clone());
        }
        let next = self.relays.pick(&reception.tried, &cx.links, None);
        let Some(next) = next else {
            reception.exhausted = true;
            return;
        };
        cx.counters.relay_failovers += 1;
        info!(
            multicast_address = %Ipv6Addr::from(key.multicast_address),
            relay = relay.as_deref().unwrap_or("unknown"),
            why,
            next,
            "Next relay is asked"
        );
        self.begin_session(cx, key, Place::Standby, next);
        self.set_session_timer(cx, key);
    }

    /// Starts the takeover if the session brings no more packets, or drops the standby if the session
    /// sends again.
    pub(super) fn look_at_standby(&mut self, cx: &mut Context, key: ManagedKey) {
        let now = cx.now;
        let floor = cx.config.relay.map_or(Duration::ZERO, |t| t.silence);
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        let ready = reception
            .standby
            .as_ref()
            .is_some_and(|standby| standby.answered.is_some());
        if !ready || reception.swap.is_some() {
            return;
        }
        let Some(session) = &reception.session else {
            self.promote(cx, key);
            return;
        };
        if session.flows.is_empty() {
            self.promote(cx, key);
        } else if !reception.is_delivered(now, floor) {
            let flows: Vec<RelayFlowKey> = session.flows.keys().copied().collect();
            let token = cx.numbers.next();
            reception.swap = Some(token);
            for flow in flows {
                cx.outputs.push_back(Output::RelayFlowRemove(flow));
            }
            let keys = vec![key];
            cx.outputs.push_back(Output::ReadStreams { token, keys });
        } else if session.lease_left(now) > session.lease / 3 && session.asked.is_none() {
            self.drop_standby(cx, key, "The first relay sends again");
        }
    }

    /// Ends the takeover after the final counters of the removed flows are read. The standby takes over
    /// unless the session sent again meanwhile.
    pub(super) fn swap(&mut self, cx: &mut Context, key: ManagedKey) {
        let now = cx.now;
        let floor = cx.config.relay.map_or(Duration::ZERO, |t| t.silence);
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        reception.swap = None;
        if !reception.is_delivered(now, floor) && reception.standby.is_some() {
            let session = reception.session.take().map(|mut session| {
                session.flows.clear();
                session
            });
            self.release_session(cx, session, "Another relay has taken over");
            self.promote(cx, key);
            return;
        }
        let flows = reception.session.iter().flat_map(|session| &session.flows);
        for (key, value) in flows {
            cx.outputs.push_back(Output::RelayFlowSet {
                key: *key,
                value: *value,
            });
        }
        self.drop_standby(cx, key, "The first relay sends again");
    }

    /// Replaces the session by the standby, if there is a standby. The flows of the old session are
    /// already removed.
    pub(super) fn promote(&mut self, cx: &mut Context, key: ManagedKey) {
        let now = cx.now;
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        let Some(mut standby) = reception.standby.take() else {
            return;
        };
        if let Some(old) = reception.session.take() {
            self.release_session(cx, Some(old), "Another relay has taken over");
        }
        let Some(reception) = self.by_address.get_mut(&key) else {
            return;
        };
        let flows = std::mem::take(&mut standby.flows);
        standby.began = now;
        standby.answered = standby.answered.map(|_| now);
        for flow in reception.flows.values_mut() {
            flow.relayed.restart();
        }
        reception.session = Some(standby);
        reception.why = match reception.state {
            State::Native | State::Doubtful { .. } => reception.why,
            _ => "the relay before has stopped",
        };
        self.set_flows(cx, key, flows);
    }
}
