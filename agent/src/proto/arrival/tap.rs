//! TAPs that libvirt has given to no domain yet: which arrival each is kept for, and for how long.
//!
//! A TAP is there before libvirt says whose it is, and its gate has to close by then. All that is
//! known is the MAC that libvirt has made of the guest's, and a peer may name anybody's: so a TAP is
//! kept for one arrival only, for that of a domain which libvirt brings here before others, and it is
//! given back as soon as libvirt says that it is another's. Whatever is said, its gate is not closed
//! for longer than `handover.gate_max_s` in all.

use std::collections::BTreeMap;
use std::time::Duration;

use common::maps::{ListenerKey, ManagedKey, SourceKey};
use tracing::warn;

use super::handover::ArrivalGate;
use crate::proto::inventory::is_tap_of;
use crate::proto::listener::listener_key;
use crate::proto::record::Ungated;
use crate::proto::timer::Timer;
use crate::proto::{Agent, DomainUuid, GateCommand, MdbEntry, Output, Timestamp};

/// How long a TAP is kept for a domain of which libvirt has not said that it comes. libvirt says so once
/// QEMU has started, which takes a minute and more where memory is allocated beforehand or the host is at
/// full load.
const UNCONFIRMED: Duration = Duration::from_secs(120);

impl Agent {
    /// Decides whom the TAPs are kept for that no domain has, and takes back what is another's.
    pub(super) fn lend_taps(&mut self) {
        let inventory = &self.inventory;
        let mut lent = BTreeMap::new();
        for port in inventory.ports_of_nobody() {
            let claimants = || {
                let claims = |mac| is_tap_of(&port.mac, mac);
                let incoming = self.incoming.values();
                incoming
                    .filter(move |incoming| incoming.macs.iter().any(claims))
                    .map(|incoming| incoming.uuid)
            };
            let expected = claimants().find(|uuid| inventory.arriving.contains_key(uuid));
            let before = inventory.lent.get(&port.ifindex).copied();
            let kept = before.filter(|before| claimants().any(|uuid| uuid == *before));
            // Whose it is nobody knows while libvirt cannot be asked.
            let first = claimants()
                .next()
                .filter(|_| inventory.hypervisor_connected);
            if let Some(uuid) = expected.or(kept).or(first) {
                lent.insert(port.ifindex, uuid);
            }
        }
        self.inventory.lent = lent;
        self.inventory.forget_closed();
        self.take_back_taps();
    }

    /// Opens the gates of TAPs that are no longer an arrival's, and has the bridge forget what they
    /// were to get.
    fn take_back_taps(&mut self) {
        let mut opened = Vec::new();
        let mut entries = Vec::new();
        for incoming in self.incoming.values_mut() {
            let ports = self
                .inventory
                .ports_of_arrival(&incoming.uuid, &incoming.macs);
            let is_lost = |ifindex: &u32| !ports.iter().any(|(of, _)| of == ifindex);
            opened.extend(incoming.gates.extract_if(.., |ifindex, _| is_lost(ifindex)));
            entries.extend(incoming.mdb.extract_if(.., |(ifindex, _)| is_lost(ifindex)));
        }
        let here = &self.inventory.ports;
        opened.retain(|(ifindex, _)| here.contains_key(ifindex));
        for (ifindex, _) in &opened {
            warn!(
                ifindex,
                "A TAP that was kept for an arriving domain is another's"
            );
        }
        self.clear_gates(&opened.into_iter().collect());
        for (ifindex, key) in entries {
            self.delete_mdb(ifindex, key);
        }
    }

    /// Closes the gate of a TAP for an arrival; `false` if it has been closed for long enough.
    pub(super) fn close_gate(&mut self, ifindex: u32, uuid: &DomainUuid) -> bool {
        let until = self.closed_until(ifindex, uuid);
        if until <= self.cx.now {
            return false;
        }
        self.cx.timers.set_earlier(Timer::Gate(ifindex), until);
        let hold = GateCommand::Hold { ifindex };
        self.cx.outputs.push_back(Output::Gate(hold));
        true
    }

    /// Until when the gate of a TAP may be closed, counted from its first time.
    fn closed_until(&mut self, ifindex: u32, uuid: &DomainUuid) -> Timestamp {
        let most = self.cx.config.timing.gate_max;
        let bound = if self.inventory.comes(uuid) {
            most
        } else {
            most.min(UNCONFIRMED)
        };
        *self.inventory.closed.entry(ifindex).or_insert(self.cx.now) + bound
    }

    /// A gate has perhaps been closed for too long.
    pub(in crate::proto) fn gate_overdue(&mut self, ifindex: u32) {
        let is_closed =
            |gate: &ArrivalGate| matches!(gate, ArrivalGate::Holding | ArrivalGate::Replaying);
        let Some((domain, uuid, gate)) = self.incoming.values().find_map(|incoming| {
            let gate = incoming.gates.get(&ifindex).copied().filter(is_closed)?;
            Some((incoming.domain.clone(), incoming.uuid, gate))
        }) else {
            return;
        };
        let until = self.closed_until(ifindex, &uuid);
        if self.cx.now < until {
            self.cx.timers.set(Timer::Gate(ifindex), until);
            return;
        }
        warn!(
            domain = %domain,
            ifindex,
            "The gate of a TAP is opened before its VM has arrived: libvirt brings no such domain, or \
             its copy takes longer than handover.gate_max_s; packets may be lost or doubled"
        );
        let clear = GateCommand::Clear { ifindex };
        self.cx.outputs.push_back(Output::Gate(clear));
        if gate == ArrivalGate::Holding {
            self.not_held(ifindex, Ungated::ClosedTooLong);
            return;
        }
        for incoming in self.incoming.values_mut() {
            if let Some(gate) = incoming.gates.get_mut(&ifindex) {
                *gate = ArrivalGate::Refused(Ungated::ClosedTooLong);
            }
        }
        self.ports_changed();
    }

    /// Has the bridge forget an entry made for an arrival, unless the VM behind the port has reported
    /// it itself.
    pub(super) fn delete_mdb(&mut self, ifindex: u32, key: ManagedKey) {
        let listens = self.mirror.get(&listener_key(ifindex, &key)).is_some();
        if !listens && self.inventory.ports.contains_key(&ifindex) {
            let source = None;
            self.cx.outputs.push_back(Output::MdbDelete(MdbEntry {
                ifindex,
                key,
                source,
            }));
        }
    }

    /// Has the bridge forget what a VM may not have reported: a bridge with too many entries stops snooping.
    pub(in crate::proto) fn reports_refused(
        &mut self,
        listeners: &[ListenerKey],
        sources: &[SourceKey],
    ) {
        for listener in listeners {
            self.delete_mdb(listener.ifindex, listener.managed());
        }
        for SourceKey { listener, source } in sources {
            if !self.inventory.ports.contains_key(&listener.ifindex) {
                continue;
            }
            self.cx.outputs.push_back(Output::MdbDelete(MdbEntry {
                ifindex: listener.ifindex,
                key: listener.managed(),
                source: Some(*source),
            }));
        }
    }
}

#[cfg(test)]
#[path = "../tests/gates.rs"]
mod tests;
