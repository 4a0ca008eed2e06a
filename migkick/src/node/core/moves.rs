//! A migration: the new MoA stands by; when the VM arrives, the MoAs change places.
//!
//! ```text
//!           prepare()          ready()           announcement
//!  (none) ------------> Prepared ------> Ready ---------------------> arrived: (none)
//!                                           | hint                       ^
//!                                           +------> Checking -----------+ answer to the new MoA
//! ```
//!
//! The announcement comes from the guest's own kernel (NOTIFY_PEERS), so it proves the arrival. A
//! hint is a message that any node on the link could have sent: DstAgent's answer to the probe, or
//! the agent's report of the arrival. A hint counts after a server or a peer has answered with a
//! sealed message at the new MoA, because routers deliver that address to the destination only.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::mat::message::{Echo, LookupRequest};

use super::{Core, MoveStage, Output, Place};

/// Peers that receive a check, besides the servers.
const CHECK_PEERS: usize = 4;
/// Limit of outstanding checks; answers to older checks would be too late.
const MAX_CHECKS: usize = 64;

/// A migration in progress.
#[derive(Debug)]
pub(super) struct Move {
    pub(super) stage: MoveStage,
    /// Whether the destination translates packets from the old address. If so, peers that do not
    /// know the new address receive nothing.
    translates: bool,
    /// Transactions of the outstanding checks.
    checks: Vec<u64>,
    next_check: Duration,
}

impl Core {
    /// Returns the active place.
    pub(crate) fn active(&self) -> Option<Place> {
        self.active
    }

    /// Returns the stage of the migration; `None` before and after.
    pub(crate) fn stage(&self) -> Option<MoveStage> {
        self.movement.as_ref().map(|it| it.stage)
    }

    /// Begins a migration: `standby` is configured on the idle NIC. Ends an earlier migration.
    pub(crate) fn prepare(&mut self, now: Duration, standby: Place) {
        self.left.retain(|left| left.place.moa != standby.moa);
        self.standby = Some(standby);
        self.movement = Some(Move {
            stage: MoveStage::Prepared,
            translates: false,
            checks: Vec::new(),
            next_check: now,
        });
        self.changed(now);
    }

    /// From now on the VM may wake up at the destination. Returns whether the destination may
    /// translate packets from the VM's old address: all peers in use know the new one. From then
    /// on, other peers receive nothing until they know the new address.
    pub(crate) fn ready(&mut self, now: Duration) -> bool {
        let known = self.is_known(now);
        let (Some(movement), Some(standby)) = (&mut self.movement, self.standby) else {
            return false;
        };
        if movement.stage == MoveStage::Prepared {
            movement.stage = MoveStage::Ready;
        }
        if movement.translates || !known {
            return movement.translates;
        }
        movement.translates = true;
        let released = self.hold_unaware(now, standby);
        self.settle_all(now, released);
        true
    }

    /// Whether all peers in use know the standby address.
    pub(crate) fn is_known(&self, now: Duration) -> bool {
        let Some(standby) = self.standby else {
            return false;
        };
        let in_use = self.timing.keepalive * 2;
        self.peers
            .values()
            .all(|it| self.knows(it, standby.moa) || now >= it.sent_at.max(it.heard_at) + in_use)
    }

    /// Returns the place at the destination that packets appear from when translated.
    pub(super) fn translated_to(&self) -> Option<Place> {
        let translates = self.movement.as_ref().is_some_and(|it| it.translates);
        self.standby.filter(|_| translates)
    }

    /// Handles the kernel's announcement of the VM on its new link.
    pub(crate) fn handle_announcement(&mut self, now: Duration) {
        if self
            .stage()
            .is_some_and(|stage| stage != MoveStage::Prepared)
        {
            self.arrive(now);
        }
    }

    /// Handles a hint that the VM has arrived.
    pub(crate) fn handle_hint(&mut self, now: Duration) {
        if let Some(movement) = &mut self.movement
            && movement.stage == MoveStage::Ready
        {
            movement.stage = MoveStage::Checking;
            movement.next_check = now;
            self.outputs.push_back(Output::Join);
            self.moves_due(now);
        }
    }

    /// Aborts the migration and restores the former state. Does nothing after the arrival.
    pub(crate) fn abort(&mut self, now: Duration) {
        if self.movement.take().is_some() {
            self.standby = None;
            self.counters.moves_aborted += 1;
            if let Some(active) = self.active {
                let released = self.hold_unaware(now, active);
                self.settle_all(now, released);
            }
            self.changed(now);
        }
    }

    fn arrive(&mut self, now: Duration) {
        self.movement = None;
        let Some(place) = self.standby.take() else {
            return;
        };
        self.counters.moves += 1;
        self.candidate = None;
        let released = self.hold_unaware(now, place);
        let old = self.active.replace(place);
        // First, because packets sent before the switch are lost.
        self.outputs.push_back(Output::SetActive(place));
        self.settle_all(now, released);
        self.outputs.push_back(Output::Join);
        if let Some(old) = old.filter(|old| old.moa != place.moa) {
            self.leave(now, old);
        }
        self.outputs.push_back(Output::PathChanged);
        for server in &mut self.servers {
            // Another server may be the nearest at the destination.
            server.round_trip = None;
            server.silent = 0;
        }
        self.changed(now);
    }

    /// Whether a message answers a check; an answer at the new MoA proves the arrival.
    pub(super) fn handle_check(
        &mut self,
        now: Duration,
        local: Ipv6Addr,
        transaction: u64,
    ) -> bool {
        let Some(movement) = &self.movement else {
            return false;
        };
        let answers = movement.checks.contains(&transaction);
        if answers && self.standby.is_some_and(|it| it.moa == local) {
            self.arrive(now);
        }
        answers
    }

    pub(super) fn moves_due(&mut self, now: Duration) {
        let Some(standby) = self.standby else {
            return;
        };
        match &mut self.movement {
            Some(it) if it.stage == MoveStage::Checking && now >= it.next_check => {
                it.next_check = now + self.timing.check;
            }
            _ => return,
        }
        let mut checks = Vec::new();
        let servers: Vec<_> = self.servers.iter().map(|it| it.address).collect();
        let hoa = self.identity.hoa.octets().into();
        for to in servers {
            let transaction = self.entropy.number();
            checks.push(transaction);
            self.ask(standby.moa, to, transaction, &LookupRequest { hoa }.into());
        }
        let peers = self
            .peers
            .iter()
            .filter_map(|(hoa, peer)| Some((*hoa, peer.to?)));
        let peers: Vec<_> = peers.take(CHECK_PEERS).collect();
        for (hoa, to) in peers {
            let transaction = self.entropy.number();
            checks.push(transaction);
            self.tell(hoa, standby.moa, to, transaction, &Echo {}.into());
        }
        if let Some(movement) = &mut self.movement {
            movement.checks.extend(checks);
            let over = movement.checks.len().saturating_sub(MAX_CHECKS);
            movement.checks.drain(..over);
        }
    }

    pub(super) fn moves_timeout(&self) -> Option<Duration> {
        let movement = self.movement.as_ref()?;
        (movement.stage == MoveStage::Checking).then_some(movement.next_check)
    }
}
