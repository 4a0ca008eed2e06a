//! Migrations that somebody else starts in libvirt, as reported by the destination's
//! `ArrivalNotice` or by libvirt itself.
//!
//! The notice arrives before libvirt copies memory, so the destination joins, probes and holds as
//! in Roamcast's own migrations. From then on the agent follows the migration. If libvirt never
//! begins the migration, the agent undoes everything as soon as the hypervisor stops looking for
//! the migration.

use common::signal::{ArrivalNotice, MigrationAbort, Phase};
use tracing::{info, warn};

use super::check::check_route;
use super::stage::{Mover, Moving, Stage, Step};
use super::{
    Around, Departures, Order, Outgoing, Requester, UNKNOWN_DESTINATION, agent_request,
    begin_record,
};
use crate::proto::context::Context;
use crate::proto::host::inventory::Inventory;
use crate::proto::policy::Asker;
use crate::proto::refusal::Refusal;
use crate::proto::{Domain, DomainUuid};

impl Departures {
    /// Handles the destination's notice that libvirt brings a domain of this host there. `allowed`
    /// is the result of the peer's rate check.
    pub(in crate::proto) fn on_arrival_notice(
        &mut self,
        cx: &mut Context,
        mut around: Around<'_>,
        (peer, transaction): (&str, u64),
        notice: &ArrivalNotice,
        allowed: Result<(), Refusal>,
    ) {
        let taken = allowed
            .and_then(|()| noticed_domain(cx, around.inventory, peer, notice))
            .and_then(|domain| self.take_notice(cx, &mut around, peer, transaction, domain));
        if let Err(refusal) = taken {
            let reason = refusal.reason();
            info!(peer, domain = %notice.domain_name, %reason, "Move by somebody else is not followed");
            cx.send(peer, transaction, &MigrationAbort(reason).into());
        }
    }

    fn take_notice(
        &mut self,
        cx: &mut Context,
        around: &mut Around<'_>,
        peer: &str,
        transaction: u64,
        domain: &Domain,
    ) -> Result<(), Refusal> {
        if let Some(known) = self.of_domain(domain.uuid) {
            if known.order.destination == peer {
                known.noticed_again(cx, around.inventory);
                return Ok(());
            }
            if let Stage::Moving(moving) = &mut known.stage
                && known.order.requester == Requester::Unknown
            {
                moving.destination_found(cx, around, &mut known.order, (peer, transaction));
                return Ok(());
            }
        }
        if !domain.running {
            return Err(Refusal::NotRunning {
                domain: domain.name.clone(),
            });
        }
        self.check_departure(cx, around.inventory, domain, peer, Asker::Hook)?;
        self.depart(
            cx,
            around,
            domain,
            peer,
            Requester::External { transaction },
        );
        Ok(())
    }

    /// Handles libvirt's report that it migrates a domain: a migration that the agent follows, or
    /// one that started before this agent. In the latter case this agent sends nothing to the
    /// destination, which relies on its own libvirt, until the destination sends a notice.
    pub(in crate::proto) fn found(
        &mut self,
        cx: &mut Context,
        inventory: &Inventory,
        uuid: DomainUuid,
    ) {
        if let Some(known) = self.of_domain(uuid) {
            if let Stage::Moving(moving) = &mut known.stage {
                moving.seen();
            }
            return;
        }
        let Some(domain) = inventory.domains.get(&uuid) else {
            return;
        };
        let number = begin_record(cx, domain, UNKNOWN_DESTINATION);
        cx.records
            .update(number, |record| record.phase = Phase::Copying);
        warn!(
            domain = %domain.name,
            number,
            "Migration that was started before this agent goes on; libvirt brings it to its end"
        );
        let requester = Requester::Unknown;
        let order = Order::new(cx, number, domain, UNKNOWN_DESTINATION, requester);
        let stage = Stage::Moving(Box::new(Moving::new(Step::Copying, None, cx.now)));
        self.outgoing.insert(number, Outgoing { order, stage });
    }
}

/// Returns the domain of a notice, if the peer may learn of the domain and announce its arrival
/// there.
fn noticed_domain<'a>(
    cx: &Context,
    inventory: &'a Inventory,
    peer: &str,
    notice: &ArrivalNotice,
) -> Result<&'a Domain, Refusal> {
    let named = &notice.domain_name;
    let found = inventory
        .domains
        .get(&DomainUuid(notice.domain_uuid.into()))
        .filter(|domain| domain.name == *named);
    let Some(domain) = found else {
        return Err(Refusal::UnknownDomain {
            agent: cx.config.name.clone(),
            named: named.clone(),
        });
    };
    check_route(cx, domain, peer, Asker::Hook)?;
    Ok(domain)
}

impl Outgoing {
    /// Handles a notice for a migration to the same destination. Before START MIGRATION, the notice
    /// means that somebody else asked libvirt first. After it, the notice means that the
    /// destination lost the request, so the agent repeats the request.
    fn noticed_again(&mut self, cx: &mut Context, inventory: &Inventory) {
        match &mut self.stage {
            Stage::Gathering { mover, .. }
            | Stage::Connecting { mover }
            | Stage::Requesting { mover, .. } => *mover = Mover::External,
            Stage::Ready(answered) => {
                let answered = *answered;
                self.start(cx, inventory, None, answered);
            }
            Stage::Moving(_) => self.order.ask(cx),
        }
    }
}

impl Moving {
    /// Records the destination of a migration that was found running, and sends the destination
    /// what is still useful.
    fn destination_found(
        &mut self,
        cx: &mut Context,
        around: &Around<'_>,
        order: &mut Order,
        (peer, transaction): (&str, u64),
    ) {
        order.destination = peer.to_owned();
        order.requester = Requester::External { transaction };
        order.transaction = transaction;
        order.request = Some(agent_request(order, cx.now, around, &[]));
        cx.records.update(order.number, |record| {
            record.peer = peer.to_owned();
        });
        if self.stopped().is_none() {
            self.record(cx, around.inventory, order);
        }
        order.ask(cx);
        self.tell_peer(cx, order);
    }
}

#[cfg(test)]
mod tests;
