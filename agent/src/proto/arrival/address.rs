//! Claimed address of an arriving VM on this link.
//!
//! ```text
//!  AddressClaim           RetransTimer              frame of the VM
//!  -----------> Probing -------------> Unique ------------------------> Spoken
//!                  |                     | deadline after the arrival
//!                  |                     +----------------------------> Silent
//!                  | another node says it has the address, before the switch
//!                  +--> refused, and the source ends the migration, if the configuration demands it
//! ```
//!
//! Every node on the link can object, and could thus end every migration. So by default the
//! migration continues, the record marks the address as disputed, and Advertisements for it have no
//! Override flag.
//!
//! The agent probes the address while libvirt copies memory (RFC 4862 §5.4, one probe). After the
//! probe, or from the switch on if that is earlier, the agent answers Solicitations with the MAC of
//! the VM's NIC (RFC 4861 §7.2.8). Routers then deliver packets at once, and the packets wait in
//! the TAP until the VM reads them. Advertisements have no Override flag while the probe runs (RFC
//! 4429 §3.3). The agent remembers a neighbour that asks too early and answers as soon as it may.
//! Otherwise the neighbour would ask again only after a second, and the first forwarded packet
//! makes a router ask just before the switch is known here.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::{AddressClaimReply, ClaimState, Reason};
use tracing::{info, warn};

use super::Incoming;
use super::left::Left;
use crate::proto::addresses::{Addresses, Allowance, Said};
use crate::proto::context::Context;
use crate::proto::record::ClaimOutcome;
use crate::proto::refusal::Refusal;
use crate::proto::timer::Timer;
use crate::proto::{AddressCommand, Dispute, LinkAddress, Mac, mac_text};

/// Limit of remembered neighbours that asked during the probe.
const MAX_ASKED: usize = 8;

/// IP address and MAC of a neighbour that asked for the address.
type Asker = (Ipv6Addr, Mac);

/// Claim of one address.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) address: LinkAddress,
    pub(super) mac: Mac,
    /// Transaction number of the claim, for replies.
    pub(super) transaction: u64,
    /// Time for which no other VM gets the address after this VM leaves it.
    pub(super) quarantine: Duration,
    pub(super) left: Left,
    pub(super) state: State,
    /// Ifindex of the NIC's TAP; `None` before the TAP exists.
    port: Option<u32>,
    pub(super) disputed: bool,
    answers: Allowance,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum State {
    Probing {
        /// Neighbours that asked during the probe.
        asked: Vec<Asker>,
    },
    Unique,
    /// The VM sends from the address itself.
    Spoken,
    /// The VM did not send from the address in time.
    Silent,
}

impl Claim {
    pub(super) fn new(
        address: LinkAddress,
        mac: Mac,
        transaction: u64,
        quarantine: Duration,
    ) -> Self {
        Self {
            address,
            mac,
            transaction,
            quarantine,
            left: Left::default(),
            state: State::Probing { asked: Vec::new() },
            port: None,
            disputed: false,
            answers: Allowance::default(),
        }
    }

    /// Returns true during the probe.
    pub(super) fn is_probed(&self) -> bool {
        matches!(self.state, State::Probing { .. })
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.state, State::Spoken | State::Silent)
    }

    pub(super) fn reply(&self, cx: &mut Context, peer: &str, state: ClaimState, reason: Reason) {
        reply(cx, (peer, self.transaction), self.address, state, reason);
    }

    /// Sends an Advertisement with the VM's MAC.
    fn advertise(&self, cx: &mut Context, to: Option<Asker>) {
        let LinkAddress { bridge, address } = self.address;
        let advertise = AddressCommand::Advertise {
            address,
            owner: Some(self.mac),
            overrides: self.state == State::Unique && !self.disputed,
            to,
        };
        cx.address(bridge, advertise);
    }

    /// Directs packets for the address to the NIC's TAP, once the TAP exists.
    pub(super) fn expect(&mut self, cx: &mut Context, ports: &[(u32, Mac)]) {
        let port = ports.iter().find(|(_, mac)| *mac == self.mac);
        let port = port.map(|(ifindex, _)| *ifindex);
        if self.is_over() || self.port == port {
            return;
        }
        self.port = port;
        if let Some(ifindex) = port {
            let LinkAddress { bridge, address } = self.address;
            let mac = self.mac;
            let expect = AddressCommand::Expect {
                address,
                mac,
                ifindex,
            };
            cx.address(bridge, expect);
        }
    }

    /// Advertises the address to another node that tests whether the address is free.
    fn tell_wanted(&mut self, cx: &mut Context, by: Mac) {
        if self.answers.allows(cx.now) {
            let address = self.address;
            info!(%address, mac = mac_text(&by), "Address is wanted by another node; it is told");
            self.advertise(cx, None);
        }
    }
}

pub(super) fn reply(
    cx: &mut Context,
    (peer, transaction): (&str, u64),
    address: LinkAddress,
    state: ClaimState,
    reason: Reason,
) {
    let reply = AddressClaimReply {
        address: address.address.octets().into(),
        state,
        reason: reason.text,
        code: reason.code,
    };
    cx.send(peer, transaction, &reply.into());
}

pub(super) fn note(cx: &mut Context, number: u64, on: LinkAddress, outcome: ClaimOutcome) {
    cx.records
        .update(number, |record| record.claim(on.address, outcome));
}

impl Incoming {
    /// Returns true if neighbour messages about the address concern this arrival.
    pub(super) fn watches(&self, address: LinkAddress) -> bool {
        let claim = self.claim.as_ref();
        claim.is_some_and(|it| it.address == address && !it.is_over())
    }

