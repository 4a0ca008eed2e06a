//! The source host's part of the handover. The agent records the domain's TAPs while libvirt copies
//! memory. When the VM stops, the agent tells the destination how far the VM received each stream
//! (the cut).
//!
//! On a loaded host, libvirt may finish a migration before the cuts are placed. The agent still
//! waits for them ([`LateCuts`]), because the VM waits for them at the destination.
//!
//! Nothing here delays a migration: the agent skips a TAP that it cannot record, and the
//! destination does without that cut.

use std::collections::BTreeMap;
use std::time::Duration;

use common::signal::{HandoverCut, NicCut};
use tracing::debug;

use super::stage::Moving;
use super::{Departures, Order, Requester, Stage};
use crate::proto::context::Context;
use crate::proto::handover::LATEST_CUT;
use crate::proto::host::inventory::Inventory;
use crate::proto::timer::Timer;
use crate::proto::{GateCommand, Output, Timestamp};

/// Time for the report of the last possible cut to reach the protocol.
const CUT_REPORT: Duration = Duration::from_millis(50);

/// Recorded TAPs by ifindex; the value is the cut once it is placed.
pub(super) type Recorded = BTreeMap<u32, Option<NicCut>>;

/// TAPs of a VM that left, some of them with a missing cut.
#[derive(Debug)]
pub(super) struct LateCuts {
    destination: String,
    transaction: u64,
    recorded: Recorded,
}

impl LateCuts {
    pub(super) fn is_complete(&self) -> bool {
        self.recorded.values().all(Option::is_some)
    }
}

impl Moving {
    /// Starts recording of all TAPs of a departing domain, before libvirt copies memory.
    pub(super) fn record(&mut self, cx: &mut Context, inventory: &Inventory, order: &Order) {
        if !cx.config.handover {
            return;
        }
        let Some(domain) = inventory.domains.get(&order.uuid) else {
            return;
        };
        for (ifindex, mac) in inventory.ports_of_domain(&order.uuid) {
            let vhost = domain
                .interfaces
                .iter()
                .any(|interface| interface.mac == mac && interface.vhost);
            self.recorded.insert(ifindex, None);
            let record = GateCommand::Record {
                ifindex,
                mac,
                vhost,
            };
            cx.outputs.push_back(Output::Gate(record));
        }
    }

    /// Requests the cut of each recorded TAP, because the VM stopped.
    pub(super) fn place_cuts(&self, cx: &mut Context, migration: u64, stopped: Timestamp) {
        for ifindex in self.recorded.keys() {
            let cut = GateCommand::Cut {
                ifindex: *ifindex,
                migration,
                stopped,
            };
            cx.outputs.push_back(Output::Gate(cut));
        }
    }

    /// Discards the cuts and records anew, because the VM resumed on this host.
    pub(super) fn void_cuts(&mut self, cx: &mut Context, inventory: &Inventory, order: &Order) {
        self.recorded.clear();
        self.record(cx, inventory, order);
    }

    /// Sends the cuts to the destination when all are known, and again after each reconnect. If the
    /// VM stopped and no TAP is recorded, the empty list tells the destination that no cut follows.
    pub(super) fn tell_cuts(&self, cx: &mut Context, order: &Order) {
        let cuts = self.recorded.values().cloned();
        let Some(nics) = cuts.collect::<Option<Vec<_>>>() else {
            return;
        };
        let is_said = !nics.is_empty() || self.stopped().is_some();
        if is_said && order.requester != Requester::Unknown {
            send_cuts(cx, &order.destination, order.transaction, nics);
        }
    }
}

impl Departures {
    /// Records a placed cut; the last one triggers the message to the destination.
    pub(in crate::proto) fn cut_placed(&mut self, cx: &mut Context, ifindex: u32, cut: NicCut) {
        self.change_recorded(cx, ifindex, |recorded| {
            recorded.insert(ifindex, Some(cut));
        });
    }

    /// Removes a TAP that could not be recorded.
    pub(in crate::proto) fn not_recorded(&mut self, cx: &mut Context, ifindex: u32) {
        self.change_recorded(cx, ifindex, |recorded| {
            recorded.remove(&ifindex);
        });
    }

    /// Changes the recorded TAPs of the migration that owns the TAP, and sends the cuts if they are
    /// now complete.
    fn change_recorded(
        &mut self,
        cx: &mut Context,
        ifindex: u32,
        change: impl FnOnce(&mut Recorded),
    ) {
        for outgoing in self.outgoing.values_mut() {
            if let Stage::Moving(moving) = &mut outgoing.stage
                && moving.recorded.contains_key(&ifindex)
            {
                change(&mut moving.recorded);
                moving.tell_cuts(cx, &outgoing.order);
                return;
            }
        }
        let mut late = self.late_cuts.iter_mut();
        if let Some((number, late)) = late.find(|(_, late)| late.recorded.contains_key(&ifindex)) {
            change(&mut late.recorded);
            if late.is_complete() {
                let number = *number;
                self.end_late_cuts(cx, number);
            }
        }
    }

    /// Ends recording after the VM left. If cuts are still missing, recording ends after the last
    /// cut or a deadline.
    pub(super) fn end_departure_recording(
        &mut self,
        cx: &mut Context,
        order: &Order,
        moving: &Moving,
    ) {
        let late = LateCuts {
            destination: order.destination.clone(),
            transaction: order.transaction,
            recorded: moving.recorded.clone(),
        };
        match moving.stopped() {
            Some(stopped) if !late.is_complete() && order.requester != Requester::Unknown => {
                self.late_cuts.insert(order.number, late);
                let due = stopped + LATEST_CUT + CUT_REPORT;
                cx.timers.set(Timer::LateCuts(order.number), due);
            }
            _ => end_recording(cx, &late.recorded),
        }
    }

    /// Ends the wait for late cuts and sends the known cuts to the destination.
    pub(in crate::proto) fn end_late_cuts(&mut self, cx: &mut Context, number: u64) {
        cx.timers.stop(Timer::LateCuts(number));
        if let Some(late) = self.late_cuts.remove(&number) {
            end_recording(cx, &late.recorded);
            let nics = late.recorded.into_values().flatten().collect();
            send_cuts(cx, &late.destination, late.transaction, nics);
        }
    }
}

fn send_cuts(cx: &mut Context, peer: &str, transaction: u64, nics: Vec<NicCut>) {
    if cx.is_up(peer) {
        debug!(peer, nics = nics.len(), "Cut is told");
        let clock_ns = cx.now.0;
        cx.send(peer, transaction, &HandoverCut { clock_ns, nics }.into());
    }
}

/// Ends recording on all TAPs of a migration.
pub(super) fn end_recording(cx: &mut Context, recorded: &Recorded) {
    for ifindex in recorded.keys() {
        let clear = GateCommand::Clear { ifindex: *ifindex };
        cx.outputs.push_back(Output::Gate(clear));
    }
}
