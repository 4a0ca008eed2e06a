//! The destination host's part of the handover: the gates of arriving TAPs.
//!
//! ```text
//!             TAP exists           HandoverCut            all replayed
//!  (no gate) --------------> Holding -----------> Replaying --------------> (no gate)
//!                              |                      ^
//!                              | the VM runs, and no  |
//!                              | cut can arrive       |
//!                              +----------------------+  all packets of the pause: rather
//!                                                        duplicates than losses
//! ```
//!
//! A connected source sends its cut at most [`LATEST_CUT`] after the stop, or says that there is
//! none. The gate waits that long: meanwhile the VM gets none of its streams, but loses no packet.
//!
//! A gate that cannot be made does not stop a VM: its TAP gets the streams from the pause on
//! instead. The same holds for a TAP whose gate was closed for the maximum time (`tap`).

use std::collections::BTreeMap;
use std::time::Duration;

use common::signal::{HandoverCut, NicCut};
use tracing::{info, warn};

use super::tap::Taps;
use super::{Arrivals, Host, Incoming};
use crate::proto::context::Context;
use crate::proto::handover::{FlowReport, HoldReport, LATEST_CUT};
use crate::proto::host::inventory::Inventory;
use crate::proto::record::Ungated;
use crate::proto::timer::Timer;
use crate::proto::{GateCommand, Mac, Output};

/// Longest transit time of a cut. A running VM waits at least this long for its cut, and only this
/// long if its source is not connected.
const CUT_TRANSIT: Duration = Duration::from_millis(200);
/// Margin of a replay without a cut. The replay starts this much before the last time at which the
/// source reported a running VM, because libvirt's report of the stop takes up to this long to
/// reach the source.
const BLIND_MARGIN: Duration = Duration::from_millis(100);
/// Assumed pause if the source reported neither.
const ASSUMED_PAUSE: Duration = Duration::from_secs(1);

/// State of an arriving TAP's gate.
#[derive(Clone, Debug, PartialEq)]
enum Gate {
    Holding,
    Replaying {
        /// A newer cut from the source, after the one in use.
        revised: Option<NicCut>,
    },
    /// The gate is gone again; the TAP gets its streams directly.
    Opened,
    /// The TAP has no gate and gets its streams from the pause on.
    Refused(Ungated),
}

impl Gate {
    fn is_closed(&self) -> bool {
        matches!(self, Self::Holding | Self::Replaying { .. })
    }
}

/// Gates of an arrival's TAPs, by ifindex.
#[derive(Debug, Default)]
pub(super) struct Gates(BTreeMap<u32, Gate>);

impl Gates {
    /// Returns true if a gate keeps, or kept, the TAP from filling before the VM runs.
    pub(super) fn hold(&self, ifindex: u32) -> bool {
        let gate = self.0.get(&ifindex);
        gate.is_some_and(|gate| !matches!(gate, Gate::Refused(_)))
    }

    pub(super) fn is_closed(&self, ifindex: u32) -> bool {
        self.0.get(&ifindex).is_some_and(Gate::is_closed)
    }

    pub(super) fn is_holding(&self, ifindex: u32) -> bool {
        self.0.get(&ifindex) == Some(&Gate::Holding)
    }

    /// Marks a TAP as ungated. Returns false if the TAP is not among these.
    pub(super) fn refuse(&mut self, ifindex: u32, reason: Ungated) -> bool {
        let gate = self.0.get_mut(&ifindex);
        gate.map(|gate| *gate = Gate::Refused(reason)).is_some()
    }

    /// Moves the gates that match `condition` from `others` to these.
    pub(super) fn take_from(&mut self, others: &mut Self, condition: impl Fn(u32) -> bool) {
        let taken = others.0.extract_if(.., |ifindex, _| condition(*ifindex));
        self.0.extend(taken);
    }

    pub(super) fn retain(&mut self, condition: impl Fn(u32) -> bool) {
        self.0.retain(|ifindex, _| condition(*ifindex));
    }

    pub(super) fn taps(&self) -> impl Iterator<Item = u32> {
        self.0.keys().copied()
    }

