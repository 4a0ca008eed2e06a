//! Stages of an outgoing migration. Each stage holds only the data that it needs; the diagram of
//! the parent module shows their order.

use std::net::Ipv6Addr;

use common::backoff::Backoff;
use common::signal::{AgentResponse, MigrationProgress, MigrationResponse, Phase};

use super::address::Leaving;
use super::handover::Recorded;
use super::{Order, millis};
use crate::proto::links::peers::RECONNECT;
use crate::proto::refusal::Refusal;
use crate::proto::{JobStats, Timestamp};

/// Party that asks libvirt to migrate the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mover {
    Agent,
    /// Somebody else; the agent follows the migration.
    External,
}

/// Stage of an outgoing migration.
#[derive(Debug)]
pub(super) enum Stage {
    /// Waiting for the flows of the domain's addresses.
    Gathering {
        /// Token of the pending [`Output::ReadStreams`](crate::proto::Output::ReadStreams).
        token: u64,
        mover: Mover,
    },
    /// Waiting for the connection to the peer.
    Connecting { mover: Mover },
    /// Waiting for `AgentResponse`.
    Requesting {
        mover: Mover,
        /// Whether the destination answered that it has no place yet.
        waits: bool,
    },
    /// Waiting for the VM's `MigrationReady`.
    Ready(Answered),
    /// libvirt migrates the domain, or somebody else is about to ask for the migration.
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

    /// Returns the destination's answer. `None` before the answer, and always if the agent found
    /// the migration already running in libvirt.
    pub(super) fn answered(&self) -> Option<&Answered> {
        match self {
            Self::Gathering { .. } | Self::Connecting { .. } | Self::Requesting { .. } => None,
            Self::Ready(answered) => Some(answered),
            Self::Moving(moving) => moving.answered.as_ref(),
        }
    }

    /// Returns the part that the VM can still change. The VM's last message before the switch
    /// counts.
    pub(super) fn answered_before_switch(&mut self) -> Option<&mut Answered> {
        match self {
            Self::Gathering { .. } | Self::Connecting { .. } | Self::Requesting { .. } => None,
            Self::Ready(answered) => Some(answered),
            Self::Moving(moving) if moving.stopped().is_some() => None,
            Self::Moving(moving) => moving.answered.as_mut(),
        }
    }
}

/// The destination's answer, and the address change that the VM announced since.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answered {
    pub(super) prefix: Ipv6Addr,
    pub(super) prefix_length: u8,
    agent_address: Ipv6Addr,
    /// Whether QEMU on the destination host can decrypt a memory copy.
    pub(super) copy_tls: bool,
    /// The VM's new address; `None` until `MigrationReady` names one.
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

    /// Returns the part of the answer that goes to the VM.
    pub(super) fn for_vm(&self) -> MigrationResponse {
        MigrationResponse {
            prefix: self.prefix.octets().into(),
            prefix_length: self.prefix_length,
            agent_address: self.agent_address.octets().into(),
        }
    }
}

/// Progress of libvirt's migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Somebody else asked libvirt, or is about to. libvirt has not reported the migration yet.
    Awaited,
    /// libvirt copies the domain's memory.
    Copying,
    /// The source host's VM is stopped for the switch.
    Switching {
        /// Time of libvirt's event about the stop.
        stopped: Timestamp,
    },
}

/// A migration that libvirt runs.
#[derive(Debug)]
pub(super) struct Moving {
    pub(super) step: Step,
    /// `None` if an earlier agent started the migration.
    pub(super) answered: Option<Answered>,
    /// Start of the copy as far as the agent knows.
    pub(super) since: Timestamp,
    pub(super) stats: JobStats,
    /// Time of the last progress message to the destination.
    pub(super) peer_told: Timestamp,
    /// Delay before the next attempt to connect to the destination.
    pub(super) backoff: Backoff,
    /// Reason why the agent asked libvirt to abort, if it did.
    pub(super) stopped_for: Option<Refusal>,
    /// Recorded TAPs, with the cut once it is placed.
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

    /// Returns the time at which the VM stopped for the switch, if it stopped.
    pub(super) fn stopped(&self) -> Option<Timestamp> {
        match self.step {
            Step::Awaited | Step::Copying => None,
            Step::Switching { stopped } => Some(stopped),
        }
    }

    /// Records that libvirt reported the migration.
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

/// Makes the progress message for the VM and the destination.
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
