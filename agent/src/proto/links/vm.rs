//! Datagrams of the VMs.
//!
//! Who asks is the TAP that a datagram came in by, never what it says. Datagrams get lost,
//! doubled and reordered, so the VM repeats each question, and the same transaction gets the same
//! answer: a running migration answers by its state, one that has ended by its last message. How many
//! a VM may send is limited at its TAP (`snoop`).

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddrV6;
use std::time::Duration;

use common::signal::{
    AgentSearchReply, DecodeError, MAX_DATAGRAM_BYTES, MigrationAbort, MigrationReady, VmMessage,
};
use tracing::debug;

use crate::proto::context::Context;
use crate::proto::policy::Asker;
use crate::proto::rate::Bucket;
use crate::proto::refusal::{Refusal, bounded};
use crate::proto::{Agent, Domain, DomainUuid, Output, Timestamp};

/// Last messages kept for each domain.
const ANSWERS: usize = 8;
/// How long after its start an agent does not deny a transaction that it does not know: the other
/// end may still be about to tell.
const AMNESTY: Duration = Duration::from_secs(10);

/// Moves that a VM may ask for within the pause between two, if they fail before anything is copied.
const TRIES: u32 = 4;

/// What is kept of each VM.
#[derive(Debug, Default)]
pub(in crate::proto) struct Vms {
    answers: BTreeMap<DomainUuid, VecDeque<(u64, VmMessage)>>,
    /// When libvirt has last moved a domain on its own request, or brought it.
    moved: BTreeMap<DomainUuid, Timestamp>,
    /// How often domains may still ask.
    tries: BTreeMap<DomainUuid, Bucket>,
}

impl Vms {
    pub(in crate::proto) fn forget_domain(&mut self, uuid: &DomainUuid) {
        self.answers.remove(uuid);
        self.moved.remove(uuid);
        self.tries.remove(uuid);
    }

    /// Keeps the last message of a transaction.
    pub(in crate::proto) fn answer(
        &mut self,
        uuid: DomainUuid,
        transaction: u64,
        message: VmMessage,
    ) {
        let answers = self.answers.entry(uuid).or_default();
        answers.retain(|(known, _)| *known != transaction);
        answers.push_back((transaction, message));
        if answers.len() > ANSWERS {
            answers.pop_front();
        }
    }

    fn answered(&self, uuid: &DomainUuid, transaction: u64) -> Option<&VmMessage> {
        self.answers
            .get(uuid)?
            .iter()
            .find(|(known, _)| *known == transaction)
            .map(|(_, message)| message)
    }

    /// Notes that a domain is moved on its own request, or has come.
    pub(in crate::proto) fn has_moved(&mut self, uuid: DomainUuid, at: Timestamp) {
        self.moved.insert(uuid, at);
    }

    /// How long a domain has to wait until it may ask for a move; `pause` is that between two moves.
    /// One that fails before anything is copied is none, but [`TRIES`] in that time are enough.
    pub(in crate::proto) fn has_to_wait(
        &mut self,
        uuid: DomainUuid,
        now: Timestamp,
        pause: Duration,
    ) -> Option<Duration> {
        if pause.is_zero() {
            return None;
        }
        let passed = self.moved.get(&uuid).map(|at| now.since(*at));
        if let Some(passed) = passed.filter(|passed| *passed < pause) {
            return Some(pause - passed);
        }
        let full = || Bucket::full(now, TRIES);
        let bucket = self.tries.entry(uuid).or_insert_with(full);
        (!bucket.take(now, TRIES, pause)).then_some(pause / TRIES)
    }
}

impl Context {
    /// Sends a message to a VM.
    pub(in crate::proto) fn tell(
        &mut self,
        to: SocketAddrV6,
        transaction: u64,
        message: &VmMessage,
    ) {
        self.outputs.push_back(Output::Datagram {
            to,
            bytes: message.encode(transaction),
        });
    }

    /// Tells a VM that its migration is refused or over, and keeps the answer.
    pub(in crate::proto) fn tell_refusal(
        &mut self,
        uuid: DomainUuid,
        transaction: u64,
        to: SocketAddrV6,
        refusal: &Refusal,
    ) {
        let reason = bounded(&refusal.to_string());
        let message = VmMessage::from(MigrationAbort { reason });
        self.tell(to, transaction, &message);
        self.vms.answer(uuid, transaction, message);
    }
}

