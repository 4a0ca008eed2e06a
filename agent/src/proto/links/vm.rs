//! Datagrams from and to VMs.
//!
//! The TAP that receives a datagram identifies the VM, never the datagram's content. Datagrams may be
//! lost, duplicated or reordered, so the VM repeats each request, and the same transaction gets the
//! same answer. A running migration answers with its state, an ended migration with its last message.
//! The TAP's `snoop` program limits the rate of a VM's datagrams.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddrV6;
use std::time::Duration;

use common::signal::{
    AgentSearchReply, DecodeError, MAX_DATAGRAM_BYTES, MigrationAbort, Reason, VmMessage,
};
use tracing::debug;

use crate::proto::context::Context;
use crate::proto::host::inventory::Inventory;
use crate::proto::policy::Asker;
use crate::proto::rate::Bucket;
use crate::proto::refusal::{Refusal, bounded};
use crate::proto::{Domain, DomainUuid, Output, Timestamp, VmAddress};

/// Limit of stored answers per domain.
const ANSWERS: usize = 8;
/// Time after the agent's start during which the agent does not deny unknown transactions: the agent at
/// the other end may still report them.
const AMNESTY: Duration = Duration::from_secs(10);

/// Number of migrations that a VM may request within the pause between two migrations, if the requests
/// fail before the memory copy.
const TRIES: u32 = 4;

/// Per-VM state.
#[derive(Debug, Default)]
pub(in crate::proto) struct Vms {
    answers: BTreeMap<DomainUuid, VecDeque<(u64, VmMessage)>>,
    /// Time of the last migration that the domain requested, or of the domain's arrival.
    moved: BTreeMap<DomainUuid, Timestamp>,
    /// Remaining requests of each domain.
    tries: BTreeMap<DomainUuid, Bucket>,
}

impl Vms {
    pub(in crate::proto) fn forget_domain(&mut self, uuid: &DomainUuid) {
        self.answers.remove(uuid);
        self.moved.remove(uuid);
        self.tries.remove(uuid);
    }

    /// Stores the last message of a transaction.
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

    /// Records that a domain migrates at its own request, or has arrived.
    pub(in crate::proto) fn has_moved(&mut self, uuid: DomainUuid, at: Timestamp) {
        self.moved.insert(uuid, at);
    }

    /// Returns the time until a domain may request a migration; `pause` is the time between two
    /// migrations. A request that fails before the memory copy does not start a pause, but the domain
    /// has only [`TRIES`] requests per pause.
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
    pub(in crate::proto) fn tell(&mut self, to: VmAddress, transaction: u64, message: &VmMessage) {
        self.outputs.push_back(Output::Datagram {
            to,
            bytes: message.encode(transaction),
        });
    }

    /// Tells a VM that its migration is refused or over, and stores the answer.
    pub(in crate::proto) fn tell_refusal(
        &mut self,
        uuid: DomainUuid,
        transaction: u64,
        to: VmAddress,
        refusal: &Refusal,
    ) {
        let reason = refusal.reason();
        let message = VmMessage::from(MigrationAbort(reason));
        self.tell(to, transaction, &message);
        self.vms.answer(uuid, transaction, message);
    }
}

/// Sender of a datagram.
#[derive(Debug)]
pub(in crate::proto) struct Caller {
    /// Domain behind the TAP that received the datagram.
    pub(in crate::proto) domain: Domain,
    /// Transaction of the datagram, for answers.
    pub(in crate::proto) transaction: u64,
    pub(in crate::proto) from: VmAddress,
}

impl Context {
    /// Returns the sender of a datagram that came from a VM's link-local address, through a port of
    /// a bridge.
    pub(in crate::proto) fn sender(
        &mut self,
        inventory: &Inventory,
        ifindex: u32,
        socket: SocketAddrV6,
    ) -> Option<VmAddress> {
        let Some(port) = inventory.ports.get(&ifindex) else {
            self.counters.unknown_port_datagrams += 1;
            return None;
        };
        if !socket.ip().is_unicast_link_local() {
            self.counters.off_link_datagrams += 1;
            return None;
        }
        Some(VmAddress {
            bridge: port.bridge,
            socket,
        })
    }

    /// Returns the sender and message of a datagram. A `migkick` newer than this agent gets the reason
    /// if the agent cannot decode the datagram.
    pub(in crate::proto) fn understand(
        &mut self,
        inventory: &Inventory,
        ifindex: u32,
        from: VmAddress,
        decoded: Result<(u64, VmMessage), DecodeError>,
    ) -> Option<(Caller, VmMessage)> {
        let Some(domain) = inventory.domain_of_port(ifindex) else {
            self.counters.datagrams_without_domain += 1;
            return None;
        };
        match decoded {
            Ok((transaction, message)) => {
                let domain = domain.clone();
                let caller = Caller {
                    domain,
                    transaction,
                    from,
                };
                Some((caller, message))
            }
            Err(error) => {
                self.counters.malformed_datagrams += 1;
                debug!(domain = %domain.name, %error, "Datagram is not understood");
                if let DecodeError::Version { transaction, .. }
                | DecodeError::UnknownKind { transaction, .. }
                | DecodeError::Text { transaction } = error
                {
                    let reason = Reason::from(&error);
                    self.tell(from, transaction, &MigrationAbort(reason).into());
                }
                None
            }
        }
    }

    /// Tells a VM the name of its agent and the allowed destinations, as many as fit into a datagram.
    pub(in crate::proto) fn answer_search(&mut self, caller: &Caller) {
        let domain = &caller.domain.name;
        let policy = &self.config.policy;
        let names = self.config.peers.iter().map(|peer| &peer.name);
        let mut reply = AgentSearchReply {
            agent: self.config.name.clone(),
            domain: bounded(domain),
            destinations: names
                .filter(|peer| policy.allows_departure(domain, peer, Asker::Vm))
                .cloned()
                .collect(),
        };
        loop {
            let bytes = VmMessage::from(reply.clone()).encode(caller.transaction);
            if bytes.len() <= MAX_DATAGRAM_BYTES {
                let to = caller.from;
                self.outputs.push_back(Output::Datagram { to, bytes });
                return;
            }
            if reply.destinations.pop().is_none() {
                return;
            }
        }
    }

    /// Repeats the last message of a transaction; returns false if there is none.
    pub(in crate::proto) fn answer_again(&mut self, caller: &Caller) -> bool {
        let answered = self.vms.answered(&caller.domain.uuid, caller.transaction);
        let Some(message) = answered.cloned() else {
            return false;
        };
        self.tell(caller.from, caller.transaction, &message);
        true
    }

    /// Tells a VM that its transaction is unknown, unless the agent started just now.
    pub(in crate::proto) fn deny(&mut self, caller: &Caller) {
        if self.uptime() > AMNESTY {
            let agent = self.config.name.clone();
            let refusal = Refusal::UnknownTransaction { agent };
            self.tell_refusal(
                caller.domain.uuid,
                caller.transaction,
                caller.from,
                &refusal,
            );
        }
    }
}

#[cfg(test)]
mod tests;
