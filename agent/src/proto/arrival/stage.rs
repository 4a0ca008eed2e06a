//! Progress of an arrival, from messages of its source host, libvirt's events and its TAPs.
//!
//! ```text
//!  AgentRequest           domain or TAPs are here           the VM runs here
//!  ------------> Expected ----------------------> Coming ------------------> Arrived
//!                   |                                |                          |
//!                   | aborted, or its source         | TAPs gone, aborted,      | domain or TAPs gone,
//!                   | lost or silent                 | or its source silent     | or the hold is over
//!                   v                                v                          v
//!                (undone)                         (undone)                  (released)
//! ```
//!
//! The module `ending` implements the endings.

use std::collections::BTreeMap;
use std::time::Duration;

use common::maps::Network;
use common::signal::{MigrationProgress, Phase, Reason};
use tracing::info;

use super::{Arrivals, Host, Incoming};
use crate::proto::context::Context;
use crate::proto::handover::ClockOffset;
use crate::proto::host::inventory::Inventory;
use crate::proto::host::listeners::Mirror;
use crate::proto::record::Outcome;
use crate::proto::timer::Timer;
use crate::proto::{DomainUuid, Timestamp};

/// Stage of an arrival.
#[derive(Debug)]
pub(super) enum Stage {
    /// libvirt has not begun to receive the domain.
    Expected {
        /// Time of the source's last message.
        heard: Timestamp,
    },
    /// libvirt has begun to receive the domain: the domain or its TAPs are, or were, on this host.
    Coming {
        heard: Timestamp,
        /// Reason of the source's abort since `heard`. libvirt decides whether the VM still
        /// arrives.
        aborted: Option<Reason>,
    },
    /// The VM runs on this host.
    Arrived(Arrived),
}

/// State of a VM that runs on this host.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) at: Timestamp,
    /// Whether the domain or its TAPs are, or were, on this host. libvirt may report the running VM
    /// earlier.
    pub(super) has_begun: bool,
    /// Reason of the source's abort, if the source aborted.
    pub(super) aborted: Option<Reason>,
    /// Time of the first General Query after the arrival, by VLAN.
    pub(super) queried: BTreeMap<Network, Timestamp>,
    /// End of the time in which answers to the last Query are polled.
    pub(super) poll_until: Timestamp,
}

impl Stage {
    /// Returns the time at which the VM began to run here.
    pub(super) fn arrived(&self) -> Option<Timestamp> {
        match self {
            Self::Arrived(arrived) => Some(arrived.at),
            Self::Expected { .. } | Self::Coming { .. } => None,
        }
    }

    /// Returns true if the domain or its TAPs are, or were, on this host.
    pub(super) fn has_begun(&self) -> bool {
        match self {
            Self::Expected { .. } => false,
            Self::Coming { .. } => true,
            Self::Arrived(arrived) => arrived.has_begun,
        }
    }

    /// Returns the reason of the source's abort, if the source aborted.
    pub(super) fn aborted(&self) -> Option<&Reason> {
        match self {
            Self::Expected { .. } => None,
            Self::Coming { aborted, .. } => aborted.as_ref(),
            Self::Arrived(arrived) => arrived.aborted.as_ref(),
        }
    }

    /// Records that the domain or its TAPs are on this host.
    pub(super) fn begin(&mut self) {
        match self {
            Self::Expected { heard } => {
                *self = Self::Coming {
                    heard: *heard,
                    aborted: None,
                }
            }
            Self::Coming { .. } => {}
            Self::Arrived(arrived) => arrived.has_begun = true,
        }
    }
}

/// Messages of the source host about the VM, condensed.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) progress: Option<MigrationProgress>,
    /// Time of the first message about the switch.
    pub(super) switching: Option<Timestamp>,
    /// Latest time, on this host's clock, at which the source reported the running VM as being
    /// copied.
    pub(super) ran: Option<Timestamp>,
    /// Offset between the source's clock and this host's.
    pub(super) clock: ClockOffset,
}

impl Told {
    /// Returns true if the source said that the VM no longer runs there.
    pub(super) fn is_switched(&self) -> bool {
        let phase = self.progress.as_ref().map(|progress| progress.phase);
        matches!(phase, Some(Phase::Switching | Phase::Completed))
    }

    fn take(&mut self, progress: MigrationProgress, now: Timestamp) {
        if let Some(clock_ns) = progress.clock_ns {
            self.clock.observe(clock_ns, now);
        }
        match progress.phase {
            Phase::Copying => {
                let sent = progress.clock_ns.and_then(|sent| self.clock.latest(sent));
                self.ran = sent.or(self.ran);
            }
            Phase::Switching => {
                self.switching.get_or_insert(now);
            }
            Phase::Preparing | Phase::Ready | Phase::Completed => {}
        }
        self.progress = Some(progress);
    }
}

impl Incoming {
    /// Records a sign of life of the source, and rearms [`Timer::Unused`].
    pub(super) fn heard(&mut self, cx: &mut Context) {
        match &mut self.stage {
            Stage::Expected { heard } => *heard = cx.now,
            Stage::Coming { heard, aborted } => {
                *heard = cx.now;
                *aborted = None;
            }
            Stage::Arrived(_) => return,
        }
        let expiry = cx.now + cx.config.timing.unused_join_expiry;
        cx.timers.set(Timer::Unused(self.number), expiry);
    }

