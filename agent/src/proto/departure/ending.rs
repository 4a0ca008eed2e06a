//! Outgoing migrations after START MIGRATION, and all endings of outgoing migrations.

use std::time::Duration;

use common::signal::{MigrationAbort, MigrationProgress, PeerMessage, Phase, Reason};
use tracing::{debug, info, warn};

use super::handover::end_recording;
use super::stage::{Stage, Step};
use super::{Around, Departures, Order, Outgoing, Requester};
use crate::proto::addresses::Addresses;
use crate::proto::context::Context;
use crate::proto::host::inventory::Inventory;
use crate::proto::links::vm::Caller;
use crate::proto::record::Outcome;
use crate::proto::refusal::{Refusal, bounded};
use crate::proto::timer::Timer;
use crate::proto::{CommandReply, DomainUuid, JobStats, Output, Timestamp, millis};

/// Shortest interval of progress messages to the destination. The destination takes them as a sign
/// of life and learns this host's clock from them.
const PEER_PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

impl Departures {
    /// Handles libvirt's progress report of the memory copy.
    pub(in crate::proto) fn progress(
        &mut self,
        cx: &mut Context,
        uuid: DomainUuid,
        stats: JobStats,
    ) {
        let Some((order, moving)) = self.moving_of(uuid) else {
            return;
        };
        moving.seen();
        moving.stats = JobStats {
            downtime: stats.downtime.or(moving.stats.downtime),
            ..stats
        };
        cx.records.update(order.number, |record| {
            record.processed_bytes = stats.processed_bytes;
            record.total_bytes = stats.total_bytes;
        });
        if cx.now.since(moving.peer_told) >= PEER_PROGRESS_INTERVAL {
            moving.tell_peer(cx, order);
        }
        order.tell_operator(cx, &moving.progress(order, cx.now));
    }

    /// Handles the stop of the domain for the switch.
    pub(in crate::proto) fn suspended(
        &mut self,
        cx: &mut Context,
        addresses: &mut Addresses,
        uuid: DomainUuid,
        stopped: Timestamp,
    ) {
        let Some((order, moving)) = self.moving_of(uuid) else {
            return;
        };
        moving.step = Step::Switching { stopped };
        cx.records
            .update(order.number, |record| record.phase = Phase::Switching);
        moving.place_cuts(cx, order.number, stopped);
        addresses.forward_departures(cx, order.number);
        moving.tell_peer(cx, order);
        moving.tell_cuts(cx, order);
        order.tell_operator(cx, &moving.progress(order, cx.now));
    }

    /// Handles the resume of a domain on this host, after a failed switch or after an operator's
    /// pause.
    pub(in crate::proto) fn resumed(
        &mut self,
        cx: &mut Context,
        inventory: &Inventory,
        addresses: &mut Addresses,
        uuid: DomainUuid,
    ) {
        let Some((order, moving)) = self.moving_of(uuid) else {
            return;
        };
        if let Step::Switching { .. } = moving.step {
            moving.step = Step::Copying;
        }
        cx.records
            .update(order.number, |record| record.phase = Phase::Copying);
        moving.void_cuts(cx, inventory, order);
        addresses.keep_departures(cx, order.number);
    }

    /// Handles libvirt's report that the migration ended.
    pub(in crate::proto) fn ended(
        &mut self,
        cx: &mut Context,
        around: Around<'_>,
        uuid: DomainUuid,
        result: Result<JobStats, String>,
    ) {
        let Some((order, moving)) = self.moving_of(uuid) else {
            return;
        };
        let number = order.number;
        match result {
            Ok(stats) => self.complete(cx, around, number, stats),
            Err(reason) => {
                let stopped_for = moving.stopped_for.take();
                let refusal = stopped_for.unwrap_or_else(|| Refusal::Hypervisor {
                    domain: order.domain.clone(),
                    destination: order.destination.clone(),
                    agent: cx.config.name.clone(),
                    reason: bounded(&reason),
                });
                self.fail(cx, around.addresses, number, &refusal);
            }
        }
    }

