//! A move: the new MoA stands by, then the VM arrives and the MoAs change places.
//!
//! ```text
//!           prepare()          ready()           announcement
//!  (none) ------------> Prepared ------> Ready ---------------------> arrived: (none)
//!                                           | hint                       ^
//!                                           +------> Checking -----------+ answer to the new MoA
//! ```
//!
//! The announcement is the guest kernel's own (NOTIFY_PEERS), so it counts at once. A hint is what
//! anybody on the link could have sent: an answer of DstAgent to the probe, or the agent's word that
//! the VM is there. It counts once a server or a peer has answered, sealed, at the new MoA: that
//! address is routed to the destination only.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::mat::message::{Echo, LookupRequest};

use super::{Core, MoveStage, Output, Place};

/// Peers that are asked, beside the servers, whether the VM has arrived.
const CHECK_PEERS: usize = 4;
/// Answers that are waited for; older ones come too late anyway.
const MAX_CHECKS: usize = 64;

/// A move under way.
#[derive(Debug)]
pub(super) struct Move {
    pub(super) stage: MoveStage,
    /// What is still sent from the old address is translated at the destination, so nothing is sent to
    /// peers that do not know the new one.
    translates: bool,
    /// Transactions of the checks.
    checks: Vec<u64>,
    next_check: Duration,
}

impl Core {
    /// Where the node is.
    pub(crate) fn active(&self) -> Option<Place> {
        self.active
    }

    /// How far the move is; `None` before and after.
    pub(crate) fn stage(&self) -> Option<MoveStage> {
        self.movement.as_ref().map(|it| it.stage)
    }

    /// A move begins: `standby` has been set up on the idle NIC. An earlier one is off.
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

    /// From now on the VM may find itself at the destination. Returns whether what it sends there
    /// from its old address may be translated to come from the new one: all peers in use know that
    /// one. The others get nothing before they do, from then on.
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

    /// Whether all peers in use know the address that stands by.
    pub(crate) fn is_known(&self, now: Duration) -> bool {
        let Some(standby) = self.standby else {
            return false;
        };
        let in_use = self.timing.keepalive * 2;
        self.peers
            .values()
            .all(|it| self.knows(it, standby.moa) || now >= it.sent_at.max(it.heard_at) + in_use)
    }

    /// Where what is sent may come out: translated, at the destination.
    pub(super) fn translated_to(&self) -> Option<Place> {
        let translates = self.movement.as_ref().is_some_and(|it| it.translates);
        self.standby.filter(|_| translates)
    }

    /// The kernel has announced the VM on its new link.
    pub(crate) fn handle_announcement(&mut self, now: Duration) {
        if self
            .stage()
            .is_some_and(|stage| stage != MoveStage::Prepared)
        {
            self.arrive(now);
        }
    }

    /// It seems that the VM has arrived.
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

    /// The move is off; all is as it was. Nothing happens if the VM has arrived.
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
        // First of all: until then what is sent is lost.
        self.outputs.push_back(Output::SetActive(place));
        self.settle_all(now, released);
        self.outputs.push_back(Output::Join);
        if let Some(old) = old.filter(|old| old.moa != place.moa) {
            self.leave(now, old);
        }
        self.outputs.push_back(Output::PathChanged);
        for server in &mut self.servers {
            // Another one may be the nearest here.
            server.round_trip = None;
            server.silent = 0;
        }
        self.changed(now);
    }

    /// Whether that answers a check; if it came to the new MoA, the VM has arrived.
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
