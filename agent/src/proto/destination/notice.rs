//! Domains that somebody else moves to this host: libvirt's hook tells, and waits a little.
//!
//! ```text
//!  hook: Prepare --- nobody has asked for the domain yet ---> ArrivalNotice to its source
//!     |                                                            | AgentRequest
//!     | its source has asked already, as in Roamcast's own moves   v
//!     +--------------------------------------------------> joins and probes
//!                                                                  | AgentResponse
//!  hook: done, refused, or [`HOOK_WAIT`] is over <-----------------+
//! ```
//!
//! The hook never decides whether a domain comes: whatever it is told, libvirt goes on. A probe that
//! takes longer than the hook waits goes on too.

use std::time::Duration;

use common::signal::{ArrivalNotice, MAX_TEXT_BYTES};
use tracing::{info, warn};

use super::{Agent, DomainUuid, Incoming};
use crate::proto::CommandReply;
use crate::proto::refusal::{Refusal, bounded};
use crate::proto::timer::Timer;

/// How long the hook is kept waiting at most, and libvirt with it.
const HOOK_WAIT: Duration = Duration::from_secs(4);

/// A hook that waits.
#[derive(Debug)]
pub(in crate::proto) struct Preparation {
    uuid: DomainUuid,
    domain: String,
    /// Name of the agent where the domain runs.
    source: String,
    /// Of the notice; `None` where the source needs none.
    notice: Option<u64>,
}

impl Preparation {
    /// What libvirt calls the domain, if it is this one.
    pub(super) fn name_of(&self, uuid: &DomainUuid) -> Option<&str> {
        (self.uuid == *uuid).then_some(self.domain.as_str())
    }
}

impl Agent {
    /// `roamcast hook run` of this host: libvirt is about to bring a domain here.
    pub(in crate::proto) fn command_prepare(
        &mut self,
        command: u64,
        uuid: DomainUuid,
        domain: &str,
        source: &str,
    ) {
        self.check_told(uuid, domain);
        let number = match self.expected(uuid) {
            Some((number, incoming)) if incoming.response.is_some() => {
                self.cx
                    .reply(command, CommandReply::Done { migration: number });
                return;
            }
            Some((number, _)) => Some(number),
            None => {
                if let Err(refusal) = self.check_notice(domain, source) {
                    self.cx
                        .reply(command, CommandReply::Failed(refusal.to_string()));
                    return;
                }
                None
            }
        };
        let preparation = Preparation {
            uuid,
            domain: domain.to_owned(),
            source: source.to_owned(),
            notice: number.is_none().then(|| self.cx.numbers.next()),
        };
        self.preparations.insert(command, preparation);
        let deadline = self.cx.now + HOOK_WAIT;
        self.cx.timers.set(Timer::Preparation(command), deadline);
        if number.is_none() {
            info!(domain, source, "Domain is moved here by somebody else");
            self.cx.connect(source);
            self.notice(command);
        }
    }

    /// Returns the arrival of a domain that its source has asked for and still stands by.
    fn expected(&self, uuid: DomainUuid) -> Option<(u64, &Incoming)> {
        let number = self.incoming_of(uuid)?;
        let incoming = self.incoming.get(&number)?;
        let is_cut_off = incoming.begun && !self.has_begun(incoming);
        let stands = incoming.arrived.is_none()
            && incoming.aborted.is_none()
            && !is_cut_off
            && self.cx.is_up(&incoming.peer);
        stands.then_some((number, incoming))
    }

    fn check_notice(&self, domain: &str, source: &str) -> Result<(), Refusal> {
        for (field, text) in [("domain", domain), ("source", source)] {
            if text.is_empty() || text.len() > MAX_TEXT_BYTES {
                return Err(Refusal::BadField { field });
            }
        }
        let agent = self.cx.config.name.clone();
        let domain = domain.to_owned();
        if source == agent {
            return Err(Refusal::StaleSource { domain });
        }
        if self.cx.config.peer(source).is_none() && !self.cx.is_up(source) {
            let source_agent = source.to_owned();
            return Err(Refusal::UnknownSource {
                agent,
                domain,
                source_agent,
            });
        }
        if !self.cx.config.policy.allows_arrival(source, &domain) {
            let peer = source.to_owned();
            return Err(Refusal::Arrival {
                agent,
                domain,
                peer,
            });
        }
        Ok(())
    }

