//! TAPs of arriving VMs: which arrival gets a TAP, and how long the TAP's gate may be closed.
//!
//! A TAP exists before libvirt says whose it is, and its gate must be closed by then. The agent
//! knows only the MAC that libvirt derives from the guest's MAC, and a peer may name any MAC. So
//! the agent assigns a TAP to one arrival only, preferably to a domain that libvirt is receiving,
//! and takes the TAP back as soon as libvirt assigns it to another domain. Whatever peers say, a
//! gate is closed for at most `handover.gate_max_s` in total.

use std::collections::BTreeMap;
use std::time::Duration;

use tracing::warn;

use super::handover::Gates;
use super::{Arrivals, Host, Incoming};
use crate::proto::context::Context;
use crate::proto::host::inventory::{Inventory, is_tap_of};
use crate::proto::record::Ungated;
use crate::proto::timer::Timer;
use crate::proto::{DomainUuid, GateCommand, Mac, Output, Timestamp};

/// Time for which a TAP stays assigned to a domain that libvirt has not announced. libvirt
/// announces the domain once QEMU has started, which takes a minute or more if memory is
/// preallocated or the host is at full load.
const UNCONFIRMED: Duration = Duration::from_secs(120);

/// State of the TAPs that arrivals use.
#[derive(Debug, Default)]
pub(super) struct Taps {
    /// Arriving domain by ifindex, for TAPs that libvirt has not assigned to a domain.
    lent: BTreeMap<u32, DomainUuid>,
    /// Time of the first closing of a TAP's gate, by ifindex.
    closed: BTreeMap<u32, Timestamp>,
}

impl Taps {
    /// Returns the TAPs of an arrival with the MACs of the NICs behind them: those that the
    /// hypervisor names, and TAPs lent to the domain whose MAC libvirt derived from one of its
    /// NICs.
    pub(super) fn of(&self, inventory: &Inventory, incoming: &Incoming) -> Vec<(u32, Mac)> {
        self.of_domain(inventory, &incoming.uuid, &incoming.macs)
    }

    fn of_domain(&self, inventory: &Inventory, uuid: &DomainUuid, macs: &[Mac]) -> Vec<(u32, Mac)> {
        let mut found = inventory.ports_of_domain(uuid);
        for port in inventory.ports_of_nobody() {
            if self.lent.get(&port.ifindex) != Some(uuid) {
                continue;
            }
            if let Some(mac) = macs.iter().find(|mac| is_tap_of(&port.mac, mac)) {
                found.push((port.ifindex, *mac));
            }
        }
        found
    }

    /// Returns true if libvirt has begun to receive a domain: the domain is known, or its TAPs
    /// exist.
    pub(super) fn are_here(&self, inventory: &Inventory, incoming: &Incoming) -> bool {
        inventory.domains.contains_key(&incoming.uuid) || !self.of(inventory, incoming).is_empty()
    }

    /// Closes the gate of a TAP for an arrival. Returns false if the gate has used up its time.
    pub(super) fn close_gate(
        &mut self,
        cx: &mut Context,
        inventory: &Inventory,
        ifindex: u32,
        uuid: &DomainUuid,
    ) -> bool {
        let until = self.closed_until(cx, inventory, ifindex, uuid);
        if until <= cx.now {
            return false;
        }
        cx.timers.set_earlier(Timer::Gate(ifindex), until);
        let hold = GateCommand::Hold { ifindex };
        cx.outputs.push_back(Output::Gate(hold));
        true
    }

    /// Returns the time until which the gate of a TAP may be closed, counted from its first
    /// closing.
    fn closed_until(
        &mut self,
        cx: &Context,
        inventory: &Inventory,
        ifindex: u32,
        uuid: &DomainUuid,
    ) -> Timestamp {
        let most = cx.config.timing.gate_max;
        let bound = if inventory.comes(uuid) {
            most
        } else {
            most.min(UNCONFIRMED)
        };
        *self.closed.entry(ifindex).or_insert(cx.now) + bound
    }

    /// Forgets the closing times of vanished TAPs and of TAPs whose VM runs; their gates may close
    /// anew.
    fn forget_closed(&mut self, inventory: &Inventory) {
        self.closed.retain(|ifindex, _| {
            let domain = inventory.domain_of_port(*ifindex);
            inventory.ports.contains_key(ifindex) && !domain.is_some_and(|it| it.running)
        });
    }
}