    /// Opens the closed gates. A gate that is already open may belong to another migration by now.
    pub(super) fn clear(&self, cx: &mut Context) {
        for (ifindex, _) in self.0.iter().filter(|(_, gate)| gate.is_closed()) {
            let clear = GateCommand::Clear { ifindex: *ifindex };
            cx.outputs.push_back(Output::Gate(clear));
        }
    }
}

impl Incoming {
    /// Returns true if the VM runs here without its streams, for lack of a cut.
    pub(super) fn waits_for_cut(&self) -> bool {
        let mut gates = self.gates.0.values();
        self.stage.arrived().is_some() && gates.any(|gate| *gate == Gate::Holding)
    }

    /// Closes the gates of new TAPs of a VM that does not run here yet.
    pub(super) fn hold(
        &mut self,
        cx: &mut Context,
        inventory: &Inventory,
        taps: &mut Taps,
        ports: &[(u32, Mac)],
    ) {
        if self.stage.arrived().is_some() {
            self.note_ungated(cx, ports);
            return;
        }
        let domain = inventory.domains.get(&self.uuid);
        if !cx.config.handover || domain.is_some_and(|domain| domain.running) {
            return;
        }
        for (ifindex, _) in ports {
            if self.gates.0.contains_key(ifindex) {
                continue;
            }
            let gate = if taps.close_gate(cx, inventory, *ifindex, &self.uuid) {
                Gate::Holding
            } else {
                Gate::Refused(Ungated::ClosedTooLong)
            };
            self.gates.0.insert(*ifindex, gate);
        }
    }

    /// Records which TAPs of a VM that runs here get streams that no gate held.
    fn note_ungated(&self, cx: &mut Context, ports: &[(u32, Mac)]) {
        let listens = |mac: &Mac| self.needs.keys().any(|(_, of)| of == mac);
        let reason = |ifindex: &u32| match self.gates.0.get(ifindex) {
            Some(Gate::Refused(reason)) => Some(*reason),
            Some(_) => None,
            None if cx.config.handover => Some(Ungated::RanAlready),
            None => Some(Ungated::SwitchedOff),
        };
        let ungated: Vec<(Mac, Ungated)> = ports
            .iter()
            .filter(|(_, mac)| listens(mac))
            .filter_map(|(ifindex, mac)| Some((*mac, reason(ifindex)?)))
            .collect();
        cx.records
            .update(self.number, |record| record.ungated.extend(ungated));
    }

    /// Handles the cut of one TAP.
    fn cut(&mut self, cx: &mut Context, ifindex: u32, clock_ns: u64, cut: &NicCut) {
        match self.gates.0.get_mut(&ifindex) {
            Some(gate @ Gate::Holding) => {
                *gate = Gate::Replaying { revised: None };
                cx.outputs.push_back(Output::Gate(GateCommand::Replay {
                    ifindex,
                    cut: cut.clone(),
                    clock_ns,
                    clock: self.told.clock,
                }));
            }
            // The source repeats a cut because it knows more, or after a reconnect.
            Some(Gate::Replaying { revised }) => *revised = Some(cut.clone()),
            Some(Gate::Opened) => cx.records.update(self.number, |record| {
                if let Some(report) = record.handover.get_mut(&ifindex) {
                    report.revise(cut);
                }
            }),
            Some(Gate::Refused(_)) | None => {}
        }
    }

    /// Starts the wait of a running VM for its cut.
    pub(super) fn expect_cut(&self, cx: &mut Context) {
        if !self.waits_for_cut() {
            return;
        }
        let soon = cx.now + CUT_TRANSIT;
        let due = if cx.is_up(&self.peer) {
            let stopped = self.told.switching.unwrap_or(cx.now);
            soon.max(stopped + LATEST_CUT + CUT_TRANSIT)
        } else {
            soon
        };
        cx.timers.set(Timer::Cut(self.number), due);
    }

