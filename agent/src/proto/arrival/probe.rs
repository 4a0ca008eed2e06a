//! Ends of probes: a packet, the flows read from the kernel, the deadline, or the kernel's refusal.

use std::time::Duration;

use common::maps::{ManagedKey, Origin, StreamKey};
use common::signal::ReceptionMode;

use super::Arrivals;
use super::joins::{INTERARRIVALS, Join};
use crate::proto::context::Context;
use crate::proto::reception::{Changed, Receptions};
use crate::proto::{Output, Stream, Timestamp};

impl Arrivals {
    /// Handles the kernel's first packet of a flow on one path.
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

    /// Handles a changed path of an address's packets.
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

    /// Requests the flows of all addresses under probe.
    pub(in crate::proto) fn read_probed_streams(&self, cx: &mut Context) {
        for incoming in self.incoming.iter() {
            let keys: Vec<ManagedKey> = incoming.answer.pending().copied().collect();
            if !keys.is_empty() {
                let token = incoming.token;
                cx.outputs.push_back(Output::ReadStreams { token, keys });
            }
        }
    }

    /// Handles the flows of addresses that this host received before the request. A flow with a
    /// packet within its interarrival time, or since the probe began, needs no further proof.
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

    /// Handles the kernel's refusal of a join or of an object that the join needs.
    pub(in crate::proto) fn join_failed(&mut self, cx: &mut Context, key: ManagedKey) {
        let probing = |join: &Join| join.reception.is_none();
        if self.joins.get(&key).is_some_and(probing) {
            self.decide(cx, key, ReceptionMode::Refused, cx.now);
        }
    }

    /// Records a verdict, and sends the answers that waited for it.
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