impl Arrivals {
    /// Assigns the TAPs without a domain to arrivals, and takes back TAPs that belong to another
    /// domain.
    pub(super) fn lend_taps(&mut self, cx: &mut Context, host: &Host<'_>) {
        let inventory = host.inventory;
        let mut lent = BTreeMap::new();
        for port in inventory.ports_of_nobody() {
            let claimants = || {
                let claims = |mac| is_tap_of(&port.mac, mac);
                let incoming = self.incoming.iter();
                incoming
                    .filter(move |incoming| incoming.macs.iter().any(claims))
                    .map(|incoming| incoming.uuid)
            };
            let expected = claimants().find(|uuid| inventory.arriving.contains_key(uuid));
            let before = self.taps.lent.get(&port.ifindex).copied();
            let kept = before.filter(|before| claimants().any(|uuid| uuid == *before));
            // Without a connection to libvirt, a TAP's owner is unknown.
            let first = claimants()
                .next()
                .filter(|_| inventory.hypervisor_connected);
            if let Some(uuid) = expected.or(kept).or(first) {
                lent.insert(port.ifindex, uuid);
            }
        }
        self.taps.lent = lent;
        self.taps.forget_closed(inventory);
        self.take_back_taps(cx, host);
    }

    /// Opens the gates of TAPs that an arrival lost, and removes their MDB entries.
    fn take_back_taps(&mut self, cx: &mut Context, host: &Host<'_>) {
        let mut opened = Gates::default();
        let mut entries = Vec::new();
        for incoming in self.incoming.iter_mut() {
            let ports = self.taps.of(host.inventory, incoming);
            let is_lost = |ifindex: u32| !ports.iter().any(|(of, _)| *of == ifindex);
            opened.take_from(&mut incoming.gates, is_lost);
            let made = &mut incoming.mdb.made;
            entries.extend(made.extract_if(.., |(ifindex, _)| is_lost(*ifindex)));
        }
        // The kernel removes the gate of a vanished TAP.
        opened.retain(|ifindex| host.inventory.ports.contains_key(&ifindex));
        for ifindex in opened.taps() {
            warn!(
                ifindex,
                "A TAP that was kept for an arriving domain is another's"
            );
        }
        opened.clear(cx);
        for place in entries {
            host.delete_mdb(cx, place);
        }
    }

    /// Opens a gate that has been closed for too long.
    pub(in crate::proto) fn gate_overdue(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        ifindex: u32,
    ) {
        let is_closed = |it: &&Incoming| it.gates.is_closed(ifindex);
        let Some(incoming) = self.incoming.iter().find(is_closed) else {
            return;
        };
        let uuid = incoming.uuid;
        let until = self.taps.closed_until(cx, host.inventory, ifindex, &uuid);
        if cx.now < until {
            cx.timers.set(Timer::Gate(ifindex), until);
            return;
        }
        warn!(
            domain = %incoming.domain,
            ifindex,
            "The gate of a TAP is opened before its VM has arrived: libvirt brings no such domain, or \
             its copy takes longer than handover.gate_max_s; packets may be lost or doubled"
        );
        let clear = GateCommand::Clear { ifindex };
        cx.outputs.push_back(Output::Gate(clear));
        if incoming.gates.is_holding(ifindex) {
            self.not_held(cx, host, ifindex, Ungated::ClosedTooLong);
            return;
        }
        for incoming in self.incoming.iter_mut() {
            incoming.gates.refuse(ifindex, Ungated::ClosedTooLong);
        }
        self.ports_changed(cx, host);
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod lent_tests {
    use super::*;
    use crate::proto::host::inventory::tests::inventory;

    #[test]
    fn port_kept_for_an_expected_domain_is_known_by_its_mac() {
        let inventory = inventory();
        let expected = [0x52, 0x54, 0, 0, 0, 2];
        let uuids = [2, 3].map(|number| DomainUuid([number; 16]));
        let mut taps = Taps::default();
        taps.lent.insert(8, uuids[0]);
        let [kept, other] = uuids.map(|uuid| taps.of_domain(&inventory, &uuid, &[expected]));
        assert_eq!((kept, other), (vec![(8, expected)], vec![]));
    }

    #[test]
    fn port_of_another_domain_is_never_taken_for_an_expected_one() {
        let mut taps = Taps::default();
        taps.lent.insert(7, DomainUuid([2; 16]));
        let stolen = [0x52, 0x54, 0, 0, 0, 1];
        assert_eq!(
            taps.of_domain(&inventory(), &DomainUuid([2; 16]), &[stolen]),
            []
        );
    }
}
