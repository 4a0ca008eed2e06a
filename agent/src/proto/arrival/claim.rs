//! The address that an arriving VM is going to have on this link.
//!
//! ```text
//!  AddressClaim           RetransTimer              frame of the VM
//!  -----------> Probing -------------> Unique ------------------------> Spoken
//!                  |                     | deadline after the arrival
//!                  |                     +----------------------------> Silent
//!                  | somebody says he has it, before the VM has switched
//!                  +--> refused, and the source ends the move, if the configuration wants it
//! ```
//!
//! Anybody on the link can say so, and end every move that way. So by default the move goes on, the record
//! says that the address is disputed, and an Advertisement for it overrides nothing.
//!
//! The address is asked for while memory is copied (RFC 4862 §5.4, one probe). From then on, or from
//! the switch on if that comes first, Solicitations for it are answered with the MAC of the VM's NIC
//! (RFC 4861 §7.2.8): routers pass packets on at once, which wait in the TAP until the VM reads them.
//! As long as the probe may still be answered an Advertisement overrides nothing (RFC 4429 §3.3). Who
//! asks too early is answered as soon as that may be: he would ask again only after a second, and the
//! first packet that is sent on makes a router ask just before the switch is known here.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::{AddressClaim, AddressClaimReply, ClaimState, ErrorMessage};
use tracing::{info, warn};

use super::{Agent, Incoming};
use crate::proto::addresses::{Allowance, Holder, Said};
use crate::proto::record::ClaimOutcome;
use crate::proto::refusal::{Refusal, bounded};
use crate::proto::timer::Timer;
use crate::proto::{AddressCommand, Dispute, DomainUuid, Mac, mac_text};

/// Neighbours that are remembered to have asked.
const MAX_ASKED: usize = 8;

/// A claimed address.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) address: Ipv6Addr,
    pub(super) mac: Mac,
    /// Of the claim, for answers.
    transaction: u64,
    /// How long nobody else gets it once it is left.
    quarantine: Duration,
    /// The addresses that it may still send from, and for how long.
    pub(super) left: Vec<Ipv6Addr>,
    pub(super) translate: Duration,
    state: State,
    /// The TAP of the NIC.
    port: Option<u32>,
    disputed: bool,
    answers: Allowance,
    /// Who has asked before he could be answered.
    asked: Vec<(Ipv6Addr, Mac)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Probing,
    Unique,
    /// The VM speaks for itself.
    Spoken,
    /// It has never said anything from there.
    Silent,
}

impl Claim {
    fn is_over(&self) -> bool {
        matches!(self.state, State::Spoken | State::Silent)
    }
}

impl Incoming {
    /// Whether somebody has to listen to what is said about an address for it.
    pub(in crate::proto) fn watches(&self, address: Ipv6Addr) -> bool {
        self.claim
            .as_ref()
            .is_some_and(|it| it.address == address && !it.is_over())
    }
}

/// Which other domain that arrives is to have an address, or has had it since.
pub(in crate::proto) fn claimant(
    arrivals: &BTreeMap<u64, Incoming>,
    address: Ipv6Addr,
    uuid: DomainUuid,
) -> Option<DomainUuid> {
    let claims = |it: &Incoming| it.claim.as_ref().is_some_and(|it| it.address == address);
    let mut others = arrivals.values().filter(|it| it.uuid != uuid);
    others.find(|it| claims(it)).map(|it| it.uuid)
}

