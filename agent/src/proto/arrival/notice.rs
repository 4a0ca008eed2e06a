//! Migrations to this host that somebody else starts. libvirt's hook reports them and waits
//! briefly.
//!
//! ```text
//!  hook: Prepare --- no request for the domain yet ---> ArrivalNotice to its source
//!     |                                                            | AgentRequest
//!     | request exists, as in Roamcast's own migrations            v
//!     +--------------------------------------------------> joins and probes
//!                                                                  | AgentResponse
//!  hook: done, refused, or [`HOOK_WAIT`] is over <-----------------+
//! ```
//!
//! The hook never decides whether a domain arrives: libvirt proceeds after every answer. A probe
//! that takes longer than the hook waits continues.

use std::collections::BTreeMap;
use std::time::Duration;

use common::signal::{ArrivalNotice, MAX_TEXT_BYTES, Reason};
use tracing::{info, warn};

use super::{Arrivals, Host, Incoming};
use crate::proto::context::Context;
use crate::proto::refusal::{Refusal, bounded};
use crate::proto::timer::Timer;
use crate::proto::{CommandReply, DomainUuid};

/// Longest wait of the hook, and of libvirt with it.
const HOOK_WAIT: Duration = Duration::from_secs(4);

/// A waiting hook.
#[derive(Debug)]
struct Preparation {
    uuid: DomainUuid,
    domain: String,
    /// Name of the agent on the source host.
    source: String,
    /// Transaction number of the notice; `None` if the source sent its request already.
    notice: Option<u64>,
}

/// libvirt's waiting hooks, by command number.
#[derive(Debug, Default)]
pub(super) struct Preparations(BTreeMap<u64, Preparation>);

impl Preparations {
    /// Adds a waiting hook, and sends the notice to the source if it needs one.
    fn begin(&mut self, cx: &mut Context, command: u64, preparation: Preparation) {
        let deadline = cx.now + HOOK_WAIT;
        cx.timers.set(Timer::Preparation(command), deadline);
        let notice = preparation.notice;
        let (domain, source) = (preparation.domain.clone(), preparation.source.clone());
        self.0.insert(command, preparation);
        if notice.is_some() {
            info!(domain, source, "Domain is moved here by somebody else");
            cx.connect(&source);
            self.notice(cx, command);
        }
    }