    /// Tells the source that its VM cannot have the address; the source ends the migration.
    pub(super) fn refuse_claim(
        &self,
        cx: &mut Context,
        transaction: u64,
        address: LinkAddress,
        why: &Refusal,
    ) {
        let (number, reason) = (self.number, why.reason());
        cx.counters.claims_refused += 1;
        warn!(domain = %self.domain, number, %address, %reason, "Address is refused");
        note(cx, number, address, ClaimOutcome::Refused);
        let asked = (self.peer.as_str(), transaction);
        reply(cx, asked, address, ClaimState::Refused, reason);
    }

    /// Starts the time in which the arrived VM must send from its address.
    pub(super) fn claim_arrived(&mut self, cx: &mut Context) {
        self.answer_asked(cx);
        let claim = self.claim.as_ref();
        if claim.is_some_and(|claim| claim.state == State::Unique) {
            let due = cx.now + cx.config.unicast.defence;
            cx.timers.set(Timer::Claim(self.number), due);
        }
    }

    /// Answers the remembered neighbours, because the agent defends the address from now on.
    pub(super) fn answer_asked(&mut self, cx: &mut Context) {
        if let Some(claim) = &mut self.claim
            && let State::Probing { asked } = &mut claim.state
        {
            for asker in std::mem::take(asked) {
                claim.advertise(cx, Some(asker));
            }
        }
    }

    /// Handles the end of the probe, or of an arrived VM's time to send. Returns the address if the
    /// agent stops answering for it.
    pub(super) fn claim_due(&mut self, cx: &mut Context) -> Option<LinkAddress> {
        let (number, arrived) = (self.number, self.stage.arrived());
        let claim = self.claim.as_mut()?;
        let address = claim.address;
        match (&mut claim.state, arrived) {
            (State::Probing { asked }, _) => {
                let asked = std::mem::take(asked);
                claim.state = State::Unique;
                // The source was already told of the dispute.
                if !claim.disputed {
                    info!(domain = %self.domain, number, %address, "Address is unique");
                    note(cx, number, address, ClaimOutcome::Unique);
                    claim.reply(cx, &self.peer, ClaimState::Unique, Reason::default());
                }
                for asker in asked {
                    claim.advertise(cx, Some(asker));
                }
                if let Some(arrived) = arrived {
                    let due = (arrived + cx.config.unicast.defence).max(cx.now);
                    cx.timers.set(Timer::Claim(number), due);
                }
                None
            }
            (State::Unique, Some(_)) => {
                claim.state = State::Silent;
                warn!(
                    domain = %self.domain,
                    number,
                    %address,
                    "VM has never spoken from its address; it is not answered for any more"
                );
                cx.counters.claims_silent += 1;
                note(cx, number, address, ClaimOutcome::Silent);
                Some(address)
            }
            (State::Unique, None) | (State::Spoken | State::Silent, _) => None,
        }
    }

    /// Handles a neighbour message about the claimed address. Returns the refusal that ends the
    /// claim, if the message does.
    pub(super) fn hear(&mut self, cx: &mut Context, said: Said, by: Mac) -> Option<Refusal> {
        let switched = self.is_switched_to();
        // The VM itself speaks through its TAP here, or where it still runs.
        let claim = self.claim.as_mut().filter(|claim| by != claim.mac)?;
        let address = claim.address;
        match (said, &mut claim.state) {
            (Said::Asks(from), State::Probing { asked }) if !switched => {
                if asked.len() < MAX_ASKED && !asked.contains(&(from, by)) {
                    asked.push((from, by));
                }
                None
            }
            (Said::Asks(from), _) => {
                if claim.answers.allows(cx.now) {
                    claim.advertise(cx, Some((from, by)));
                }
                None
            }
            (Said::Wants, State::Unique) => {
                claim.tell_wanted(cx, by);
                None
            }
            (Said::Wants, _) if switched => {
                claim.tell_wanted(cx, by);
                None
            }
            (Said::Has | Said::Wants, _) => {
                let mac = mac_text(&by);
                let taken = Refusal::AddressTaken {
                    address: address.address,
                    mac,
                };
                if !switched && cx.config.unicast.disputed == Dispute::Refuse {
                    return Some(taken);
                }
                if !std::mem::replace(&mut claim.disputed, true) {
                    cx.counters.addresses_disputed += 1;
                    warn!(domain = %self.domain, number = self.number, %address, mac = mac_text(&by), "Somebody says that he has the address of a VM that moves here; the move goes on");
                    note(cx, self.number, address, ClaimOutcome::Disputed);
                    let reason = taken.reason();
                    claim.reply(cx, &self.peer, ClaimState::Disputed, reason);
                }
                None
            }
        }
    }

    /// Refuses the claim and ends it. Returns the address if the agent stops answering for it.
    pub(super) fn end_refused(
        &mut self,
        cx: &mut Context,
        addresses: &mut Addresses,
        why: &Refusal,
    ) -> Option<LinkAddress> {
        let claim = self.claim.as_ref()?;
        self.refuse_claim(cx, claim.transaction, claim.address, why);
        self.end_claim(cx, addresses, false)
    }

    /// Ends the claim. With `keep`, the address stays in quarantine unless the VM sent from it.
    /// Returns the address if the agent stops answering for it.
    pub(super) fn end_claim(
        &mut self,
        cx: &mut Context,
        addresses: &mut Addresses,
        keep: bool,
    ) -> Option<LinkAddress> {
        let number = self.number;
        cx.timers.stop(Timer::Claim(number));
        let claim = self.claim.take()?;
        addresses.end_translations(cx, |_, translating| translating.is_of(number));
        if keep && claim.state != State::Spoken {
            let until = cx.now + claim.quarantine;
            addresses.keep(claim.address, self.uuid, until);
        }
        (!claim.is_over()).then_some(claim.address)
    }
}
