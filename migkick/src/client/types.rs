//! Inputs and outputs of the client.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::{DecodeError, MigrationProgress, MigrationResponse, Reason, VERSION};

/// Intervals and deadlines of the client.
#[derive(Clone, Debug)]
pub(crate) struct Timing {
    /// First interval between repetitions of a request; doubles each time.
    pub(crate) retry_first: Duration,
    /// Limit of that interval.
    pub(crate) retry_most: Duration,
    /// Duration of the search.
    pub(crate) search: Duration,
    /// Time to wait for the answer on a better NIC after the first answer.
    pub(crate) settle: Duration,
    /// Longest silence of the agent during preparation.
    pub(crate) request_silence: Duration,
    /// Interval between `MigrationReady` messages.
    pub(crate) ready_interval: Duration,
    /// Longest silence of all agents during the migration.
    pub(crate) ready_silence: Duration,
    /// Time to keep asking for the length of the pause after the arrival.
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

/// The agent of this VM's host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Agent {
    /// Name in the agent's certificate.
    pub(crate) name: String,
    /// Link-local address of the agent.
    pub(crate) address: Ipv6Addr,
    /// NIC that received the answer: the active one.
    pub(crate) ifindex: u32,
    /// Name of this VM's libvirt domain.
    pub(crate) domain: String,
    /// Destinations to which the policy allows this VM to move.
    pub(crate) destinations: Vec<String>,
}

/// A datagram for [`common::signal::PORT`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Transmit {
    /// NIC to send from.
    pub(crate) ifindex: u32,
    /// Destination address.
    pub(crate) to: Ipv6Addr,
    /// Payload.
    pub(crate) bytes: Vec<u8>,
}

/// A step of the migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The search found the agent.
    Found(Agent),
    /// The destination is ready; the caller may configure the idle NIC.
    Prepared(MigrationResponse),
    /// The migration made progress.
    Progress(MigrationProgress),
    /// The VM runs at the destination. Last event.
    Completed(MigrationProgress),
    /// The migration has failed. Last event.
    Failed(ClientError),
}

/// Why a migration failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ClientError {
    /// No agent answered the search.
    #[error(
        "No Roamcast agent answered on {interfaces}; check that the agent runs on this VM's host and manages its bridge"
    )]
    NoAgent {
        /// NICs of the search; the caller, who knows their names, fills the field.
        interfaces: String,
    },
    /// The agent stopped answering during preparation.
    #[error("Agent \"{agent}\" has not answered for {} s; see its log", silence.as_secs())]
    Silent {
        /// Name of the agent.
        agent: String,
        /// Time without an answer.
        silence: Duration,
    },
    /// No agent answers during the migration.
    #[error(
        "No agent has answered for {} s; the move may have ended either way, see `roamcast migrations` on both hosts",
        silence.as_secs()
    )]
    Lost {
        /// Time without an answer.
        silence: Duration,
    },
    /// The agent refuses or aborts the migration.
    #[error("{0}")]
    Aborted(Reason),
    /// The agent's answer contains a text that is not plain.
    #[error("The agent's answer is refused: {0}; have the domain or the agent renamed")]
    Text(DecodeError),
    /// The agent has another version of the protocol.
    #[error(
        "The agent speaks protocol version {theirs}, this migkick {VERSION}; install the same version on both"
    )]
    Version {
        /// Protocol version of the agent.
        theirs: u16,
    },
}