    /// Fails a migration whose domain vanished before libvirt was asked to migrate it.
    pub(in crate::proto) fn domain_gone(
        &mut self,
        cx: &mut Context,
        addresses: &mut Addresses,
        uuid: DomainUuid,
    ) {
        let is_moving = |it: &Outgoing| matches!(it.stage, Stage::Moving(_));
        if let Some(outgoing) = self.of_domain(uuid).filter(|it| !is_moving(it)) {
            let number = outgoing.order.number;
            let refusal = Refusal::DomainGone {
                domain: outgoing.order.domain.clone(),
                agent: cx.config.name.clone(),
            };
            self.fail(cx, addresses, number, &refusal);
        }
    }

    /// Handles a peer's refusal of a request, or its message that it undid the preparations.
    pub(in crate::proto) fn peer_refused(
        &mut self,
        cx: &mut Context,
        addresses: &mut Addresses,
        from: (&str, u64),
        reason: &Reason,
    ) {
        let (peer, transaction) = from;
        debug!(peer, transaction, %reason, "Peer ends a migration");
        self.claim_not_understood(cx, from);
        let Some(Outgoing { order, stage }) = self.by_transaction(from) else {
            return;
        };
        if let Stage::Moving(moving) = stage
            && moving.step != Step::Awaited
        {
            warn!(
                peer,
                %reason, "Destination has undone its joins; libvirt goes on"
            );
            return;
        }
        let number = order.number;
        let refusal = Refusal::Refused {
            destination: peer.to_owned(),
            reason: reason.clone(),
        };
        self.fail(cx, addresses, number, &refusal);
    }

    pub(in crate::proto) fn response_timed_out(
        &mut self,
        cx: &mut Context,
        addresses: &mut Addresses,
        number: u64,
    ) {
        let Some(Outgoing { order, stage }) = self.outgoing.get(&number) else {
            return;
        };
        let destination = order.destination.clone();
        let waited = cx.now.since(order.started);
        let timing = &cx.config.timing;
        let refusal = match stage {
            Stage::Requesting { waits: true, .. } if waited >= timing.place_timeout => {
                Refusal::NoPlace {
                    destination,
                    waited,
                }
            }
            _ => Refusal::NoAnswer {
                destination,
                waited: timing.response_timeout,
            },
        };
        self.fail(cx, addresses, number, &refusal);
    }

    pub(in crate::proto) fn ready_timed_out(
        &mut self,
        cx: &mut Context,
        addresses: &mut Addresses,
        number: u64,
    ) {
        let waited = cx.config.timing.ready_timeout;
        self.fail(cx, addresses, number, &Refusal::NotReady { waited });
    }

    /// Handles `roamcast abort DOMAIN`.
    pub(in crate::proto) fn command_abort(
        &mut self,
        cx: &mut Context,
        addresses: &mut Addresses,
        command: u64,
        domain: &str,
    ) {
        let is_named = |order: &Order| order.domain == domain || order.uuid.to_string() == domain;
        let mut all = self.outgoing.values_mut();
        let Some(outgoing) = all.find(|it| is_named(&it.order)) else {
            let domain = bounded(domain);
            let refusal = Refusal::NothingToAbort { domain };
            cx.reply(command, CommandReply::Failed(refusal.to_string()));
            return;
        };
        let migration = outgoing.order.number;
        if let Err(refusal) = outgoing.cancel(cx, "an operator") {
            self.fail(cx, addresses, migration, &refusal);
        }
        cx.reply(command, CommandReply::Done { migration });
    }

    /// Handles a VM's abort of its own request.
    pub(in crate::proto) fn vm_aborts(
        &mut self,
        cx: &mut Context,
        addresses: &mut Addresses,
        caller: &Caller,
    ) {
        let mut all = self.outgoing.values_mut();
        let Some(outgoing) = all.find(|it| it.is_asked_by(caller)) else {
            return;
        };
        let number = outgoing.order.number;
        if let Err(refusal) = outgoing.cancel(cx, "the VM") {
            self.fail(cx, addresses, number, &refusal);
        }
    }

