//! The unicast addresses of a VM that leaves: the new one is claimed at the destination, and packets
//! that still come for the old ones are sent on to it.
//!
//! ```text
//!  MigrationReady            suspended               the time asked for is over
//!  -------------> Checking ------------> Forwarding -------------------------> (gone)
//!                    |                        | the VM runs on here, or the move has failed
//!                    |                        +--> Checking or gone, and neighbours are told
//!                    | somebody else has the address
//!                    +--> it is not forwarded
//! ```
//!
//! A VM names its old addresses itself, so each is asked for on the link first: one that somebody
//! else answers for is not this VM's to give away. While packets are sent on, this host's bridge
//! answers Solicitations for the old addresses in the place of the VM.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{Forward, ForwardKey};
use common::mat::MAX_MOAS;
use common::signal::{AddressClaim, AddressClaimReply, ClaimState, MigrationReady};
use tracing::{info, warn};

use super::State;
use crate::proto::record::{ClaimOutcome, ForwardRecord};
use crate::proto::refusal::{Refusal, bounded};
use crate::proto::timer::Timer;
use crate::proto::unicast::{Allowance, Said, is_in};
use crate::proto::{
    AddressCommand, Agent, DomainUuid, ForwardCommand, Mac, Output, Timestamp, mac_text,
};

/// How often what was sent on is read, and next hops are looked up again.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How often a VM may say something else: each time the link is asked.
const MAX_CHANGES: u32 = 4;

/// Where a VM that leaves is going to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaving {
    address: Ipv6Addr,
    mac: Mac,
    /// Of the claim.
    transaction: u64,
    /// How long packets are sent on.
    lasting: Duration,
    /// All that the VM talks to know the new address.
    translate: bool,
    /// How often the VM has said something else before.
    changes: u32,
}

/// An address that a VM leaves or has left.
#[derive(Debug)]
pub(in crate::proto) struct Departure {
    pub(in crate::proto) uuid: DomainUuid,
    /// The migration's record; `None` where an agent before this one has begun.
    number: Option<u64>,
    /// Where packets go.
    to: Ipv6Addr,
    /// MACs of the domain, by which its own answers are known.
    macs: Vec<Mac>,
    /// The one of them that has the address, once it has answered.
    owner: Option<Mac>,
    lasting: Duration,
    /// Until when packets are sent on, while they are.
    until: Option<Timestamp>,
    /// Neighbours were told that this host takes the packets.
    answered: bool,
    answers: Allowance,
}

impl Departure {
    /// Whether it is of the migration with that record.
    pub(super) fn is_of(&self, number: u64) -> bool {
        self.number == Some(number)
    }
}

impl Agent {
    /// Takes in which addresses of a VM change, as it says itself; the last word before the switch
    /// counts.
    pub(super) fn addresses_change(&mut self, number: u64, ready: &MigrationReady) {
        let Some(outgoing) = self.outgoing.get(&number) else {
            return;
        };
        let (Some(address), Some(mac)) = (ready.address, ready.mac) else {
            return;
        };
        let (address, mac): (Ipv6Addr, Mac) = (Ipv6Addr::from(*address), *mac);
        let known = |leaving: &Leaving| (leaving.address, leaving.mac) == (address, mac);
        let Some(response) = &outgoing.response else {
            return;
        };
        if outgoing.state == State::Switching {
            return;
        }
        if let Some(leaving) = outgoing.leaving.filter(known) {
            if ready.translate && !leaving.translate {
                self.let_translate(number);
            }
            return;
        }
        let changes = outgoing.leaving.map_or(0, |leaving| leaving.changes + 1);
        if changes > MAX_CHANGES {
            return;
        }
        let macs: Vec<Mac> = self
            .inventory
            .domains
            .get(&outgoing.uuid)
            .into_iter()
            .flat_map(|domain| &domain.interfaces)
            .map(|interface| interface.mac)
            .collect();
        let prefix = Ipv6Addr::from(*response.prefix);
        let uuid = outgoing.uuid;
        if !macs.contains(&mac) || !is_in(address, prefix, response.prefix_length) {
            self.counters.forwards_refused += 1;
            warn!(domain = %outgoing.domain, number, %address, mac = mac_text(&mac), "VM names an address or NIC that is not its own; its move goes on without them");
            return;
        }
        let asked = Duration::from_secs(u64::from(ready.forward_s));
        let lasting = asked.min(self.config.unicast.forward);
        let leaving = Leaving {
            address,
            mac,
            transaction: self.numbers.next(),
            lasting,
            translate: ready.translate,
            changes,
        };
        if let Some(outgoing) = self.outgoing.get_mut(&number) {
            outgoing.leaving = Some(leaving);
        }
        self.records
            .update(number, |record| record.claim(address, ClaimOutcome::Asked));
        self.end_departures(|_, departure| departure.number == Some(number));
        if !lasting.is_zero() {
            for old in ready.forward.iter().take(MAX_MOAS) {
                self.check_departure_of(number, uuid, Ipv6Addr::from(**old), leaving, &macs);
            }
        }
        self.claim_address(number);
    }

