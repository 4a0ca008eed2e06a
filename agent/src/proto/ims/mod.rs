//! Mapping server of MAT (`roamcast ims`), without I/O: the MoAs of each HoA.
//!
//! Implements draft-inayat-mat-00 §3.4, 4.2 and 4.3, with the messages of [`common::mat::message`].
//!
//! ```text
//!   datagram -> opened with the key of its HoA? -> UpdateRequest -> Write -> stored -> UpdateReply
//!                  | no: counted, no answer     '-> LookupRequest -> LookupReply (from memory)
//! ```
//!
//! [`Ims::handle_datagram`] takes a datagram. [`Ims::poll_writes`] returns the records to store.
//! Lookups see a record, and the server acknowledges the update, only after [`Ims::handle_stored`].
//! [`Ims::poll_reply`] then returns the answers, and [`Ims::poll_timeout`] returns the time at which an
//! entry ends.
//!
//! Servers may share a [`MappingStore`]: every write names the version that it replaces, and
//! [`Ims::handle_change`] takes what others have stored.
//!
//! # Trust
//!
//! A key derives from the servers' secret, the HoA and a generation. Whoever can seal with the key was
//! enrolled by somebody with the secret, so servers need not inform each other. Each server remembers
//! the newest generation of a HoA that the server has seen, and refuses older ones. If a datagram opens
//! with the key of one of up to [`AHEAD`] newer generations, that generation replaces the known one.
//! All registrations of the former key then end.
//!
//! The server only counts a datagram that does not open. Such a datagram never uses a node's allowance:
//! source addresses can be forged, and forged datagrams must not silence a node. For the same reason,
//! all repeated datagrams share one allowance. Newer generations are tried within an allowance, of
//! which each prefix has a share. A flood of forged datagrams thus excludes new nodes only from the
//! flood's own, or claimed, prefix.
//!
//! # Quarantine of addresses
//!
//! A former MoA of a HoA stays closed to other HoAs until the mapping would have ended and every answer
//! with the MoA has expired. A peer that still sends to the MoA must not reach another node.
//!
//! | module | holds |
//! |---|---|
//! | `node` | state of a HoA |
//! | `record` | stored form of the state |
//! | `update` | handling of an update |
//! | `store` | what a store does |
//! | `change` | changes by other servers |
//! | `address` | valid MoAs, and their holders |
//! | `enroll` | generation of a new node |
//! | `io` | inputs and outputs |
//! | `limit` | allowances of sources |
//! | `counter` | counters by reason |

mod address;
mod change;
mod counter;
mod enroll;
mod exchange;
mod io;
mod limit;
mod node;
mod record;
mod store;
#[cfg(any(test, fuzzing))]
pub(in crate::proto) mod tests;
mod update;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::Ipv6Addr;
use std::time::Duration;

use common::mat::entropy::Entropy;
use common::mat::key::Secret;
use common::mat::message::MatMessage;
use tracing::{info, warn};

use super::Timestamp;

pub use counter::Counters;
pub use enroll::{EnrollError, next_generation};
pub use io::{Config, Enrolled, Now, Path, Reply, Write};
pub use record::{FreedMoa, Record, RecordError, Version};
pub use store::{MappingStore, Swapped};

use address::Holders;
use exchange::whole_seconds;
use limit::{Allowance, Repeats, Shared, Sources};
use node::Node;
use update::{Staged, Waiting};

/// HoA in network order.
pub type Hoa = [u8; 16];

/// Number of generations beyond the known one that the server tries.
pub const AHEAD: u32 = 4;
/// Limit of tries of unknown generations per second, since each try costs a key derivation.
const AHEAD_PER_SECOND: u32 = 2000;
/// Tries per second reserved for each prefix.
const AHEAD_SHARE: u32 = 32;
/// Limit of answered repeated datagrams per second, for all senders together.
const REPEATS_PER_SECOND: u32 = 1000;
/// Change of the wall clock against the monotonic clock that counts as a clock set, milliseconds.
const CLOCK_JUMP_MS: u64 = 1000;
/// Minimum time between two warnings of a kind that others can cause.
const WARNING_INTERVAL: Duration = Duration::from_secs(10);

/// State machine of the mapping server.
pub struct Ims {
    config: Config,
    secret: Secret,
    entropy: Entropy,
    nodes: HashMap<Hoa, Node>,
    holders: Holders,
    /// Times at which a mapping or a quarantine of a node ends.
    ends: BTreeSet<(Timestamp, Hoa)>,
    staged: HashMap<Hoa, Staged>,
    waiting: HashMap<Hoa, Waiting>,
    writes: Vec<Write>,
    replies: VecDeque<Reply>,
    enrolled: VecDeque<Enrolled>,
    sources: Sources,
    repeats: Repeats,
    repeat_allowance: Allowance,
    ahead_allowance: Shared,
    /// Wall clock minus monotonic clock, milliseconds.
    clock_offset_ms: Option<u64>,
    old_key_warning: Option<Timestamp>,
    taken_warning: Option<Timestamp>,
    counters: Counters,
}

