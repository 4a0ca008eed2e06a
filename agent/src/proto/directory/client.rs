//! Client of a directory: an agent or a relay registers with its migration control servers, and an
//! agent asks the servers for relays.
//!
//! ```text
//!            Connect            Up                Registered
//!  Down --------------> Dialing ----> Registering -----------> Registered --+
//!   ^ ^                   |                ^                       |  ^     | a third of the lease
//!   | +-------- later ----+                +-----------------------+  +-----+
//!   +--------------------------- connection lost ------------------+
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use common::backoff::Backoff;
use common::signal::{DirectoryMessage, KnownRelay, Register, RelaySearch};
use tracing::{info, warn};

use crate::proto::links::peers::RECONNECT;
use crate::proto::refusal::bounded;
use crate::proto::{PeerEvent, Timestamp};

/// Time that a server has to answer before the client asks again.
const ANSWER: Duration = Duration::from_secs(2);
/// Limit of searches that wait for a server.
const MAX_SEARCHES: usize = 4096;

/// Action for the caller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientOutput {
    /// Connect to a server; [`PeerEvent::Up`] or `Down` answers.
    Connect {
        /// Name of the server.
        peer: String,
    },
    /// Send a frame to a connected server.
    Frame {
        /// Name of the server.
        peer: String,
        /// [`DirectoryMessage`], encoded.
        bytes: Vec<u8>,
    },
    /// A server's answer to [`DirectoryClient::search`]; each answering server causes one.
    Found {
        /// Multicast address of the search.
        multicast_address: [u8; 16],
        /// Relays for the address, best first.
        relays: Vec<KnownRelay>,
    },
}

#[derive(Debug)]
struct Server {
    up: bool,
    backoff: Backoff,
    /// Time of the next connection attempt, registration or renewal.
    next: Timestamp,
    /// Addresses of unanswered searches, by transaction.
    asked: BTreeMap<u64, [u8; 16]>,
    registered: bool,
}

impl Server {
    /// Returns an unconnected server; `next` is the time of the next connection attempt.
    fn down(next: Timestamp, backoff: Backoff) -> Self {
        Self {
            up: false,
            backoff,
            next,
            asked: BTreeMap::new(),
            registered: false,
        }
    }
}

/// Client of all configured directories.
#[derive(Debug)]
pub struct DirectoryClient {
    register: Register,
    servers: BTreeMap<String, Server>,
    /// Addresses of searches made while no server was connected.
    waiting: BTreeSet<[u8; 16]>,
    /// Last transaction of a search. Every registration uses transaction 0.
    last_transaction: u64,
    outputs: VecDeque<ClientOutput>,
}

impl DirectoryClient {
    /// Creates a client that registers this host with the named servers; `register` is the message.
    pub fn new(register: Register, servers: impl IntoIterator<Item = String>) -> Self {
        Self {
            register,
            servers: servers
                .into_iter()
                .map(|name| (name, Server::down(Timestamp::default(), RECONNECT)))
                .collect(),
            waiting: BTreeSet::new(),
            last_transaction: 0,
            outputs: VecDeque::new(),
        }
    }

    /// Returns true if a peer is one of the servers. The peer's events then belong to
    /// [`Self::handle_peer`].
    pub fn is_server(&self, peer: &str) -> bool {
        self.servers.contains_key(peer)
    }

    /// Handles an event of a server's connection.
    pub fn handle_peer(&mut self, now: Timestamp, peer: &str, event: PeerEvent) {
        let Some(server) = self.servers.get_mut(peer) else {
            return;
        };
        match event {
            PeerEvent::Up { .. } => {
                server.up = true;
                server.backoff.reset();
                server.next = now;
                for address in std::mem::take(&mut self.waiting) {
                    self.ask(peer, address);
                }
                self.handle_timeout(now);
            }
            PeerEvent::Down { reason } => {
                if server.up || !server.registered {
                    warn!(mcs = peer, %reason, "Migration control server is not connected");
                }
                let delay = server.backoff.delay();
                *server = Server::down(now + delay, server.backoff);
            }
            PeerEvent::Frame(bytes) => self.handle_frame(now, peer, &bytes),
        }
    }

