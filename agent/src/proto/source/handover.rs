//! The source's part of the handover: its domain's TAPs are recorded while memory is copied, and
//! the destination is told how far the VM has received as soon as it stands still.
//!
//! Nothing here can hold up a migration: a TAP that cannot be recorded is left out, and the
//! destination does without its cut.

use common::signal::{HandoverCut, NicCut};
use tracing::debug;

use super::Requester;
use crate::proto::{Agent, GateCommand, Output, Timestamp};

impl Agent {
    /// Has all TAPs of a departing domain recorded, before its memory is copied.
    pub(super) fn record_departure(&mut self, number: u64) {
        let Some(outgoing) = self.outgoing.get_mut(&number) else {
            return;
        };
        if !self.config.handover {
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
            self.outputs.push_back(Output::Gate(record));
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
            self.outputs.push_back(Output::Gate(cut));
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
        let found = self
            .outgoing
            .iter_mut()
            .find(|(_, outgoing)| outgoing.recorded.contains_key(&ifindex));
        if let Some((number, outgoing)) = found {
            let number = *number;
            outgoing.recorded.insert(ifindex, Some(cut));
            self.tell_cuts(number);
        }
    }

    /// A TAP of a departing domain is not recorded.
    pub(in crate::proto) fn not_recorded(&mut self, ifindex: u32) {
        let found = self
            .outgoing
            .iter_mut()
            .find(|(_, outgoing)| outgoing.recorded.contains_key(&ifindex));
        if let Some((number, outgoing)) = found {
            let number = *number;
            outgoing.recorded.remove(&ifindex);
            self.tell_cuts(number);
        }
    }

    /// Tells the destination the cuts, once all are known and whenever the connection is made anew; of a VM
    /// that has stopped and of which nothing is recorded, that there is none to wait for.
    pub(super) fn tell_cuts(&mut self, number: u64) {
        let Some(outgoing) = self.outgoing.get(&number) else {
            return;
        };
        let cuts: Option<Vec<NicCut>> = outgoing.recorded.values().cloned().collect();
        let is_said = |cuts: &Vec<NicCut>| !cuts.is_empty() || outgoing.suspended.is_some();
        let Some(nics) = cuts.filter(is_said) else {
            return;
        };
        if outgoing.requester == Requester::Unknown || !self.is_up(&outgoing.destination) {
            return;
        }
        debug!(domain = %outgoing.domain, number, nics = nics.len(), "Cut is told");
        let (peer, transaction) = (outgoing.destination.clone(), outgoing.transaction);
        let clock_ns = self.now.0;
        self.send(&peer, transaction, &HandoverCut { clock_ns, nics }.into());
    }

    /// Ends the recording of a domain that is gone, or stays.
    pub(super) fn end_recording(&mut self, recorded: impl Iterator<Item = u32>) {
        for ifindex in recorded {
            let clear = GateCommand::Clear { ifindex };
            self.outputs.push_back(Output::Gate(clear));
        }
    }
}
