//! What the source says while its domain is to arrive, and how arrivals end that do not happen.

use std::time::Duration;

use common::signal::{MigrationAbort, MigrationProgress, PeerMessage, Phase};
use tracing::warn;

use super::Incoming;
use super::handover::CUT_TRANSIT;
use crate::proto::Agent;
use crate::proto::record::Outcome;
use crate::proto::refusal::{Refusal, bounded};
use crate::proto::timer::Timer;

/// How long the source of a domain whose TAPs are gone may take to say why.
const REASON_WAIT: Duration = Duration::from_secs(2);

impl Agent {
    pub(in crate::proto) fn on_peer_progress(
        &mut self,
        peer: &str,
        transaction: u64,
        progress: MigrationProgress,
    ) {
        let Some(number) = self.incoming_by_transaction(peer, transaction) else {
            return;
        };
        self.heard_of(number);
        let pause = progress.vm_pause_ms.map(Duration::from_millis);
        self.cx.records.update(number, |record| {
            if record.outcome.is_none() {
                record.phase = progress.phase;
            }
            record.vm_pause = pause.or(record.vm_pause);
            record.processed_bytes = progress.processed_bytes;
            record.total_bytes = progress.total_bytes;
        });
        let phase = progress.phase;
        let now = self.cx.now;
        let Some(incoming) = self.incoming.get_mut(&number) else {
            return;
        };
        let uuid = incoming.uuid;
        if let Some(clock_ns) = progress.clock_ns {
            incoming.clock.observe(clock_ns, now);
        }
        match phase {
            Phase::Copying => {
                let sent = progress
                    .clock_ns
                    .and_then(|sent| incoming.clock.latest(sent));
                incoming.ran = sent.or(incoming.ran);
            }
            Phase::Switching => {
                incoming.switching.get_or_insert(now);
            }
            Phase::Preparing | Phase::Ready | Phase::Completed => {}
        }
        incoming.progress = Some(progress);
        match phase {
            Phase::Switching => {
                self.answer_asked(number);
                self.ports_changed();
            }
            // Only libvirt says whether it runs here.
            Phase::Completed => {
                if self
                    .inventory
                    .domains
                    .get(&uuid)
                    .is_some_and(|it| it.running)
                {
                    self.arrived(uuid, self.cx.now);
                }
                self.note_arrival(number);
            }
            Phase::Preparing | Phase::Ready | Phase::Copying => {}
        }
    }

    /// The source takes an arrival back. While QEMU already waits for it here the last word is
    /// libvirt's, within a bound: the VM may have got through although its source thinks not.
    pub(in crate::proto) fn on_peer_abort(&mut self, peer: &str, transaction: u64, reason: &str) {
        self.queue.remove(peer, transaction);
        let Some(number) = self.incoming_by_transaction(peer, transaction) else {
            return;
        };
        let Some(incoming) = self.incoming.get_mut(&number) else {
            return;
        };
        if incoming.arrived.is_some() {
            // It runs at both ends when libvirt has lost its word in between; the source ends it
            // here, unless it is the one that errs.
            incoming.aborted = Some(reason.to_owned());
            return;
        }
        let Some(incoming) = self.incoming.get(&number) else {
            return;
        };
        if self.has_begun(incoming)
            && let Some(incoming) = self.incoming.get_mut(&number)
        {
            incoming.aborted = Some(reason.to_owned());
            let grace = self.cx.now + self.cx.config.timing.lost_peer_grace;
            self.cx.timers.set_earlier(Timer::Unused(number), grace);
        } else {
            self.undo(number, reason);
        }
    }

    /// The connection to a source broke. Before its VM has begun to come nothing is lost by undoing
    /// soon; after that libvirt decides.
    pub(in crate::proto) fn incoming_peer_down(&mut self, peer: &str) {
        let grace = self.cx.now + self.cx.config.timing.lost_peer_grace;
        for (number, incoming) in &self.incoming {
            if incoming.peer == peer && incoming.waits_for_cut() {
                self.cx
                    .timers
                    .set_earlier(Timer::Cut(*number), self.cx.now + CUT_TRANSIT);
            }
            if incoming.peer == peer && incoming.arrived.is_none() && !self.has_begun(incoming) {
                self.cx.timers.set_earlier(Timer::Unused(*number), grace);
            }
        }
    }

