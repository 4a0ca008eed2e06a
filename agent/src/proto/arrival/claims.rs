//! Claims of all arrivals: whether a VM may have an address, and which claim a neighbour message
//! concerns.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::{AddressClaim, ClaimState, Code, ErrorMessage, Reason};
use tracing::info;

use super::address::{Claim, State, note, reply};
use super::{Arrivals, Host, Incoming};
use crate::proto::addresses::{Addresses, Holder, Said};
use crate::proto::context::Context;
use crate::proto::host::inventory::Inventory;
use crate::proto::record::ClaimOutcome;
use crate::proto::refusal::Refusal;
use crate::proto::timer::Timer;
use crate::proto::{AddressCommand, DomainUuid, LinkAddress, Mac, mac_text};

impl Arrivals {
    /// Returns another arriving or held domain that claims the address.
    pub(in crate::proto) fn claimant(
        &self,
        address: LinkAddress,
        uuid: DomainUuid,
    ) -> Option<DomainUuid> {
        let claims = |it: &Incoming| it.claim.as_ref().is_some_and(|it| it.address == address);
        let mut others = self.incoming.iter().filter(|it| it.uuid != uuid);
        others.find(|it| claims(it)).map(|it| it.uuid)
    }

    /// Returns the holder of an address other than the given domain.
    pub(in crate::proto) fn holder_of(
        &self,
        cx: &Context,
        addresses: &mut Addresses,
        address: LinkAddress,
        uuid: DomainUuid,
    ) -> Option<Holder> {
        let holder = addresses.holder(address, uuid, cx.now);
        match holder {
            Some(Holder::Vm(_)) => holder,
            _ => self.claimant(address, uuid).map(Holder::Vm).or(holder),
        }
    }

    /// Undoes the commands for an address, unless an arrival or an outgoing migration still needs
    /// it.
    pub(in crate::proto) fn forget_address(
        &self,
        cx: &mut Context,
        addresses: &Addresses,
        address: LinkAddress,
        spoken: bool,
    ) {
        let is_watched = self.incoming.iter().any(|it| it.watches(address));
        if !is_watched && !addresses.is_left(address) {
            let LinkAddress { bridge, address } = address;
            cx.address(bridge, AddressCommand::Forget { address, spoken });
        }
    }

    /// Handles the source's claim of an address for its VM.
    pub(in crate::proto) fn claimed(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        (peer, transaction): (&str, u64),
        said: &AddressClaim,
    ) {
        let mac = *said.mac;
        let address = cx.config.here(Ipv6Addr::from(*said.address));
        let Some(incoming) = self.incoming.of_transaction(peer, said.migration) else {
            let reason = format!("{} expects no such domain", cx.config.name);
            let reason = Reason::new(Code::UNKNOWN_TRANSACTION, reason);
            cx.send(peer, transaction, &ErrorMessage(reason).into());
            return;
        };
        let (number, uuid) = (incoming.number, incoming.uuid);
        let claim = incoming.claim.as_ref();
        if claim.is_some_and(|it| (it.address, it.mac) == (address, mac)) {
            self.claimed_again(cx, host, number, (peer, transaction), said);
            return;
        }
        let checked = self.check_claim(cx, host.addresses, incoming, address, mac);
        if let Err(refusal) = checked {
            incoming.refuse_claim(cx, transaction, address, &refusal);
            return;
        }
        info!(domain = %incoming.domain, number, %address, mac = mac_text(&mac), "Address is claimed");
        let replaced = self.incoming.get_mut(number);
        let ended = replaced.and_then(|it| it.end_claim(cx, host.addresses, true));
        if let Some(address) = ended {
            self.forget_address(cx, host.addresses, address, false);
        }
        // The VM returns to an address that it left, so its packets must not be forwarded any more.
        host.addresses
            .end_departures(cx, |departed, it| *departed == address && it.uuid == uuid);
        let asked = Duration::from_secs(u64::from(said.quarantine_s));
        let quarantine = asked.min(cx.config.unicast.forward);
        let mut claim = Claim::new(address, mac, transaction, quarantine);
        claim.take_left(cx, host, number, said);
        if let Some(incoming) = self.incoming.get_mut(number) {
            incoming.claim = Some(claim);
        }
        note(cx, number, address, ClaimOutcome::Asked);
        let LinkAddress { bridge, address } = address;
        cx.address(bridge, AddressCommand::Watch { address });
        cx.address(bridge, AddressCommand::Probe { address });
        let due = cx.now + cx.config.unicast.retransmit;
        cx.timers.set(Timer::Claim(number), due);
        self.expect_claims(cx, host.inventory);
        self.translate_left(cx, host);
    }

