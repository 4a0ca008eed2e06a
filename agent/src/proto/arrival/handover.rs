//! The destination's part of the handover: the gates of arriving TAPs.
//!
//! ```text
//!             TAP is there          HandoverCut            all replayed
//!  (no gate) --------------> Holding -----------> Replaying --------------> (no gate)
//!                              |                      ^
//!                              | the VM runs, and no  |
//!                              | cut can come         |
//!                              +----------------------+  everything of the pause, twice rather
//!                                                        than never
//! ```
//!
//! A connected source sends its cut by [`LATEST_CUT`] after the stop, or that there is none, so it is waited
//! for until then: meanwhile the VM gets none of its streams, but loses nothing of them.
//!
//! A gate that cannot be made is no reason to keep a VM from coming: its TAP gets the streams from
//! the pause on instead. So does one whose gate was closed for as long as may be (`tap`).

use std::collections::BTreeMap;
use std::time::Duration;

use common::signal::HandoverCut;
use tracing::{info, warn};

use super::{Agent, Incoming};
use crate::proto::handover::{FlowReport, HoldReport, LATEST_CUT};
use crate::proto::record::Ungated;
use crate::proto::timer::Timer;
use crate::proto::{GateCommand, Mac, Output};

/// How long a cut may be on its way; the least that a VM that runs here waits for its cut, and all that it
/// waits for one of a source that is not connected.
pub(super) const CUT_TRANSIT: Duration = Duration::from_millis(200);
/// What is replayed without a cut begins so long before the last moment of which the source said that the
/// VM ran: as long as libvirt's word of the stop may take to get to the source.
const BLIND_MARGIN: Duration = Duration::from_millis(100);
/// Pause that is assumed where not even that was heard.
const ASSUMED_PAUSE: Duration = Duration::from_secs(1);

/// What the gate of an arriving TAP does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ArrivalGate {
    Holding,
    Replaying,
    /// It is gone again: the TAP gets its streams by itself.
    Opened,
    /// There is none: the TAP waits for its streams until the pause.
    Refused(Ungated),
}

impl Incoming {
    /// Whether a gate keeps a TAP from filling before its VM runs, or has done so.
    pub(super) fn is_held(&self, ifindex: u32) -> bool {
        self.gates
            .get(&ifindex)
            .is_some_and(|gate| !matches!(gate, ArrivalGate::Refused(_)))
    }

    /// Whether the VM runs here and is kept from its streams for want of a cut.
    pub(super) fn waits_for_cut(&self) -> bool {
        self.arrived.is_some()
            && self
                .gates
                .values()
                .any(|gate| *gate == ArrivalGate::Holding)
    }
}

impl Agent {
    /// Closes the gates of TAPs that have come for a VM that does not run here yet.
    pub(super) fn hold_arrival(&mut self, number: u64) {
        let Some(incoming) = self.incoming.get(&number) else {
            return;
        };
        let runs = self
            .inventory
            .domains
            .get(&incoming.uuid)
            .is_some_and(|domain| domain.running);
        if incoming.arrived.is_some() {
            self.note_ungated(number);
            return;
        }
        if !self.cx.config.handover || runs {
            return;
        }
        let uuid = incoming.uuid;
        let mut ports = self.inventory.ports_of_arrival(&uuid, &incoming.macs);
        ports.retain(|(ifindex, _)| !incoming.gates.contains_key(ifindex));
        for (ifindex, _) in ports {
            let gate = if self.close_gate(ifindex, &uuid) {
                ArrivalGate::Holding
            } else {
                ArrivalGate::Refused(Ungated::ClosedTooLong)
            };
            if let Some(incoming) = self.incoming.get_mut(&number) {
                incoming.gates.insert(ifindex, gate);
            }
        }
    }

    /// Notes which TAPs of a VM that runs here get streams that no gate has held.
    fn note_ungated(&mut self, number: u64) {
        let Some(incoming) = self.incoming.get(&number) else {
            return;
        };
        let ports = self
            .inventory
            .ports_of_arrival(&incoming.uuid, &incoming.macs);
        let listens = |mac: &Mac| incoming.needs.keys().any(|(_, of)| of == mac);
        let reason = |ifindex: &u32| match incoming.gates.get(ifindex) {
            Some(ArrivalGate::Refused(reason)) => Some(*reason),
            Some(_) => None,
            None if self.cx.config.handover => Some(Ungated::RanAlready),
            None => Some(Ungated::SwitchedOff),
        };
        let ungated: Vec<(Mac, Ungated)> = ports
            .iter()
            .filter(|(_, mac)| listens(mac))
            .filter_map(|(ifindex, mac)| Some((*mac, reason(ifindex)?)))
            .collect();
        self.cx
            .records
            .update(number, |record| record.ungated.extend(ungated));
    }

    /// There is no gate, so the bridge sends nothing to the TAP until the pause.
    pub(in crate::proto) fn not_held(&mut self, ifindex: u32, reason: Ungated) {
        let mut entries = Vec::new();
        for incoming in self.incoming.values_mut() {
            let Some(gate) = incoming.gates.get_mut(&ifindex) else {
                continue;
            };
            *gate = ArrivalGate::Refused(reason);
            entries.extend(incoming.mdb.extract_if(.., |(port, _)| *port == ifindex));
        }
        for (ifindex, key) in entries {
            self.delete_mdb(ifindex, key);
        }
        self.ports_changed();
    }