    /// Asks on the link whether an address is the VM's to leave.
    fn check_departure_of(
        &mut self,
        number: u64,
        uuid: DomainUuid,
        address: Ipv6Addr,
        leaving: Leaving,
        macs: &[Mac],
    ) {
        if !self.is_on_link(address) || self.holder_of(address, uuid).is_some() {
            self.counters.forwards_refused += 1;
            warn!(number, %address, "Packets for an address are not sent on: it is not the VM's");
            return;
        }
        // Of an earlier move.
        self.end_departures(|departed, _| *departed == address);
        let to = leaving.address;
        self.addresses.departures.insert(
            address,
            Departure {
                uuid,
                number: Some(number),
                to,
                macs: macs.to_vec(),
                owner: None,
                lasting: leaving.lasting,
                until: None,
                answered: false,
                answers: Allowance::default(),
            },
        );
        self.address(AddressCommand::Watch { address });
        self.address(AddressCommand::Probe { address });
        self.forward(ForwardCommand::Resolve { to });
        self.timers
            .set_earlier(Timer::Forwards, self.now + LOOK_INTERVAL);
    }

    /// The VM says that what it still sends from where it was may be translated.
    fn let_translate(&mut self, number: u64) {
        let outgoing = self.outgoing.get_mut(&number);
        if let Some(leaving) = outgoing.and_then(|it| it.leaving.as_mut()) {
            leaving.translate = true;
        }
        self.claim_address(number);
    }

    /// Tells the destination which address the VM will have, and from which it may still send; also
    /// when the connection is made anew, and when one of those turns out to be somebody else's.
    pub(super) fn claim_address(&mut self, number: u64) {
        let Some(outgoing) = self.outgoing.get(&number) else {
            return;
        };
        let Some(leaving) = outgoing.leaving else {
            return;
        };
        let lasting_s = u32::try_from(leaving.lasting.as_secs()).unwrap_or(u32::MAX);
        let departures = self.addresses.departures.iter();
        let claim = AddressClaim {
            migration: outgoing.transaction,
            address: leaving.address.octets().into(),
            mac: leaving.mac.into(),
            quarantine_s: lasting_s,
            translate: departures
                .filter(|(_, departure)| leaving.translate && departure.is_of(number))
                .map(|(address, _)| address.octets().into())
                .collect(),
            translate_s: lasting_s,
        };
        let peer = outgoing.destination.clone();
        self.send(&peer, leaving.transaction, &claim.into());
    }

    /// The destination says what has become of the claim.
    pub(in crate::proto) fn on_address_claim_reply(
        &mut self,
        peer: &str,
        transaction: u64,
        reply: &AddressClaimReply,
    ) {
        let Some(number) = self.leaving_by_transaction(peer, transaction) else {
            return;
        };
        let address = Ipv6Addr::from(*reply.address);
        let outcome = match reply.state {
            ClaimState::Unique => ClaimOutcome::Unique,
            ClaimState::Refused => ClaimOutcome::Refused,
            ClaimState::Disputed => ClaimOutcome::Disputed,
        };
        self.records
            .update(number, |record| record.claim(address, outcome));
        let reason = bounded(&reply.reason);
        match reply.state {
            ClaimState::Unique => {}
            ClaimState::Disputed => warn!(peer, number, %address, %reason, "Address is disputed"),
            ClaimState::Refused => self.claim_refused(number, peer, reason),
        }
    }

