//! What may be asked of each role.
//!
//! All roles use one transport and one form, an object with the key `request`. A role knows its own
//! requests only.

use std::net::Ipv6Addr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::trace::TraceRequest;
use crate::proto::{Command, DomainUuid};

/// Longest request in bytes, including the newline.
pub const MAX_REQUEST_BYTES: usize = 4096;

/// How a request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// With a state or a table, at once.
    Table,
    /// When the command is over, which takes as long as a migration.
    Command,
    /// With lines, until either side ends the trace.
    Trace,
}

/// The requests of one role.
pub trait Request: DeserializeOwned + Send + 'static {
    /// What the role is, and what it can be asked, for a sentence.
    const ROLE: &'static str;

    /// Returns how the request is answered.
    fn answer(&self) -> Answer;
}

/// Requests to an agent, by the operator or by libvirt's hook.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "request",
    rename_all = "kebab-case",
    rename_all_fields = "snake_case"
)]
pub enum Agent {
    /// State of the agent.
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

impl Request for Agent {
    const ROLE: &'static str = "an agent, no mapping server";

    fn answer(&self) -> Answer {
        match self {
            Self::Trace(_) => Answer::Trace,
            _ if self.command().is_some() => Answer::Command,
            _ => Answer::Table,
        }
    }
}

impl Agent {
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
            | Self::Trace(_) => None,
        }
    }
}

/// A table of an agent; a relay has streams too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Multicast addresses to which the VMs listen.
    Listeners,
    /// Flows of the managed multicast addresses.
    Streams,
    /// Relays, and the sessions with each.
    Relays,
    /// Migrations; the newest is the last row.
    Migrations,
}

impl Table {
    /// Returns the request for the table.
    pub fn request(self) -> Agent {
        match self {
            Self::Listeners => Agent::Listeners,
            Self::Streams => Agent::Streams,
            Self::Relays => Agent::Relays,
            Self::Migrations => Agent::Migrations,
        }
    }
}

/// Requests to a relay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Relay {
    /// State of the relay.
    Status,
    /// Flows of the relayed multicast addresses.
    Streams,
    /// Decisions of the kernel programs, as the programs take them.
    Trace(TraceRequest),
}

impl Request for Relay {
    const ROLE: &'static str = "a relay; ask it for its status or streams";

    fn answer(&self) -> Answer {
        match self {
            Self::Trace(_) => Answer::Trace,
            Self::Status | Self::Streams => Answer::Table,
        }
    }
}

/// Requests to a migration control server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Mcs {
    /// State of the server.
    Status,
}

impl Request for Mcs {
    const ROLE: &'static str = "a migration control server; ask it for its status";

    fn answer(&self) -> Answer {
        Answer::Table
    }
}

/// Requests to a mapping server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "request",
    rename_all = "kebab-case",
    rename_all_fields = "snake_case"
)]
pub enum Ims {
    /// State of the server.
    Status,
    /// Nodes that the server knows.
    Nodes,
    /// Enrolls a node.
    Enroll {
        /// Home address (HoA) of the node.
        hoa: Ipv6Addr,
        /// Generation of the node's key; `None`: the next generation.
        generation: Option<u32>,
    },
}

impl Request for Ims {
    const ROLE: &'static str = "a mapping server; ask it for its status or its nodes";

    fn answer(&self) -> Answer {
        Answer::Table
    }
}

/// Decodes a request to a role.
///
/// # Errors
///
/// One sentence for the operator: the line is too long, is no request, or is one to another role.
pub fn decode<R: Request>(line: &[u8]) -> Result<R, String> {
    if line.len() >= MAX_REQUEST_BYTES {
        return Err(format!(
            "The request has more than {MAX_REQUEST_BYTES} bytes"
        ));
    }
    serde_json::from_slice(line).map_err(|error| {
        // An agent knows every request of a relay and of a migration control server.
        let other = serde_json::from_slice::<Agent>(line).is_ok()
            || serde_json::from_slice::<Ims>(line).is_ok();
        match other {
            true => format!("This is {}", R::ROLE),
            false => format!("The request is not understood: {error}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_to_another_role_is_told_what_this_one_is() {
        let line = br#"{"request":"listeners"}"#;
        assert_eq!(decode::<Agent>(line), Ok(Agent::Listeners));
        assert_eq!(
            decode::<Relay>(line),
            Err("This is a relay; ask it for its status or streams".to_owned())
        );
        let enroll = br#"{"request":"enroll","hoa":"fd00::1","generation":null}"#;
        assert!(decode::<Ims>(enroll).is_ok());
        assert_eq!(
            decode::<Agent>(enroll),
            Err("This is an agent, no mapping server".to_owned())
        );
    }

    #[test]
    fn every_role_knows_status_by_the_same_line() {
        let line = br#"{"request":"status"}"#;
        assert_eq!(decode::<Agent>(line), Ok(Agent::Status));
        assert_eq!(decode::<Relay>(line), Ok(Relay::Status));
        assert_eq!(decode::<Mcs>(line), Ok(Mcs::Status));
        assert_eq!(decode::<Ims>(line), Ok(Ims::Status));
    }

    #[test]
    fn request_of_no_role_is_named() {
        let error = decode::<Mcs>(br#"{"request":"reboot"}"#).unwrap_err();
        assert!(error.contains("unknown variant `reboot`"), "{error}");
    }
}