    /// Records that the VM runs here since `at`.
    fn arrive(&mut self, cx: &mut Context, mirror: &Mirror, at: Timestamp) {
        let number = self.number;
        info!(domain = %self.domain, number, "Domain has arrived");
        self.stage = Stage::Arrived(Arrived {
            at,
            has_begun: self.stage.has_begun(),
            aborted: self.stage.aborted().cloned(),
            queried: BTreeMap::new(),
            poll_until: Timestamp::default(),
        });
        let hold = cx.now + self.longest_interval(cx, mirror);
        cx.timers.stop(Timer::Unused(number));
        cx.timers.set(Timer::Hold(number), hold);
        cx.records.end(number, at, Outcome::Completed);
    }

    /// Returns the longest listening interval of the networks in which the VM needs addresses.
    fn longest_interval(&self, cx: &Context, mirror: &Mirror) -> Duration {
        let interval = |network| mirror.queriers().listening_interval(network, cx.now);
        let networks = self.needs.keys().map(|(key, _)| key.network());
        let untagged = Network {
            bridge: cx.config.bridge,
            vlan: 0,
        };
        networks
            .map(interval)
            .max()
            .unwrap_or_else(|| interval(untagged))
    }
}

impl Arrivals {
    /// Handles the source's progress message.
    pub(in crate::proto) fn progressed(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        (peer, transaction): (&str, u64),
        progress: MigrationProgress,
    ) {
        let Some(incoming) = self.incoming.of_transaction_mut(peer, transaction) else {
            return;
        };
        incoming.heard(cx);
        let pause = progress.vm_pause_ms.map(Duration::from_millis);
        cx.records.update(incoming.number, |record| {
            if record.outcome.is_none() {
                record.phase = progress.phase;
            }
            record.vm_pause = pause.or(record.vm_pause);
            record.processed_bytes = progress.processed_bytes;
            record.total_bytes = progress.total_bytes;
        });
        let (phase, uuid) = (progress.phase, incoming.uuid);
        incoming.told.take(progress, cx.now);
        match phase {
            Phase::Switching => {
                incoming.answer_asked(cx);
                self.ports_changed(cx, host);
            }
            // The source cannot know whether the domain runs here; libvirt can.
            Phase::Completed => {
                self.finished.note(incoming);
                let domain = host.inventory.domains.get(&uuid);
                if domain.is_some_and(|it| it.running) {
                    self.runs_here(cx, host, uuid, cx.now);
                }
            }
            Phase::Preparing | Phase::Ready | Phase::Copying => {}
        }
    }

    /// Records that a domain runs here since `at`, as libvirt or a datagram of the VM shows.
    pub(in crate::proto) fn runs_here(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        uuid: DomainUuid,
        at: Timestamp,
    ) {
        let incoming = self.incoming.of_domain_mut(uuid);
        let Some(incoming) = incoming.filter(|it| it.stage.arrived().is_none()) else {
            return;
        };
        incoming.arrive(cx, host.mirror, at);
        self.finished.note(incoming);
        self.ports_changed(cx, host);
        if let Some(incoming) = self.incoming.of_domain_mut(uuid) {
            let ports = self.taps.of(host.inventory, incoming);
            incoming.renew_mdb(cx, &ports);
            incoming.expect_cut(cx);
            incoming.claim_arrived(cx);
            incoming.finish_if_released(cx);
        }
    }

    /// Gives each TAP of an arriving VM its gate, MDB entries and addresses, as soon as the TAP
    /// exists and they are due.
    pub(in crate::proto) fn ports_changed(&mut self, cx: &mut Context, host: &mut Host<'_>) {
        self.lend_taps(cx, host);
        for incoming in self.incoming.iter_mut() {
            let ports = self.taps.of(host.inventory, incoming);
            let is_here = self.taps.are_here(host.inventory, incoming);
            incoming.hold(cx, host.inventory, &mut self.taps, &ports);
            incoming.begin_mdb(cx, &ports);
            if is_here {
                incoming.stage.begin();
            }
        }
        self.expect_claims(cx, host.inventory);
        self.translate_left(cx, host);
    }

    /// Handles a broken connection to a source. Before its domain begins to arrive, the arrival
    /// ends after a short grace period, which loses nothing; afterwards libvirt decides.
    pub(in crate::proto) fn peer_down(
        &mut self,
        cx: &mut Context,
        inventory: &Inventory,
        peer: &str,
        reason: &str,
    ) {
        let grace = cx.now + cx.config.timing.lost_peer_grace;
        for incoming in self.incoming.iter().filter(|it| it.peer == peer) {
            incoming.hurry_cut(cx);
            let is_here = self.taps.are_here(inventory, incoming);
            if incoming.stage.arrived().is_none() && !is_here {
                cx.timers.set_earlier(Timer::Unused(incoming.number), grace);
            }
        }
        self.preparations.peer_down(cx, peer, reason);
    }
}

#[cfg(test)]
mod tests;
