//! Directory of a migration control server (`roamcast mcs`), without I/O: known agents and relays, and
//! the choice of relays for an agent.
//!
//! ```text
//!             Register (name of its certificate, policy)
//!   unknown ---------------------------------------------> known --+
//!      ^                                                    |  ^   | Register: lease renewed
//!      +--------------------- lease over -------------------+  +---+
//! ```
//!
//! The answer to a `RelaySearch` lists the relays that serve the address. Relays of the asking agent's
//! site come first, and each answer starts with another relay, so agents spread over the relays. The
//! directory vouches only for a relay's address: the connecting agent checks the relay's certificate.

pub mod client;
#[cfg(any(test, fuzzing))]
pub(in crate::proto) mod fuzz;

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::{
    AddressRange, Code, DecodeError, DirectoryMessage, ErrorMessage, KnownRelay, MAX_TEXT_BYTES,
    Reason, Register, Registered, RelaySearch, RelaySearchReply, Role,
};
use tracing::{info, warn};

use super::Timestamp;
use super::refusal::bounded;
use crate::glob::{Glob, any_matches};

/// Limit of relays per answer.
const MAX_ANSWER: usize = 8;
/// Limit of address ranges per relay.
const MAX_RANGES: usize = 32;

/// Configuration of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryConfig {
    /// Name of this server.
    pub name: String,
    /// Lifetime of a registration.
    pub lease: Duration,
    /// Limit of registrations.
    pub capacity: usize,
    /// Patterns for the names that may register as agents, and search.
    pub agents: Vec<Glob>,
    /// Patterns for the names that may register as relays.
    pub relays: Vec<Glob>,
}

/// Frame to send to a connected peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryOutput {
    /// Name of the peer.
    pub peer: String,
    /// [`DirectoryMessage`], encoded.
    pub bytes: Vec<u8>,
}

/// Registration of an agent or a relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// Agent or relay.
    pub role: Role,
    /// Address of the registered host.
    pub address: Ipv6Addr,
    /// Site of the registered host; empty for none.
    pub site: String,
    /// Address ranges that a relay serves; empty for all.
    pub serves: Vec<AddressRange>,
    /// Time of the first registration.
    pub since: Timestamp,
    /// End of the registration without renewal.
    pub until: Timestamp,
}

/// Counts of searches and refusals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectoryCounters {
    /// Searches answered with at least one relay.
    pub found: u64,
    /// Searches without a matching relay.
    pub not_found: u64,
    /// Messages that the policy or a limit forbids.
    pub refused: u64,
    /// Frames that cannot be decoded.
    pub malformed: u64,
}

/// State machine of a migration control server.
#[derive(Debug)]
pub struct Directory {
    config: DirectoryConfig,
    known: BTreeMap<String, Registration>,
    /// Number of answers so far; rotates the order of relays.
    turn: usize,
    outputs: VecDeque<DirectoryOutput>,
    counters: DirectoryCounters,
}

/// Reason of a refusal: one sentence for the peer's log.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("The policy of {server} does not let {peer} register as {role}")]
    Register {
        server: String,
        peer: String,
        role: &'static str,
    },
    #[error("The policy of {server} does not let {peer} search for relays")]
    Search { server: String, peer: String },
    #[error("{server} has no room for more than {capacity} registrations")]
    Full { server: String, capacity: usize },
    #[error("Field {field} of the registration is not acceptable")]
    Field { field: &'static str },
    #[error("{server} is a migration control server and does not understand this message")]
    Foreign { server: String },
}

impl Refusal {
    fn code(&self) -> Code {
        match self {
            Self::Register { .. } | Self::Search { .. } => Code::NOT_PERMITTED,
            Self::Full { .. } => Code::LIMIT,
            Self::Field { .. } => Code::MALFORMED,
            Self::Foreign { .. } => Code::UNSUPPORTED,
        }
    }
}

impl Directory {
    /// Creates a directory without registrations.
    pub fn new(config: DirectoryConfig) -> Self {
        Self {
            config,
            known: BTreeMap::new(),
            turn: 0,
            outputs: VecDeque::new(),
            counters: DirectoryCounters::default(),
        }
    }

    /// Handles a frame of a peer; the peer's certificate gives the name.
    pub fn handle_frame(&mut self, now: Timestamp, peer: &str, bytes: &[u8]) {
        self.handle_timeout(now);
        let (transaction, message) = match DirectoryMessage::decode(bytes) {
            Ok(decoded) => decoded,
            Err(error) => {
                self.counters.malformed += 1;
                warn!(peer, %error, "Frame is not understood");
                if let DecodeError::Version { transaction, .. }
                | DecodeError::UnknownKind { transaction, .. }
                | DecodeError::Text { transaction } = error
                {
                    let reason = Reason::from(&error);
                    self.send(peer, transaction, &ErrorMessage(reason).into());
                }
                return;
            }
        };
        let answer = match message {
            DirectoryMessage::Register(body) => self.register(now, peer, body).map(Into::into),
            DirectoryMessage::RelaySearch(body) => self.search(peer, &body).map(Into::into),
            DirectoryMessage::Error(error) => {
                warn!(peer, reason = %bounded(&error.0.text), "Peer reports an error");
                return;
            }
            DirectoryMessage::Registered(_) | DirectoryMessage::RelaySearchReply(_) => {
                Err(Refusal::Foreign {
                    server: self.config.name.clone(),
                })
            }
        };
        let answer = answer.unwrap_or_else(|refusal| {
            self.counters.refused += 1;
            let reason = Reason::new(refusal.code(), bounded(&refusal.to_string()));
            warn!(peer, %reason, "Message is refused");
            ErrorMessage(reason).into()
        });
        self.send(peer, transaction, &answer);
    }

