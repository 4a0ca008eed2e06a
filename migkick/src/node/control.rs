//! Protocol of the control socket: one JSON request per line, one JSON answer per line.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Ipv6Addr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::report::NodeStatus;
use crate::identifier::Scheme;

/// Default path of the control socket.
pub(crate) const SOCKET: &str = "/run/migkick/node.sock";
/// Longest request, bytes.
pub(super) const MAX_REQUEST_BYTES: usize = 4096;
/// Longest answer, bytes: the status of a node with the maximum of peers.
const MAX_ANSWER_BYTES: u64 = 16 * 1024 * 1024;
/// Longest wait for the node's answer. In a busy VM the node may wait long for a CPU, and a
/// migration must not fail because of that.
const PATIENCE: Duration = Duration::from_secs(20);

/// A request to the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    /// Asks for the status.
    Status,
    /// Asks the node to prepare for a migration.
    Prepare(Prepare),
    /// Asks whether all correspondents in use know the prepared address.
    Known,
    /// Tells the node that the agents know that the VM is ready; repeated during the migration.
    Ready {
        /// Whether the switch is near.
        near: bool,
    },
    /// Tells the node that the migration is off.
    Aborted {
        /// Whether another node has the new address.
        taken: bool,
    },
    /// Tells the node that the outcome is unknown: without an early arrival the migration is off.
    Lost,
    /// Tells the node that the agents have reported the arrival.
    Completed,
    /// Asks the node to remove the data path and end.
    Stop,
}

/// Destination of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Prepare {
    /// Name of the idle NIC.
    pub(crate) interface: String,
    /// Prefix of the destination's network.
    pub(crate) prefix: Ipv6Addr,
    /// Length of the prefix, bits.
    pub(crate) length: u8,
    /// Address of DstAgent.
    pub(crate) agent: Ipv6Addr,
    /// First router of the destination's network, when known.
    pub(crate) router: Option<Ipv6Addr>,
    /// Scheme for the interface identifier.
    pub(crate) identifier: Scheme,
    /// Secret for the scheme; the machine's without one.
    pub(crate) secret: Option<String>,
}

/// Result of a preparation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Prepared {
    /// MoA at the destination.
    pub(crate) address: Ipv6Addr,
    /// MAC of the idle NIC.
    pub(crate) mac: [u8; 6],
    /// MoAs that the VM leaves.
    pub(crate) forward: Vec<Ipv6Addr>,
    /// Duration of their forwarding, seconds.
    pub(crate) forward_s: u32,
}

/// Answer of the node to a [`Request`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// The node has carried out the request.
    Done,
    /// Status of the node.
    Status(Box<NodeStatus>),
    /// The node has prepared for the migration.
    Prepared(Prepared),
    /// Whether all correspondents in use know the prepared address.
    Known(bool),
    /// Another node has the prepared address: the client has to prepare once more, with another one.
    Taken,
    /// The node expects the migration.
    Ready {
        /// Whether the agents may translate packets from the VM's old addresses.
        translate: bool,
    },
    /// The node refuses, with one sentence of explanation.
    Error(String),
}

/// Why the node gave no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    /// No node runs here.
    #[error("No `migkick node` runs here; start it with `systemctl start migkick-node`")]
    NoNode,
    /// The caller is not root.
    #[error("The node takes orders from root only; run migkick as root")]
    NotRoot,
    /// The node did not answer.
    #[error("The node has not answered; see its log")]
    Io(#[source] io::Error),
    /// The answer is malformed.
    #[error("The node has answered what this migkick does not understand; restart it")]
    Answer,
    /// The node refuses, with one sentence of explanation.
    #[error("{0}")]
    Refused(String),
    /// Other nodes have all addresses that were tried.
    #[error("A mapping server says that other nodes have {0} and those before; see its log")]
    Taken(Ipv6Addr),
}

/// Sends a request to the node behind `socket`; returns the answer.
pub(crate) fn ask(socket: &Path, request: &Request) -> Result<Answer, ControlError> {
    let stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ControlError::NoNode,
        io::ErrorKind::PermissionDenied => ControlError::NotRoot,
        _ => ControlError::Io(error),
    })?;
    let line = exchange(&stream, request).map_err(ControlError::Io)?;
    match serde_json::from_str(&line) {
        Ok(Answer::Error(reason)) => Err(ControlError::Refused(reason)),
        Ok(answer) => Ok(answer),
        Err(_) => Err(ControlError::Answer),
    }
}

fn exchange(stream: &UnixStream, request: &Request) -> io::Result<String> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut bytes = serde_json::to_vec(request)?;
    bytes.push(b'\n');
    let mut writer = stream;
    writer.write_all(&bytes)?;
    let mut line = String::new();
    BufReader::new(stream.take(MAX_ANSWER_BYTES)).read_line(&mut line)?;
    Ok(line)
}