    /// Handles a repeated claim, perhaps with a new transaction, and adopts its list of old
    /// addresses.
    fn claimed_again(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        number: u64,
        (peer, transaction): (&str, u64),
        said: &AddressClaim,
    ) {
        let incoming = self.incoming.get_mut(number);
        let Some(claim) = incoming.and_then(|it| it.claim.as_mut()) else {
            return;
        };
        claim.transaction = transaction;
        claim.take_left(cx, host, number, said);
        let (address, is_probed) = (claim.address, claim.is_probed());
        self.translate_left(cx, host);
        if !is_probed {
            let unique = ClaimState::Unique;
            reply(cx, (peer, transaction), address, unique, Reason::default());
        }
    }

    fn check_claim(
        &self,
        cx: &Context,
        addresses: &mut Addresses,
        incoming: &Incoming,
        on: LinkAddress,
        mac: Mac,
    ) -> Result<(), Refusal> {
        let address = on.address;
        let agent = cx.config.name.clone();
        if !incoming.macs.contains(&mac) {
            return Err(Refusal::BadField { field: "mac" });
        }
        if address == cx.config.address {
            return Err(Refusal::AddressOfHost { address, agent });
        }
        if !cx.config.is_on_link(address) {
            return Err(Refusal::AddressOffLink {
                address,
                agent,
                prefix: cx.config.address,
                length: cx.config.prefix_length,
            });
        }
        match self.holder_of(cx, addresses, on, incoming.uuid) {
            None => Ok(()),
            Some(Holder::Vm(_)) => Err(Refusal::AddressHeld { address, agent }),
            Some(Holder::Left { wait }) => Err(Refusal::AddressLeft {
                address,
                agent,
                wait,
            }),
        }
    }

    pub(in crate::proto) fn claim_timed_out(
        &mut self,
        cx: &mut Context,
        addresses: &Addresses,
        number: u64,
    ) {
        let incoming = self.incoming.get_mut(number);
        if let Some(address) = incoming.and_then(|it| it.claim_due(cx)) {
            self.forget_address(cx, addresses, address, false);
        }
    }

    /// Handles a neighbour message about an address.
    pub(in crate::proto) fn address_heard(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        address: LinkAddress,
        said: Said,
        by: Mac,
    ) {
        let ended = self.watching(address).and_then(|incoming| {
            let refusal = incoming.hear(cx, said, by)?;
            incoming.end_refused(cx, host.addresses, &refusal)
        });
        if let Some(address) = ended {
            self.forget_address(cx, host.addresses, address, false);
        }
    }

    /// Refuses the claim of an address that belongs to this host.
    pub(in crate::proto) fn address_is_own(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        address: LinkAddress,
    ) {
        let agent = cx.config.name.clone();
        let refusal = Refusal::AddressOfHost {
            address: address.address,
            agent,
        };
        let watching = self.watching(address);
        let ended = watching.and_then(|it| it.end_refused(cx, host.addresses, &refusal));
        if let Some(address) = ended {
            self.forget_address(cx, host.addresses, address, false);
        }
    }

    /// Handles the first frame that a VM sent from its new address.
    pub(in crate::proto) fn address_spoken(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        address: LinkAddress,
    ) {
        let Some(incoming) = self.watching(address) else {
            return;
        };
        let (number, uuid) = (incoming.number, incoming.uuid);
        let Some(claim) = &mut incoming.claim else {
            return;
        };
        claim.state = State::Spoken;
        info!(domain = %incoming.domain, number, %address, "VM speaks for its address");
        cx.timers.stop(Timer::Claim(number));
        if !claim.disputed {
            note(cx, number, address, ClaimOutcome::Spoken);
        }
        host.addresses.own(address, uuid, claim.quarantine);
        self.forget_address(cx, host.addresses, address, true);
    }

    /// Returns the arrival that handles neighbour messages about an address.
    fn watching(&mut self, address: LinkAddress) -> Option<&mut Incoming> {
        self.incoming.iter_mut().find(|it| it.watches(address))
    }

    /// Directs packets for the new addresses of arriving VMs to their TAPs.
    pub(super) fn expect_claims(&mut self, cx: &mut Context, inventory: &Inventory) {
        for incoming in self.incoming.iter_mut() {
            let ports = self.taps.of(inventory, incoming);
            if let Some(claim) = &mut incoming.claim {
                claim.expect(cx, &ports);
            }
        }
    }
}

#[cfg(test)]
mod tests;