impl Agent {
    pub(in crate::proto) fn on_datagram(&mut self, ifindex: u32, from: SocketAddrV6, bytes: &[u8]) {
        if !self.inventory.ports.contains_key(&ifindex) {
            self.cx.counters.unknown_port_datagrams += 1;
            return;
        }
        if !from.ip().is_unicast_link_local() {
            self.cx.counters.off_link_datagrams += 1;
            return;
        }
        let decoded = VmMessage::decode(bytes);
        if let Ok((transaction, VmMessage::MigrationReady(_))) = &decoded
            && self.answer_arrival(ifindex, *transaction, from)
        {
            return;
        }
        let Some(domain) = self.inventory.domain_of_port(ifindex).cloned() else {
            self.cx.counters.unhoused_datagrams += 1;
            return;
        };
        let (transaction, message) = match decoded {
            Ok(decoded) => decoded,
            Err(error) => {
                self.cx.counters.malformed_datagrams += 1;
                debug!(domain = %domain.name, %error, "Datagram is not understood");
                if let DecodeError::Version { transaction, .. }
                | DecodeError::UnknownKind { transaction, .. }
                | DecodeError::Text { transaction } = error
                {
                    let reason = error.to_string();
                    self.cx
                        .tell(from, transaction, &MigrationAbort { reason }.into());
                }
                return;
            }
        };
        match message {
            VmMessage::AgentSearch(_) => self.answer_search(&domain, transaction, from),
            VmMessage::MigrationRequest(mut body) => {
                body.destination.make_ascii_lowercase();
                if !self.answer_again(&domain, transaction, from) {
                    let (departures, cx, around) = self.departing();
                    departures.request_from_vm(cx, around, &domain, (transaction, from), &body);
                }
            }
            VmMessage::MigrationReady(body) => {
                self.vm_is_ready(&domain, transaction, from, &body);
            }
            VmMessage::MigrationAbort(_) => {
                let addresses = &mut self.addresses;
                self.departures
                    .vm_aborts(&mut self.cx, addresses, &domain, transaction);
            }
            VmMessage::AgentSearchReply(_)
            | VmMessage::MigrationResponse(_)
            | VmMessage::MigrationProgress(_) => self.cx.counters.malformed_datagrams += 1,
        }
    }

    fn answer_search(&mut self, domain: &Domain, transaction: u64, to: SocketAddrV6) {
        let mut reply = AgentSearchReply {
            agent: self.cx.config.name.clone(),
            domain: bounded(&domain.name),
            destinations: self
                .cx
                .config
                .peers
                .iter()
                .map(|peer| &peer.name)
                .filter(|peer| {
                    let policy = &self.cx.config.policy;
                    policy.allows_departure(&domain.name, peer, Asker::Vm)
                })
                .cloned()
                .collect(),
        };
        loop {
            let bytes = VmMessage::from(reply.clone()).encode(transaction);
            if bytes.len() <= MAX_DATAGRAM_BYTES {
                self.cx.outputs.push_back(Output::Datagram { to, bytes });
                return;
            }
            if reply.destinations.pop().is_none() {
                return;
            }
        }
    }

    /// Answers a transaction that is known already.
    fn answer_again(&mut self, domain: &Domain, transaction: u64, to: SocketAddrV6) -> bool {
        if let Some(message) = self.cx.vms.answered(&domain.uuid, transaction).cloned() {
            self.cx.tell(to, transaction, &message);
            return true;
        }
        self.departures
            .answer_request_again(&mut self.cx, &domain.uuid, transaction, to)
    }

    fn vm_is_ready(
        &mut self,
        domain: &Domain,
        transaction: u64,
        from: SocketAddrV6,
        body: &MigrationReady,
    ) {
        if let Some(message) = self.cx.vms.answered(&domain.uuid, transaction).cloned() {
            self.cx.tell(from, transaction, &message);
            return;
        }
        let (departures, cx, around) = self.departing();
        if departures.ready_from_vm(cx, around, &domain.uuid, (transaction, from), body) {
            debug!(domain = %domain.name, transaction, "VM is ready");
        } else if self.uptime() > AMNESTY && !self.expects(&domain.uuid) {
            let agent = self.cx.config.name.clone();
            let refusal = Refusal::UnknownTransaction { agent };
            self.cx
                .tell_refusal(domain.uuid, transaction, from, &refusal);
        }
    }
}

#[cfg(test)]
#[path = "../tests/vm.rs"]
mod tests;