    /// Tells the source of a domain that it is moved, as soon as it can be told.
    fn notice(&mut self, command: u64) {
        let Some(preparation) = self.preparations.get(&command) else {
            return;
        };
        let Some(transaction) = preparation.notice else {
            return;
        };
        let notice = ArrivalNotice {
            domain_uuid: preparation.uuid.0.into(),
            domain_name: preparation.domain.clone(),
        };
        let source = preparation.source.clone();
        self.cx.send(&source, transaction, &notice.into());
    }

    pub(in crate::proto) fn preparations_peer_up(&mut self, peer: &str) {
        for command in self.preparations_where(|preparation| preparation.source == peer) {
            self.notice(command);
        }
    }

    pub(in crate::proto) fn preparations_peer_down(&mut self, peer: &str, reason: &str) {
        let refusal = Refusal::SourceDown {
            source_agent: peer.to_owned(),
            reason: reason.to_owned(),
        };
        for command in self.preparations_where(|preparation| preparation.source == peer) {
            self.end_preparation(command, &refusal.to_string());
        }
    }

    /// The source of a noticed domain does not ask for it.
    pub(in crate::proto) fn preparation_refused(
        &mut self,
        peer: &str,
        transaction: u64,
        reason: &str,
    ) {
        let refused = |preparation: &Preparation| {
            preparation.notice == Some(transaction) && preparation.source == peer
        };
        let refusal = Refusal::RefusedBySource {
            source_agent: peer.to_owned(),
            reason: reason.to_owned(),
        };
        for command in self.preparations_where(refused) {
            self.end_preparation(command, &refusal.to_string());
        }
    }

    /// The source of a domain has its answer: libvirt can go on.
    pub(super) fn prepared(&mut self, uuid: DomainUuid, number: u64) {
        for command in self.preparations_where(|preparation| preparation.uuid == uuid) {
            self.preparations.remove(&command);
            self.cx.timers.stop(Timer::Preparation(command));
            self.cx
                .reply(command, CommandReply::Done { migration: number });
        }
    }

    /// A domain is not expected, or no longer.
    pub(super) fn not_prepared(&mut self, uuid: DomainUuid, reason: &str) {
        for command in self.preparations_where(|preparation| preparation.uuid == uuid) {
            self.end_preparation(command, reason);
        }
    }

    /// A request of the source of a noticed domain is refused. Others who ask for it change nothing.
    pub(super) fn preparation_refused_here(&mut self, peer: &str, uuid: DomainUuid, reason: &str) {
        let of_source =
            |preparation: &Preparation| preparation.uuid == uuid && preparation.source == peer;
        for command in self.preparations_where(of_source) {
            self.end_preparation(command, reason);
        }
    }

    pub(in crate::proto) fn preparation_timed_out(&mut self, command: u64) {
        if let Some(preparation) = self.preparations.get(&command) {
            let refusal = Refusal::NotPrepared {
                domain: preparation.domain.clone(),
                waited: HOOK_WAIT,
            };
            self.end_preparation(command, &refusal.to_string());
        }
    }

    fn end_preparation(&mut self, command: u64, reason: &str) {
        if let Some(preparation) = self.preparations.remove(&command) {
            let domain = bounded(&preparation.domain);
            warn!(domain, reason, "Domain comes without being prepared for");
            self.cx.timers.stop(Timer::Preparation(command));
            self.cx
                .reply(command, CommandReply::Failed(reason.to_owned()));
        }
    }

    fn preparations_where(&self, condition: impl Fn(&Preparation) -> bool) -> Vec<u64> {
        self.preparations
            .iter()
            .filter(|(_, preparation)| condition(preparation))
            .map(|(command, _)| *command)
            .collect()
    }
}

#[cfg(test)]
#[path = "../tests/arrival_notice.rs"]
mod tests;
