//! Permission checks for outgoing migrations, whoever asks: route, policy, limits, state of the
//! hypervisor.

use common::text::is_plain_text;

use super::{Departures, Outgoing};
use crate::proto::Domain;
use crate::proto::addresses::Addresses;
use crate::proto::context::Context;
use crate::proto::host::inventory::Inventory;
use crate::proto::policy::Asker;
use crate::proto::refusal::{Refusal, Whose, bounded};

/// Returns the running domain that an operator named.
pub(super) fn check_departing<'a>(
    cx: &Context,
    inventory: &'a Inventory,
    named: &str,
) -> Result<&'a Domain, Refusal> {
    match inventory.domain_by_name(named) {
        None if !inventory.hypervisor_connected => Err(Refusal::NoHypervisor {
            agent: cx.config.name.clone(),
        }),
        None => Err(Refusal::UnknownDomain {
            agent: cx.config.name.clone(),
            named: bounded(named),
        }),
        Some(domain) if !domain.running => Err(Refusal::NotRunning {
            domain: domain.name.clone(),
        }),
        Some(domain) => Ok(domain),
    }
}

/// Checks the destination and the policy, regardless of the current state of the domain and the
/// host.
pub(super) fn check_route(
    cx: &Context,
    domain: &Domain,
    destination: &str,
    by: Asker,
) -> Result<(), Refusal> {
    let agent = cx.config.name.clone();
    let domain_name = domain.name.clone();
    if !is_plain_text(&domain_name) {
        return Err(Refusal::Name {
            domain: bounded(&domain_name),
        });
    }
    if destination != agent && cx.config.peer(destination).is_none() {
        return Err(Refusal::UnknownDestination {
            agent,
            named: bounded(destination),
            known: cx.config.peer_names(),
        });
    }
    if destination == agent {
        return Err(Refusal::SameHost {
            domain: domain_name,
            agent,
        });
    }
    let policy = &cx.config.policy;
    if !policy.allows_departure(&domain_name, destination, by) {
        return Err(Refusal::Departure {
            agent,
            domain: domain_name,
            destination: destination.to_owned(),
            by,
        });
    }
    Ok(())
}

/// Checks that a VM's last migration is long enough ago for a new request.
pub(super) fn check_pause(cx: &mut Context, domain: &Domain) -> Result<(), Refusal> {
    let pause = cx.config.policy.vm_pause();
    match cx.vms.has_to_wait(domain.uuid, cx.now, pause) {
        None => Ok(()),
        Some(wait) => Err(Refusal::Pause {
            domain: domain.name.clone(),
            wait,
        }),
    }
}

impl Departures {
    /// Checks whether a domain may go to a destination now.
    pub(super) fn check_departure(
        &self,
        cx: &Context,
        inventory: &Inventory,
        domain: &Domain,
        destination: &str,
        by: Asker,
    ) -> Result<(), Refusal> {
        check_route(cx, domain, destination, by)?;
        let agent = cx.config.name.clone();
        let is_it = |outgoing: &&Outgoing| outgoing.order.uuid == domain.uuid;
        let running = self.outgoing.values().find(is_it);
        // An unconfirmed report of a peer must not block a migration.
        let only_told = |outgoing: &&Outgoing| by != Asker::Hook && outgoing.is_only_told();
        if let Some(running) = running.filter(|it| !only_told(it)) {
            return Err(Refusal::AlreadyMigrating {
                domain: domain.name.clone(),
                destination: running.order.destination.clone(),
            });
        }
        if !inventory.hypervisor_connected {
            return Err(Refusal::NoHypervisor { agent });
        }
        let share = cx.config.policy.departing();
        let others = || self.outgoing.values().filter(|it| !is_it(it));
        let is_to_peer = |it: &&Outgoing| it.order.destination == destination;
        let whose = if others().filter(is_to_peer).count() >= share.of_peer {
            Whose::Peer
        } else if others().count() >= share.of_all {
            Whose::All
        } else {
            return Ok(());
        };
        Err(Refusal::TooManyOutgoing {
            agent,
            limit: whose.limit(share),
            whose,
        })
    }

    /// Ends a migration that only a peer reported, in favour of a migration that `asker` wants.
    pub(super) fn supersede(
        &mut self,
        cx: &mut Context,
        addresses: &mut Addresses,
        domain: &Domain,
        asker: &'static str,
    ) {
        let told = self.of_domain(domain.uuid).filter(|it| it.is_only_told());
        if let Some(outgoing) = told {
            let number = outgoing.order.number;
            let domain = domain.name.clone();
            self.fail(
                cx,
                addresses,
                number,
                &Refusal::Superseded { domain, asker },
            );
        }
    }
}
