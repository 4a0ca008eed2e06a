//! Claim of the leaving VM's future address at the destination.
//!
//! ```text
//!  MigrationReady           AddressClaimReply: Unique
//!  -------------> claimed ------------------------------> the migration continues
//!                    |  ^   Refused: not yet switching --> the migration stops, and the VM learns why
//!                    |  |   Error: an older agent -------> the migration continues without a claim
//!                    +--+
//!          MigrationReady: all peers of the VM know the new address, so packets that the VM
//!          still sends from old addresses may be translated; or a reconnect to the destination
//! ```
//!
//! The claim also names the addresses that the VM leaves; [`crate::proto::addresses`] handles
//! those.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::{AddressClaim, AddressClaimReply, ClaimState, MigrationReady, Reason};
use tracing::{info, warn};

use super::stage::Stage;
use super::{Around, Departures, Outgoing};
use crate::proto::addresses::{Addresses, Going, is_in};
use crate::proto::context::Context;
use crate::proto::record::ClaimOutcome;
use crate::proto::refusal::{Refusal, bounded};
use crate::proto::{Mac, Output, mac_text};

/// Limit of address changes per migration, since each one probes the destination's link.
const MAX_CHANGES: u32 = 4;

/// The VM's future address, as the VM announced it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaving {
    address: Ipv6Addr,
    mac: Mac,
    /// Transaction number of the claim.
    transaction: u64,
    /// Time for which packets to the old addresses are forwarded after the switch.
    lasting: Duration,
    /// Whether all peers of the VM know the new address, so the destination may translate old
    /// source addresses.
    translate: bool,
    /// Number of earlier, different announcements of the VM.
    changes: u32,
}

impl Outgoing {
    /// Handles the addresses in the VM's `MigrationReady`. The VM's last message before the switch
    /// counts.
    pub(super) fn change_addresses(
        &mut self,
        cx: &mut Context,
        around: &mut Around<'_>,
        ready: &MigrationReady,
    ) {
        let (Some(address), Some(mac)) = (ready.address, ready.mac) else {
            return;
        };
        let (address, mac): (Ipv6Addr, Mac) = (Ipv6Addr::from(*address), *mac);
        let Some(answered) = self.stage.answered_before_switch() else {
            return;
        };
        let known = |leaving: &&mut Leaving| (leaving.address, leaving.mac) == (address, mac);
        if let Some(leaving) = answered.leaving.as_mut().filter(known) {
            if ready.translate && !leaving.translate {
                leaving.translate = true;
                self.claim_address(cx, around.addresses);
            }
            return;
        }
        let changes = answered.leaving.map_or(0, |leaving| leaving.changes + 1);
        if changes > MAX_CHANGES {
            return;
        }
        let (uuid, number) = (self.order.uuid, self.order.number);
        let domain = around.inventory.domains.get(&uuid);
        let interfaces = domain.into_iter().flat_map(|domain| &domain.interfaces);
        let macs: Vec<Mac> = interfaces.map(|interface| interface.mac).collect();
        if !macs.contains(&mac) || !is_in(address, answered.prefix, answered.prefix_length) {
            cx.counters.forwards_refused += 1;
            warn!(domain = %self.order.domain, number, %address, mac = mac_text(&mac), "VM names an address or NIC that is not its own; its move goes on without them");
            return;
        }
        let asked = Duration::from_secs(u64::from(ready.forward_s));
        let lasting = asked.min(cx.config.unicast.forward);
        answered.leaving = Some(Leaving {
            address,
            mac,
            transaction: cx.numbers.next(),
            lasting,
            translate: ready.translate,
            changes,
        });
        cx.records
            .update(number, |record| record.claim(address, ClaimOutcome::Asked));
        let named = ready.forward.iter().map(|old| Ipv6Addr::from(**old));
        let going = Going {
            to: address,
            lasting,
            macs: &macs,
            is_claimed: &|address| around.arrivals.claimant(address, uuid).is_some(),
        };
        around
            .addresses
            .begin_departures(cx, (number, uuid), named, &going);
        self.claim_address(cx, around.addresses);
    }