    /// Returns libvirt's name of a domain, as a waiting hook reported it.
    pub(super) fn name_of(&self, uuid: &DomainUuid) -> Option<&str> {
        let mut hooks = self.0.values();
        let hook = hooks.find(|it| it.uuid == *uuid)?;
        Some(&hook.domain)
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sends the notice to the source; a later connection repeats it.
    fn notice(&mut self, cx: &mut Context, command: u64) {
        let Some(preparation) = self.0.get(&command) else {
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
        cx.send(&source, transaction, &notice.into());
    }

    pub(super) fn peer_up(&mut self, cx: &mut Context, peer: &str) {
        for command in self.of(|preparation| preparation.source == peer) {
            self.notice(cx, command);
        }
    }

    pub(super) fn peer_down(&mut self, cx: &mut Context, peer: &str, reason: &str) {
        let refusal = Refusal::SourceDown {
            source_agent: peer.to_owned(),
            reason: reason.to_owned(),
        };
        for command in self.of(|preparation| preparation.source == peer) {
            self.end(cx, command, &refusal.to_string());
        }
    }

    /// Handles a source's refusal to send a request for a noticed domain.
    pub(super) fn refused(
        &mut self,
        cx: &mut Context,
        peer: &str,
        transaction: u64,
        reason: &Reason,
    ) {
        let refused = |preparation: &Preparation| {
            preparation.notice == Some(transaction) && preparation.source == peer
        };
        let refusal = Refusal::RefusedBySource {
            source_agent: peer.to_owned(),
            reason: reason.clone(),
        };
        for command in self.of(refused) {
            self.end(cx, command, &refusal.to_string());
        }
    }

    /// Releases the hooks of a domain whose source got its answer.
    pub(super) fn prepared(&mut self, cx: &mut Context, uuid: DomainUuid, number: u64) {
        for command in self.of(|preparation| preparation.uuid == uuid) {
            self.0.remove(&command);
            cx.timers.stop(Timer::Preparation(command));
            cx.reply(command, CommandReply::Done { migration: number });
        }
    }

    /// Ends the hooks of a domain that does not arrive.
    pub(super) fn not_prepared(&mut self, cx: &mut Context, uuid: DomainUuid, reason: &str) {
        for command in self.of(|preparation| preparation.uuid == uuid) {
            self.end(cx, command, reason);
        }
    }

    /// Ends the hooks of a domain after this host refused its source's request. Requests of other
    /// peers change nothing.
    pub(super) fn refused_here(
        &mut self,
        cx: &mut Context,
        peer: &str,
        uuid: DomainUuid,
        reason: &str,
    ) {
        let of_source =
            |preparation: &Preparation| preparation.uuid == uuid && preparation.source == peer;
        for command in self.of(of_source) {
            self.end(cx, command, reason);
        }
    }

    pub(super) fn timed_out(&mut self, cx: &mut Context, command: u64) {
        if let Some(preparation) = self.0.get(&command) {
            let refusal = Refusal::NotPrepared {
                domain: preparation.domain.clone(),
                waited: HOOK_WAIT,
            };
            self.end(cx, command, &refusal.to_string());
        }
    }

    fn end(&mut self, cx: &mut Context, command: u64, reason: &str) {
        if let Some(preparation) = self.0.remove(&command) {
            let domain = bounded(&preparation.domain);
            warn!(domain, reason, "Domain comes without being prepared for");
            cx.timers.stop(Timer::Preparation(command));
            cx.reply(command, CommandReply::Failed(reason.to_owned()));
        }
    }

    fn of(&self, condition: impl Fn(&Preparation) -> bool) -> Vec<u64> {
        self.0
            .iter()
            .filter(|(_, preparation)| condition(preparation))
            .map(|(command, _)| *command)
            .collect()
    }
}

impl Arrivals {
    /// Repeats the pending notices to a peer that has just connected.
    pub(in crate::proto) fn source_up(&mut self, cx: &mut Context, peer: &str) {
        self.preparations.peer_up(cx, peer);
    }

    pub(in crate::proto) fn hook_timed_out(&mut self, cx: &mut Context, command: u64) {
        self.preparations.timed_out(cx, command);
    }

    /// Handles `roamcast hook run` on this host: libvirt is about to receive a domain.
    pub(in crate::proto) fn prepare(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        command: u64,
        (uuid, domain, source): (DomainUuid, &str, &str),
    ) {
        self.check_told(cx, host, uuid, domain);
        let notice = match self.expected(cx, host, uuid) {
            Some(incoming) if incoming.answer.is_given() => {
                let migration = incoming.number;
                cx.reply(command, CommandReply::Done { migration });
                return;
            }
            Some(_) => None,
            None => {
                if let Err(refusal) = check_notice(cx, domain, source) {
                    cx.reply(command, CommandReply::Failed(refusal.to_string()));
                    return;
                }
                Some(cx.numbers.next())
            }
        };
        let preparation = Preparation {
            uuid,
            domain: domain.to_owned(),
            source: source.to_owned(),
            notice,
        };
        self.preparations.begin(cx, command, preparation);
    }

    /// Returns the domain's arrival if its source sent a request and still stands by it.
    fn expected(&self, cx: &Context, host: &Host<'_>, uuid: DomainUuid) -> Option<&Incoming> {
        let incoming = self.incoming.of_domain(uuid)?;
        let stage = &incoming.stage;
        let is_cut_off = stage.has_begun() && !self.taps.are_here(host.inventory, incoming);
        let stands = stage.arrived().is_none()
            && stage.aborted().is_none()
            && !is_cut_off
            && cx.is_up(&incoming.peer);
        stands.then_some(incoming)
    }
}

/// Checks whether this host may send a notice to the source of a domain.
fn check_notice(cx: &Context, domain: &str, source: &str) -> Result<(), Refusal> {
    for (field, text) in [("domain", domain), ("source", source)] {
        if text.is_empty() || text.len() > MAX_TEXT_BYTES {
            return Err(Refusal::BadField { field });
        }
    }
    let agent = cx.config.name.clone();
    let domain = domain.to_owned();
    if source == agent {
        return Err(Refusal::StaleSource { domain });
    }
    if cx.config.peer(source).is_none() && !cx.is_up(source) {
        let source_agent = source.to_owned();
        return Err(Refusal::UnknownSource {
            agent,
            domain,
            source_agent,
        });
    }
    if !cx.config.policy.allows_arrival(source, &domain) {
        let peer = source.to_owned();
        return Err(Refusal::Arrival {
            agent,
            domain,
            peer,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
