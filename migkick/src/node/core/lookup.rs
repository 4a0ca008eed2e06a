//! Mappings of peers: requests to the nearest server that answers, then to the next.
//!
//! A replica may lack an update, so the node believes "no such node" only when every answering
//! server says so, and never accepts a mapping older than a known one. While no server answers,
//! known mappings stay in use.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use common::mat::MAX_MOAS;
use common::mat::key::Key;
use common::mat::message::{LookupReply, LookupRequest, Mapping};

use super::Core;
use super::peer::Peer;
use super::registration::same_host;

/// Shortest interval between lookups of a peer.
const DISTANCE: Duration = Duration::from_millis(50);
/// Shortest interval between lookups of a peer on unauthenticated messages.
const STRANGER_DISTANCE: Duration = Duration::from_secs(1);
/// Shortest lifetime that the node accepts, so that no server keeps the node busy.
const MIN_LIFETIME: Duration = Duration::from_secs(5);
/// Lookups for a sequence number that a peer names and the servers do not have yet.
const MAX_REREADS: u32 = 8;
/// Pause after a lookup without any answer.
const FAILED: Duration = Duration::from_secs(2);

/// A mapping from a server.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) sequence: u64,
    /// MoAs with their priorities, first choice first.
    pub(super) moas: Vec<(Ipv6Addr, u8)>,
    /// Time of the answer.
    pub(super) read: Duration,
    refresh: Duration,
    expires: Duration,
}

impl Known {
    pub(super) fn has(&self, address: Ipv6Addr) -> bool {
        self.moas.iter().any(|(moa, _)| *moa == address)
    }
}

/// A lookup in progress.
#[derive(Debug)]
pub(super) struct Lookup {
    /// Servers, nearest first.
    order: Vec<usize>,
    /// Number of requests; exceeds the number of servers in the second round.
    asked: usize,
    transaction: u64,
    sent: Duration,
    /// When to ask the next server.
    next: Duration,
    deadline: Duration,
    /// Lifetime of the answer "no such node", once a server has given that answer.
    negative: Option<Duration>,
}

/// Reason for a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// An application of this node, or a peer in use.
    Own,
    /// A new message that the peer has authenticated.
    Peer,
    /// A message that may be replayed or forged.
    Stranger,
    /// As `Stranger`, with the rate limit applied already.
    Counted,
}