impl Agent {
    /// The source says which address its VM will have here.
    pub(in crate::proto) fn on_address_claim(
        &mut self,
        peer: &str,
        transaction: u64,
        claim: &AddressClaim,
    ) {
        let address = Ipv6Addr::from(*claim.address);
        let Some(number) = self.incoming_by_transaction(peer, claim.migration) else {
            let reason = format!("{} expects no such domain", self.cx.config.name);
            self.cx
                .send(peer, transaction, &ErrorMessage { reason }.into());
            return;
        };
        let mac: Mac = *claim.mac;
        let Some(incoming) = self.incoming.get_mut(&number) else {
            return;
        };
        if let Some(known) = &mut incoming.claim
            && (known.address, known.mac) == (address, mac)
        {
            known.transaction = transaction;
            let told = known.state != State::Probing;
            self.take_left(number, claim);
            if told {
                self.tell_claim(number, ClaimState::Unique, String::new());
            }
            return;
        }
        let uuid = incoming.uuid;
        if let Err(refusal) = self.check_claim(number, uuid, address, mac) {
            self.refuse_claim(number, transaction, address, &refusal);
            return;
        }
        self.end_claim(number, true);
        // It comes back to an address that it has left: nothing is sent on any more.
        self.addresses.end_departures(&mut self.cx, |departed, it| {
            *departed == address && it.uuid == uuid
        });
        let asked = Duration::from_secs(u64::from(claim.quarantine_s));
        let quarantine = asked.min(self.cx.config.unicast.forward);
        let Some(incoming) = self.incoming.get_mut(&number) else {
            return;
        };
        incoming.claim = Some(Claim {
            address,
            mac,
            transaction,
            quarantine,
            left: Vec::new(),
            translate: Duration::ZERO,
            state: State::Probing,
            port: None,
            disputed: false,
            answers: Allowance::default(),
            asked: Vec::new(),
        });
        info!(domain = %incoming.domain, number, %address, mac = mac_text(&mac), "Address is claimed");
        self.cx
            .records
            .update(number, |record| record.claim(address, ClaimOutcome::Asked));
        self.cx.address(AddressCommand::Watch { address });
        self.cx.address(AddressCommand::Probe { address });
        let due = self.cx.now + self.cx.config.unicast.retransmit;
        self.cx.timers.set(Timer::Claim(number), due);
        self.expect_claims();
        self.take_left(number, claim);
    }

    fn check_claim(
        &mut self,
        number: u64,
        uuid: DomainUuid,
        address: Ipv6Addr,
        mac: Mac,
    ) -> Result<(), Refusal> {
        let agent = self.cx.config.name.clone();
        let known = self.incoming.get(&number);
        if !known.is_some_and(|incoming| incoming.macs.contains(&mac)) {
            return Err(Refusal::BadField { field: "mac" });
        }
        if address == self.cx.config.address {
            return Err(Refusal::AddressOfHost { address, agent });
        }
        if !self.cx.config.is_on_link(address) {
            return Err(Refusal::AddressOffLink {
                address,
                agent,
                prefix: self.cx.config.address,
                length: self.cx.config.prefix_length,
            });
        }
        match self.holder_of(address, uuid) {
            None => Ok(()),
            Some(Holder::Vm(_)) => Err(Refusal::AddressHeld { address, agent }),
            Some(Holder::Left { wait }) => Err(Refusal::AddressLeft {
                address,
                agent,
                wait,
            }),
        }
    }

    /// Tells the source that its VM cannot have the address; the source ends the move.
    fn refuse_claim(&mut self, number: u64, transaction: u64, address: Ipv6Addr, why: &Refusal) {
        let reason = bounded(&why.to_string());
        self.cx.counters.claims_refused += 1;
        let Some(incoming) = self.incoming.get(&number) else {
            return;
        };
        warn!(domain = %incoming.domain, number, %address, %reason, "Address is refused");
        let peer = incoming.peer.clone();
        self.cx.records.update(number, |record| {
            record.claim(address, ClaimOutcome::Refused);
        });
        let reply = AddressClaimReply {
            address: address.octets().into(),
            state: ClaimState::Refused,
            reason,
        };
        self.cx.send(&peer, transaction, &reply.into());
    }

    fn tell_claim(&mut self, number: u64, state: ClaimState, reason: String) {
        let Some(incoming) = self.incoming.get(&number) else {
            return;
        };
        let Some(claim) = &incoming.claim else {
            return;
        };
        let reply = AddressClaimReply {
            address: claim.address.octets().into(),
            state,
            reason,
        };
        let (peer, transaction) = (incoming.peer.clone(), claim.transaction);
        self.cx.send(&peer, transaction, &reply.into());
    }

