//! The control socket: one JSON request on a line, one JSON answer on a line.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Ipv6Addr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::report::NodeStatus;
use crate::identifier::Scheme;

/// The socket.
pub(crate) const SOCKET: &str = "/run/migkick/node.sock";
/// Longest request, bytes.
pub(super) const MAX_REQUEST_BYTES: usize = 4096;
/// Longest answer, bytes: a node with all its peers.
const MAX_ANSWER_BYTES: u64 = 16 * 1024 * 1024;
/// How long the node may take. In a VM that is busy with its streams it waits long for the processor,
/// and a move is not given up for that.
const PATIENCE: Duration = Duration::from_secs(20);

/// What the node is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    /// How it is.
    Status,
    /// Prepare for a move.
    Prepare(Prepare),
    /// Whether all correspondents in use know the prepared address.
    Known,
    /// The agents know that the VM is prepared; asked again while it is being moved.
    Ready {
        /// Whether the switch is near.
        near: bool,
    },
    /// The move is off.
    Aborted {
        /// Whether that is because another node has the new address.
        taken: bool,
    },
    /// How the move ends is not known: if the VM does not arrive soon it is off.
    Lost,
    /// The agents say that the VM is there.
    Completed,
    /// Take the data path away and end.
    Stop,
}

/// Where a move goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Prepare {
    /// Name of the idle NIC.
    pub(crate) interface: String,
    /// Prefix of the destination's network.
    pub(crate) prefix: Ipv6Addr,
    /// Its length, bits.
    pub(crate) length: u8,
    /// DstAgent.
    pub(crate) agent: Ipv6Addr,
    /// First router there, if it is known.
    pub(crate) router: Option<Ipv6Addr>,
    /// How the address is made.
    pub(crate) identifier: Scheme,
    /// Secret for that; that of the machine without one.
    pub(crate) secret: Option<String>,
}

/// What a prepared node says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Prepared {
    /// MoA at the destination.
    pub(crate) address: Ipv6Addr,
    /// MAC of the idle NIC.
    pub(crate) mac: [u8; 6],
    /// MoAs that are left.
    pub(crate) forward: Vec<Ipv6Addr>,
    /// How long they are to be forwarded, seconds.
    pub(crate) forward_s: u32,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// Done.
    Done,
    /// How the node is.
    Status(Box<NodeStatus>),
    /// The node is prepared.
    Prepared(Prepared),
    /// Whether all correspondents in use know the prepared address.
    Known(bool),
    /// Another node has the prepared address: the node has to prepare once more, with another one.
    Taken,
    /// The node expects to be moved.
    Ready {
        /// Whether what the VM still sends from its old addresses may be translated.
        translate: bool,
    },
    /// It is not done; one sentence says why.
    Error(String),
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ControlError {
    /// There is no node.
    #[error("No `migkick node` runs here; start it with `systemctl start migkick-node`")]
    NoNode,
    /// The socket is root's.
    #[error("The node takes orders from root only; run migkick as root")]
    NotRoot,
    /// The node has not answered.
    #[error("The node has not answered; see its log")]
    Io(#[source] io::Error),
    /// The answer is not one.
    #[error("The node has answered what this migkick does not understand; restart it")]
    Answer,
    /// The node refuses.
    #[error("{0}")]
    Refused(String),
    /// Other nodes have all addresses that were tried.
    #[error("A mapping server says that other nodes have {0} and those before; see its log")]
    Taken(Ipv6Addr),
}

/// Asks the node behind `socket`.
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
