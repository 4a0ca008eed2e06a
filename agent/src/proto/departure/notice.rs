//! Migrations that somebody else has libvirt make, told by `ArrivalNotice` of the destination.
//!
//! The notice comes before libvirt copies anything, so the destination joins, probes and holds as for
//! a move of Roamcast's own. From then on the migration is followed: one that never begins is undone
//! as soon as the hypervisor has given up looking for it.

use common::signal::{ArrivalNotice, MigrationAbort};
use tracing::info;

use super::{Requester, State, UNKNOWN_DESTINATION};
use crate::proto::policy::Asker;
use crate::proto::refusal::{Refusal, bounded};
use crate::proto::{Agent, Domain, DomainUuid};

impl Agent {
    /// The destination says that libvirt brings a domain of this host there.
    pub(in crate::proto) fn on_arrival_notice(
        &mut self,
        peer: &str,
        transaction: u64,
        notice: &ArrivalNotice,
    ) {
        let uuid = DomainUuid(notice.domain_uuid.into());
        let allowed = self
            .check_notice_of(peer, transaction, uuid, &notice.domain_name)
            .and_then(|domain| self.take_notice(peer, transaction, &domain));
        if let Err(refusal) = allowed {
            let reason = bounded(&refusal.to_string());
            info!(peer, domain = %notice.domain_name, %reason, "Move by somebody else is not followed");
            self.cx
                .send(peer, transaction, &MigrationAbort { reason }.into());
        }
    }

    /// Whether a peer may know of a domain, and tell that it comes there.
    fn check_notice_of(
        &mut self,
        peer: &str,
        transaction: u64,
        uuid: DomainUuid,
        named: &str,
    ) -> Result<Domain, Refusal> {
        let agent = self.cx.config.name.clone();
        self.check_rate(peer, transaction)?;
        let Some(domain) = self.inventory.domains.get(&uuid).cloned() else {
            return Err(Refusal::UnknownDomain {
                agent,
                named: named.to_owned(),
            });
        };
        if domain.name != named {
            return Err(Refusal::UnknownDomain {
                agent,
                named: named.to_owned(),
            });
        }
        self.check_route(&domain, peer, Asker::Hook)?;
        Ok(domain)
    }

    fn take_notice(
        &mut self,
        peer: &str,
        transaction: u64,
        domain: &Domain,
    ) -> Result<(), Refusal> {
        let known = self.outgoing.iter().find(|(_, o)| o.uuid == domain.uuid);
        match known.map(|(number, outgoing)| (*number, outgoing.destination.as_str())) {
            Some((number, destination)) if destination == peer => self.noticed_again(number),
            Some((number, UNKNOWN_DESTINATION)) => {
                self.destination_found(number, peer, transaction);
            }
            _ if !domain.running => {
                return Err(Refusal::NotRunning {
                    domain: domain.name.clone(),
                });
            }
            _ => {
                self.check_departure(domain, peer, Asker::Hook)?;
                self.depart(domain, peer, Requester::Nobody { transaction });
            }
        }
        Ok(())
    }

    /// A domain that is to leave for that destination anyway. If libvirt was not asked yet, it has
    /// been by somebody else. If it was, the destination has forgotten what it was asked.
    fn noticed_again(&mut self, number: u64) {
        let Some(outgoing) = self.outgoing.get_mut(&number) else {
            return;
        };
        if outgoing.state.is_started() {
            self.send_request(number);
            return;
        }
        outgoing.foreign = true;
        if outgoing.state == State::Ready {
            self.start(number);
        }
    }

    /// The destination of a migration that was found running. It is told what it can still use.
    fn destination_found(&mut self, number: u64, peer: &str, transaction: u64) {
        let Some(outgoing) = self.outgoing.get_mut(&number) else {
            return;
        };
        outgoing.destination = peer.to_owned();
        outgoing.requester = Requester::Nobody { transaction };
        outgoing.transaction = transaction;
        let stands_still = outgoing.state == State::Switching;
        let Some(outgoing) = self.outgoing.get(&number) else {
            return;
        };
        let request = self.agent_request(outgoing, &[]);
        if let Some(outgoing) = self.outgoing.get_mut(&number) {
            outgoing.request = Some(request);
        }
        self.cx.records.update(number, |record| {
            record.peer = peer.to_owned();
        });
        if !stands_still {
            self.record_departure(number);
        }
        self.send_request(number);
        self.tell_peer(number);
    }
}

#[cfg(test)]
#[path = "../tests/departure_notice.rs"]
mod tests;