/// A datagram that opened with its key.
struct Opened {
    hoa: Hoa,
    message: Vec<u8>,
}

impl Ims {
    /// Creates a server without nodes.
    pub fn new(config: Config, secret: Secret, entropy: Entropy) -> Self {
        let sources = Sources::new(config.requests_per_second, config.burst, config.sources);
        Self {
            config,
            secret,
            entropy,
            nodes: HashMap::new(),
            holders: Holders::default(),
            ends: BTreeSet::new(),
            staged: HashMap::new(),
            waiting: HashMap::new(),
            writes: Vec::new(),
            replies: VecDeque::new(),
            enrolled: VecDeque::new(),
            sources,
            repeats: Repeats::default(),
            repeat_allowance: Allowance::new(REPEATS_PER_SECOND, REPEATS_PER_SECOND),
            ahead_allowance: Shared::new(AHEAD_SHARE, AHEAD_PER_SECOND - AHEAD_SHARE),
            clock_offset_ms: None,
            old_key_warning: None,
            taken_warning: None,
            counters: Counters::default(),
        }
    }

    /// Restores the records stored before this start.
    pub fn restore(&mut self, now: Now, records: impl IntoIterator<Item = (Hoa, Record)>) {
        let mut nodes: Vec<(Hoa, Node)> = records
            .into_iter()
            .map(|(hoa, record)| {
                let key = self.secret.node(hoa, record.generation);
                let node = Node::restore(record, key, now, self.config.max_lifetime);
                (hoa, node)
            })
            .collect();
        // A clock that was set back may revive a mapping whose address belongs to another node by now.
        // The mapping that ends first is the older one.
        nodes.sort_by_key(|(_, node)| std::cmp::Reverse(node.until));
        for (hoa, node) in &mut nodes {
            let taken = node.moas.iter().any(|moa| {
                let holder = self.holders.other(&moa.address, hoa, now.monotonic);
                holder.is_some()
            });
            if taken {
                node.moas.clear();
            }
            for moa in &node.moas {
                self.holders.hold(*moa.address, *hoa, node.until);
            }
        }
        for (hoa, mut node) in nodes {
            node.freed.retain(|freed| {
                let holder = self.holders.other(&freed.address, &hoa, now.monotonic);
                holder.is_none()
            });
            self.place(hoa, node);
        }
    }

    /// Decrypts a datagram and answers its request within the sender's allowance.
    pub fn handle_datagram(&mut self, now: Now, path: Path, datagram: &[u8]) {
        self.counters.datagrams += 1;
        let Some(opened) = self.open(now, *path.remote.ip(), datagram) else {
            return;
        };
        let hoa = opened.hoa;
        let Ok((transaction, message)) = MatMessage::decode(&opened.message) else {
            self.counters.malformed += 1;
            return;
        };
        if self.repeats.is_repeated(&hoa, transaction) {
            self.counters.repeated += 1;
            if !self.repeat_allowance.take(now.monotonic) {
                self.counters.rate_limited += 1;
                return;
            }
        } else {
            match self.sources.take(now.monotonic, *path.remote.ip()) {
                Ok(true) => {}
                Ok(false) => {
                    self.counters.rate_limited += 1;
                    return;
                }
                Err(limit::Full) => {
                    self.counters.sources_full += 1;
                    return;
                }
            }
        }
        match message {
            MatMessage::LookupRequest(body) => self.lookup(now, path, hoa, transaction, &body),
            MatMessage::UpdateRequest(body) => {
                let request = Waiting {
                    path,
                    transaction,
                    body,
                };
                self.update(now, hoa, request);
            }
            MatMessage::UpdateReply(_)
            | MatMessage::LookupReply(_)
            | MatMessage::Alert(_)
            | MatMessage::AlertAck(_)
            | MatMessage::Echo(_)
            | MatMessage::EchoReply(_) => self.counters.unexpected += 1,
        }
    }

    /// Enrolls a node or re-enrolls a known one. The generation is the next, or the given one unless
    /// the given one is older. `request` returns in [`Enrolled`].
    ///
    /// # Errors
    ///
    /// [`EnrollError`].
    pub fn enroll(
        &mut self,
        now: Now,
        hoa: Ipv6Addr,
        generation: Option<u32>,
        request: u64,
    ) -> Result<(), EnrollError> {
        let home = self.config.home;
        let octets = hoa.octets();
        let known = self.nodes.get(&octets).map_or(0, |node| node.generation);
        let generation = next_generation(home, hoa, known, generation)?;
        if generation > known {
            self.renew(now, octets, generation);
        }
        self.stage_current(now, octets, Some(request));
        Ok(())
    }