    /// Removes the expired registrations.
    pub fn handle_timeout(&mut self, now: Timestamp) {
        self.known.retain(|peer, known| {
            if known.until <= now {
                info!(%peer, "Registration is over");
            }
            known.until > now
        });
    }

    /// Returns the time of the next [`Self::handle_timeout`]; `None` without registrations.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        self.known.values().map(|known| known.until).min()
    }

    /// Returns the next output; `None` if none is left.
    pub fn poll_output(&mut self) -> Option<DirectoryOutput> {
        self.outputs.pop_front()
    }

    /// Returns all registrations, by name.
    pub fn registrations(&self) -> impl Iterator<Item = (&str, &Registration)> {
        self.known
            .iter()
            .map(|(name, known)| (name.as_str(), known))
    }

    /// Returns the counts of searches and refusals.
    pub fn counters(&self) -> DirectoryCounters {
        self.counters
    }

    fn register(
        &mut self,
        now: Timestamp,
        peer: &str,
        body: Register,
    ) -> Result<Registered, Refusal> {
        let (allowed, role) = match body.role {
            Role::Agent => (&self.config.agents, "an agent"),
            Role::Relay => (&self.config.relays, "a relay"),
        };
        let server = self.config.name.clone();
        if !any_matches(allowed, peer) {
            let peer = peer.to_owned();
            return Err(Refusal::Register { server, peer, role });
        }
        let address = Ipv6Addr::from(*body.address);
        let field = |field| Err(Refusal::Field { field });
        if address.is_multicast() || address.is_unspecified() || address.is_unicast_link_local() {
            return field("address");
        }
        if body.site.len() > MAX_TEXT_BYTES {
            return field("site");
        }
        if body.serves.len() > MAX_RANGES || body.serves.iter().any(|range| range.length > 128) {
            return field("serves");
        }
        let capacity = self.config.capacity;
        if !self.known.contains_key(peer) && self.known.len() >= capacity {
            return Err(Refusal::Full { server, capacity });
        }
        let since = self.known.get(peer).map_or(now, |known| known.since);
        if since == now {
            info!(peer, role, %address, site = %bounded(&body.site), "Registered");
        }
        self.known.insert(
            peer.to_owned(),
            Registration {
                role: body.role,
                address,
                site: body.site,
                serves: body.serves,
                since,
                until: now + self.config.lease,
            },
        );
        Ok(Registered {
            lease_ms: u64::try_from(self.config.lease.as_millis()).unwrap_or(u64::MAX),
        })
    }

    fn search(&mut self, peer: &str, body: &RelaySearch) -> Result<RelaySearchReply, Refusal> {
        if !any_matches(&self.config.agents, peer) {
            return Err(Refusal::Search {
                server: self.config.name.clone(),
                peer: peer.to_owned(),
            });
        }
        let serves = |known: &Registration| {
            known.role == Role::Relay
                && (known.serves.is_empty()
                    || known
                        .serves
                        .iter()
                        .any(|range| contains(range, &body.multicast_address)))
        };
        let (mut near, mut far): (Vec<_>, Vec<_>) = self
            .known
            .iter()
            .filter(|(_, known)| serves(known))
            .partition(|(_, known)| known.site == body.site);
        for relays in [&mut near, &mut far] {
            let turn = self.turn.checked_rem(relays.len()).unwrap_or_default();
            relays.rotate_left(turn);
        }
        let relays: Vec<KnownRelay> = near
            .into_iter()
            .chain(far)
            .take(MAX_ANSWER)
            .map(|(name, known)| KnownRelay {
                name: name.clone(),
                address: known.address.octets().into(),
            })
            .collect();
        self.turn = self.turn.wrapping_add(1);
        if relays.is_empty() {
            self.counters.not_found += 1;
        } else {
            self.counters.found += 1;
        }
        Ok(RelaySearchReply { relays })
    }

    fn send(&mut self, peer: &str, transaction: u64, message: &DirectoryMessage) {
        self.outputs.push_back(DirectoryOutput {
            peer: peer.to_owned(),
            bytes: message.encode(transaction),
        });
    }
}

fn contains(range: &AddressRange, address: &[u8; 16]) -> bool {
    let host_bits = 128_u32.saturating_sub(u32::from(range.length));
    let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
    (u128::from_be_bytes(*range.address) ^ u128::from_be_bytes(*address)) & mask == 0
}

#[cfg(test)]
mod tests;
