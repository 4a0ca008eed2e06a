//! How an outgoing migration goes on after START MIGRATION, and how every one ends.

use std::time::Duration;

use common::signal::{MigrationAbort, MigrationProgress, PeerMessage, Phase};
use tracing::{info, warn};

use super::{Outgoing, Requester, State, millis};
use crate::proto::record::Outcome;
use crate::proto::refusal::{Refusal, bounded};
use crate::proto::timer::Timer;
use crate::proto::{Agent, CommandReply, Domain, DomainUuid, JobStats, Output, Timestamp};

/// How often the destination is told the progress at most. It takes it as a sign of life, and learns
/// this host's clock from it.
const PEER_PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

impl Agent {
    pub(in crate::proto) fn outgoing_progress(&mut self, uuid: DomainUuid, stats: JobStats) {
        let now = self.cx.now;
        let Some((number, outgoing)) = self.started_of(uuid) else {
            return;
        };
        outgoing.awaited = false;
        outgoing.stats = JobStats {
            downtime: stats.downtime.or(outgoing.stats.downtime),
            ..stats
        };
        let due = now.since(outgoing.peer_told) >= PEER_PROGRESS_INTERVAL;
        self.cx.records.update(number, |record| {
            record.processed_bytes = stats.processed_bytes;
            record.total_bytes = stats.total_bytes;
        });
        if due {
            self.tell_peer(number);
        }
        self.tell_operator(number);
    }

    pub(in crate::proto) fn outgoing_suspended(&mut self, uuid: DomainUuid, at: Timestamp) {
        let Some((number, outgoing)) = self.started_of(uuid) else {
            return;
        };
        outgoing.awaited = false;
        outgoing.suspended = Some(at);
        outgoing.state = State::Switching;
        self.cx
            .records
            .update(number, |record| record.phase = Phase::Switching);
        self.place_cuts(number, at);
        self.addresses.forward_departures(&mut self.cx, number);
        self.tell_peer(number);
        self.tell_cuts(number);
        self.tell_operator(number);
    }

    /// The domain runs here again: the switch has failed, or the operator had paused it.
    pub(in crate::proto) fn outgoing_resumed(&mut self, uuid: DomainUuid) {
        let Some((number, outgoing)) = self.started_of(uuid) else {
            return;
        };
        outgoing.suspended = None;
        outgoing.state = State::Copying;
        self.cx
            .records
            .update(number, |record| record.phase = Phase::Copying);
        self.void_cuts(number);
        self.addresses.keep_departures(&mut self.cx, number);
    }

    pub(in crate::proto) fn outgoing_ended(
        &mut self,
        uuid: DomainUuid,
        result: Result<JobStats, String>,
    ) {
        let agent = self.cx.config.name.clone();
        let Some((number, outgoing)) = self.started_of(uuid) else {
            return;
        };
        match result {
            Ok(stats) => self.complete(number, stats),
            Err(reason) => {
                let domain = outgoing.domain.clone();
                let refusal = match (outgoing.stopped_for.take(), outgoing.cancelled_by) {
                    (Some(refusal), _) => refusal,
                    (None, Some(by)) => Refusal::Cancelled { domain, by },
                    (None, None) => Refusal::Hypervisor {
                        domain,
                        destination: outgoing.destination.clone(),
                        agent,
                        reason: bounded(&reason),
                    },
                };
                self.fail(number, &refusal);
            }
        }
    }

    /// The domain left, or was shut down, before libvirt was asked to move it.
    pub(in crate::proto) fn outgoing_domain_gone(&mut self, uuid: DomainUuid) {
        let agent = self.cx.config.name.clone();
        let found = self
            .outgoing
            .iter()
            .find(|(_, outgoing)| outgoing.uuid == uuid && !outgoing.state.is_started());
        if let Some((number, outgoing)) = found {
            let refusal = Refusal::DomainGone {
                domain: outgoing.domain.clone(),
                agent,
            };
            self.fail(*number, &refusal);
        }
    }

