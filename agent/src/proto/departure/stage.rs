//! Where a migration that leaves stands. Each stage has what only it needs.

use std::net::Ipv6Addr;

use common::backoff::Backoff;
use common::signal::{AgentResponse, MigrationProgress, MigrationResponse, Phase};

use super::address::Leaving;
use super::handover::Recorded;
use super::{Order, millis};
use crate::proto::links::peers::RECONNECT;
use crate::proto::refusal::Refusal;
use crate::proto::{JobStats, Timestamp};

/// Who asks libvirt to move the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mover {
    Agent,
    /// Somebody else: the agent follows the migration.
    External,
}

/// The module's diagram shows the order of the stages.
#[derive(Debug)]
pub(super) enum Stage {
    /// Waiting for the flows of the domain's addresses.
    Gathering {
        /// Of [`Output::ReadStreams`](crate::proto::Output::ReadStreams).
        token: u64,
        mover: Mover,
    },
    /// Waiting for the connection to the peer.
    Connecting { mover: Mover },
    /// Waiting for `AgentResponse`.
    Requesting {
        mover: Mover,
        /// The destination has said that it has no place yet.
        waits: bool,
    },
    /// Waiting for the VM's `MigrationReady`.
    Ready(Answered),
    /// libvirt moves the domain, or somebody else is about to ask it to.
    Moving(Box<Moving>),
}

impl Stage {
    pub(super) fn phase(&self) -> Phase {
        match self {
            Self::Gathering { .. } | Self::Connecting { .. } | Self::Requesting { .. } => {
                Phase::Preparing
            }
            Self::Ready(_) => Phase::Ready,
            Self::Moving(moving) => moving.phase(),
        }
    }

    /// The destination has answered, unless the agent knows the migration from libvirt only.
    pub(super) fn answered(&self) -> Option<&Answered> {
        match self {
            Self::Gathering { .. } | Self::Connecting { .. } | Self::Requesting { .. } => None,
            Self::Ready(answered) => Some(answered),
            Self::Moving(moving) => moving.answered.as_ref(),
        }
    }

    /// What the VM may still change: its last word before the switch counts.
    pub(super) fn answered_before_switch(&mut self) -> Option<&mut Answered> {
        match self {
            Self::Gathering { .. } | Self::Connecting { .. } | Self::Requesting { .. } => None,
            Self::Ready(answered) => Some(answered),
            Self::Moving(moving) if moving.stopped().is_some() => None,
            Self::Moving(moving) => moving.answered.as_mut(),
        }
    }
}

/// The destination's answer, and what the VM has said of its addresses since.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answered {
    pub(super) prefix: Ipv6Addr,
    pub(super) prefix_length: u8,
    agent_address: Ipv6Addr,
    /// QEMU there can decrypt a copy.
    pub(super) copy_tls: bool,
    /// Where the VM is going to be.
    pub(super) leaving: Option<Leaving>,
}

impl Answered {
    pub(super) fn new(response: &AgentResponse) -> Self {
        Self {
            prefix: Ipv6Addr::from(*response.prefix),
            prefix_length: response.prefix_length,
            agent_address: Ipv6Addr::from(*response.agent_address),
            copy_tls: response.copy_tls,
            leaving: None,
        }
    }

    /// The part of the answer that the VM needs.
    pub(super) fn for_vm(&self) -> MigrationResponse {
        MigrationResponse {
            prefix: self.prefix.octets().into(),
            prefix_length: self.prefix_length,
            agent_address: self.agent_address.octets().into(),
        }
    }
}

/// How far libvirt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Somebody else has asked libvirt, or is about to: the agent has not seen it begin.
    Awaited,
    /// libvirt copies memory.
    Copying,
    /// The VM has stopped for the switch.
    Switching {
        /// When libvirt said so.
        stopped: Timestamp,
    },
}

/// A migration that is libvirt's now.
#[derive(Debug)]
pub(super) struct Moving {
    pub(super) step: Step,
    /// `None` of a migration that an agent before this one has started.
    pub(super) answered: Option<Answered>,
    /// When the copy began, as far as the agent knows.
    pub(super) since: Timestamp,
    pub(super) stats: JobStats,
    /// When the destination was last told how it stands.
    pub(super) peer_told: Timestamp,
    /// Until the next attempt to connect to the destination.
    pub(super) backoff: Backoff,
    /// Why libvirt was asked to abort it.
    pub(super) stopped_for: Option<Refusal>,
    /// TAPs that are recorded, and what the VM has had by them.
    pub(super) recorded: Recorded,
}

impl Moving {
    pub(super) fn new(step: Step, answered: Option<Answered>, now: Timestamp) -> Self {
        Self {
            step,
            answered,
            since: now,
            stats: JobStats::default(),
            peer_told: now,
            backoff: RECONNECT,
            stopped_for: None,
            recorded: Recorded::new(),
        }
    }

    /// When the VM stopped for the switch, if it did.
    pub(super) fn stopped(&self) -> Option<Timestamp> {
        match self.step {
            Step::Awaited | Step::Copying => None,
            Step::Switching { stopped } => Some(stopped),
        }
    }

    /// libvirt was seen to move the domain.
    pub(super) fn seen(&mut self) {
        if self.step == Step::Awaited {
            self.step = Step::Copying;
        }
    }

    fn phase(&self) -> Phase {
        match self.step {
            Step::Awaited | Step::Copying => Phase::Copying,
            Step::Switching { .. } => Phase::Switching,
        }
    }

    pub(super) fn progress(&self, order: &Order, now: Timestamp) -> MigrationProgress {
        progress(order, self.phase(), &self.stats, now)
    }
}

/// How a migration stands, for its VM and its destination.
pub(super) fn progress(
    order: &Order,
    phase: Phase,
    stats: &JobStats,
    now: Timestamp,
) -> MigrationProgress {
    MigrationProgress {
        phase,
        processed_bytes: stats.processed_bytes,
        total_bytes: stats.total_bytes,
        elapsed_ms: millis(now.since(order.started)),
        vm_pause_ms: stats.downtime.map(millis),
        clock_ns: None,
    }
}
