//! What ends probes: a packet, the flows that are read, the deadline, the kernel's refusal.

use std::time::Duration;

use common::maps::{ManagedKey, Origin, StreamKey};
use common::signal::ReceptionMode;

use super::Arrivals;
use super::joins::{INTERARRIVALS, Join};
use crate::proto::context::Context;
use crate::proto::reception::{Changed, Receptions};
use crate::proto::{Output, Stream, Timestamp};

impl Arrivals {
    /// The first packet of a flow by one way came.
    pub(in crate::proto) fn first_packet(
        &mut self,
        cx: &mut Context,
        receptions: &Receptions,
        flow: &StreamKey,
        origin: Origin,
        at: Timestamp,
    ) {
        let key = flow.managed();
        let is_proof = |join: &Join| join.joined.accepts(&flow.source) && at >= join.since;
        if self.joins.get(&key).is_some_and(is_proof)
            && let Some(mode) = self.joins.verdict_of(receptions, &key, origin)
        {
            self.decide(cx, key, mode, at);
        }
    }

    /// The reception of an address has changed.
    pub(in crate::proto) fn reception_changed(
        &mut self,
        cx: &mut Context,
        Changed { key, mode }: Changed,
    ) {
        let known = self.joins.get(&key).and_then(|join| join.reception);
        if known.is_some_and(|known| known != mode) {
            self.decide(cx, key, mode, cx.now);
        }
    }

    /// Asks for the flows of all addresses being probed.
    pub(in crate::proto) fn read_probed_streams(&self, cx: &mut Context) {
        for incoming in self.incoming.iter() {
            let keys: Vec<ManagedKey> = incoming.answer.pending().copied().collect();
            if !keys.is_empty() {
                let token = incoming.token;
                cx.outputs.push_back(Output::ReadStreams { token, keys });
            }
        }
    }

    /// Takes in the flows of addresses that were received here before the request: one that has
    /// had a packet within its interarrival time, or since the probe began, needs no other proof.
    pub(in crate::proto) fn streams_read(
        &mut self,
        cx: &mut Context,
        receptions: &Receptions,
        token: u64,
        streams: &[(StreamKey, Stream)],
    ) {
        if !self.incoming.iter().any(|it| it.token == token) {
            return;
        }
        for (flow, stream) in streams {
            let key = flow.managed();
            for origin in [Origin::Native, Origin::Relay] {
                let usage = stream.by(origin);
                let recent = Duration::from_nanos(usage.interarrival_ns) * INTERARRIVALS;
                let last = Timestamp(usage.last_ns);
                let fresh = usage.packets > 1 && cx.now.since(last) <= recent;
                let is_proof = |join: &Join| {
                    (fresh || last >= join.since)
                        && join.reception.is_none()
                        && join.joined.accepts(&flow.source)
                };
                if self.joins.get(&key).is_some_and(is_proof)
                    && let Some(mode) = self.joins.verdict_of(receptions, &key, origin)
                {
                    self.decide(cx, key, mode, cx.now);
                }
            }
        }
    }

    pub(in crate::proto) fn probe_timed_out(&mut self, cx: &mut Context, key: ManagedKey) {
        self.decide(cx, key, ReceptionMode::Unreachable, cx.now);
    }

    /// A join, or what belongs to it, could not be made.
    pub(in crate::proto) fn join_failed(&mut self, cx: &mut Context, key: ManagedKey) {
        let probing = |join: &Join| join.reception.is_none();
        if self.joins.get(&key).is_some_and(probing) {
            self.decide(cx, key, ReceptionMode::Refused, cx.now);
        }
    }

    /// An address has its verdict: answers that have waited for it are sent.
    fn decide(&mut self, cx: &mut Context, key: ManagedKey, mode: ReceptionMode, at: Timestamp) {
        if !self.joins.decide(cx, key, mode, at) {
            return;
        }
        for incoming in self.incoming.iter_mut() {
            if incoming.answer.decided(&key) && incoming.answer_if_decided(cx, &self.joins) {
                let (uuid, number) = (incoming.uuid, incoming.number);
                self.preparations.prepared(cx, uuid, number);
            }
        }
    }
}
