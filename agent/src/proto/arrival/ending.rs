//! How arrivals end: those that do not happen, and those whose VM is gone or has had its time.

use std::time::Duration;

use common::signal::{MigrationAbort, PeerMessage, Reason};
use tracing::{debug, info, warn};

use super::stage::Stage;
use super::{Arrivals, Host, Incoming};
use crate::proto::DomainUuid;
use crate::proto::context::Context;
use crate::proto::record::Outcome;
use crate::proto::refusal::{Refusal, bounded_reason};
use crate::proto::timer::Timer;

/// How long the source of a domain whose TAPs are gone may take to say why.
const REASON_WAIT: Duration = Duration::from_secs(2);

impl Arrivals {
    /// The source takes an arrival back, or does not ask for a domain that it was given notice of. While QEMU already waits for it here the last word is
    /// libvirt's, within a bound: the VM may have got through although its source thinks not.
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
                // It runs at both ends when libvirt has lost its word in between; the source ends it
                // here, unless it is the one that errs.
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

    /// TAPs are gone. A domain that was coming and has none any more does not arrive, and its source
    /// can still say why; one that has arrived is gone.
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

    /// A domain left this host: a migration that failed, or a VM that was held for.
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

    /// Nothing was heard for as long as may be, or what was to end the arrival has not.
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
            // Its source is lost, but the VM has begun to come meanwhile.
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

    /// The VM came, but never answered for what is left: nothing more is to be expected.
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

    /// A domain is gone that was held for. If its source took the migration back, it ran here only
    /// by mistake.
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
        let reason = bounded_reason(&refusal.reason());
        if let Some(incoming) = self.incoming.get(number) {
            let abort = PeerMessage::from(MigrationAbort(reason.clone()));
            cx.send(&incoming.peer, incoming.transaction, &abort);
        }
        self.undo(cx, host, number, &reason);
    }

    /// Ends an arrival that has not happened, with all that was made for it.
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