    /// Handles the result of writes: stored or failed.
    pub fn handle_stored(&mut self, now: Now, hoas: &[Hoa], stored: bool) {
        for hoa in hoas {
            self.conclude(now, *hoa, stored);
            self.resume(now, *hoa);
        }
    }

    /// Ends mappings and quarantines due at `now`.
    pub fn handle_timeout(&mut self, now: Now) {
        self.watch_clock(now);
        while let Some((due, hoa)) = self.ends.first().copied() {
            if due > now.monotonic {
                break;
            }
            self.ends.pop_first();
            let Some(node) = self.nodes.get_mut(&hoa) else {
                continue;
            };
            node.due = None;
            let over = node.end(now.monotonic);
            if over.contains_mapping {
                self.counters.mappings_ended += 1;
            }
            // Addresses of a pending write belong to the node already.
            let staged = self.staged.get(&hoa);
            for address in over.addresses {
                if !staged.is_some_and(|staged| staged.holds(&address)) {
                    self.holders.release(&address, &hoa);
                }
            }
            self.schedule(hoa);
        }
    }

    /// Returns the time of the next [`Self::handle_timeout`]; `None` if nothing ends.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        self.ends.first().map(|(due, _)| *due)
    }

    /// Returns the records to store in one batch.
    pub fn poll_writes(&mut self) -> Vec<Write> {
        std::mem::take(&mut self.writes)
    }

    /// Returns the next datagram to send.
    pub fn poll_reply(&mut self) -> Option<Reply> {
        self.replies.pop_front()
    }

    /// Returns the next answer to an operator.
    pub fn poll_enrolled(&mut self) -> Option<Enrolled> {
        self.enrolled.pop_front()
    }

    /// Returns the counters.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Returns the number of known nodes, and the number of nodes with a mapping.
    pub fn counts(&self, now: Timestamp) -> (usize, usize) {
        let living = self.nodes.values().filter(|it| it.lives(now)).count();
        (self.nodes.len(), living)
    }

    /// Starts a new generation of a node; the registrations of the former key end.
    fn renew(&mut self, now: Now, hoa: Hoa, generation: u32) {
        let key = self.secret.node(hoa, generation);
        let quarantine = now.monotonic + self.config.lookup_lifetime;
        let node = match self.nodes.get(&hoa) {
            Some(node) => node.renewed(generation, key, now.monotonic, quarantine),
            None => Node::new(generation, key),
        };
        info!(hoa = %Ipv6Addr::from(hoa), generation, "Node is enrolled");
        self.place(hoa, node);
    }

    /// Inserts a node into all tables.
    fn place(&mut self, hoa: Hoa, mut node: Node) {
        if let Some(old) = self.nodes.get(&hoa) {
            node.due = old.due;
            node.stored = old.stored;
            for (address, _) in old.holds() {
                self.holders.release(&address, &hoa);
            }
        }
        for (address, until) in node.holds() {
            self.holders.hold(address, hoa, until);
        }
        self.nodes.insert(hoa, node);
        self.schedule(hoa);
    }

    /// Updates a node's entry in the table of ends.
    fn schedule(&mut self, hoa: Hoa) {
        let Some(node) = self.nodes.get_mut(&hoa) else {
            return;
        };
        let next = node.next_end();
        if node.due != next {
            if let Some(due) = node.due {
                self.ends.remove(&(due, hoa));
            }
            self.ends.extend(next.map(|due| (due, hoa)));
            node.due = next;
        }
    }

    /// Warns after a change of the wall clock, since the server compares nodes' times with the wall
    /// clock.
    fn watch_clock(&mut self, now: Now) {
        let offset = now.wall_ms.wrapping_sub(now.monotonic.0 / 1_000_000);
        let before = self.clock_offset_ms.replace(offset).unwrap_or(offset);
        let jump_ms = offset.wrapping_sub(before).cast_signed();
        if jump_ms.unsigned_abs() > CLOCK_JUMP_MS {
            self.counters.clock_jumps += 1;
            warn!(
                jump_ms,
                "The clock of this host was set; mappings keep their lifetimes, and nodes whose clocks differ are told the time"
            );
        }
    }
}

/// Returns true if a warning is due, and records the warning.
fn is_due(last: &mut Option<Timestamp>, now: Timestamp) -> bool {
    let due = last.is_none_or(|last| now.since(last) >= WARNING_INTERVAL);
    if due {
        *last = Some(now);
    }
    due
}
