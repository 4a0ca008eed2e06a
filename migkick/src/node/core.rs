//! The protocol of a MAT node, sans-IO: without clock, sockets and maps.
//!
//! The messages are those of [`common::mat`]. Datagrams may be lost, duplicated, reordered,
//! replayed and forged; the network may fail at any time, and both sides may move at the same time.
//! The core therefore repeats every request, counts every answer once, and refreshes every belief
//! while it is in use.
//!
//! ```text
//!              frame for it, or its Alert or Echo
//!  (unknown) -----------------------------------> looking up --no server knows it--> unknown, refused
//!                                                     | LookupReply
//!                                                     v
//!      +---------------------------------------- verifying: Echo to the desired MoA
//!      |                                              | EchoReply
//!      | other MoA: Alert, re-read, no EchoReply      v
//!      +------------------------------------------- known: data goes to the MoA
//! ```
//!
//! The caller passes inputs to the `handle_*` methods and the methods of a migration, drains
//! [`Core::poll_output`], and calls [`Core::handle_timeout`] at [`Core::poll_timeout`]. Times count
//! from an arbitrary fixed moment on a monotonic clock.
//!
//! | module | contents |
//! |---|---|
//! | `registration` | updates of the node's mapping at every server |
//! | `place` | choice of the active address |
//! | `moves` | a migration: standby, arrival, end |
//! | `lookup` | mappings of peers: requests to the nearest server |
//! | `peer` | state of a peer, and held frames |
//! | `alert` | alerts and echoes between peers |

mod alert;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod lookup;
mod moves;
mod peer;
mod place;
mod registration;
#[cfg(test)]
mod tests;
mod types;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use common::mat::entropy::Entropy;
use common::mat::key::Key;
use common::mat::message::MatMessage;
use common::mat::seal::{Keying, Sealed, seal};

use common::rate::Bucket;
use moves::Move;
use peer::Peer;
use place::Left;
use registration::Server;

pub(crate) use peer::Used;
pub(crate) use types::*;

/// State machine of a node.
#[derive(Debug)]
pub(crate) struct Core {
    identity: Identity,
    timing: Timing,
    entropy: Entropy,
    /// Sequence number of the last update, and of the last update with other MoAs.
    sequence: u64,
    changed_sequence: u64,
    servers: Vec<Server>,
    /// NICs and their usable addresses, in order of preference.
    nics: Vec<NicState>,
    active: Option<Place>,
    /// A better place than the active one, which stays active until all peers know the candidate.
    candidate: Option<Place>,
    /// Sequence number of the first mapping with each own address.
    told: BTreeMap<Ipv6Addr, u64>,
    /// Place prepared for a migration.
    standby: Option<Place>,
    /// Places that migrations have left.
    left: Vec<Left>,
    /// Addresses that were to be replaced since all servers took the mapping.
    replaced: BTreeSet<Ipv6Addr>,
    movement: Option<Move>,
    peers: BTreeMap<Ipv6Addr, Peer>,
    /// Number of held frames over all peers.
    held: usize,
    /// Rate limit of lookups for applications and for unauthenticated messages.
    own_lookups: Bucket,
    foreign_lookups: Bucket,
    refusals: Bucket,
    counters: Counters,
    outputs: VecDeque<Output>,
}

impl Core {
    /// Starts a node; `epoch_ms` is time zero in milliseconds since 1970.
    pub(crate) fn new(
        identity: Identity,
        timing: Timing,
        saved: Saved,
        epoch_ms: u64,
        entropy: Entropy,
    ) -> Self {
        let first = timing.update.0;
        let server = |address: &SocketAddrV6| Server::new(*address, epoch_ms, first);
        let servers = identity.servers.iter().map(server).collect();
        // Without saved state, the clock exceeds the sequence numbers of earlier runs.
        let sequence = saved.sequence.max(epoch_ms);
        let mut core = Self {
            identity,
            timing,
            entropy,
            sequence,
            changed_sequence: sequence,
            servers,
            nics: Vec::new(),
            active: None,
            candidate: None,
            told: BTreeMap::new(),
            standby: None,
            left: Vec::new(),
            replaced: BTreeSet::new(),
            movement: None,
            peers: BTreeMap::new(),
            held: 0,
            own_lookups: Bucket::new(200, Duration::from_millis(10)),
            foreign_lookups: Bucket::new(64, Duration::from_millis(20)),
            refusals: Bucket::new(100, Duration::from_millis(10)),
            counters: Counters::default(),
            outputs: VecDeque::new(),
        };
        core.restore(saved);
        core
    }

    /// Handles a datagram on a socket of the node.
    pub(crate) fn handle_datagram(&mut self, now: Duration, received: Received) {
        self.datagram(now, received, true);
    }

