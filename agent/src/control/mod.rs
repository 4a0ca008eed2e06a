//! The operator's socket: a Unix socket that only root may open.
//!
//! Client and role exchange lines of JSON. The role answers a [`request`] with [`Reply`] lines
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
//! | [`request`] | what each role may be asked |
//! | [`report`] | the rows of every table |
//! | [`server`] | the agent's side of the socket |
//! | [`client`] | the operator's side of the socket |
//! | [`table`] | tables for people |
//! | [`trace`], [`follow`] | decisions of the kernel programs, as they happen: rows, and the command |
//! | [`command`] | `roamcast status` and its siblings |
//!
//! libvirt's hook ([`crate::hook`]) uses the same socket.

pub mod client;
pub mod command;
pub mod follow;
pub mod report;
pub mod request;
pub mod server;
pub mod table;
pub mod trace;

use serde::{Deserialize, Serialize};

use crate::proto::CommandReply;
use report::{
    ImsStatus, ListenerRow, McsStatus, MigrationPhase, MigrationRow, NodeRow, RelayRow,
    RelayStatus, Status, StreamRow,
};
use trace::TraceLine;

/// One line of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", content = "data", rename_all = "kebab-case")]
pub enum Reply {
    /// To `status`, by an agent.
    Status(Box<Status>),
    /// To `status`, by a relay.
    RelayStatus(Box<RelayStatus>),
    /// To `status`, by a migration control server.
    McsStatus(Box<McsStatus>),
    /// To `status`, by a mapping server.
    ImsStatus(Box<ImsStatus>),
    /// To `listeners`: some of the rows.
    Listeners(Vec<ListenerRow>),
    /// To `streams`: some of the rows.
    Streams(Vec<StreamRow>),
    /// To `migrations`: some of the rows.
    Migrations(Vec<MigrationRow>),
    /// To `relays`: some of the rows.
    Relays(Vec<RelayRow>),
    /// To `nodes`: some of the rows.
    Nodes(Vec<NodeRow>),
    /// To `enroll`.
    Enrolled {
        /// Generation of the node's key.
        generation: u32,
    },
    /// To `trace`: the programs report their decisions from now on.
    Tracing,
    /// To `trace`: one line of the trace.
    Trace(TraceLine),
    /// To `migrate`: how far the migration is.
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