    /// Shortens the wait after a broken connection: a cut is in transit or does not arrive.
    pub(super) fn hurry_cut(&self, cx: &mut Context) {
        if self.waits_for_cut() {
            let due = cx.now + CUT_TRANSIT;
            cx.timers.set_earlier(Timer::Cut(self.number), due);
        }
    }

    /// Replays what the VM may have missed at TAPs that still hold, because no cut arrives for
    /// them.
    fn do_without_cut(&mut self, cx: &mut Context) {
        let told = &self.told;
        let stopped = told.switching.map(|at| told.ran.unwrap_or(at).min(at));
        let since = match (stopped, self.stage.arrived()) {
            (Some(stopped), _) => stopped - BLIND_MARGIN,
            (None, Some(arrived)) => arrived - ASSUMED_PAUSE,
            (None, None) => return,
        };
        for (ifindex, gate) in &mut self.gates.0 {
            if *gate == Gate::Holding {
                *gate = Gate::Replaying { revised: None };
                warn!(
                    domain = %self.domain,
                    source = %self.peer,
                    "How far the VM has received was not told; it gets what came during the pause"
                );
                let replay = GateCommand::ReplayBlind {
                    ifindex: *ifindex,
                    since,
                };
                cx.outputs.push_back(Output::Gate(replay));
            }
        }
    }
}

impl Arrivals {
    /// Handles a TAP without a gate: the bridge sends nothing to the TAP until the pause.
    pub(in crate::proto) fn not_held(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        ifindex: u32,
        reason: Ungated,
    ) {
        let mut entries = Vec::new();
        for incoming in self.incoming.iter_mut() {
            if incoming.gates.refuse(ifindex, reason) {
                let made = &mut incoming.mdb.made;
                entries.extend(made.extract_if(.., |(port, _)| *port == ifindex));
            }
        }
        for place in entries {
            host.delete_mdb(cx, place);
        }
        self.ports_changed(cx, host);
    }

    /// Handles the source's cuts: how far its VM received each stream.
    pub(in crate::proto) fn cut_told(
        &mut self,
        cx: &mut Context,
        inventory: &Inventory,
        (peer, transaction): (&str, u64),
        cut: &HandoverCut,
    ) {
        let Some(incoming) = self.incoming.of_transaction_mut(peer, transaction) else {
            return;
        };
        incoming.told.clock.observe(cut.clock_ns, cx.now);
        let ports = self.taps.of(inventory, incoming);
        for nic in &cut.nics {
            let mac: Mac = *nic.mac;
            if let Some((ifindex, _)) = ports.iter().find(|(_, of)| *of == mac) {
                incoming.cut(cx, *ifindex, cut.clock_ns, nic);
            }
        }
        // The source has no cut for the TAPs that it omits.
        incoming.do_without_cut(cx);
    }

    pub(in crate::proto) fn cut_timed_out(&mut self, cx: &mut Context, number: u64) {
        if let Some(incoming) = self.incoming.get_mut(number) {
            incoming.do_without_cut(cx);
        }
    }

    /// Handles an opened gate: the TAP gets its streams directly again.
    pub(in crate::proto) fn gate_opened(
        &mut self,
        cx: &mut Context,
        ifindex: u32,
        mut report: HoldReport,
    ) {
        let found = self.incoming.iter_mut().find_map(|incoming| {
            let gate = incoming.gates.0.get_mut(&ifindex)?;
            let before = std::mem::replace(gate, Gate::Opened);
            Some((&*incoming, before))
        });
        let Some((incoming, before)) = found else {
            return;
        };
        if let Gate::Replaying { revised: Some(cut) } = before {
            report.revise(&cut);
        }
        let sum = |of: fn(&FlowReport) -> u64| report.flows.iter().map(of).sum::<u64>();
        info!(
            domain = %incoming.domain,
            number = incoming.number,
            ifindex,
            replayed = sum(|flow| flow.replayed),
            lost = sum(|flow| flow.lost),
            doubled_at_most = sum(|flow| flow.duplicates),
            "Handover is done"
        );
        cx.records.update(incoming.number, |record| {
            record.handover.insert(ifindex, report);
        });
    }
}

#[cfg(test)]
mod tests;
