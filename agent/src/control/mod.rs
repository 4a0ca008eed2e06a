//! The operator's socket: a Unix socket that only root may use.
//!
//! One line of JSON each way. A [`Request`] is answered by [`Reply`] lines; a long table comes in
//! several of the same kind, and every answer ends with [`Reply::End`] or [`Reply::Error`], so a
//! connection that broke in the middle is noticed. A connection may ask again after that.
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
//! | [`server`] | the agent's side |
//! | [`client`] | the operator's side |
//! | [`table`] | tables for people |
//! | [`trace`] | decisions of the kernel programs, as they happen |
//! | [`command`] | `roamcast status` and its siblings |
//!
//! libvirt's hook ([`crate::hook`]) asks by it too.

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

/// Longest request, bytes with its newline.
pub const MAX_REQUEST_BYTES: usize = 4096;

/// What the operator asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "request",
    rename_all = "kebab-case",
    rename_all_fields = "snake_case"
)]
pub enum Request {
    /// State of the agent, or of the relay.
    Status,
    /// Multicast addresses that the VMs listen to.
    Listeners,
    /// Flows of the managed multicast addresses.
    Streams,
    /// Migrations, the newest last.
    Migrations,
    /// Relays that the agent may ask, and what it asks of them.
    Relays,
    /// Moves a domain.
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
    /// Decisions of the kernel programs, as they happen.
    Trace(TraceRequest),
    /// Nodes that a mapping server knows.
    Nodes,
    /// Enrolls a node at a mapping server.
    Enroll {
        /// Its HoA.
        hoa: Ipv6Addr,
        /// Generation of its key; none for the next.
        generation: Option<u32>,
    },
    /// libvirt's hook: prepares for a domain that somebody else moves here.
    Prepare {
        /// UUID of the domain.
        domain_uuid: DomainUuid,
        /// Its name.
        domain_name: String,
        /// Name of the agent where it runs.
        source: String,
    },
}

impl Request {
    /// The protocol's command, for the requests that are one.
    // Names of agents are those in certificates, in any case.
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

/// What the agent answers.
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
    /// To [`Request::Listeners`]; a part of them.
    Listeners(Vec<ListenerRow>),
    /// To [`Request::Streams`]; a part of them.
    Streams(Vec<StreamRow>),
    /// To [`Request::Migrations`]; a part of them.
    Migrations(Vec<MigrationRow>),
    /// To [`Request::Relays`]; a part of them.
    Relays(Vec<RelayRow>),
    /// To [`Request::Nodes`]; a part of them.
    Nodes(Vec<NodeRow>),
    /// To [`Request::Enroll`].
    Enrolled {
        /// Generation of the node's key.
        generation: u32,
    },
    /// To [`Request::Trace`]: the programs tell their decisions from now on.
    Tracing,
    /// To [`Request::Trace`]: a line.
    Trace(TraceLine),
    /// How far a migration is.
    Progress(Progress),
    /// A command is done.
    Done {
        /// Number of the migration's record.
        migration: u64,
    },
    /// The request failed; one sentence for a person. Nothing follows.
    Error(String),
    /// The answer is complete.
    End,
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Where it stands.
    pub phase: MigrationPhase,
    /// Memory copied, bytes.
    pub processed_bytes: u64,
    /// Memory in all, bytes.
    pub total_bytes: u64,
}

impl Reply {
    /// Whether nothing follows in this answer.
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