    /// Asks every connected server for relays of an address, or the first server to connect if none is.
    pub fn search(&mut self, multicast_address: [u8; 16]) {
        let up: Vec<String> = self
            .servers
            .iter()
            .filter(|(_, server)| server.up)
            .map(|(name, _)| name.clone())
            .collect();
        if up.is_empty() && self.waiting.len() < MAX_SEARCHES {
            self.waiting.insert(multicast_address);
        }
        for name in up {
            self.ask(&name, multicast_address);
        }
    }

    /// Connects and registers where due.
    pub fn handle_timeout(&mut self, now: Timestamp) {
        for (name, server) in &mut self.servers {
            if server.next > now {
                continue;
            }
            // The answer sets another time; without an answer, the client tries again then.
            server.next = now + ANSWER;
            let peer = name.clone();
            self.outputs.push_back(if server.up {
                let message = DirectoryMessage::from(self.register.clone());
                let bytes = message.encode(0);
                ClientOutput::Frame { peer, bytes }
            } else {
                ClientOutput::Connect { peer }
            });
        }
    }

    /// Returns the time of the next [`Self::handle_timeout`]; `None` without servers.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        self.servers.values().map(|server| server.next).min()
    }

    /// Returns the next output; `None` if none is left.
    pub fn poll_output(&mut self) -> Option<ClientOutput> {
        self.outputs.pop_front()
    }

    /// Returns the servers by name, and whether this host is registered with each.
    pub fn servers(&self) -> impl Iterator<Item = (&str, bool)> {
        self.servers
            .iter()
            .map(|(name, server)| (name.as_str(), server.registered))
    }

    fn ask(&mut self, peer: &str, multicast_address: [u8; 16]) {
        let Some(server) = self.servers.get_mut(peer) else {
            return;
        };
        self.last_transaction += 1;
        while server.asked.len() >= MAX_SEARCHES {
            server.asked.pop_first();
        }
        server
            .asked
            .insert(self.last_transaction, multicast_address);
        let search = RelaySearch {
            multicast_address: multicast_address.into(),
            site: self.register.site.clone(),
        };
        self.outputs.push_back(ClientOutput::Frame {
            peer: peer.to_owned(),
            bytes: DirectoryMessage::from(search).encode(self.last_transaction),
        });
    }

    fn handle_frame(&mut self, now: Timestamp, peer: &str, bytes: &[u8]) {
        let Some(server) = self.servers.get_mut(peer) else {
            return;
        };
        match DirectoryMessage::decode(bytes) {
            Ok((_, DirectoryMessage::Registered(body))) => {
                if !server.registered {
                    info!(mcs = peer, "Registered");
                }
                server.registered = true;
                let third = Duration::from_millis(body.lease_ms) / 3;
                server.next = now + third.max(ANSWER);
            }
            Ok((transaction, DirectoryMessage::RelaySearchReply(body))) => {
                if let Some(multicast_address) = server.asked.remove(&transaction) {
                    self.outputs.push_back(ClientOutput::Found {
                        multicast_address,
                        relays: body.relays,
                    });
                }
            }
            Ok((transaction, DirectoryMessage::Error(error))) => {
                server.asked.remove(&transaction);
                warn!(mcs = peer, reason = %bounded(&error.0.text), "Migration control server refuses");
                if transaction == 0 {
                    server.registered = false;
                    server.next = now + server.backoff.delay().max(ANSWER);
                }
            }
            Ok((_, DirectoryMessage::Register(_) | DirectoryMessage::RelaySearch(_))) => {
                warn!(mcs = peer, "Peer is no migration control server");
            }
            Err(error) => warn!(mcs = peer, %error, "Frame is not understood"),
        }
    }
}
