//! Connections between agents: TCP port 47411, TLS 1.3 with certificates on both sides.
//!
//! Each peer has one persistent connection, dialed by either side on demand. The DNS name in its
//! certificate identifies a peer. A peer is admitted if the configuration names it or a pattern of
//! `admit` matches its name. Every other connection is refused, counted by reason, and logged once
//! a minute.
//!
//! Each side checks the other's [role](crate::role) before it reads anything: the acceptor admits
//! the roles that have a reason to connect, the dialer only the role that it dialed for. Each frame
//! must be of a message type that the peer's role may send; the check precedes the decoding of the
//! body.
//!
//! ```text
//!   connect()            TCP, TLS, verdict "accepted"
//! Idle ------> Dialing ------------------------------> Up --- lost ---> Idle (Down)
//!   |            |  \                                   ^
//!   |            |   `-- refused, unreachable --> Idle (Down)
//!   |            `------ peer dialed too, see below --->|
//!   `------------------- peer dialed ------------------>'
//! ```
//!
//! When two agents dial each other at the same time, the connection dialed by the agent whose name
//! sorts first is kept. The acceptor decides in its verdict frame, before any other frame is sent,
//! so the choice loses no frame. A peer that dials although its connection seems up has lost the
//! connection (its host crashed); the new connection replaces the old one.

mod accept;
mod admission;
mod command;
mod connection;
mod counters;
mod dial;
mod handshakes;
mod manager;
mod reload;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use common::signal::PORT;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use time::OffsetDateTime;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio_util::sync::{CancellationToken, DropGuard};

#[cfg(feature = "agent")]
use super::relays::FoundRelay;
use super::tls::Tls;
use crate::glob::Glob;
use crate::proto::PeerEvent;
use crate::role::Role;
use admission::Admission;
use counters::Counters;

/// Time limit for each of TCP, TLS and verdict.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// `TCP_USER_TIMEOUT`: the kernel closes the connection after this time with unacknowledged data.
const USER_TIMEOUT: Duration = Duration::from_secs(8);
/// Idle time before the first keepalive probe; the next ones follow at [`KEEPALIVE_INTERVAL`].
const KEEPALIVE_TIME: Duration = Duration::from_secs(3);
/// Interval between unanswered keepalive probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Time within which an accepted connection must send its first TLS bytes.
const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(1);

/// Length of the kernel's accept queue.
const BACKLOG: i32 = 128;

/// Capacity of the event channel; a full channel blocks the peers' connections.
pub const MAX_EVENTS: usize = 16;

/// Sender of the peers' events.
///
/// The channel is bounded: a slow receiver slows the peers down through TCP flow control.
pub type PeerEventSender = mpsc::Sender<FromPeer>;

/// An event of a peer. Each peer has at most one frame in the channel, of up to
/// [`common::signal::MAX_FRAME_BYTES`], 4 MiB: its connection reads the next frame after this value
/// is dropped.
#[derive(Debug)]
pub struct FromPeer {
    /// DNS name of the peer in lower case; for a relay its [`FoundRelay::id`].
    pub peer: String,
    /// Connection up, connection down, or a frame.
    pub event: PeerEvent,
    /// Permit that the peer's connection waits for before it reads the next frame.
    _place: Option<OwnedSemaphorePermit>,
}

/// Configuration of the peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeersConfig {
    /// This agent's name: the DNS name in its certificate.
    pub name: String,
    /// Address and TCP port to listen on.
    pub listen: SocketAddr,
    /// Configured peers, by DNS name.
    pub peers: BTreeMap<String, Endpoint>,
    /// Patterns for the names of other peers that may connect; in lower case, like the names taken
    /// from certificates.
    pub admit: Vec<Glob>,
    /// Source address for connections to relays: relays send the streams to this address.
    pub relays_from: Option<Ipv6Addr>,
}

/// Role and address of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Role that the peer's certificate must have.
    pub role: Role,
    /// `host:port` or `[address]:port` to dial; without a port, [`PORT`].
    pub address: String,
}

impl Default for PeersConfig {
    fn default() -> Self {
        Self {
            name: String::new(),
            listen: SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, PORT, 0, 0).into(),
            peers: BTreeMap::new(),
            admit: Vec::new(),
            relays_from: None,
        }
    }
}

/// Why the peers cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum PeersError {
    /// The listening socket cannot be opened.
    #[error(
        "Cannot listen for agents on TCP {address}: {error}; stop what else uses the port, or change `listen`"
    )]
    Listen {
        /// Address of the `listen` setting.
        address: SocketAddr,
        /// Error of the kernel.
        error: io::Error,
    },
    /// The configuration lists this agent as its own peer.
    #[error("The peer `{name}` is this agent itself; remove it from the peers")]
    OwnName {
        /// DNS name of this agent.
        name: String,
    },
    /// The name of a peer is not a DNS name, so no certificate can contain it.
    #[error("The peer name `{name}` is not a DNS name; use the name in the peer's certificate")]
    InvalidName {
        /// Key of the peer in the configuration.
        name: String,
    },
}

/// The connections to all peers. Dropping the value closes them.
#[derive(Debug)]
pub struct Peers {
    shared: Arc<Shared>,
    commands: mpsc::UnboundedSender<command::Command>,
    local_address: SocketAddr,
    _stop: DropGuard,
}

