//! The address that a leaving VM is going to have: it is claimed at the destination.
//!
//! ```text
//!  MigrationReady           AddressClaimReply: Unique
//!  -------------> claimed ------------------------------> the move goes on
//!                    |  ^   Refused: not yet switching --> the move is stopped, and the VM told why
//!                    |  |   Error: an older agent -------> the move goes on without
//!                    +--+
//!          MigrationReady: all peers know the address, so what the VM still sends
//!          from the old ones may be translated; the connection is made anew
//! ```
//!
//! The claim also names the addresses that the VM leaves; what is done here for those is in
//! [`crate::proto::addresses`].

use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::{AddressClaim, AddressClaimReply, ClaimState, MigrationReady};
use tracing::{info, warn};

use super::State;
use crate::proto::addresses::{Going, is_in};
use crate::proto::destination::claimant;
use crate::proto::record::ClaimOutcome;
use crate::proto::refusal::{Refusal, bounded};
use crate::proto::{Agent, Mac, Output, mac_text};

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
            self.cx.counters.forwards_refused += 1;
            warn!(domain = %outgoing.domain, number, %address, mac = mac_text(&mac), "VM names an address or NIC that is not its own; its move goes on without them");
            return;
        }
        let asked = Duration::from_secs(u64::from(ready.forward_s));
        let lasting = asked.min(self.cx.config.unicast.forward);
        let leaving = Leaving {
            address,
            mac,
            transaction: self.cx.numbers.next(),
            lasting,
            translate: ready.translate,
            changes,
        };
        if let Some(outgoing) = self.outgoing.get_mut(&number) {
            outgoing.leaving = Some(leaving);
        }
        self.cx
            .records
            .update(number, |record| record.claim(address, ClaimOutcome::Asked));
        let named = ready.forward.iter().map(|old| Ipv6Addr::from(**old));
        let arrivals = &self.incoming;
        let going = Going {
            to: address,
            lasting,
            macs: &macs,
            is_claimed: &|address| claimant(arrivals, address, uuid).is_some(),
        };
        self.addresses
            .begin_departures(&mut self.cx, (number, uuid), named, &going);
        self.claim_address(number);
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
    pub(in crate::proto) fn claim_address(&mut self, number: u64) {
        let Some(outgoing) = self.outgoing.get(&number) else {
            return;
        };
        let Some(leaving) = outgoing.leaving else {
            return;
        };
        let lasting_s = u32::try_from(leaving.lasting.as_secs()).unwrap_or(u32::MAX);
        let left = self.addresses.left_by(number);
        let claim = AddressClaim {
            migration: outgoing.transaction,
            address: leaving.address.octets().into(),
            mac: leaving.mac.into(),
            quarantine_s: lasting_s,
            translate: left
                .filter(|_| leaving.translate)
                .map(|address| address.octets().into())
                .collect(),
            translate_s: lasting_s,
        };
        let peer = outgoing.destination.clone();
        self.cx.send(&peer, leaving.transaction, &claim.into());
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
        self.cx
            .records
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
                self.cx.outputs.push_back(Output::AbortMigration { uuid });
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
            self.cx.records.update(number, |record| {
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
}