    /// Ends a migration that did not happen. The VM never left this host.
    pub(super) fn fail(
        &mut self,
        cx: &mut Context,
        addresses: &mut Addresses,
        number: u64,
        refusal: &Refusal,
    ) {
        let Some(Outgoing { order, stage }) = self.remove(cx, number) else {
            return;
        };
        if let Stage::Moving(moving) = &stage {
            end_recording(cx, &moving.recorded);
        }
        addresses.end_departures(cx, |_, departure| departure.is_of(number));
        let reason = refusal.whole_reason();
        warn!(domain = %order.domain, number, %reason, "Migration has failed");
        let ended = Outcome::Failed(reason.clone());
        cx.records.end(number, cx.now, ended);
        let peer_knows = matches!(order.requester, Requester::External { .. })
            || !matches!(stage, Stage::Gathering { .. } | Stage::Connecting { .. });
        if peer_knows
            && order.requester != Requester::Unknown
            && !matches!(refusal, Refusal::Refused { .. })
        {
            let end = PeerMessage::from(MigrationAbort(refusal.reason()));
            cx.send_end(number, &order.destination, order.transaction, None, end);
        }
        match order.requester {
            Requester::Vm { transaction, to } => {
                if let Stage::Moving(_) = stage {
                    cx.vms.has_moved(order.uuid, cx.now);
                }
                cx.tell_refusal(order.uuid, transaction, to, refusal);
            }
            Requester::Operator { command } => {
                cx.reply(command, CommandReply::Failed(reason.text));
            }
            Requester::Unknown | Requester::External { .. } => {}
        }
    }

    fn complete(&mut self, cx: &mut Context, around: Around<'_>, number: u64, stats: JobStats) {
        // Repeated here in case libvirt did not report the stop.
        around.addresses.forward_departures(cx, number);
        let Some(Outgoing {
            order,
            stage: Stage::Moving(moving),
        }) = self.remove(cx, number)
        else {
            return;
        };
        self.end_departure_recording(cx, &order, &moving);
        let now = cx.now;
        // Without QEMU's own number, the time from the stop to libvirt's report of the end is an
        // upper bound.
        let pause = stats
            .downtime
            .or(moving.stats.downtime)
            .or(moving.stopped().map(|at| now.since(at)));
        let copy = moving.stopped().unwrap_or(now).since(moving.since);
        cx.records.update(number, |record| {
            record.copy = Some(copy);
            record.vm_pause = pause;
            record.processed_bytes = stats.processed_bytes.max(record.processed_bytes);
            record.total_bytes = stats.total_bytes.max(record.total_bytes);
        });
        cx.records.end(number, now, Outcome::Completed);
        info!(domain = %order.domain, destination = %order.destination, number, ?pause, "Migration is done");
        let progress = MigrationProgress {
            phase: Phase::Completed,
            processed_bytes: stats.processed_bytes,
            total_bytes: stats.total_bytes,
            elapsed_ms: millis(now.since(order.started)),
            vm_pause_ms: pause.map(millis),
            clock_ns: None,
        };
        if order.requester != Requester::Unknown {
            let end = progress.clone().into();
            let request = order.request;
            cx.send_end(number, &order.destination, order.transaction, request, end);
        }
        match order.requester {
            Requester::Vm { transaction, .. } => {
                if around.inventory.domains.contains_key(&order.uuid) {
                    cx.vms.answer(order.uuid, transaction, progress.into());
                }
            }
            Requester::Operator { command } => {
                cx.reply(command, CommandReply::Done { migration: number });
            }
            Requester::Unknown | Requester::External { .. } => {}
        }
    }

    fn remove(&mut self, cx: &mut Context, number: u64) -> Option<Outgoing> {
        for timer in [
            Timer::Streams(number),
            Timer::Response(number),
            Timer::Again(number),
            Timer::Ready(number),
            Timer::Reconnect(number),
        ] {
            cx.timers.stop(timer);
        }
        self.outgoing.remove(&number)
    }
}

impl Outgoing {
    /// Asks libvirt to abort the migration on behalf of the VM or an operator.
    ///
    /// # Errors
    ///
    /// Returns the refusal if libvirt does not run the migration yet; the caller then ends the
    /// migration.
    fn cancel(&mut self, cx: &mut Context, by: &'static str) -> Result<(), Refusal> {
        let uuid = self.order.uuid;
        let domain = self.order.domain.clone();
        let refusal = Refusal::Cancelled { domain, by };
        let Stage::Moving(moving) = &mut self.stage else {
            return Err(refusal);
        };
        // A refusal of the VM's address is the more useful reason.
        if !matches!(moving.stopped_for, Some(Refusal::Address { .. })) {
            moving.stopped_for = Some(refusal);
        }
        cx.outputs.push_back(Output::AbortMigration { uuid });
        Ok(())
    }
}