    /// The probe was not answered in time, or an arrived VM has had its time to speak.
    pub(in crate::proto) fn claim_timed_out(&mut self, number: u64) {
        let deadline = self.cx.config.unicast.defence;
        let now = self.cx.now;
        let Some(incoming) = self.incoming.get_mut(&number) else {
            return;
        };
        let arrived = incoming.arrived;
        let Some(claim) = &mut incoming.claim else {
            return;
        };
        let address = claim.address;
        match claim.state {
            State::Probing => {
                claim.state = State::Unique;
                // It was said when it was disputed.
                if !claim.disputed {
                    info!(domain = %incoming.domain, number, %address, "Address is unique");
                    self.cx
                        .records
                        .update(number, |record| record.claim(address, ClaimOutcome::Unique));
                    self.tell_claim(number, ClaimState::Unique, String::new());
                }
                self.answer_asked(number);
                if let Some(arrived) = arrived {
                    let due = (arrived + deadline).max(now);
                    self.cx.timers.set(Timer::Claim(number), due);
                }
            }
            State::Unique if arrived.is_some() => {
                claim.state = State::Silent;
                warn!(
                    domain = %incoming.domain,
                    number,
                    %address,
                    "VM has never spoken from its address; it is not answered for any more"
                );
                self.cx.counters.claims_silent += 1;
                self.cx
                    .records
                    .update(number, |record| record.claim(address, ClaimOutcome::Silent));
                self.forget_address(address, false);
            }
            State::Unique | State::Spoken | State::Silent => {}
        }
    }

    /// The VM runs here: it has so long to speak from its address.
    pub(super) fn claim_arrived(&mut self, number: u64) {
        self.answer_asked(number);
        let unique = self
            .incoming
            .get(&number)
            .and_then(|incoming| incoming.claim.as_ref())
            .is_some_and(|claim| claim.state == State::Unique);
        if unique {
            let due = self.cx.now + self.cx.config.unicast.defence;
            self.cx.timers.set(Timer::Claim(number), due);
        }
    }

    /// The address is defended from now on: who has asked already is answered.
    pub(super) fn answer_asked(&mut self, number: u64) {
        let claim = self
            .incoming
            .get_mut(&number)
            .and_then(|incoming| incoming.claim.as_mut());
        let Some(claim) = claim.filter(|claim| !claim.is_over()) else {
            return;
        };
        let (address, owner) = (claim.address, Some(claim.mac));
        let overrides = claim.state == State::Unique && !claim.disputed;
        for asker in std::mem::take(&mut claim.asked) {
            self.cx.address(AddressCommand::Advertise {
                address,
                owner,
                overrides,
                to: Some(asker),
            });
        }
    }

    /// Somebody has said something about a claimed address.
    pub(in crate::proto) fn claim_heard(&mut self, address: Ipv6Addr, said: Said, by: Mac) {
        let now = self.cx.now;
        let Some((number, incoming)) = self
            .incoming
            .iter_mut()
            .find(|(_, incoming)| incoming.watches(address))
        else {
            return;
        };
        let number = *number;
        let switched = incoming.is_switched_to();
        let refuses = self.cx.config.unicast.disputed == Dispute::Refuse;
        let Some(claim) = &mut incoming.claim else {
            return;
        };
        // What the VM itself says it says here by its TAP, or where it still is.
        if by == claim.mac {
            return;
        }
        let defended = claim.state == State::Unique || switched;
        let unique = claim.state == State::Unique && !claim.disputed;
        match said {
            Said::Asks(from) if defended => {
                if claim.answers.allows(now) {
                    let owner = Some(claim.mac);
                    self.cx.address(AddressCommand::Advertise {
                        address,
                        owner,
                        overrides: unique,
                        to: Some((from, by)),
                    });
                }
            }
            Said::Wants if defended => {
                if claim.answers.allows(now) {
                    let owner = Some(claim.mac);
                    info!(%address, mac = mac_text(&by), "Address is wanted by another node; it is told");
                    self.cx.address(AddressCommand::Advertise {
                        address,
                        owner,
                        overrides: unique,
                        to: None,
                    });
                }
            }
            Said::Asks(from) => {
                if claim.asked.len() < MAX_ASKED && !claim.asked.contains(&(from, by)) {
                    claim.asked.push((from, by));
                }
            }
            Said::Has | Said::Wants if !switched && refuses => {
                let transaction = claim.transaction;
                let mac = mac_text(&by);
                self.refuse_claim(
                    number,
                    transaction,
                    address,
                    &Refusal::AddressTaken { address, mac },
                );
                self.end_claim(number, false);
            }
            Said::Has | Said::Wants => {
                if std::mem::replace(&mut claim.disputed, true) {
                    return;
                }
                self.cx.counters.addresses_disputed += 1;
                let mac = mac_text(&by);
                warn!(domain = %incoming.domain, number, %address, mac, "Somebody says that he has the address of a VM that moves here; the move goes on");
                self.cx.records.update(number, |record| {
                    record.claim(address, ClaimOutcome::Disputed);
                });
                let reason = bounded(&Refusal::AddressTaken { address, mac }.to_string());
                self.tell_claim(number, ClaimState::Disputed, reason);
            }
        }
    }