    /// The VM cannot have the address there, so it does not move there.
    fn claim_refused(&mut self, number: u64, peer: &str, reason: String) {
        let refusal = Refusal::Address {
            destination: peer.to_owned(),
            reason,
        };
        let Some(outgoing) = self.outgoing.get_mut(&number) else {
            return;
        };
        match outgoing.state {
            State::Switching => {
                warn!(domain = %outgoing.domain, number, %refusal, "Too late to stop the move");
            }
            State::Copying => {
                info!(domain = %outgoing.domain, number, %refusal, "Migration is stopped");
                outgoing.stopped_for = Some(refusal);
                let uuid = outgoing.uuid;
                self.outputs.push_back(Output::AbortMigration { uuid });
            }
            _ => self.fail(number, &refusal),
        }
    }

    /// The destination does not know what a claim is: the move goes on without it.
    pub(in crate::proto) fn claim_not_understood(&mut self, peer: &str, transaction: u64) {
        if let Some(number) = self.leaving_by_transaction(peer, transaction)
            && let Some(leaving) = self.outgoing.get(&number).and_then(|it| it.leaving)
        {
            info!(peer, number, address = %leaving.address, "Destination claims no addresses");
            self.records.update(number, |record| {
                record.claim(leaving.address, ClaimOutcome::Unknown);
            });
        }
    }

    fn leaving_by_transaction(&self, peer: &str, transaction: u64) -> Option<u64> {
        let is_it = |leaving: Leaving| leaving.transaction == transaction;
        self.outgoing
            .iter()
            .find(|(_, it)| it.destination == peer && it.leaving.is_some_and(is_it))
            .map(|(number, _)| *number)
    }

    /// Somebody has said something about an address that a VM leaves.
    pub(in crate::proto) fn departure_heard(&mut self, address: Ipv6Addr, said: Said, by: Mac) {
        let now = self.now;
        let Some(departure) = self.addresses.departures.get_mut(&address) else {
            return;
        };
        let is_own = departure.macs.contains(&by);
        match said {
            Said::Has if is_own => departure.owner = Some(by),
            _ if is_own => {}
            Said::Asks(_) | Said::Wants if departure.until.is_some() => {
                if departure.answers.allows(now) {
                    departure.answered = true;
                    let to = match said {
                        Said::Asks(from) => Some((from, by)),
                        Said::Has | Said::Wants => None,
                    };
                    self.address(AddressCommand::Advertise {
                        address,
                        owner: None,
                        overrides: true,
                        to,
                    });
                }
            }
            Said::Asks(_) | Said::Wants => {}
            Said::Has if departure.number.is_none() && departure.macs.is_empty() => {
                // Adopted: which MACs were the domain's is not known any more.
            }
            Said::Has => {
                self.counters.addresses_disputed += 1;
                warn!(%address, mac = mac_text(&by), "Packets for an address are not sent on: somebody else has it");
                let number = departure.number;
                self.end_departures(|departed, _| *departed == address);
                if let Some(number) = number {
                    self.claim_address(number);
                }
            }
        }
    }

    pub(in crate::proto) fn departure_of_own(&mut self, address: Ipv6Addr) {
        self.end_departures(|departed, _| *departed == address);
    }

    /// The VM stands still: from now on packets for its addresses are sent on.
    pub(super) fn forward_departures(&mut self, number: u64) {
        let now = self.now;
        let mut begun = Vec::new();
        for (address, departure) in &mut self.addresses.departures {
            if departure.number != Some(number) || departure.until.is_some() {
                continue;
            }
            let until = now + departure.lasting;
            departure.until = Some(until);
            begun.push((*address, departure.to, until, departure.uuid));
        }
        for (address, to, until, uuid) in begun {
            info!(number, %address, %to, "Packets are sent on");
            self.forward(ForwardCommand::Set {
                address,
                to,
                until,
                uuid,
            });
            self.address(AddressCommand::Replace { address });
            self.timers.set_earlier(Timer::Forwards, until);
            let forward = ForwardRecord {
                address,
                to,
                packets: 0,
                bytes: 0,
                dropped: 0,
            };
            self.records
                .update(number, |record| record.forwarded(forward));
        }
    }

    /// The VM runs on here: its packets are its own again.
    pub(super) fn keep_departures(&mut self, number: u64) {
        let stopped: Vec<Ipv6Addr> = self
            .addresses
            .departures
            .iter_mut()
            .filter(|(_, departure)| departure.number == Some(number))
            .filter_map(|(address, departure)| departure.until.take().map(|_| *address))
            .collect();
        for address in stopped {
            self.give_back(address);
        }
    }

