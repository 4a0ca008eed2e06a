//! What the client is given and what it gives.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::{DecodeError, MigrationProgress, MigrationResponse, VERSION};

/// When to repeat and when to give up.
#[derive(Clone, Debug)]
pub(crate) struct Timing {
    /// First distance of two sends of a question; doubles each time.
    pub(crate) retry_first: Duration,
    /// Longest distance of two sends.
    pub(crate) retry_most: Duration,
    /// How long the search goes on.
    pub(crate) search: Duration,
    /// How long a better NIC is waited for after the first answer to the search.
    pub(crate) settle: Duration,
    /// How long the agent may be silent while it prepares the move.
    pub(crate) request_silence: Duration,
    /// Distance of two `MigrationReady`.
    pub(crate) ready_interval: Duration,
    /// How long every agent may be silent during the move.
    pub(crate) ready_silence: Duration,
    /// How long, once the VM is there, to go on asking for the length of its pause.
    pub(crate) pause_known: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            retry_first: Duration::from_millis(100),
            retry_most: Duration::from_secs(1),
            search: Duration::from_secs(10),
            settle: Duration::from_millis(100),
            request_silence: Duration::from_secs(30),
            ready_interval: Duration::from_millis(200),
            ready_silence: Duration::from_secs(60),
            pause_known: Duration::from_secs(1),
        }
    }
}

/// The agent that houses this VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Agent {
    /// Its name.
    pub(crate) name: String,
    /// Its link-local address.
    pub(crate) address: Ipv6Addr,
    /// The NIC that it answered on, which is the active one.
    pub(crate) ifindex: u32,
    /// Name of this VM's libvirt domain.
    pub(crate) domain: String,
    /// Where the policy lets this VM go.
    pub(crate) destinations: Vec<String>,
}

/// A datagram to be sent to [`common::signal::PORT`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Transmit {
    /// NIC to send from.
    pub(crate) ifindex: u32,
    /// Destination address.
    pub(crate) to: Ipv6Addr,
    /// Payload.
    pub(crate) bytes: Vec<u8>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The search succeeded.
    Found(Agent),
    /// The destination is ready; the idle NIC may be prepared.
    Prepared(MigrationResponse),
    /// The move went on.
    Progress(MigrationProgress),
    /// The VM runs at the destination. The last event.
    Completed(MigrationProgress),
    /// It is over without that. The last event.
    Failed(ClientError),
}

/// Why there is no move.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ClientError {
    /// Nobody answered the search.
    #[error(
        "No Roamcast agent answered on {interfaces}; check that the agent runs on this VM's host and manages its bridge"
    )]
    NoAgent {
        /// NICs that were searched on; filled in by the caller, who knows names.
        interfaces: String,
    },
    /// The agent fell silent while it prepared the move.
    #[error("Agent \"{agent}\" has not answered for {} s; see its log", silence.as_secs())]
    Silent {
        /// Its name.
        agent: String,
        /// How long.
        silence: Duration,
    },
    /// Nobody answers any more during the move.
    #[error(
        "No agent has answered for {} s; the move may have ended either way, see `roamcast migrations` on both hosts",
        silence.as_secs()
    )]
    Lost {
        /// How long.
        silence: Duration,
    },
    /// The agent refuses or gives up.
    #[error("{0}")]
    Aborted(String),
    /// The agent's answer cannot be shown.
    #[error("The agent's answer is refused: {0}; have the domain or the agent renamed")]
    Text(DecodeError),
    /// The agent speaks another version of the protocol.
    #[error(
        "The agent speaks protocol version {theirs}, this migkick {VERSION}; install the same version on both"
    )]
    Version {
        /// Its version.
        theirs: u16,
    },
}
