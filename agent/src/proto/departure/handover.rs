//! The source's part of the handover: its domain's TAPs are recorded while memory is copied, and
//! the destination is told how far the VM has received as soon as it stands still.
//!
//! libvirt may be done with a migration before the cuts are placed, on a loaded host. They are waited
//! for all the same ([`LateCuts`]), because the VM waits for them.
//!
//! Nothing here can hold up a migration: a TAP that cannot be recorded is left out, and the
//! destination does without its cut.

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

/// How long the last possible cut may take to get here.
const CUT_REPORT: Duration = Duration::from_millis(50);

/// Recorded TAPs, and what the VM has had by those whose cut is placed.
pub(super) type Recorded = BTreeMap<u32, Option<NicCut>>;

/// TAPs of a VM that has left, with cuts still to be placed.
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
    /// Has all TAPs of a departing domain recorded, before its memory is copied.
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

    /// The VM stands still: asks for the cut of each of its TAPs.
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

    /// The VM runs on here: cuts are void, and recording goes on.
    pub(super) fn void_cuts(&mut self, cx: &mut Context, inventory: &Inventory, order: &Order) {
        self.recorded.clear();
        self.record(cx, inventory, order);
    }

    /// Tells the destination the cuts, once all are known and whenever the connection is made anew; of a VM
    /// that has stopped and of which nothing is recorded, that there is none to wait for.
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
    /// A cut was placed. When all of them are, the destination is told.
    pub(in crate::proto) fn cut_placed(&mut self, cx: &mut Context, ifindex: u32, cut: NicCut) {
        self.change_recorded(cx, ifindex, |recorded| {
            recorded.insert(ifindex, Some(cut));
        });
    }

    /// A TAP of a departing domain is not recorded.
    pub(in crate::proto) fn not_recorded(&mut self, cx: &mut Context, ifindex: u32) {
        self.change_recorded(cx, ifindex, |recorded| {
            recorded.remove(&ifindex);
        });
    }

    /// Changes the cuts of the migration for which a TAP is recorded, and tells those that are due.
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

    /// The VM has left. Ends its recording, once all cuts are placed that are to be told.
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

    /// Tells the destination what is known of a VM that has left.
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

/// Ends the recording of a domain that is gone, or stays.
pub(super) fn end_recording(cx: &mut Context, recorded: &Recorded) {
    for ifindex in recorded.keys() {
        let clear = GateCommand::Clear { ifindex: *ifindex };
        cx.outputs.push_back(Output::Gate(clear));
    }
}
