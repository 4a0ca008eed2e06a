//! Endings of arrivals: failures before the VM runs here, vanished VMs, and the end of the hold.

use std::time::Duration;

use common::signal::{MigrationAbort, PeerMessage, Reason};
use tracing::{debug, info, warn};

use super::stage::Stage;
use super::{Arrivals, Host, Incoming};
use crate::proto::DomainUuid;
use crate::proto::context::Context;
use crate::proto::record::Outcome;
use crate::proto::refusal::Refusal;
use crate::proto::timer::Timer;

/// Time in which the source of a domain without TAPs may still send the reason.
const REASON_WAIT: Duration = Duration::from_secs(2);

impl Arrivals {
    /// Handles the source's abort, or its refusal to send a request for a noticed domain. While
    /// QEMU waits here for the domain, libvirt decides, within a time limit: the VM may have
    /// arrived although its source believes otherwise.
    pub(in crate::proto) fn aborted(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        (peer, transaction): (&str, u64),
        reason: &Reason,
    ) {
        self.queue.remove(peer, transaction);
        if let Some(incoming) = self.incoming.of_transaction_mut(peer, transaction) {
            let is_here = self.taps.are_here(host.inventory, incoming);
            let number = incoming.number;
            match &mut incoming.stage {
                // The VM runs on both hosts if libvirt's confirmation was lost. The source ends the
                // VM on this host, unless the source is the one in error.
                Stage::Arrived(arrived) => arrived.aborted = Some(reason.clone()),
                Stage::Coming { aborted, .. } if is_here => {
                    *aborted = Some(reason.clone());
                    let grace = cx.now + cx.config.timing.lost_peer_grace;
                    cx.timers.set_earlier(Timer::Unused(number), grace);
                }
                Stage::Expected { .. } | Stage::Coming { .. } => {
                    self.undo(cx, host, number, reason);
                }
            }
        }
        self.preparations.refused(cx, peer, transaction, reason);
    }

    /// Handles vanished TAPs. An arriving domain without TAPs does not arrive, but its source can
    /// still send the reason. An arrived domain without TAPs is gone.
    pub(in crate::proto) fn cut_off(&mut self, cx: &mut Context, host: &mut Host<'_>) {
        let cut_off = self.incoming.iter().filter(|incoming| {
            incoming.stage.has_begun() && !self.taps.are_here(host.inventory, incoming)
        });
        let cut_off = cut_off.map(|incoming| incoming.number);
        for number in cut_off.collect::<Vec<_>>() {
            let Some(incoming) = self.incoming.get(number) else {
                continue;
            };
            match &incoming.stage {
                Stage::Arrived(_) => self.gone_after_arrival(cx, host, number),
                Stage::Coming {
                    aborted: Some(reason),
                    ..
                } => {
                    let reason = reason.clone();
                    self.undo(cx, host, number, &reason);
                }
                Stage::Expected { .. } | Stage::Coming { aborted: None, .. } => {
                    let until = cx.now + REASON_WAIT;
                    cx.timers.set_earlier(Timer::Unused(number), until);
                }
            }
        }
    }

    /// Handles a domain that left this host: a failed migration, or a VM with held joins.
    pub(in crate::proto) fn domain_gone(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        uuid: DomainUuid,
    ) {
        let Some(incoming) = self.incoming.of_domain(uuid) else {
            return;
        };
        let number = incoming.number;
        if incoming.stage.arrived().is_some() {
            self.gone_after_arrival(cx, host, number);
            return;
        }
        let refusal = Refusal::GoneBeforeArrival {
            domain: incoming.domain.clone(),
            agent: cx.config.name.clone(),
        };
        self.undo_and_tell(cx, host, number, &refusal);
    }