    /// Handles a datagram. `may_wait` is false after the datagram has waited for a key.
    fn datagram(&mut self, now: Duration, received: Received, may_wait: bool) {
        let Ok(sealed) = Sealed::parse(&received.bytes) else {
            self.counters.malformed += 1;
            return;
        };
        let hoa = Ipv6Addr::from(sealed.hoa);
        match sealed.keying {
            Keying::Node => {
                let is_server = |it: &Server| registration::same_host(it.address, received.from);
                if hoa != self.identity.hoa || !self.servers.iter().any(is_server) {
                    self.counters.unexpected += 1;
                    return;
                }
                let key = self.identity.key;
                if let Some((transaction, message)) = self.open(&sealed, &key) {
                    self.handle_server(now, &received, transaction, message);
                }
            }
            Keying::Pair => {
                if !self.is_peer(hoa) {
                    self.counters.unexpected += 1;
                    return;
                }
                let Some(key) = self.peers.get(&hoa).and_then(|peer| peer.key) else {
                    if may_wait {
                        self.keep_for_key(now, hoa, received);
                    }
                    return;
                };
                match self.open(&sealed, &key) {
                    Some((transaction, message)) => {
                        self.handle_peer(now, hoa, &received, transaction, message);
                        self.candidate_due(now);
                    }
                    // Either node may have a new enrolment, and with it a new key at the servers.
                    None if may_wait => self.keep_for_key(now, hoa, received),
                    None => {}
                }
            }
        }
    }

    fn open(&mut self, sealed: &Sealed<'_>, key: &Key) -> Option<(u64, MatMessage)> {
        let Ok(bytes) = sealed.open(key) else {
            self.counters.forged += 1;
            return None;
        };
        let message = MatMessage::decode(&bytes).ok();
        if message.is_none() {
            self.counters.malformed += 1;
        }
        message
    }

    fn handle_server(
        &mut self,
        now: Duration,
        received: &Received,
        transaction: u64,
        message: MatMessage,
    ) {
        match message {
            MatMessage::UpdateReply(reply) => {
                self.handle_update_reply(now, received.from, transaction, &reply);
            }
            MatMessage::LookupReply(reply) => {
                if !self.handle_check(now, received.local, transaction) {
                    self.handle_lookup_reply(now, received.from, transaction, reply);
                }
            }
            _ => self.counters.unexpected += 1,
        }
    }

    /// Runs all due timers. Extra calls do nothing.
    pub(crate) fn handle_timeout(&mut self, now: Duration) {
        self.update_due(now);
        self.moves_due(now);
        self.place_due(now);
        self.lookups_due(now);
        self.alerts_due(now);
        self.peers_due(now);
        self.candidate_due(now);
    }

    /// When to call [`Core::handle_timeout`].
    pub(crate) fn poll_timeout(&self) -> Option<Duration> {
        let peers = self
            .peers
            .values()
            .filter_map(|peer| self.peer_timeout(peer));
        let own = [
            self.update_timeout(),
            self.moves_timeout(),
            self.place_timeout(),
        ];
        peers.chain(own.into_iter().flatten()).min()
    }

    /// Returns the next output.
    pub(crate) fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Returns the status for `migkick node status`.
    pub(crate) fn status(&self, now: Duration) -> Status {
        Status {
            hoa: self.identity.hoa,
            ifindex: self.active.map(|it| it.ifindex),
            moa: self.active.map(|it| it.moa),
            standby: self.standby.map(|it| it.moa),
            left: self.left.iter().map(|it| it.place.moa).collect(),
            stage: self.movement.as_ref().map(|it| it.stage),
            sequence: self.sequence,
            registered: self.is_registered(),
            servers: self.server_status(),
            peers: self.peer_status(now),
            counters: self.counters,
        }
    }

    /// Whether the address may be the HoA of a peer.
    fn is_peer(&self, hoa: Ipv6Addr) -> bool {
        let (prefix, length) = self.identity.home;
        let host = u128::MAX.checked_shr(length.into()).unwrap_or(0);
        hoa != self.identity.hoa && (hoa.to_bits() ^ prefix.to_bits()) & !host == 0
    }

    fn seal(
        &mut self,
        keying: Keying,
        key: &Key,
        from: Ipv6Addr,
        to: SocketAddrV6,
        transaction: u64,
        message: &MatMessage,
    ) {
        let Some(nonce) = self.entropy.nonce() else {
            self.counters.no_random_numbers += 1;
            return;
        };
        let hoa = self.identity.hoa.octets();
        let bytes = seal(keying, hoa, key, nonce, &message.encode(transaction));
        self.outputs.push_back(Output::Transmit { from, to, bytes });
    }
}