    /// Sends the claim: the VM's future address, and the old addresses that the VM may still use.
    /// Called again after a reconnect, and when an old address turns out to belong to another node.
    pub(super) fn claim_address(&self, cx: &mut Context, addresses: &Addresses) {
        let Some(leaving) = self.leaving() else {
            return;
        };
        let lasting_s = u32::try_from(leaving.lasting.as_secs()).unwrap_or(u32::MAX);
        let left = addresses.left_by(self.order.number);
        let claim = AddressClaim {
            migration: self.order.transaction,
            address: leaving.address.octets().into(),
            mac: leaving.mac.into(),
            quarantine_s: lasting_s,
            translate: left
                .filter(|_| leaving.translate)
                .map(|address| address.octets().into())
                .collect(),
            translate_s: lasting_s,
        };
        cx.send(&self.order.destination, leaving.transaction, &claim.into());
    }

    fn leaving(&self) -> Option<&Leaving> {
        self.stage.answered()?.leaving.as_ref()
    }

    /// Stops the migration because the VM cannot have the address at the destination: asks libvirt
    /// to abort.
    ///
    /// # Errors
    ///
    /// Returns the refusal if libvirt does not run the migration yet; the caller then ends the
    /// migration.
    fn take_claim_refusal(&mut self, cx: &mut Context, refusal: Refusal) -> Result<(), Refusal> {
        let (uuid, number) = (self.order.uuid, self.order.number);
        let Stage::Moving(moving) = &mut self.stage else {
            return Err(refusal);
        };
        if moving.stopped().is_some() {
            warn!(domain = %self.order.domain, number, %refusal, "Too late to stop the move");
            return Ok(());
        }
        info!(domain = %self.order.domain, number, %refusal, "Migration is stopped");
        moving.stopped_for = Some(refusal);
        cx.outputs.push_back(Output::AbortMigration { uuid });
        Ok(())
    }
}

impl Departures {
    /// Repeats a claim after an old address of the VM turned out to belong to another node.
    pub(in crate::proto) fn claim_anew(
        &self,
        cx: &mut Context,
        addresses: &Addresses,
        number: u64,
    ) {
        if let Some(outgoing) = self.outgoing.get(&number) {
            outgoing.claim_address(cx, addresses);
        }
    }

    /// Handles the destination's verdict on a claim.
    pub(in crate::proto) fn on_address_claim_reply(
        &mut self,
        cx: &mut Context,
        addresses: &mut Addresses,
        (peer, transaction): (&str, u64),
        reply: &AddressClaimReply,
    ) {
        let Some(outgoing) = self.by_claim(peer, transaction) else {
            return;
        };
        let number = outgoing.order.number;
        let address = Ipv6Addr::from(*reply.address);
        let outcome = match reply.state {
            ClaimState::Unique => ClaimOutcome::Unique,
            ClaimState::Refused => ClaimOutcome::Refused,
            ClaimState::Disputed => ClaimOutcome::Disputed,
        };
        cx.records
            .update(number, |record| record.claim(address, outcome));
        let reason = Reason::new(reply.code, bounded(&reply.reason));
        match reply.state {
            ClaimState::Unique => {}
            ClaimState::Disputed => warn!(peer, number, %address, %reason, "Address is disputed"),
            ClaimState::Refused => {
                let refusal = Refusal::Address {
                    destination: peer.to_owned(),
                    reason,
                };
                if let Err(refusal) = outgoing.take_claim_refusal(cx, refusal) {
                    self.fail(cx, addresses, number, &refusal);
                }
            }
        }
    }

    /// Records that the destination does not support claims. The migration continues without one.
    pub(super) fn claim_not_understood(
        &mut self,
        cx: &mut Context,
        (peer, transaction): (&str, u64),
    ) {
        if let Some(outgoing) = self.by_claim(peer, transaction)
            && let Some(leaving) = outgoing.leaving()
        {
            let (number, address) = (outgoing.order.number, leaving.address);
            info!(peer, number, %address, "Destination claims no addresses");
            cx.records.update(number, |record| {
                record.claim(address, ClaimOutcome::Unknown);
            });
        }
    }

    /// Returns the migration to that peer whose claim had the transaction.
    fn by_claim(&mut self, peer: &str, transaction: u64) -> Option<&mut Outgoing> {
        let is_it = |leaving: &Leaving| leaving.transaction == transaction;
        self.bound_for(peer)
            .find(|it| it.leaving().is_some_and(is_it))
    }
}
