//! The operator's socket: a Unix socket that only root may open.
//!
//! Client and agent exchange lines of JSON. The agent answers a [`Request`] with [`Reply`] lines
//! and cuts a long table into several lines of the same kind. [`Reply::End`] or [`Reply::Error`]
//! ends every answer, so the client notices a connection that breaks in the middle. After the end
//! of an answer the client may send the next request on the same connection.
//!
//! ```text
//! {"request":"listeners"}                              {"reply":"listeners","data":[{..},{..}]}
//!                                                      {"reply":"listeners","data":[{..}]}
//!                                                      {"reply":"end"}
//! {"request":"migrate","domain":"a","destination":"b"} {"reply":"progress","data":{..}}
//!                                                      {"reply":"done","data":{"migration":7}}
//!                                                      {"reply":"end"}
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`report`] | the rows of every table |
//! | [`server`] | the agent's side of the socket |
//! | [`client`] | the operator's side of the socket |
//! | [`table`] | tables for people |
//! | [`trace`] | decisions of the kernel programs, as they happen |
//! | [`command`] | `roamcast status` and its siblings |
//!
//! libvirt's hook ([`crate::hook`]) uses the same socket.

pub mod client;
pub mod command;
pub mod report;
pub mod server;
pub mod table;
pub mod trace;

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use crate::proto::{Command, CommandReply, DomainUuid};
use report::{
    ImsStatus, ListenerRow, McsStatus, MigrationPhase, MigrationRow, NodeRow, RelayRow,
    RelayStatus, Status, StreamRow,
};
use trace::{TraceLine, TraceRequest};

/// Longest request in bytes, including the newline.
pub const MAX_REQUEST_BYTES: usize = 4096;

/// A request of the operator or of libvirt's hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "request",
    rename_all = "kebab-case",
    rename_all_fields = "snake_case"
)]
pub enum Request {
    /// State of the agent, or of the relay.
    Status,
    /// Multicast addresses to which the VMs listen.
    Listeners,
    /// Flows of the managed multicast addresses.
    Streams,
    /// Migrations; the newest is the last row.
    Migrations,
    /// Relays that the agent may ask, and the agent's sessions with each relay.
    Relays,
    /// Migrates a domain to another host.
    Migrate {
        /// Name or UUID of the domain.
        domain: String,
        /// Name of the destination's agent.
        destination: String,
    },
    /// Stops a migration in progress.
    Abort {
        /// Name or UUID of the domain.
        domain: String,
    },
    /// Decisions of the kernel programs, as the programs take them.
    Trace(TraceRequest),
    /// Nodes that a mapping server knows.
    Nodes,
    /// Enrolls a node at a mapping server.
    Enroll {
        /// Home address (HoA) of the node.
        hoa: Ipv6Addr,
        /// Generation of the node's key; `None`: the next generation.
        generation: Option<u32>,
    },
    /// Sent by libvirt's hook: prepare for a domain that somebody else migrates to this host.
    Prepare {
        /// UUID, which libvirt keeps across the migration.
        domain_uuid: DomainUuid,
        /// Name of the domain at the source, for the log and the tables.
        domain_name: String,
        /// Name of the source's agent.
        source: String,
    },
}

impl Request {
    /// Returns the protocol's command, for the requests that are a command.
    // Certificates carry agent names in lower case; an operator may type any case.
    pub fn command(&self) -> Option<Command> {
        match self {
            Self::Migrate {
                domain,
                destination,
            } => Some(Command::Migrate {
                domain: domain.clone(),
                destination: destination.to_ascii_lowercase(),
            }),
            Self::Abort { domain } => Some(Command::Abort {
                domain: domain.clone(),
            }),
            Self::Prepare {
                domain_uuid,
                domain_name,
                source,
            } => Some(Command::Prepare {
                uuid: *domain_uuid,
                domain: domain_name.clone(),
                source: source.to_ascii_lowercase(),
            }),
            Self::Status
            | Self::Listeners
            | Self::Streams
            | Self::Migrations
            | Self::Relays
            | Self::Trace(_)
            | Self::Nodes
            | Self::Enroll { .. } => None,
        }
    }
}

/// One line of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", content = "data", rename_all = "kebab-case")]
pub enum Reply {
    /// To [`Request::Status`], by an agent.
    Status(Box<Status>),
    /// To [`Request::Status`], by a relay.
    RelayStatus(Box<RelayStatus>),
    /// To [`Request::Status`], by a migration control server.
    McsStatus(Box<McsStatus>),
    /// To [`Request::Status`], by a mapping server.
    ImsStatus(Box<ImsStatus>),
    /// To [`Request::Listeners`]: some of the rows.
    Listeners(Vec<ListenerRow>),
    /// To [`Request::Streams`]: some of the rows.
    Streams(Vec<StreamRow>),
    /// To [`Request::Migrations`]: some of the rows.
    Migrations(Vec<MigrationRow>),
    /// To [`Request::Relays`]: some of the rows.
    Relays(Vec<RelayRow>),
    /// To [`Request::Nodes`]: some of the rows.
    Nodes(Vec<NodeRow>),
    /// To [`Request::Enroll`].
    Enrolled {
        /// Generation of the node's key.
        generation: u32,
    },
    /// To [`Request::Trace`]: the programs report their decisions from now on.
    Tracing,
    /// To [`Request::Trace`]: one line of the trace.
    Trace(TraceLine),
    /// To [`Request::Migrate`]: how far the migration is.
    Progress(Progress),
    /// A command succeeded.
    Done {
        /// Number of the migration's record.
        migration: u64,
    },
    /// The request failed; the text is one sentence for a person. No reply follows.
    Error(String),
    /// The answer is complete. No reply follows.
    End,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Current phase.
    pub phase: MigrationPhase,
    /// Memory copied so far, bytes.
    pub processed_bytes: u64,
    /// Memory of the domain, bytes.
    pub total_bytes: u64,
}

impl Reply {
    /// Returns true if no reply follows in this answer.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::End | Self::Error(_))
    }
}

impl From<CommandReply> for Reply {
    fn from(reply: CommandReply) -> Self {
        match reply {
            CommandReply::Progress {
                phase,
                processed_bytes,
                total_bytes,
            } => Self::Progress(Progress {
                phase: phase.into(),
                processed_bytes,
                total_bytes,
            }),
            CommandReply::Done { migration } => Self::Done { migration },
            CommandReply::Failed(reason) => Self::Error(reason),
        }
    }
}
