//! One port of the bridge, and the state of its programs.

use std::error::Error;
use std::time::Duration;

use crate::datapath::{Datapath, DatapathError, Limits};
use crate::net::tap_queue;
use crate::proto::{Port, Timestamp};

/// Time without a change of an interface's traffic control after which the agent creates a missing
/// qdisc.
const QUIET: Duration = Duration::from_secs(1);
/// Uptime of programs after which their loss no longer counts as a repeated loss.
const STEADY: Duration = Duration::from_secs(10);
/// Number of repeated losses after which each further loss doubles [`QUIET`].
const PATIENCE: u32 = 8;
/// Upper bound of the doubled time.
const LONGEST_QUIET: Duration = Duration::from_secs(64);

/// Role of a port on the bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A VM's TAP.
    Tap,
    /// A physical port towards the network.
    Uplink,
    /// Neither a TAP nor an uplink.
    Other,
}

/// State of a port's programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// All programs are attached.
    Attached,
    /// Some programs wait until nobody changes the qdiscs any more.
    Waiting {
        /// End of the wait if the qdiscs do not change.
        until: Timestamp,
    },
    /// The kernel refuses the programs.
    Refused {
        /// Reason and remedy, for the operator.
        reason: String,
    },
}

/// A port of the bridge, with its programs.
#[derive(Clone, Debug)]
pub struct Tended {
    /// TAP, uplink or other.
    pub role: Role,
    /// Name and interface index.
    pub port: Port,
    /// State of the programs.
    pub state: State,
    /// True if all programs have been attached at least once.
    pub(super) was_attached: bool,
    /// Number of repeated losses: programs lost before they were attached for [`STEADY`].
    pub(super) losses: u32,
    pub(super) attached_at: Timestamp,
}

impl Tended {
    /// Returns true if the port is a TAP that has not been announced yet.
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

    /// Returns the time for which the port's traffic control must not change.
    pub(super) fn quiet(&self) -> Duration {
        let doubled = self.losses.saturating_sub(PATIENCE).min(6);
        (QUIET * (1 << doubled)).min(LONGEST_QUIET)
    }

    /// Attaches the programs. Returns whether the programs of an earlier agent were adopted, or
    /// `None` if the programs have to wait.
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
            // Somebody may be about to replace the qdisc that disappeared.
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