/// State shared by all tasks of [`Peers`].
#[derive(Debug)]
struct Shared {
    config: PeersConfig,
    /// Literal IP addresses among the addresses of `config.peers`.
    configured: BTreeSet<IpAddr>,
    /// Role of this host.
    role: Role,
    tls: RwLock<Tls>,
    counters: Counters,
    admission: Mutex<Admission>,
    /// Relays by [`FoundRelay::id`].
    relays: Mutex<BTreeMap<String, Target>>,
    stop: CancellationToken,
}

/// A peer or relay to dial.
#[derive(Clone, Debug)]
struct Target {
    /// DNS name that its certificate must contain.
    name: String,
    /// Role that its certificate must have, and address to dial.
    endpoint: Endpoint,
}

impl Shared {
    /// Returns the target for a configured peer or a known relay.
    fn target(&self, peer: &str) -> Option<Target> {
        if let Some(endpoint) = self.config.peers.get(peer) {
            return Some(Target {
                name: peer.to_owned(),
                endpoint: endpoint.clone(),
            });
        }
        self.relays
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(peer)
            .cloned()
    }

    /// Whether a configured peer has this address, or an authenticated peer has connected from it.
    fn is_known(&self, address: IpAddr) -> bool {
        self.configured.contains(&address) || self.admission().is_known(address)
    }

    /// Counts a refusal, and logs it unless the same one was logged within the last minute.
    fn refuse(&self, who: &str, refusal: counters::Refusal, detail: &str) {
        self.counters.add(refusal);
        if self
            .admission()
            .log_now(&format!("{who} {}", refusal.as_str()))
        {
            tracing::warn!(
                peer = who,
                reason = refusal.as_str(),
                detail,
                "Refused a connection"
            );
        }
    }

    /// A copy of the current TLS configuration; a reload replaces the configuration.
    fn tls(&self) -> Tls {
        self.tls
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn admission(&self) -> std::sync::MutexGuard<'_, Admission> {
        self.admission
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Peers {
    /// Starts to listen. Must be called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// See [`PeersError`].
    pub fn start(
        mut config: PeersConfig,
        tls: Tls,
        events: PeerEventSender,
    ) -> Result<Self, PeersError> {
        config.name.make_ascii_lowercase();
        config.peers = config
            .peers
            .into_iter()
            .map(|(name, endpoint)| (name.to_ascii_lowercase(), endpoint))
            .collect();
        if config.peers.contains_key(&config.name) {
            return Err(PeersError::OwnName { name: config.name });
        }
        if let Some(name) = config
            .peers
            .keys()
            .find(|name| rustls_pki_types::DnsName::try_from(name.as_str()).is_err())
        {
            return Err(PeersError::InvalidName { name: name.clone() });
        }
        let address = config.listen;
        let failed = |error| PeersError::Listen { address, error };
        let listener = listen(address).map_err(failed)?;
        let local_address = listener.local_addr().map_err(failed)?;
        let stop = CancellationToken::new();
        let places = config.peers.values();
        let configured = places
            .filter_map(|peer| dial::literal(&peer.address))
            .map(|address| address.ip().to_canonical())
            .collect();
        let shared = Arc::new(Shared {
            config,
            configured,
            role: tls.role,
            tls: RwLock::new(tls),
            counters: Counters::default(),
            admission: Mutex::default(),
            relays: Mutex::default(),
            stop: stop.clone(),
        });
        let (commands, inbox) = mpsc::unbounded_channel();
        tokio::spawn(manager::run(
            Arc::clone(&shared),
            commands.clone(),
            inbox,
            events,
        ));
        tokio::spawn(reload::run(Arc::clone(&shared)));
        tokio::spawn(accept::run(Arc::clone(&shared), listener, commands.clone()));
        Ok(Self {
            shared,
            commands,
            local_address,
            _stop: stop.drop_guard(),
        })
    }

    /// Returns the address that the listening socket is bound to.
    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// Replaces the set of relays that may be dialed besides the configured peers. Connections to
    /// relays no longer in the set stay until they end.
    #[cfg(feature = "agent")]
    pub fn set_relays(&self, relays: &[FoundRelay]) {
        let targets = relays.iter().map(|relay| {
            let target = Target {
                name: relay.name.clone(),
                endpoint: Endpoint {
                    role: Role::Relay,
                    address: relay.address.clone(),
                },
            };
            (relay.id.clone(), target)
        });
        let mut known = self
            .shared
            .relays
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *known = targets.collect();
    }

    /// Connects to a configured peer or a known relay. [`PeerEvent::Up`] or [`PeerEvent::Down`]
    /// follows; `Up` follows at once for an existing connection.
    pub fn connect(&self, peer: &str) {
        self.command(command::Command::Connect(peer.to_ascii_lowercase()));
    }

    /// Sends a frame to a connected peer. [`PeerEvent::Down`] follows if the peer is not connected
    /// or does not read its frames.
    pub fn send(&self, peer: &str, bytes: Vec<u8>) {
        self.command(command::Command::Send(peer.to_ascii_lowercase(), bytes));
    }

    /// Days until this host's certificate expires; `None` unless the end is near enough to be
    /// reported.
    pub fn certificate_ends_in_days(&self) -> Option<i64> {
        let days = self.shared.tls().days_left(OffsetDateTime::now_utc());
        days.filter(|days| *days < reload::WARN_DAYS)
    }

    /// Returns (name, count) of the connections accepted, dialed, lost, and refused by reason.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.counters.read()
    }

    fn command(&self, command: command::Command) {
        // Fails only after the manager has ended: at shutdown, or when nobody reads events.
        let _ = self.commands.send(command);
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Makes the kernel notice a dead peer within about ten seconds.
fn set_timeouts(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_TIME)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(3),
    )?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))
}