    /// Handles the deadline of an arrival that has not become a running VM.
    pub(in crate::proto) fn unused(&mut self, cx: &mut Context, host: &mut Host<'_>, number: u64) {
        let Some(incoming) = self.incoming.get(number) else {
            return;
        };
        let (heard, begun) = match &incoming.stage {
            Stage::Expected { heard } => (*heard, false),
            Stage::Coming {
                heard,
                aborted: None,
            } => (*heard, true),
            Stage::Coming {
                aborted: Some(reason),
                ..
            } => {
                let reason = reason.clone();
                self.undo(cx, host, number, &reason);
                return;
            }
            Stage::Arrived(_) => return,
        };
        let domain = incoming.domain.clone();
        let expiry = heard + cx.config.timing.unused_join_expiry;
        let is_here = self.taps.are_here(host.inventory, incoming);
        if cx.now < expiry && is_here {
            // The source is lost, but the VM began to arrive in the meantime.
            cx.timers.set(Timer::Unused(number), expiry);
            return;
        }
        let refusal = if begun && !is_here {
            Refusal::GoneBeforeArrival {
                domain,
                agent: cx.config.name.clone(),
            }
        } else if cx.is_up(&incoming.peer) {
            Refusal::Unused {
                domain,
                waited: cx.config.timing.unused_join_expiry,
            }
        } else {
            Refusal::LostPeer {
                domain,
                peer: incoming.peer.clone(),
            }
        };
        self.undo_and_tell(cx, host, number, &refusal);
    }

    /// Ends the hold of a VM that never reported some of its addresses; no Report is to be expected
    /// any more.
    pub(in crate::proto) fn hold_timed_out(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        number: u64,
    ) {
        let Some(incoming) = self.drop_incoming(cx, host, number) else {
            return;
        };
        info!(
            domain = %incoming.domain,
            left = incoming.needs.len(),
            "Domain never answered for some addresses; their joins end"
        );
        for place in &incoming.mdb.made {
            host.delete_mdb(cx, *place);
        }
        self.release_all(cx, host, incoming);
    }

    /// Ends an arrival whose domain vanished while joins were held for it. If the source aborted,
    /// the run on this host does not count, and the record says failed.
    fn gone_after_arrival(&mut self, cx: &mut Context, host: &mut Host<'_>, number: u64) {
        if let Some(incoming) = self.incoming.get(number) {
            debug!(domain = %incoming.domain, "Domain is gone while it was held for");
            if let Some(reason) = incoming.stage.aborted() {
                let outcome = Outcome::Failed(reason.clone());
                cx.records.end(number, cx.now, outcome);
            }
        }
        self.undo(cx, host, number, &Reason::default());
    }

    pub(super) fn undo_and_tell(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        number: u64,
        refusal: &Refusal,
    ) {
        let reason = refusal.reason();
        if let Some(incoming) = self.incoming.get(number) {
            let abort = PeerMessage::from(MigrationAbort(reason.clone()));
            cx.send(&incoming.peer, incoming.transaction, &abort);
        }
        self.undo(cx, host, number, &reason);
    }

    /// Ends an arrival and undoes everything made for it. An arrival that never ran here is
    /// recorded as failed.
    pub(super) fn undo(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        number: u64,
        reason: &Reason,
    ) {
        let Some(incoming) = self.drop_incoming(cx, host, number) else {
            return;
        };
        if incoming.stage.arrived().is_none() {
            let is_replaced = self.incoming.of_domain(incoming.uuid).is_some();
            if !is_replaced {
                self.preparations
                    .not_prepared(cx, incoming.uuid, &reason.text);
            }
            warn!(domain = %incoming.domain, number, %reason, "Domain does not arrive");
            let outcome = Outcome::Failed(reason.clone());
            cx.records.end(number, cx.now, outcome);
        }
        for place in &incoming.mdb.made {
            let mut others = self.incoming.iter();
            if !others.any(|other| other.mdb.made.contains(place)) {
                host.delete_mdb(cx, *place);
            }
        }
        self.release_all(cx, host, incoming);
    }

    fn release_all(&mut self, cx: &mut Context, host: &mut Host<'_>, incoming: Incoming) {
        for (key, mac) in incoming.needs.into_keys() {
            self.joins.release(cx, host, incoming.number, key, mac);
        }
    }

    fn drop_incoming(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        number: u64,
    ) -> Option<Incoming> {
        for timer in [
            Timer::Unused(number),
            Timer::Hold(number),
            Timer::Poll(number),
            Timer::MdbRenewal(number),
            Timer::Cut(number),
            Timer::Claim(number),
        ] {
            cx.timers.stop(timer);
        }
        let mut incoming = self.incoming.remove(number)?;
        incoming.gates.clear(cx);
        if let Some(address) = incoming.end_claim(cx, host.addresses, true) {
            self.forget_address(cx, host.addresses, address, false);
        }
        Some(incoming)
    }
}