    /// Ends what is done for addresses, also in the kernel.
    pub(in crate::proto) fn end_departures(
        &mut self,
        condition: impl Fn(&Ipv6Addr, &Departure) -> bool,
    ) {
        let ending: Vec<Ipv6Addr> = self
            .addresses
            .departures
            .iter()
            .filter(|(address, departure)| condition(address, departure))
            .map(|(address, _)| *address)
            .collect();
        for address in ending {
            self.end_departure(address, true);
        }
        if self.addresses.departures.is_empty() {
            self.timers.stop(Timer::Forwards);
        }
    }

    /// A domain runs here that an agent before this one saw leave: it has not.
    pub(in crate::proto) fn end_adopted_departures(&mut self, uuid: DomainUuid) {
        self.end_departures(|_, departure| departure.uuid == uuid && departure.number.is_none());
    }

    fn end_departure(&mut self, address: Ipv6Addr, give_back: bool) {
        let active = self
            .addresses
            .departures
            .get_mut(&address)
            .and_then(|departure| departure.until.take());
        if active.is_some() {
            if give_back {
                self.give_back(address);
            } else {
                self.forward(ForwardCommand::Remove { address });
            }
        }
        let Some(departure) = self.addresses.departures.remove(&address) else {
            return;
        };
        let to = departure.to;
        if !self.addresses.departures.values().any(|it| it.to == to) {
            self.forward(ForwardCommand::Release { to });
        }
        self.forget_address(address, false);
    }

    /// Sends packets for an address on no more, and tells neighbours who were told otherwise that
    /// its VM has it.
    fn give_back(&mut self, address: Ipv6Addr) {
        self.forward(ForwardCommand::Remove { address });
        let Some(departure) = self.addresses.departures.get_mut(&address) else {
            return;
        };
        if std::mem::take(&mut departure.answered)
            && let Some(owner) = departure.owner
        {
            self.address(AddressCommand::Advertise {
                address,
                owner: Some(owner),
                overrides: true,
                to: None,
            });
        }
    }

    /// Reads what was sent on, keeps next hops known, and ends what is over.
    pub(in crate::proto) fn look_at_forwards(&mut self) {
        let now = self.now;
        self.forward(ForwardCommand::Read);
        let over: Vec<Ipv6Addr> = self
            .addresses
            .departures
            .iter()
            .filter(|(_, departure)| departure.until.is_some_and(|until| until <= now))
            .map(|(address, _)| *address)
            .collect();
        for address in over {
            info!(%address, "Packets are sent on no more: their time is over");
            self.end_departure(address, false);
        }
        let mut next = None;
        let mut ways: Vec<Ipv6Addr> = Vec::new();
        for departure in self.addresses.departures.values() {
            ways.push(departure.to);
            let due = departure.until.unwrap_or(now + LOOK_INTERVAL);
            let due = due.min(now + LOOK_INTERVAL);
            next = Some(next.map_or(due, |next: Timestamp| next.min(due)));
        }
        ways.sort_unstable();
        ways.dedup();
        for to in ways {
            self.forward(ForwardCommand::Resolve { to });
        }
        if let Some(next) = next {
            self.timers.set(Timer::Forwards, next);
        }
    }

    /// Takes over what an agent before this one has in the kernel.
    pub fn handle_forwards(&mut self, now: Timestamp, forwards: Vec<(ForwardKey, Forward)>) {
        self.begin(now);
        for (key, value) in forwards {
            let address = Ipv6Addr::from(key.address);
            let until = Timestamp(value.until_ns);
            if until <= self.now || key.vlan != 0 {
                self.forward(ForwardCommand::Remove { address });
                continue;
            }
            let to = Ipv6Addr::from(value.destination);
            info!(%address, %to, "Packets are sent on, as an earlier agent has begun");
            self.addresses.departures.insert(
                address,
                Departure {
                    uuid: DomainUuid(value.domain_uuid),
                    number: None,
                    to,
                    macs: Vec::new(),
                    owner: None,
                    lasting: until.since(self.now),
                    until: Some(until),
                    answered: false,
                    answers: Allowance::default(),
                },
            );
            self.address(AddressCommand::Watch { address });
            self.address(AddressCommand::Replace { address });
            self.forward(ForwardCommand::Resolve { to });
            self.timers
                .set_earlier(Timer::Forwards, until.min(self.now + LOOK_INTERVAL));
        }
        self.end();
    }

    fn forward(&mut self, command: ForwardCommand) {
        self.outputs.push_back(Output::Forward(command));
    }
}

#[cfg(test)]
#[path = "../tests/forward.rs"]
mod tests;