    /// The peer refuses a request, or has undone it.
    pub(in crate::proto) fn on_peer_refusal(&mut self, peer: &str, transaction: u64, reason: &str) {
        let Some((number, outgoing)) = self.outgoing.iter().find(|(_, outgoing)| {
            outgoing.transaction == transaction && outgoing.destination == peer
        }) else {
            return;
        };
        if outgoing.state.is_started() && !outgoing.awaited {
            warn!(
                peer,
                reason, "Destination has undone its joins; libvirt goes on"
            );
            return;
        }
        let refusal = Refusal::Refused {
            destination: peer.to_owned(),
            reason: reason.to_owned(),
        };
        self.fail(*number, &refusal);
    }

    pub(in crate::proto) fn response_timed_out(&mut self, number: u64) {
        if let Some(outgoing) = self.outgoing.get(&number) {
            let destination = outgoing.destination.clone();
            let waited = self.cx.now.since(outgoing.started);
            let refusal = if outgoing.waits && waited >= self.cx.config.timing.place_timeout {
                Refusal::NoPlace {
                    destination,
                    waited,
                }
            } else {
                Refusal::NoAnswer {
                    destination,
                    waited: self.cx.config.timing.response_timeout,
                }
            };
            self.fail(number, &refusal);
        }
    }

    pub(in crate::proto) fn ready_timed_out(&mut self, number: u64) {
        let waited = self.cx.config.timing.ready_timeout;
        self.fail(number, &Refusal::NotReady { waited });
    }

    /// `roamcast abort DOMAIN`.
    pub(in crate::proto) fn command_abort(&mut self, command: u64, domain: &str) {
        let found = self
            .outgoing
            .iter()
            .find(|(_, outgoing)| outgoing.domain == domain || outgoing.uuid.to_string() == domain);
        let Some(number) = found.map(|(number, _)| *number) else {
            let domain = bounded(domain);
            let refusal = Refusal::NothingToAbort { domain };
            self.cx
                .reply(command, CommandReply::Failed(refusal.to_string()));
            return;
        };
        self.cancel(number, "an operator");
        self.cx
            .reply(command, CommandReply::Done { migration: number });
    }

    /// A VM takes its request back.
    pub(in crate::proto) fn vm_aborts(&mut self, domain: &Domain, transaction: u64) {
        let found = self
            .outgoing
            .iter()
            .find(|(_, outgoing)| outgoing.is_asked_by(&domain.uuid, transaction));
        if let Some((number, _)) = found {
            self.cancel(*number, "the VM");
        }
    }

    fn cancel(&mut self, number: u64, by: &'static str) {
        let Some(outgoing) = self.outgoing.get_mut(&number) else {
            return;
        };
        if outgoing.state.is_started() {
            outgoing.cancelled_by = Some(by);
            let uuid = outgoing.uuid;
            self.cx.outputs.push_back(Output::AbortMigration { uuid });
        } else {
            let domain = outgoing.domain.clone();
            self.fail(number, &Refusal::Cancelled { domain, by });
        }
    }

    /// Ends a migration that has not happened: the VM is and was here.
    pub(super) fn fail(&mut self, number: u64, refusal: &Refusal) {
        let Some(outgoing) = self.remove(number) else {
            return;
        };
        self.end_recording(outgoing.recorded.keys().copied());
        self.addresses
            .end_departures(&mut self.cx, |_, departure| departure.is_of(number));
        let reason = refusal.to_string();
        warn!(domain = %outgoing.domain, number, %reason, "Migration has failed");
        let ended = Outcome::Failed(reason.clone());
        self.cx.records.end(number, self.cx.now, ended);
        let peer_knows = outgoing.response.is_some()
            || matches!(outgoing.requester, Requester::Nobody { .. })
            || !matches!(outgoing.state, State::Gathering { .. } | State::Connecting);
        if peer_knows
            && outgoing.requester != Requester::Unknown
            && !matches!(refusal, Refusal::Refused { .. })
        {
            let reason = bounded(&reason);
            let end = PeerMessage::from(MigrationAbort { reason });
            let (peer, transaction) = (&outgoing.destination, outgoing.transaction);
            self.cx.send_end(number, peer, transaction, None, end);
        }
        match outgoing.requester {
            Requester::Vm { transaction, to } => {
                if outgoing.state.is_started() {
                    self.cx.vms.has_moved(outgoing.uuid, self.cx.now);
                }
                self.cx
                    .tell_refusal(outgoing.uuid, transaction, to, refusal);
            }
            Requester::Operator { command } => {
                self.cx.reply(command, CommandReply::Failed(reason));
            }
            Requester::Unknown | Requester::Nobody { .. } => {}
        }
    }

