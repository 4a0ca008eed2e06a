//! Connections of the signalling: TCP port 47411, TLS 1.3 with certificates on both sides.
//!
//! One persistent connection per peer, dialed on demand and whoever dialed it. A peer is known by
//! the DNS name in its certificate and admitted when the configuration names it, or a pattern of
//! `admit` matches it. Everything else is refused, counted by reason and logged once a minute.
//!
//! Either side looks at the other's [role](crate::role) before it reads anything: who accepts takes the roles
//! that have a reason to connect, who dials takes the one that it dialed for. Each frame then has to be of
//! a message that the peer's role may send; its body is not decoded before.
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
//! When two agents dial each other at once, the connection dialed by the one whose name sorts
//! first is kept. The acceptor decides, in its verdict frame, before any other frame is sent, so no
//! frame is lost to the choice. A peer that dials although it seems connected has lost the old
//! connection (its host died), and the new one replaces it.

mod accept;
mod admission;
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

/// Time for TCP, TLS and verdict each; a connection that takes longer is given up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Unacknowledged data for so long means that the peer is gone.
const USER_TIMEOUT: Duration = Duration::from_secs(8);
/// An idle peer is probed after so long, again at [`KEEPALIVE_INTERVAL`].
const KEEPALIVE_TIME: Duration = Duration::from_secs(3);
/// Between two unanswered probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(2);
/// Time that somebody who has connected has to begin with TLS.
const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(1);

/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 128;

/// Events of peers that wait to be handled; more make the peers wait.
pub const MAX_EVENTS: usize = 16;

/// Where events go.
///
/// The channel is bounded: a receiver that is slow slows the peers down, by TCP.
pub type PeerEventSender = mpsc::Sender<FromPeer>;

/// What has happened with a peer. Of each there is one frame at a time, of
/// [`common::signal::MAX_FRAME_BYTES`], 4 MiB, at most: the next is read once this is dropped.
#[derive(Debug)]
pub struct FromPeer {
    /// Its name.
    pub peer: String,
    /// What has happened.
    pub event: PeerEvent,
    /// The peer's place for a frame.
    _place: Option<OwnedSemaphorePermit>,
}

/// Which peers there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeersConfig {
    /// This agent's name: the DNS name in its certificate.
    pub name: String,
    /// Where to listen.
    pub listen: SocketAddr,
    /// Peers by name.
    pub peers: BTreeMap<String, Endpoint>,
    /// Names that may connect although they are not in `peers`; in lower case, as names in
    /// certificates are taken.
    pub admit: Vec<Glob>,
    /// Where relays are dialed from: they send streams to that address.
    pub relays_from: Option<Ipv6Addr>,
}

/// What a peer is, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its role.
    pub role: Role,
    /// Where to dial it: `host:port`, `[address]:port`, or either without port for [`PORT`].
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

/// Why peers cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum PeersError {
    /// The listening socket could not be made.
    #[error(
        "Cannot listen for agents on TCP {address}: {error}; stop what else uses the port, or change `listen`"
    )]
    Listen {
        /// Where.
        address: SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
    /// This agent is its own peer.
    #[error("The peer `{name}` is this agent itself; remove it from the peers")]
    OwnName {
        /// The name.
        name: String,
    },
    /// A peer's name cannot be in a certificate.
    #[error("The peer name `{name}` is not a DNS name; use the name in the peer's certificate")]
    InvalidName {
        /// The name.
        name: String,
    },
}

/// The connections to all peers. Dropping it closes them.
#[derive(Debug)]
pub struct Peers {
    shared: Arc<Shared>,
    commands: mpsc::UnboundedSender<manager::Command>,
    local_address: SocketAddr,
    _stop: DropGuard,
}

/// What all tasks of [`Peers`] share.
#[derive(Debug)]
struct Shared {
    config: PeersConfig,
    /// Addresses in `config` where peers are dialed.
    configured: BTreeSet<IpAddr>,
    /// What this host is.
    role: Role,
    tls: RwLock<Tls>,
    counters: Counters,
    admission: Mutex<Admission>,
    /// Relays by the names of their connections.
    relays: Mutex<BTreeMap<String, Target>>,
    stop: CancellationToken,
}

/// Whom to dial.
#[derive(Clone, Debug)]
struct Target {
    /// Name in its certificate.
    name: String,
    /// Its role, and where it listens.
    endpoint: Endpoint,
}

impl Shared {
    /// Whom a peer's name stands for, if it may be dialed.
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

    /// Whether a configured peer is to come from an address, or a peer has come from there before.
    fn is_known(&self, address: IpAddr) -> bool {
        self.configured.contains(&address) || self.admission().is_known(address)
    }

    /// Refuses somebody: counts it, and logs it unless the same was logged within the minute.
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

    /// The certificates in use.
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
    /// Starts to listen, and to dial when asked. Must be called in a tokio runtime.
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

    /// Where it listens.
    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// Makes these the relays that may be dialed, besides the peers of the configuration.
    /// Connections to others stay until they end.
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

    /// Connects to a peer named in the configuration or to a relay; answered by [`PeerEvent::Up`] or
    /// [`PeerEvent::Down`], at once by `Up` where it is connected already.
    pub fn connect(&self, peer: &str) {
        self.command(manager::Command::Connect(peer.to_ascii_lowercase()));
    }

    /// Sends a frame to a connected peer. Where it is not connected, or does not read what is sent
    /// to it, [`PeerEvent::Down`] comes.
    pub fn send(&self, peer: &str, bytes: Vec<u8>) {
        self.command(manager::Command::Send(peer.to_ascii_lowercase(), bytes));
    }

    /// For how many days this host's certificate is still good, if that is little enough to be told.
    pub fn certificate_ends_in_days(&self) -> Option<i64> {
        let days = self.shared.tls().days_left(OffsetDateTime::now_utc());
        days.filter(|days| *days < reload::WARN_DAYS)
    }

    /// How many connections were accepted, dialed, lost, and refused by reason: (name, number).
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.counters.read()
    }

    fn command(&self, command: manager::Command) {
        // The manager ends only with the runtime, or when nobody reads events any more.
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

/// Has the kernel notice a dead peer within about ten seconds.
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
