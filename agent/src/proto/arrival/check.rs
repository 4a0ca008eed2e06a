//! Permission checks for arriving domains: the policy, and libvirt's name against the source's.
//!
//! The policy matches names, and a source could claim any name. So the name must equal libvirt's
//! name for the UUID if libvirt knows the domain: the domain is on this host, libvirt is receiving
//! the domain, or libvirt's hook named it. An arrival ends when libvirt reports a different name
//! later.

use std::time::Duration;

use common::signal::AgentRequest;

use super::{Arrivals, Host};
use crate::proto::DomainUuid;
use crate::proto::context::Context;
use crate::proto::host::inventory::Inventory;
use crate::proto::refusal::Refusal;

/// Time after a migration's end or this agent's start in which the source of a domain that already
/// runs here may still send its request.
const RECENT: Duration = Duration::from_secs(90);

impl Arrivals {
    pub(super) fn check_arrival(
        &self,
        cx: &Context,
        host: &Host<'_>,
        peer: &str,
        uuid: DomainUuid,
        body: &AgentRequest,
    ) -> Result<(), Refusal> {
        let agent = cx.config.name.clone();
        let field = |field| Err(Refusal::BadField { field });
        if body.domain_name.is_empty() {
            return field("domain_name");
        }
        let domain = body.domain_name.clone();
        if !cx.config.policy.allows_arrival(peer, &domain) {
            let peer = peer.to_owned();
            return Err(Refusal::Arrival {
                agent,
                domain,
                peer,
            });
        }
        self.check_identity(cx, host.inventory, uuid, &domain)?;
        let known = self.incoming.of_domain(uuid);
        if let Some(known) = known.filter(|known| known.peer != peer) {
            let peer = known.peer.clone();
            return Err(Refusal::AlreadyArriving {
                domain,
                agent,
                peer,
            });
        }
        let domains = &host.inventory.domains;
        let runs = domains.get(&uuid).is_some_and(|it| it.running);
        let came = host.inventory.came.get(&uuid);
        let has_come = came.is_some_and(|at| cx.now.since(*at) < RECENT);
        if runs && known.is_none() && !has_come && cx.uptime() >= RECENT {
            return Err(Refusal::RunsHere { domain, agent });
        }
        Ok(())
    }

    /// Compares the source's name for a domain with libvirt's, if libvirt knows the domain.
    fn check_identity(
        &self,
        cx: &Context,
        inventory: &Inventory,
        uuid: DomainUuid,
        named: &str,
    ) -> Result<(), Refusal> {
        let of_hook = || self.preparations.name_of(&uuid);
        if let Some(known) = inventory.name_of(&uuid).or_else(of_hook) {
            if known == named {
                return Ok(());
            }
            return Err(other_name(cx, uuid, known, named));
        }
        match inventory.uuid_of(named) {
            Some(other) => Err(Refusal::OtherUuid {
                agent: cx.config.name.clone(),
                domain: named.to_owned(),
                uuid: other.to_string(),
            }),
            None => Ok(()),
        }
    }

    /// Checks the name again after libvirt's report: an arrival under another name is a lie and
    /// ends.
    pub(in crate::proto) fn check_name(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        uuid: DomainUuid,
    ) {
        let Some(incoming) = self.incoming.of_domain(uuid) else {
            return;
        };
        let number = incoming.number;
        let checked = self.check_identity(cx, host.inventory, uuid, &incoming.domain);
        if let Err(refusal) = checked {
            self.undo_and_tell(cx, host, number, &refusal);
        }
    }

    /// Checks the name against the one that libvirt's hook reported.
    pub(super) fn check_told(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        uuid: DomainUuid,
        known: &str,
    ) {
        let incoming = self.incoming.of_domain(uuid);
        if let Some(incoming) = incoming.filter(|it| it.domain != known) {
            let number = incoming.number;
            let refusal = other_name(cx, uuid, known, &incoming.domain);
            self.undo_and_tell(cx, host, number, &refusal);
        }
    }

    /// Checks a peer's rate limit. Repetitions of a waiting request were counted before and pass.
    pub(in crate::proto) fn check_rate(
        &mut self,
        cx: &Context,
        peer: &str,
        transaction: u64,
    ) -> Result<(), Refusal> {
        let per_minute = cx.config.policy.requests_per_minute.get();
        if self.queue.has(peer, transaction) || self.rates.allow(peer, cx.now, per_minute) {
            return Ok(());
        }
        Err(Refusal::TooOften {
            agent: cx.config.name.clone(),
            peer: peer.to_owned(),
        })
    }
}

fn other_name(cx: &Context, uuid: DomainUuid, known: &str, named: &str) -> Refusal {
    Refusal::OtherName {
        agent: cx.config.name.clone(),
        uuid: uuid.to_string(),
        known: known.to_owned(),
        named: named.to_owned(),
    }
}