    /// The source says how far its VM has received.
    pub(in crate::proto) fn on_handover_cut(
        &mut self,
        peer: &str,
        transaction: u64,
        cut: &HandoverCut,
    ) {
        let Some(number) = self.incoming_by_transaction(peer, transaction) else {
            return;
        };
        let Some(incoming) = self.incoming.get_mut(&number) else {
            return;
        };
        incoming.clock.observe(cut.clock_ns, self.cx.now);
        let ports = self
            .inventory
            .ports_of_arrival(&incoming.uuid, &incoming.macs);
        for nic in &cut.nics {
            let mac: Mac = *nic.mac;
            let Some((ifindex, _)) = ports.iter().find(|(_, of)| *of == mac) else {
                continue;
            };
            match incoming.gates.get(ifindex) {
                Some(ArrivalGate::Holding) => {
                    incoming.gates.insert(*ifindex, ArrivalGate::Replaying);
                    self.cx.outputs.push_back(Output::Gate(GateCommand::Replay {
                        ifindex: *ifindex,
                        cut: nic.clone(),
                        clock_ns: cut.clock_ns,
                        clock: incoming.clock,
                    }));
                }
                // The source says it anew: it knows better now, or the connection was lost.
                Some(ArrivalGate::Replaying) => {
                    incoming.revised.insert(*ifindex, nic.clone());
                }
                Some(ArrivalGate::Opened) => self.cx.records.update(number, |record| {
                    if let Some(report) = record.handover.get_mut(ifindex) {
                        report.revise(nic);
                    }
                }),
                Some(ArrivalGate::Refused(_)) | None => {}
            }
        }
        // Of those that it leaves out, the source knows nothing.
        self.cut_timed_out(number);
    }

    /// The VM runs here: it gets a cut, or does without.
    pub(super) fn expect_cut(&mut self, number: u64) {
        let Some(incoming) = self.incoming.get(&number) else {
            return;
        };
        if !incoming.waits_for_cut() {
            return;
        }
        let soon = self.cx.now + CUT_TRANSIT;
        let due = if self.cx.is_up(&incoming.peer) {
            let stopped = incoming.switching.unwrap_or(self.cx.now);
            soon.max(stopped + LATEST_CUT + CUT_TRANSIT)
        } else {
            soon
        };
        self.cx.timers.set(Timer::Cut(number), due);
    }

    /// No cut comes. What the VM may have missed is replayed.
    pub(in crate::proto) fn cut_timed_out(&mut self, number: u64) {
        let Some(incoming) = self.incoming.get_mut(&number) else {
            return;
        };
        let stopped = incoming
            .switching
            .map(|at| incoming.ran.unwrap_or(at).min(at));
        let since = match (stopped, incoming.arrived) {
            (Some(stopped), _) => stopped - BLIND_MARGIN,
            (None, Some(arrived)) => arrived - ASSUMED_PAUSE,
            (None, None) => return,
        };
        for (ifindex, gate) in &mut incoming.gates {
            if *gate == ArrivalGate::Holding {
                *gate = ArrivalGate::Replaying;
                warn!(
                    domain = %incoming.domain,
                    source = %incoming.peer,
                    "How far the VM has received was not told; it gets what came during the pause"
                );
                let replay = GateCommand::ReplayBlind {
                    ifindex: *ifindex,
                    since,
                };
                self.cx.outputs.push_back(Output::Gate(replay));
            }
        }
    }

    /// A TAP gets its streams by itself again.
    pub(in crate::proto) fn gate_opened(&mut self, ifindex: u32, mut report: HoldReport) {
        let found = self
            .incoming
            .iter_mut()
            .find(|(_, incoming)| incoming.gates.contains_key(&ifindex));
        let Some((number, incoming)) = found else {
            return;
        };
        incoming.gates.insert(ifindex, ArrivalGate::Opened);
        if let Some(cut) = incoming.revised.remove(&ifindex) {
            report.revise(&cut);
        }
        let sum = |of: fn(&FlowReport) -> u64| report.flows.iter().map(of).sum::<u64>();
        info!(
            domain = %incoming.domain,
            number,
            ifindex,
            replayed = sum(|flow| flow.replayed),
            lost = sum(|flow| flow.lost),
            doubled_at_most = sum(|flow| flow.duplicates),
            "Handover is done"
        );
        let number = *number;
        self.cx.records.update(number, |record| {
            record.handover.insert(ifindex, report);
        });
    }

    /// Opens the gates of an arrival that does not happen. One that is open already may be another
    /// migration's by now.
    pub(super) fn clear_gates(&mut self, gates: &BTreeMap<u32, ArrivalGate>) {
        for (ifindex, gate) in gates {
            if matches!(gate, ArrivalGate::Holding | ArrivalGate::Replaying) {
                let clear = GateCommand::Clear { ifindex: *ifindex };
                self.cx.outputs.push_back(Output::Gate(clear));
            }
        }
    }
}

#[cfg(test)]
#[path = "../tests/handover.rs"]
mod tests;