    pub(in crate::proto) fn claim_of_own(&mut self, address: Ipv6Addr) {
        let found = self
            .incoming
            .iter()
            .find(|(_, incoming)| incoming.watches(address));
        let Some((number, incoming)) = found else {
            return;
        };
        let (number, agent) = (*number, self.cx.config.name.clone());
        let transaction = incoming.claim.as_ref().map_or(0, |claim| claim.transaction);
        let refusal = Refusal::AddressOfHost { address, agent };
        self.refuse_claim(number, transaction, address, &refusal);
        self.end_claim(number, false);
    }

    /// The VM has sent a frame from its address.
    pub(in crate::proto) fn claim_spoken(&mut self, address: Ipv6Addr) {
        let Some((number, incoming)) = self
            .incoming
            .iter_mut()
            .find(|(_, incoming)| incoming.watches(address))
        else {
            return;
        };
        let (number, uuid) = (*number, incoming.uuid);
        let Some(claim) = &mut incoming.claim else {
            return;
        };
        claim.state = State::Spoken;
        let (quarantine, disputed) = (claim.quarantine, claim.disputed);
        info!(domain = %incoming.domain, number, %address, "VM speaks for its address");
        self.cx.timers.stop(Timer::Claim(number));
        if !disputed {
            self.cx
                .records
                .update(number, |record| record.claim(address, ClaimOutcome::Spoken));
        }
        self.addresses.own(address, uuid, quarantine);
        self.forget_address(address, true);
    }

    /// Has the TAPs of arriving VMs made ready for packets to their new addresses.
    pub(super) fn expect_claims(&mut self) {
        let mut commands = Vec::new();
        for incoming in self.incoming.values_mut() {
            let ports = self
                .inventory
                .ports_of_arrival(&incoming.uuid, &incoming.macs);
            let Some(claim) = incoming.claim.as_mut().filter(|claim| !claim.is_over()) else {
                continue;
            };
            let port = ports
                .iter()
                .find(|(_, mac)| *mac == claim.mac)
                .map(|(ifindex, _)| *ifindex);
            if claim.port == port {
                continue;
            }
            claim.port = port;
            if let Some(ifindex) = port {
                commands.push(AddressCommand::Expect {
                    address: claim.address,
                    mac: claim.mac,
                    ifindex,
                });
            }
        }
        for command in commands {
            self.cx.address(command);
        }
    }

    /// Ends the claim of an arrival; an address that its VM had, or was about to have, is kept from
    /// others for a while.
    pub(super) fn end_claim(&mut self, number: u64, keep: bool) {
        self.cx.timers.stop(Timer::Claim(number));
        let Some(incoming) = self.incoming.get_mut(&number) else {
            return;
        };
        let uuid = incoming.uuid;
        if let Some(claim) = incoming.claim.take() {
            self.drop_claim(number, &claim, uuid, keep);
        }
    }

    pub(super) fn drop_claim(&mut self, number: u64, claim: &Claim, uuid: DomainUuid, keep: bool) {
        self.addresses
            .end_translations(&mut self.cx, |_, translating| translating.is_of(number));
        if keep && claim.state != State::Spoken {
            let until = self.cx.now + claim.quarantine;
            self.addresses.keep(claim.address, uuid, until);
        }
        if !claim.is_over() {
            self.forget_address(claim.address, false);
        }
    }
}

#[cfg(test)]
#[path = "../tests/claim.rs"]
mod tests;
