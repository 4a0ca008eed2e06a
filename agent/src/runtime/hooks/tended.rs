//! One port and its programs.

use std::error::Error;
use std::time::Duration;

use crate::datapath::{Datapath, DatapathError, Limits};
use crate::net::tap_queue;
use crate::proto::{Port, Timestamp};

/// For so long nobody may have changed the traffic control of an interface before a qdisc of ours
/// is made there.
const QUIET: Duration = Duration::from_secs(1);
/// What has been attached for so long was not taken away by somebody who always does.
const STEADY: Duration = Duration::from_secs(10);
/// After so many losses, none of what was steady, each next one doubles [`QUIET`].
const PATIENCE: u32 = 8;
/// The longest that it becomes.
const LONGEST_QUIET: Duration = Duration::from_secs(64);

/// What a port is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A VM's TAP.
    Tap,
    /// An uplink.
    Uplink,
    /// Neither.
    Other,
}

/// A port's programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// All are attached.
    Attached,
    /// Some wait until nobody changes the qdiscs any more.
    Waiting {
        /// Until when, if nobody does.
        until: Timestamp,
    },
    /// They cannot be attached.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
}

/// A port of the bridge.
#[derive(Clone, Debug)]
pub struct Tended {
    /// What it is.
    pub role: Role,
    /// The port.
    pub port: Port,
    /// Its programs.
    pub state: State,
    /// Whether all its programs were ever attached.
    pub(super) was_attached: bool,
    /// How often programs were lost that were not steady.
    pub(super) losses: u32,
    pub(super) attached_at: Timestamp,
}

impl Tended {
    /// Whether it is a TAP that nobody has been told of.
    pub(super) fn is_new(&self) -> bool {
        self.role == Role::Tap && !self.was_attached
    }

    pub(super) fn problem(&self) -> Option<String> {
        let name = &self.port.name;
        match &self.state {
            State::Attached => None,
            State::Waiting { .. } => Some(format!(
                "{name}: its programs wait until its qdiscs have not been changed for a while, so \
                 that libvirt can set its limits"
            )),
            State::Refused { reason } => Some(format!("{name}: {reason}")),
        }
    }

    pub(super) fn lose(&mut self, now: Timestamp) {
        if self.state == State::Attached && now.since(self.attached_at) > STEADY {
            self.losses = 0;
        }
        self.losses = self.losses.saturating_add(1);
        self.state = State::Waiting {
            until: now + self.quiet(),
        };
    }

    /// How long its traffic control has to be quiet.
    pub(super) fn quiet(&self) -> Duration {
        let doubled = self.losses.saturating_sub(PATIENCE).min(6);
        (QUIET * (1 << doubled)).min(LONGEST_QUIET)
    }

    /// Attaches the programs; returns whether an earlier agent's were adopted, or `None` if they
    /// have to wait.
    pub(super) fn attached(
        &self,
        datapath: &Datapath,
        limits: &Limits,
        is_settled: bool,
    ) -> Result<Option<bool>, DatapathError> {
        let (ifindex, name) = (self.port.ifindex, self.port.name.as_str());
        let attachment = match self.role {
            Role::Tap if is_settled => Some(datapath.attach_port(ifindex, name, limits)?),
            Role::Tap => datapath.attach_port_to_what_is_there(ifindex, name, limits)?,
            // Somebody may be about to put another qdisc in the place of the one that went.
            Role::Uplink | Role::Other if self.losses > 0 && !is_settled => None,
            Role::Uplink => Some(datapath.attach_uplink(ifindex, name)?),
            Role::Other => Some(datapath.attach_leak(ifindex, name)?),
        };
        if self.role == Role::Tap
            && let Err(error) = tap_queue::make_room(ifindex)
        {
            tracing::warn!(
                port = name,
                error = &error as &dyn Error,
                "A queue keeps its length; it may overflow during a pause of the VM"
            );
        }
        Ok(attachment.map(|attachment| attachment.adopted))
    }
}

impl Role {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Tap => "TAP",
            Self::Uplink => "Uplink",
            Self::Other => "Port",
        }
    }

    pub(super) fn refusal(self) -> &'static str {
        match self {
            Self::Tap => "Cannot watch a TAP; its VM cannot be moved",
            Self::Uplink => "Cannot watch an uplink; streams that come by it are not seen",
            Self::Other => "Cannot watch a port; relayed streams may leave this host by it",
        }
    }
}
