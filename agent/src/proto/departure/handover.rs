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

use super::{Outgoing, Requester};
use crate::proto::handover::LATEST_CUT;
use crate::proto::timer::Timer;
use crate::proto::{Agent, GateCommand, Output, Timestamp};

/// How long the last possible cut may take to get here.
const CUT_REPORT: Duration = Duration::from_millis(50);

/// Recorded TAPs, and what the VM has had by those whose cut is placed.
pub(super) type Recorded = BTreeMap<u32, Option<NicCut>>;

/// TAPs of a VM that has left, with cuts still to be placed.
#[derive(Debug)]
pub(in crate::proto) struct LateCuts {
    destination: String,
    transaction: u64,
    recorded: Recorded,
}

impl Agent {
    /// Has all TAPs of a departing domain recorded, before its memory is copied.
    pub(super) fn record_departure(&mut self, number: u64) {
        let Some(outgoing) = self.outgoing.get_mut(&number) else {
            return;
        };
        if !self.cx.config.handover {
            return;
        }
        let Some(domain) = self.inventory.domains.get(&outgoing.uuid) else {
            return;
        };
        for (ifindex, mac) in self.inventory.ports_of_domain(&outgoing.uuid) {
            let vhost = domain
                .interfaces
                .iter()
                .any(|interface| interface.mac == mac && interface.vhost);
            outgoing.recorded.insert(ifindex, None);
            let record = GateCommand::Record {
                ifindex,
                mac,
                vhost,
            };
            self.cx.outputs.push_back(Output::Gate(record));
        }
    }

    /// The VM stands still: asks for the cut of each of its TAPs.
    pub(super) fn place_cuts(&mut self, number: u64, stopped: Timestamp) {
        let Some(outgoing) = self.outgoing.get(&number) else {
            return;
        };
        for ifindex in outgoing.recorded.keys() {
            let cut = GateCommand::Cut {
                ifindex: *ifindex,
                migration: number,
                stopped,
            };
            self.cx.outputs.push_back(Output::Gate(cut));
        }
    }

    /// The VM runs on here: cuts are void, and recording goes on.
    pub(super) fn void_cuts(&mut self, number: u64) {
        if let Some(outgoing) = self.outgoing.get_mut(&number) {
            outgoing.recorded.clear();
        }
        self.record_departure(number);
    }

    /// A cut was placed. When all of them are, the destination is told.
    pub(in crate::proto) fn cut_placed(&mut self, ifindex: u32, cut: NicCut) {
        if let Some((number, recorded)) = self.recorded_with(ifindex) {
            recorded.insert(ifindex, Some(cut));
            self.tell_cuts(number);
        }
    }

    /// A TAP of a departing domain is not recorded.
    pub(in crate::proto) fn not_recorded(&mut self, ifindex: u32) {
        if let Some((number, recorded)) = self.recorded_with(ifindex) {
            recorded.remove(&ifindex);
            self.tell_cuts(number);
        }
    }

    /// The migration for which a TAP is recorded, with all that are.
    fn recorded_with(&mut self, ifindex: u32) -> Option<(u64, &mut Recorded)> {
        let going = self.outgoing.iter_mut();
        let going = going.map(|(number, outgoing)| (*number, &mut outgoing.recorded));
        let gone = self.late_cuts.iter_mut();
        let gone = gone.map(|(number, late)| (*number, &mut late.recorded));
        going
            .chain(gone)
            .find(|(_, recorded)| recorded.contains_key(&ifindex))
    }

    /// Tells the destination the cuts, once all are known and whenever the connection is made anew; of a VM
    /// that has stopped and of which nothing is recorded, that there is none to wait for.
    pub(super) fn tell_cuts(&mut self, number: u64) {
        if self.late_cuts.contains_key(&number) {
            return self.tell_late_cuts(number);
        }
        let Some(outgoing) = self.outgoing.get(&number) else {
            return;
        };
        let Some(nics) = outgoing
            .recorded
            .values()
            .cloned()
            .collect::<Option<Vec<_>>>()
        else {
            return;
        };
        let is_said = !nics.is_empty() || outgoing.suspended.is_some();
        if is_said && outgoing.requester != Requester::Unknown {
            let (peer, transaction) = (outgoing.destination.clone(), outgoing.transaction);
            self.send_cuts(&peer, transaction, nics);
        }
    }

    fn send_cuts(&mut self, peer: &str, transaction: u64, nics: Vec<NicCut>) {
        if self.cx.is_up(peer) {
            debug!(peer, nics = nics.len(), "Cut is told");
            let clock_ns = self.cx.now.0;
            self.cx
                .send(peer, transaction, &HandoverCut { clock_ns, nics }.into());
        }
    }

    /// The VM has left. Ends its recording, once all cuts are placed that are to be told.
    pub(super) fn end_departure_recording(&mut self, number: u64, outgoing: &Outgoing) {
        let recorded = &outgoing.recorded;
        let is_told = recorded.values().all(Option::is_some);
        match outgoing.suspended {
            Some(stopped) if !is_told && outgoing.requester != Requester::Unknown => {
                let late = LateCuts {
                    destination: outgoing.destination.clone(),
                    transaction: outgoing.transaction,
                    recorded: recorded.clone(),
                };
                self.late_cuts.insert(number, late);
                let due = stopped + LATEST_CUT + CUT_REPORT;
                self.cx.timers.set(Timer::LateCuts(number), due);
            }
            _ => self.end_recording(recorded.keys().copied()),
        }
    }

    fn tell_late_cuts(&mut self, number: u64) {
        let late = self.late_cuts.get(&number);
        if late.is_some_and(|late| late.recorded.values().all(Option::is_some)) {
            self.end_late_cuts(number);
        }
    }

    /// Tells the destination what is known of a VM that has left.
    pub(in crate::proto) fn end_late_cuts(&mut self, number: u64) {
        self.cx.timers.stop(Timer::LateCuts(number));
        if let Some(late) = self.late_cuts.remove(&number) {
            self.end_recording(late.recorded.keys().copied());
            let nics = late.recorded.into_values().flatten().collect();
            self.send_cuts(&late.destination, late.transaction, nics);
        }
    }

    /// Ends the recording of a domain that is gone, or stays.
    pub(super) fn end_recording(&mut self, recorded: impl Iterator<Item = u32>) {
        for ifindex in recorded {
            let clear = GateCommand::Clear { ifindex };
            self.cx.outputs.push_back(Output::Gate(clear));
        }
    }
}
