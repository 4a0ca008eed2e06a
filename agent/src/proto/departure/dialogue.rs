//! Messages of an outgoing migration with its destination and its VM, until START MIGRATION.

use std::time::Duration;

use common::maps::StreamKey;
use common::signal::{AgentResponse, MigrationReady, Phase};
use tracing::{debug, info, warn};

use super::stage::{Answered, Mover, Moving, Stage, Step};
use super::{Around, Departures, Order, Outgoing, Requester, agent_request};
use crate::proto::addresses::Addresses;
use crate::proto::context::Context;
use crate::proto::host::inventory::Inventory;
use crate::proto::links::vm::Caller;
use crate::proto::refusal::Refusal;
use crate::proto::timer::Timer;
use crate::proto::{CopyWay, Encrypt, Output, Stream};

/// Interval of repeated requests to a destination that has no place.
const ASK_INTERVAL: Duration = Duration::from_secs(2);

impl Departures {
    /// Handles a destination's message that it has no place yet: schedules the next request, up to
    /// `place_timeout`. Returns false if the transaction belongs to no outgoing migration.
    pub(in crate::proto) fn told_to_wait(&mut self, cx: &mut Context, from: (&str, u64)) -> bool {
        let Some(outgoing) = self.by_transaction(from) else {
            return false;
        };
        let number = outgoing.order.number;
        cx.timers.set(Timer::Again(number), cx.now + ASK_INTERVAL);
        if let Stage::Requesting { waits, .. } = &mut outgoing.stage {
            *waits = true;
            let timing = cx.config.timing;
            let most = outgoing.order.started + timing.place_timeout;
            let deadline = most.min(cx.now + timing.response_timeout);
            cx.timers.set(Timer::Response(number), deadline);
            outgoing.tell_operator(cx);
        }
        true
    }

    pub(in crate::proto) fn ask_again(&mut self, cx: &mut Context, number: u64) {
        if let Some(outgoing) = self.outgoing.get_mut(&number)
            && let Stage::Requesting { .. } | Stage::Moving(_) = outgoing.stage
        {
            outgoing.ask(cx);
        }
    }

    pub(in crate::proto) fn peer_up(
        &mut self,
        cx: &mut Context,
        addresses: &Addresses,
        peer: &str,
    ) {
        for outgoing in self.bound_for(peer) {
            cx.timers.stop(Timer::Reconnect(outgoing.order.number));
            outgoing.ask(cx);
            outgoing.claim_address(cx, addresses);
            if let Stage::Moving(moving) = &mut outgoing.stage {
                moving.backoff.reset();
                moving.tell_peer(cx, &outgoing.order);
                moving.tell_cuts(cx, &outgoing.order);
            }
        }
    }

    pub(in crate::proto) fn peer_down(
        &mut self,
        cx: &mut Context,
        addresses: &mut Addresses,
        peer: &str,
        reason: &str,
    ) {
        let mut lost = Vec::new();
        for Outgoing { order, stage } in self.bound_for(peer) {
            match stage {
                Stage::Moving(moving) => cx.reconnect(order.number, &mut moving.backoff),
                _ => lost.push(order.number),
            }
        }
        let refusal = Refusal::Down {
            destination: peer.to_owned(),
            reason: reason.to_owned(),
        };
        for number in lost {
            self.fail(cx, addresses, number, &refusal);
        }
    }

    /// Reconnects to the destination of a migration. Returns false if the migration does not exist.
    pub(in crate::proto) fn reconnect(&self, cx: &mut Context, number: u64) -> bool {
        let outgoing = self.outgoing.get(&number);
        if let Some(outgoing) = outgoing {
            cx.connect(&outgoing.order.destination);
        }
        outgoing.is_some()
    }

    pub(in crate::proto) fn on_agent_response(
        &mut self,
        cx: &mut Context,
        around: Around<'_>,
        from: (&str, u64),
        response: AgentResponse,
    ) {
        let Some(outgoing) = self.by_transaction(from) else {
            return;
        };
        let number = outgoing.order.number;
        cx.timers.stop(Timer::Again(number));
        if let Err(refusal) = outgoing.take_response(cx, around.inventory, response) {
            self.fail(cx, around.addresses, number, &refusal);
        }
    }

    /// Answers a repeated `MigrationRequest` of a running migration. Returns false if the caller
    /// asked for no running migration.
    pub(in crate::proto) fn answer_request_again(
        &mut self,
        cx: &mut Context,
        caller: &Caller,
    ) -> bool {
        let outgoing = self.asked_by(caller);
        if let Some(outgoing) = &outgoing {
            outgoing.tell_requester(cx);
        }
        outgoing.is_some()
    }

    /// Handles `MigrationReady`, which VMs also send to ask for progress. Returns false if the
    /// transaction is unknown.
    pub(in crate::proto) fn ready_from_vm(
        &mut self,
        cx: &mut Context,
        mut around: Around<'_>,
        caller: &Caller,
        ready: &MigrationReady,
    ) -> bool {
        let Some(outgoing) = self.asked_by(caller) else {
            return false;
        };
        debug!(domain = %caller.domain.name, caller.transaction, "VM is ready");
        let number = outgoing.order.number;
        outgoing.change_addresses(cx, &mut around, ready);
        let Stage::Ready(answered) = outgoing.stage else {
            outgoing.tell_progress(cx);
            return true;
        };
        match cx.copy_way(&outgoing.order.destination, answered.copy_tls) {
            Ok(way) => outgoing.start(cx, around.inventory, Some(way), answered),
            Err(refusal) => self.fail(cx, around.addresses, number, &refusal),
        }
        true
    }