    fn complete(&mut self, number: u64, stats: JobStats) {
        // Where libvirt has not told that the VM stands still.
        self.addresses.forward_departures(&mut self.cx, number);
        let Some(outgoing) = self.remove(number) else {
            return;
        };
        self.end_departure_recording(number, &outgoing);
        let now = self.cx.now;
        // Without QEMU's own number, the time until libvirt says that it is over is the bound.
        let pause = stats
            .downtime
            .or(outgoing.stats.downtime)
            .or(outgoing.suspended.map(|at| now.since(at)));
        let copy_ended = outgoing.suspended.unwrap_or(now);
        let copy = copy_ended.since(outgoing.copy_started);
        self.cx.records.update(number, |record| {
            record.copy = Some(copy);
            record.vm_pause = pause;
            record.processed_bytes = stats.processed_bytes.max(record.processed_bytes);
            record.total_bytes = stats.total_bytes.max(record.total_bytes);
        });
        self.cx.records.end(number, now, Outcome::Completed);
        info!(domain = %outgoing.domain, destination = %outgoing.destination, number, ?pause, "Migration is done");
        let progress = MigrationProgress {
            phase: Phase::Completed,
            processed_bytes: stats.processed_bytes,
            total_bytes: stats.total_bytes,
            elapsed_ms: millis(now.since(outgoing.started)),
            vm_pause_ms: pause.map(millis),
            clock_ns: None,
        };
        if outgoing.requester != Requester::Unknown {
            self.cx.send_end(
                number,
                &outgoing.destination,
                outgoing.transaction,
                outgoing.request,
                progress.clone().into(),
            );
        }
        match outgoing.requester {
            Requester::Vm { transaction, .. } => {
                if self.inventory.domains.contains_key(&outgoing.uuid) {
                    let uuid = outgoing.uuid;
                    self.cx.vms.answer(uuid, transaction, progress.into());
                }
            }
            Requester::Operator { command } => {
                self.cx
                    .reply(command, CommandReply::Done { migration: number });
            }
            Requester::Unknown | Requester::Nobody { .. } => {}
        }
    }

    fn remove(&mut self, number: u64) -> Option<Outgoing> {
        for timer in [
            Timer::Streams(number),
            Timer::Response(number),
            Timer::Again(number),
            Timer::Ready(number),
            Timer::Reconnect(number),
        ] {
            self.cx.timers.stop(timer);
        }
        self.outgoing.remove(&number)
    }

    fn started_of(&mut self, uuid: DomainUuid) -> Option<(u64, &mut Outgoing)> {
        self.outgoing
            .iter_mut()
            .find(|(_, outgoing)| outgoing.uuid == uuid && outgoing.state.is_started())
            .map(|(number, outgoing)| (*number, outgoing))
    }

    /// Tells the destination how a started migration stands.
    pub(super) fn tell_peer(&mut self, number: u64) {
        let now = self.cx.now;
        let Some(outgoing) = self.outgoing.get_mut(&number) else {
            return;
        };
        outgoing.peer_told = now;
        let progress = MigrationProgress {
            clock_ns: Some(now.0),
            ..outgoing.progress(now)
        };
        let (peer, transaction) = (outgoing.destination.clone(), outgoing.transaction);
        self.cx.send(&peer, transaction, &progress.into());
    }

    /// Tells the requester how a migration stands.
    pub(super) fn tell_progress(&mut self, number: u64) {
        let Some(outgoing) = self.outgoing.get(&number) else {
            return;
        };
        if let Requester::Vm { transaction, to } = outgoing.requester {
            let progress = outgoing.progress(self.cx.now);
            self.cx.tell(to, transaction, &progress.into());
        }
        self.tell_operator(number);
    }

    pub(super) fn tell_operator(&mut self, number: u64) {
        let Some(outgoing) = self.outgoing.get(&number) else {
            return;
        };
        if let Requester::Operator { command } = outgoing.requester {
            let reply = CommandReply::Progress {
                phase: outgoing.state.phase(),
                processed_bytes: outgoing.stats.processed_bytes,
                total_bytes: outgoing.stats.total_bytes,
            };
            self.cx.reply(command, reply);
        }
    }
}