impl Core {
    /// Begins a lookup, unless one is in progress or has just ended.
    pub(super) fn look_up(&mut self, now: Duration, hoa: Ipv6Addr, cause: Cause) {
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return;
        };
        if peer.lookup.is_some() || now < peer.lookup_after {
            return;
        }
        let allowed = match cause {
            Cause::Own => self.own_lookups.take(now),
            Cause::Peer | Cause::Counted => true,
            Cause::Stranger => {
                let allowed = now >= peer.stranger_after;
                if allowed {
                    peer.stranger_after = now + STRANGER_DISTANCE;
                }
                allowed
            }
        };
        if !allowed {
            self.counters.limited += 1;
            return;
        }
        peer.lookup = Some(Lookup {
            order: Vec::new(),
            asked: 0,
            transaction: 0,
            sent: now,
            next: now,
            deadline: now + self.timing.lookup_patience,
            negative: None,
        });
        let order = self.nearest();
        if let Some(lookup) = self.lookup_of(hoa) {
            lookup.order = order;
        }
        self.ask_next(now, hoa);
    }

    fn lookup_of(&mut self, hoa: Ipv6Addr) -> Option<&mut Lookup> {
        self.peers.get_mut(&hoa)?.lookup.as_mut()
    }

    /// Sends the request to the next server when due.
    fn ask_next(&mut self, now: Duration, hoa: Ipv6Addr) {
        let transaction = self.entropy.number();
        let (least, most) = self.timing.lookup;
        let Some(lookup) = self.peers.get_mut(&hoa).and_then(|it| it.lookup.as_mut()) else {
            return;
        };
        if now < lookup.next {
            return;
        }
        let silent = lookup.asked.checked_sub(1);
        let number = lookup.order.len();
        let at = |asked: usize| lookup.order.get(asked % number.max(1)).copied();
        if let Some(server) = silent.and_then(at).and_then(|it| self.servers.get_mut(it)) {
            server.silent = server.silent.saturating_add(1);
        }
        if now >= lookup.deadline || number == 0 {
            return self.lookup_failed(now, hoa);
        }
        let server = at(lookup.asked).and_then(|it| self.servers.get(it));
        let round = u32::try_from(lookup.asked / number)
            .unwrap_or(u32::MAX)
            .min(8);
        lookup.asked += 1;
        lookup.transaction = transaction;
        lookup.sent = now;
        let patience = server.and_then(|it| it.round_trip).unwrap_or(least) * 3;
        let patience = patience.clamp(least, most) * 2_u32.pow(round);
        lookup.next = (now + patience.min(most)).min(lookup.deadline);
        let (Some(to), Some(active)) = (server.map(|it| it.address), self.active) else {
            return;
        };
        self.counters.lookups += 1;
        let hoa = hoa.octets().into();
        self.ask(active.moa, to, transaction, &LookupRequest { hoa }.into());
    }

    /// Handles a lookup without an answer in time, or with negative answers only.
    fn lookup_failed(&mut self, now: Duration, hoa: Ipv6Addr) {
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return;
        };
        let Some(lookup) = peer.lookup.take() else {
            return;
        };
        peer.lookup_after = now + FAILED;
        match (&mut peer.known, lookup.negative) {
            (None, ttl) => {
                let failed = ttl.is_none();
                self.counters.lookups_failed += u64::from(failed);
                self.unreachable(now, hoa, ttl.unwrap_or(FAILED));
                // An alert, an echo or a new frame may repeat the lookup once the negative answer
                // expires.
                if !failed && let Some(peer) = self.peers.get_mut(&hoa) {
                    peer.lookup_after = now + DISTANCE;
                }
            }
            (Some(known), Some(ttl)) if now >= known.expires => self.unreachable(now, hoa, ttl),
            (Some(known), _) => {
                self.counters.lookups_failed += 1;
                known.refresh = now + FAILED;
                self.reread_later(now, hoa);
            }
        }
    }

    pub(super) fn handle_lookup_reply(
        &mut self,
        now: Duration,
        from: SocketAddrV6,
        transaction: u64,
        reply: LookupReply,
    ) {
        let hoa = Ipv6Addr::from(*reply.hoa);
        let peer = self.peers.get_mut(&hoa);
        let asked = |it: &&mut Peer| {
            let lookup = it.lookup.as_ref();
            lookup.is_some_and(|it| it.asked > 0 && it.transaction == transaction)
        };
        let Some(peer) = peer.filter(asked) else {
            self.counters.unexpected += 1;
            return;
        };
        let Some(lookup) = &mut peer.lookup else {
            return;
        };
        let server = self
            .servers
            .iter_mut()
            .find(|it| same_host(it.address, from));
        if let Some(server) = server {
            server.answered(now, lookup.sent);
        }
        peer.key = Some(Key(*reply.pair_key));
        let lifetime = Duration::from_secs(reply.lifetime_s.into());
        let known = peer.known.as_ref();
        // At least as new as the known mapping, unless that one is old: a node may have started
        // again.
        let fresh = |mapping: &Mapping| {
            known.is_none_or(|it| mapping.sequence >= it.sequence || now >= it.expires)
        };
        match reply.mapping {
            Some(mapping) if fresh(&mapping) => {
                peer.lookup = None;
                peer.lookup_after = now + DISTANCE;
                self.adopt(now, hoa, mapping, lifetime.max(MIN_LIFETIME));
            }
            mapping => {
                self.counters.stale_mappings += u64::from(mapping.is_some());
                if mapping.is_none() {
                    let ttl = lifetime.clamp(Duration::from_secs(1), self.timing.negative);
                    lookup.negative = Some(lookup.negative.map_or(ttl, |it| it.min(ttl)));
                }
                // The server has answered, so the next request does not count it as silent.
                lookup.next = now;
                let over = lookup.asked >= lookup.order.len();
                if over {
                    self.lookup_failed(now, hoa);
                } else {
                    self.ask_next(now, hoa);
                    if let Some(server) = self
                        .servers
                        .iter_mut()
                        .find(|it| same_host(it.address, from))
                    {
                        server.silent = 0;
                    }
                }
            }
        }
        self.key_known(now, hoa);
        self.settle(now, hoa);
    }

    fn adopt(&mut self, now: Duration, hoa: Ipv6Addr, mapping: Mapping, lifetime: Duration) {
        let moas = mapping.moas.iter();
        let moas = moas.map(|it| (Ipv6Addr::from(*it.address), it.priority));
        let mut moas: Vec<_> = moas.filter(|(moa, _)| self.may_be_moa(*moa)).collect();
        moas.truncate(MAX_MOAS);
        moas.sort_by_key(|(_, priority)| *priority);
        let Some((desired, _)) = moas.first().copied() else {
            let negative = self.timing.negative;
            return self.unreachable(now, hoa, lifetime.min(negative));
        };
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return;
        };
        let before = peer.known.take();
        let changed = before.is_none_or(|it| it.sequence != mapping.sequence || it.moas != moas);
        peer.negative = None;
        peer.known = Some(Known {
            sequence: mapping.sequence,
            moas,
            read: now,
            refresh: now + lifetime * 2 / 3,
            expires: now + lifetime,
        });
        if changed {
            // An alert may be ahead of the servers, so the same mapping again decides nothing.
            peer.desired = Some(desired);
        }
        if mapping.sequence >= peer.wanted {
            peer.rereads = 0;
        } else {
            self.reread_later(now, hoa);
        }
        self.peer_adopted(now, hoa, changed);
    }

    /// Schedules another lookup for a mapping that the servers do not have yet, at growing
    /// intervals.
    fn reread_later(&mut self, now: Duration, hoa: Ipv6Addr) {
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return;
        };
        peer.rereads += 1;
        let sequence = peer.known.as_ref().map_or(0, |it| it.sequence);
        if peer.wanted > sequence {
            peer.lookup_after = now + DISTANCE * 2_u32.pow(peer.rereads.min(8));
            if peer.rereads > MAX_REREADS {
                peer.wanted = sequence;
                peer.rereads = 0;
            }
        }
    }

    /// Whether an address may be a MoA. A HoA may not: the data path would translate its packets
    /// again.
    fn may_be_moa(&self, moa: Ipv6Addr) -> bool {
        !(moa.is_unspecified()
            || moa.is_loopback()
            || moa.is_multicast()
            || moa.is_unicast_link_local()
            || self.is_peer(moa)
            || moa == self.identity.hoa
            || self.own().iter().any(|it| it.moa == moa))
    }

    /// Continues the lookups in progress, and starts those for peers in use or behind.
    pub(super) fn lookups_due(&mut self, now: Duration) {
        let due = |(hoa, peer): (&Ipv6Addr, &Peer)| {
            self.lookup_timeout(peer)
                .is_some_and(|at| now >= at)
                .then_some(*hoa)
        };
        let due: Vec<Ipv6Addr> = self.peers.iter().filter_map(due).collect();
        for hoa in due {
            let begun = self.lookup_of(hoa).is_some();
            if begun {
                self.ask_next(now, hoa);
            } else {
                // Peers in use precede new peers, so the rate limit of new peers does not apply.
                self.look_up(now, hoa, Cause::Counted);
            }
        }
    }

    pub(super) fn lookup_timeout(&self, peer: &Peer) -> Option<Duration> {
        if let Some(lookup) = &peer.lookup {
            return Some(lookup.next);
        }
        let after = peer.lookup_after;
        let behind = |known: &Known| peer.wanted > known.sequence;
        match &peer.known {
            Some(known) if behind(known) => Some(after),
            Some(known) => Some(known.refresh.max(after)),
            None if peer.wanted > 0 && peer.negative.is_some() => Some(after),
            None => None,
        }
    }
}
