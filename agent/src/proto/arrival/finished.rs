//! Answers to VMs that arrived and still ask on this host how their migration is going.

use std::collections::VecDeque;

use common::signal::{MigrationProgress, Phase};

use super::{Arrivals, Host, Incoming};
use crate::proto::context::Context;
use crate::proto::millis;
use crate::proto::{DomainUuid, VmAddress};

/// Limit of remembered arrivals.
const REMEMBERED: usize = 100;

/// Arrivals with the domain's UUID, the VM's transaction number and the answer, oldest first.
#[derive(Debug, Default)]
pub(super) struct Finished(VecDeque<(DomainUuid, u64, MigrationProgress)>);

impl Finished {
    /// Remembers the answer for a VM that arrived.
    pub(super) fn note(&mut self, incoming: &Incoming) {
        let asked = incoming.vm_transaction;
        let (Some(transaction), Some(at)) = (asked, incoming.stage.arrived()) else {
            return;
        };
        let uuid = incoming.uuid;
        let told = incoming.told.progress.as_ref();
        let progress = MigrationProgress {
            phase: Phase::Completed,
            processed_bytes: told.map_or(0, |told| told.processed_bytes),
            total_bytes: told.map_or(0, |told| told.total_bytes),
            elapsed_ms: told
                .filter(|told| told.phase == Phase::Completed)
                .map_or(millis(at.since(incoming.started)), |told| told.elapsed_ms),
            vm_pause_ms: told.and_then(|told| told.vm_pause_ms),
            clock_ns: None,
        };
        self.0
            .retain(|(known, of, _)| *known != uuid || *of != transaction);
        self.0.push_back((uuid, transaction, progress));
        if self.0.len() > REMEMBERED {
            self.0.pop_front();
        }
    }

    fn find(&self, uuid: DomainUuid, transaction: u64) -> Option<&MigrationProgress> {
        self.0
            .iter()
            .find(|(known, of, _)| *known == uuid && *of == transaction)
            .map(|(_, _, progress)| progress)
    }
}

impl Arrivals {
    /// Answers `MigrationReady` of a VM that moved here; a datagram from its TAP proves that it
    /// runs. Returns false if the sender is no such VM.
    pub(in crate::proto) fn answer_vm(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        ifindex: u32,
        transaction: u64,
        to: VmAddress,
    ) -> bool {
        let arriving = self.incoming.iter().find(|incoming| {
            let ports = || self.taps.of(host.inventory, incoming);
            incoming.vm_transaction == Some(transaction)
                && ports().iter().any(|(port, _)| *port == ifindex)
        });
        let uuid = match arriving.map(|incoming| incoming.uuid) {
            Some(uuid) => {
                self.runs_here(cx, host, uuid, cx.now);
                uuid
            }
            None => match host.inventory.domain_of_port(ifindex) {
                Some(domain) => domain.uuid,
                None => return false,
            },
        };
        let Some(progress) = self.finished.find(uuid, transaction).cloned() else {
            return false;
        };
        cx.tell(to, transaction, &progress.into());
        true
    }
}