    /// Whether libvirt has begun to bring a domain: it is known, or its TAPs are here.
    pub(super) fn has_begun(&self, incoming: &Incoming) -> bool {
        self.inventory.domains.contains_key(&incoming.uuid)
            || !self
                .inventory
                .ports_of_arrival(&incoming.uuid, &incoming.macs)
                .is_empty()
    }

    /// TAPs are gone. A domain that was coming and has none any more does not arrive, and its source
    /// can still say why; one that has arrived is gone.
    pub(in crate::proto) fn arrivals_cut_off(&mut self) {
        let cut_off: Vec<u64> = self
            .incoming
            .iter()
            .filter(|(_, incoming)| incoming.begun && !self.has_begun(incoming))
            .map(|(number, _)| *number)
            .collect();
        for number in cut_off {
            let Some(incoming) = self.incoming.get(&number) else {
                continue;
            };
            if incoming.arrived.is_some() {
                self.gone_after_arrival(number);
            } else if let Some(reason) = incoming.aborted.clone() {
                self.undo(number, &reason);
            } else {
                let until = self.cx.now + REASON_WAIT;
                self.cx.timers.set_earlier(Timer::Unused(number), until);
            }
        }
    }

    pub(in crate::proto) fn arrival_unused(&mut self, number: u64) {
        let Some(incoming) = self.incoming.get(&number) else {
            return;
        };
        let domain = incoming.domain.clone();
        let expiry = incoming.last_heard + self.cx.config.timing.unused_join_expiry;
        let has_begun = self.has_begun(incoming);
        if incoming.aborted.is_none() && self.cx.now < expiry && has_begun {
            // Its source is lost, but the VM has begun to come meanwhile.
            self.cx.timers.set(Timer::Unused(number), expiry);
            return;
        }
        let refusal = match &incoming.aborted {
            Some(reason) => {
                let reason = reason.clone();
                self.undo(number, &reason);
                return;
            }
            None if incoming.begun && !has_begun => Refusal::GoneBeforeArrival {
                domain,
                agent: self.cx.config.name.clone(),
            },
            None if self.cx.is_up(&incoming.peer) => Refusal::Unused {
                domain,
                waited: self.cx.config.timing.unused_join_expiry,
            },
            None => Refusal::LostPeer {
                domain,
                peer: incoming.peer.clone(),
            },
        };
        self.undo_and_tell(number, &refusal);
    }

    pub(super) fn undo_and_tell(&mut self, number: u64, refusal: &Refusal) {
        let reason = bounded(&refusal.to_string());
        if let Some(incoming) = self.incoming.get(&number) {
            let (peer, transaction) = (incoming.peer.clone(), incoming.transaction);
            let abort = PeerMessage::from(MigrationAbort {
                reason: reason.clone(),
            });
            self.cx.send(&peer, transaction, &abort);
        }
        self.undo(number, &reason);
    }

    /// Ends an arrival that has not happened, with all that was made for it.
    pub(super) fn undo(&mut self, number: u64, reason: &str) {
        let Some(incoming) = self.drop_incoming(number) else {
            return;
        };
        if incoming.arrived.is_none() {
            if self.incoming_of(incoming.uuid).is_none() {
                self.preparations
                    .not_prepared(&mut self.cx, incoming.uuid, reason);
            }
            warn!(domain = %incoming.domain, number, reason, "Domain does not arrive");
            let outcome = Outcome::Failed(reason.to_owned());
            self.cx.records.end(number, self.cx.now, outcome);
        }
        for (ifindex, key) in incoming.mdb {
            let shared = self
                .incoming
                .values()
                .any(|other| other.mdb.contains(&(ifindex, key)));
            if !shared {
                self.delete_mdb(ifindex, key);
            }
        }
        for (key, mac) in incoming.needs.into_keys() {
            self.release(number, key, mac);
        }
    }

    pub(super) fn drop_incoming(&mut self, number: u64) -> Option<Incoming> {
        for timer in [
            Timer::Unused(number),
            Timer::Hold(number),
            Timer::Poll(number),
            Timer::MdbRenewal(number),
            Timer::Cut(number),
            Timer::Claim(number),
        ] {
            self.cx.timers.stop(timer);
        }
        let mut incoming = self.incoming.remove(&number)?;
        self.clear_gates(&incoming.gates);
        if let Some(claim) = incoming.claim.take() {
            self.drop_claim(number, &claim, incoming.uuid, true);
        }
        Some(incoming)
    }
}