    /// Returns the running migration of the VM's transaction, and records the VM's current address.
    fn asked_by(&mut self, caller: &Caller) -> Option<&mut Outgoing> {
        let mut all = self.outgoing.values_mut();
        let outgoing = all.find(|it| it.is_asked_by(caller))?;
        if let Requester::Vm { to, .. } = &mut outgoing.order.requester {
            *to = caller.from;
        }
        Some(outgoing)
    }
}

impl Order {
    /// Sends the request to the destination once the request exists.
    pub(super) fn ask(&self, cx: &mut Context) {
        if let Some(request) = &self.request {
            let request = request.clone().into();
            cx.send(&self.destination, self.transaction, &request);
        }
    }
}

impl Outgoing {
    pub(super) fn ask(&mut self, cx: &mut Context) {
        if let Stage::Connecting { mover } = self.stage {
            let waits = false;
            self.stage = Stage::Requesting { mover, waits };
        }
        self.order.ask(cx);
    }

    /// Makes the request from the flows, which are empty after a timeout, and sends it if the
    /// destination is connected.
    pub(super) fn gathered(
        &mut self,
        cx: &mut Context,
        around: &Around<'_>,
        streams: &[(StreamKey, Stream)],
    ) {
        cx.timers.stop(Timer::Streams(self.order.number));
        let Stage::Gathering { mover, .. } = self.stage else {
            return;
        };
        let request = agent_request(&self.order, cx.now, around, streams);
        self.order.request = Some(request);
        self.stage = Stage::Connecting { mover };
        if cx.is_up(&self.order.destination) {
            self.ask(cx);
        }
    }

    /// Handles the destination's answer.
    fn take_response(
        &mut self,
        cx: &mut Context,
        inventory: &Inventory,
        mut response: AgentResponse,
    ) -> Result<(), Refusal> {
        let Stage::Requesting { mover, .. } = self.stage else {
            return Ok(());
        };
        let order = &self.order;
        if response.prefix_length > 128 {
            let field = "prefix_length";
            return Err(Refusal::Refused {
                destination: order.destination.clone(),
                reason: Refusal::BadField { field }.whole_reason(),
            });
        }
        cx.timers.stop(Timer::Response(order.number));
        let signalling = cx.now.since(order.started);
        let asked = order.request.as_ref();
        response
            .receptions
            .truncate(asked.map_or(0, |request| request.listeners.len()));
        let answered = Answered::new(&response);
        self.stage = Stage::Ready(answered);
        cx.records.update(order.number, |record| {
            record.phase = Phase::Ready;
            record.signalling = Some(signalling);
            record.receptions = response.receptions;
        });
        if let Requester::Vm { .. } = order.requester {
            self.tell_requester(cx);
            if mover == Mover::Agent {
                let deadline = cx.now + cx.config.timing.ready_timeout;
                cx.timers.set(Timer::Ready(self.order.number), deadline);
                return Ok(());
            }
        }
        let way = match mover {
            Mover::Agent => Some(cx.copy_way(&self.order.destination, answered.copy_tls)?),
            Mover::External => None,
        };
        self.start(cx, inventory, way, answered);
        Ok(())
    }

    /// START MIGRATION. `way` is the encryption of the memory copy, or `None` if somebody else
    /// asked libvirt and the agent only follows the migration.
    pub(super) fn start(
        &mut self,
        cx: &mut Context,
        inventory: &Inventory,
        way: Option<CopyWay>,
        answered: Answered,
    ) {
        let order = &self.order;
        let (uuid, number) = (order.uuid, order.number);
        let Some(peer) = cx.config.peer(&order.destination) else {
            return;
        };
        let (step, start) = match &way {
            None => (Step::Awaited, Output::FollowMigration { uuid }),
            Some(way) => {
                let start = Output::StartMigration {
                    uuid,
                    connect_uri: peer.connect_uri.clone(),
                    migrate_uri: peer.migrate_uri.clone(),
                    tls: *way == CopyWay::Tls,
                };
                (Step::Copying, start)
            }
        };
        if matches!(order.requester, Requester::Vm { .. }) {
            cx.vms.has_moved(uuid, cx.now);
        }
        info!(domain = %order.domain, destination = %order.destination, number, "Migration starts");
        if let Some(CopyWay::Clear(why)) = &way
            && cx.config.copy.encrypt != Encrypt::Never
        {
            warn!(domain = %order.domain, destination = %order.destination, number, %why, "Memory is copied in the clear");
        }
        cx.timers.stop(Timer::Ready(number));
        cx.records.update(number, |record| {
            record.phase = Phase::Copying;
            record.way = way;
        });
        let mut moving = Moving::new(step, Some(answered), cx.now);
        moving.record(cx, inventory, order);
        cx.outputs.push_back(start);
        moving.tell_peer(cx, order);
        self.stage = Stage::Moving(Box::new(moving));
        self.tell_progress(cx);
    }
}
