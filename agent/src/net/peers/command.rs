//! What the manager of connections is told.

use std::net::IpAddr;

use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use crate::net::frames::Frames;
use crate::role::Role;

/// Frames above the TLS connection to a peer.
pub(super) type Stream = Box<Frames<TlsStream<TcpStream>>>;

/// Input of the manager; each variant names the peer by its key.
#[derive(Debug)]
pub(super) enum Command {
    /// Request to connect to a peer.
    Connect(String),
    /// Request to send a frame to a peer.
    Send(String, Vec<u8>),
    /// An authenticated peer has dialed this agent.
    Inbound(String, Inbound),
    /// A dialing attempt has ended.
    Dialed {
        /// Key of the peer that was dialed.
        peer: String,
        /// Number of the attempt, as in `Dialing::id`.
        id: u64,
        /// The accepted connection, or the reason of the failure.
        result: Result<(Role, Stream), String>,
    },
    /// A connection has ended.
    Closed {
        /// Key of the peer at the other end.
        peer: String,
        /// `Connection::id` of the connection.
        id: u64,
        /// Sentence for the log and for `PeerEvent::Down`.
        reason: String,
    },
}

/// An authenticated connection that a peer has dialed.
#[derive(Debug)]
pub(super) struct Inbound {
    /// Address that the peer dialed from.
    pub(super) source: IpAddr,
    /// Role in the peer's certificate.
    pub(super) role: Role,
    /// Frames above TLS; the verdict is not sent yet.
    pub(super) stream: Stream,
}
