//! State of a peer, and the frames that wait for it.

use std::collections::VecDeque;
use std::net::Ipv6Addr;
use std::time::Duration;

use common::mat::key::Key;

use super::alert::{AlertOut, Asked, EchoOut};
use super::lookup::{Cause, Known, Lookup};
use super::{Core, MAX_HELD, MAX_HELD_BYTES, MAX_PEERS, Output, PeerState, PeerStatus, Received};
use common::rate::Bucket;

/// Limit of datagrams that wait for the key of their peer.
const MAX_WAITING: usize = 4;

/// State of a peer, known or unknown.
#[derive(Debug)]
pub(super) struct Peer {
    /// Pair key, once a server has sent it.
    pub(super) key: Option<Key>,
    /// Mapping of the peer.
    pub(super) known: Option<Known>,
    /// Expiry of the answer "no such node".
    pub(super) negative: Option<Duration>,
    /// MoA that data goes to.
    pub(super) to: Option<Ipv6Addr>,
    /// Whether `to` has answered an echo.
    pub(super) verified: bool,
    /// MoA that data should go to.
    pub(super) desired: Option<Ipv6Addr>,
    /// Whether the data path has an entry of an earlier run.
    adopted: bool,
    /// Entry of the data path: destination of the data unless held, and sources.
    shown: Option<(Option<Ipv6Addr>, Vec<Ipv6Addr>)>,
    /// Sequence number that the peer must acknowledge before it receives data.
    pub(super) holds: Option<u64>,
    pub(super) lookup: Option<Lookup>,
    /// Earliest time of the next lookup.
    pub(super) lookup_after: Duration,
    /// Sequence number that the peer has named, and the number of lookups that did not find it.
    pub(super) wanted: u64,
    pub(super) rereads: u32,
    /// Earliest time of the next lookup on an unauthenticated message.
    pub(super) stranger_after: Duration,
    pub(super) echo: Option<EchoOut>,
    /// Unanswered alert and echo from the peer.
    pub(super) alert_in: Option<Asked>,
    pub(super) echo_in: Option<Asked>,
    pub(super) alert: Option<AlertOut>,
    /// Sequence number of our mapping that the peer has acknowledged.
    pub(super) acknowledged: u64,
    pub(super) answers: Bucket,
    waiting: Vec<Received>,
    held: VecDeque<(Duration, Vec<u8>)>,
    held_bytes: usize,
    /// Time of the last data to the peer, and of its last request.
    pub(super) sent_at: Duration,
    pub(super) heard_at: Duration,
    pub(super) keepalive: Duration,
    packets: u64,
    bytes: u64,
}

/// Usage of a peer by the data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Used {
    /// Packets sent to the peer.
    pub(crate) packets: u64,
    /// Bytes sent to the peer.
    pub(crate) bytes: u64,
    /// Time since the last packet in either direction.
    pub(crate) idle: Option<Duration>,
}

impl Peer {
    fn new(now: Duration) -> Self {
        Self {
            key: None,
            known: None,
            negative: None,
            to: None,
            verified: false,
            desired: None,
            adopted: false,
            shown: None,
            holds: None,
            lookup: None,
            lookup_after: Duration::ZERO,
            wanted: 0,
            rereads: 0,
            stranger_after: Duration::ZERO,
            echo: None,
            alert_in: None,
            echo_in: None,
            alert: None,
            acknowledged: 0,
            answers: Bucket::new(16, Duration::from_millis(50)),
            waiting: Vec::new(),
            held: VecDeque::new(),
            held_bytes: 0,
            sent_at: now,
            heard_at: now,
            keepalive: now,
            packets: 0,
            bytes: 0,
        }
    }

    /// Whether the peer knows our mapping of that sequence number, or needs none.
    pub(super) fn has_acknowledged(&self, sequence: u64) -> bool {
        self.to.is_none() || self.acknowledged >= sequence
    }

    /// Records that the peer knows our mapping of that sequence number.
    pub(super) fn acknowledge(&mut self, sequence: u64) {
        self.acknowledged = self.acknowledged.max(sequence);
        self.holds = self.holds.filter(|holds| sequence < *holds);
    }

    /// Whether data goes to the peer: it has answered an echo, which a peer does once it accepts
    /// our data. A request of the peer proves nothing, because the peer accepts data only after our
    /// answer.
    fn sends(&self) -> bool {
        self.verified && self.holds.is_none()
    }

    /// Time until which the node keeps a peer without traffic.
    fn kept_until(&self, idle: Duration) -> Duration {
        (self.sent_at + idle).max(self.heard_at + idle * 2)
    }

    /// Whether the peer's mapping has the address.
    pub(super) fn has(&self, address: Ipv6Addr) -> bool {
        self.known.as_ref().is_some_and(|known| known.has(address))
    }

    fn state(&self) -> PeerState {
        match (
            &self.lookup,
            &self.known,
            self.to == self.desired && self.verified,
        ) {
            (_, Some(_), true) => PeerState::Known,
            (_, Some(_), false) => PeerState::Verifying,
            (Some(_), None, _) => PeerState::LookingUp,
            (None, None, _) => PeerState::Unknown,
        }
    }
}

impl Core {
    /// Handles a frame to a peer without an entry in the data path.
    pub(crate) fn handle_held(&mut self, now: Duration, hoa: Ipv6Addr, frame: Vec<u8>) {
        if !self.is_peer(hoa) || hoa.is_multicast() {
            self.counters.not_peers += 1;
            return;
        }
        if !self.admit(now, hoa, false) {
            self.counters.limited += 1;
            return;
        }
        let all = self.held;
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return;
        };
        peer.sent_at = now;
        if peer.shown.is_some() && peer.sends() {
            self.counters.released += 1;
            self.outputs.push_back(Output::Release(frame));
            return;
        }
        if peer.negative.is_some_and(|until| now < until) {
            return self.refuse(now, frame);
        }
        let full = peer.held.len() >= MAX_HELD.0
            || peer.held_bytes + frame.len() > MAX_HELD_BYTES
            || all >= MAX_HELD.1;
        if full {
            self.counters.hold_overflow += 1;
        } else {
            peer.held_bytes += frame.len();
            peer.held.push_back((now, frame));
            self.held += 1;
            self.counters.held += 1;
        }
        let (known, verifying) = (peer.known.is_some(), peer.echo.is_some());
        if peer.holds.is_some() {
            self.alert(now, hoa);
        } else if !known {
            self.look_up(now, hoa, Cause::Own);
        } else if !verifying {
            self.verify(now, hoa);
        }
    }

    /// Handles the data path's usage of the peers. An unknown peer has an entry of an earlier run.
    pub(crate) fn handle_usage(&mut self, now: Duration, used: &[(Ipv6Addr, Used)]) {
        for (hoa, used) in used {
            let is_new = !self.peers.contains_key(hoa);
            if !self.is_peer(*hoa) || !self.admit(now, *hoa, false) {
                continue;
            }
            let Some(peer) = self.peers.get_mut(hoa) else {
                continue;
            };
            if let Some(idle) = used.idle {
                peer.sent_at = peer.sent_at.max(now.saturating_sub(idle));
            }
            (peer.packets, peer.bytes) = (used.packets, used.bytes);
            if is_new {
                peer.adopted = true;
                self.look_up(now, *hoa, Cause::Own);
            }
        }
    }

    /// Keeps a datagram until its key is known, and starts a lookup for the key.
    pub(super) fn keep_for_key(&mut self, now: Duration, hoa: Ipv6Addr, received: Received) {
        let known = self.peers.contains_key(&hoa);
        if !known && !self.foreign_lookups.take(now) || !self.admit(now, hoa, true) {
            self.counters.limited += 1;
            return;
        }
        if let Some(peer) = self.peers.get_mut(&hoa) {
            if peer.waiting.len() < MAX_WAITING {
                peer.waiting.push(received);
            } else {
                self.counters.limited += 1;
            }
        }
        let cause = if known {
            Cause::Stranger
        } else {
            Cause::Counted
        };
        self.look_up(now, hoa, cause);
    }

    /// Makes room for a peer. Peers known only from unauthenticated messages get at most half of
    /// the room.
    fn admit(&mut self, now: Duration, hoa: Ipv6Addr, foreign: bool) -> bool {
        if self.peers.contains_key(&hoa) {
            return true;
        }
        let room = if foreign { MAX_PEERS / 2 } else { MAX_PEERS };
        if self.peers.len() >= room {
            let mut peers = self.peers.iter();
            let unused = peers.find(|(_, peer)| peer.known.is_none() && peer.held.is_empty());
            let Some(unused) = unused.map(|(hoa, _)| *hoa) else {
                return false;
            };
            self.peers.remove(&unused);
        }
        self.peers.insert(hoa, Peer::new(now));
        true
    }

    /// Handles the datagrams that waited for the key.
    pub(super) fn key_known(&mut self, now: Duration, hoa: Ipv6Addr) {
        let waiting = self
            .peers
            .get_mut(&hoa)
            .map(|it| std::mem::take(&mut it.waiting));
        for received in waiting.unwrap_or_default() {
            self.datagram(now, received, false);
        }
    }

    pub(super) fn refuse(&mut self, now: Duration, frame: Vec<u8>) {
        self.counters.refused += 1;
        // RFC 4443 §2.4 (f): a node must limit the rate of errors.
        if self.refusals.take(now) {
            self.outputs.push_back(Output::Refuse(frame));
        }
    }

    /// Handles an unreachable peer: answers the waiting frames with errors.
    pub(super) fn unreachable(&mut self, now: Duration, hoa: Ipv6Addr, ttl: Duration) {
        let Timings { idle, .. } = self.timings();
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return;
        };
        peer.negative = Some(now + ttl);
        if now >= peer.kept_until(idle) {
            // The node stops searching the mapping of the last alert at some point.
            peer.wanted = 0;
        }
        peer.known = None;
        peer.to = None;
        peer.verified = false;
        peer.desired = None;
        peer.holds = None;
        peer.echo = None;
        peer.alert = None;
        peer.waiting.clear();
        let told = peer.shown.take().is_some() || std::mem::take(&mut peer.adopted);
        for (_, frame) in self.take_held(hoa) {
            self.refuse(now, frame);
        }
        if told {
            self.outputs.push_back(Output::RemovePeer(hoa));
        }
    }

    fn take_held(&mut self, hoa: Ipv6Addr) -> VecDeque<(Duration, Vec<u8>)> {
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return VecDeque::new();
        };
        peer.held_bytes = 0;
        let held = std::mem::take(&mut peer.held);
        self.held = self.held.saturating_sub(held.len());
        held
    }

    /// Updates the data path to the state of a peer, and sends the answers that have become
    /// possible.
    pub(super) fn settle(&mut self, now: Duration, hoa: Ipv6Addr) {
        let source_told = self.source_told();
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return;
        };
        // The node may answer, and accept data from, a peer that speaks from a MoA of its mapping,
        // before that MoA has answered an echo.
        let speaks = peer.echo_in.as_ref().map(|it| it.from);
        if peer.to.is_none() && speaks.is_some() && speaks == peer.desired {
            peer.to = peer.desired;
        }
        let (Some(to), Some(known)) = (peer.to, &peer.known) else {
            return;
        };
        if peer.holds.is_none() {
            // A peer that is new since the migration began may have read an older mapping.
            peer.holds = source_told.filter(|told| !peer.has_acknowledged(*told));
        }
        let mut from: Vec<Ipv6Addr> = known.moas.iter().map(|(moa, _)| *moa).collect();
        if !from.contains(&to) {
            from.push(to);
        }
        let shown = Some((peer.sends().then_some(to), from.clone()));
        if peer.shown != shown {
            let before = peer.shown.take().and_then(|(before, _)| before);
            let moved = before.is_some_and(|before| before != to);
            peer.shown = shown;
            peer.adopted = false;
            self.outputs.push_back(if peer.sends() {
                Output::SetPeer { hoa, to, from }
            } else {
                Output::HoldPeer { hoa, from }
            });
            if moved {
                self.outputs.push_back(Output::PathChanged);
            }
        }
        self.answer(now, hoa);
        if self.peers.get(&hoa).is_some_and(Peer::sends) {
            for (_, frame) in self.take_held(hoa) {
                self.counters.released += 1;
                self.outputs.push_back(Output::Release(frame));
            }
        }
    }

    /// Settles each of the peers.
    pub(super) fn settle_all(&mut self, now: Duration, peers: Vec<Ipv6Addr>) {
        for hoa in peers {
            self.settle(now, hoa);
        }
    }

    /// Drops held frames that are too old, and unused peers.
    pub(super) fn peers_due(&mut self, now: Duration) {
        let Timings { hold, idle } = self.timings();
        let mut over = Vec::new();
        for (hoa, peer) in &mut self.peers {
            while peer.held.front().is_some_and(|(at, _)| now >= *at + hold) {
                if let Some((_, frame)) = peer.held.pop_front() {
                    peer.held_bytes = peer.held_bytes.saturating_sub(frame.len());
                    self.held = self.held.saturating_sub(1);
                    self.counters.hold_overflow += 1;
                }
            }
            peer.negative = peer.negative.filter(|until| now < *until);
            let needed = match &peer.known {
                Some(_) => now < peer.kept_until(idle),
                None => peer.lookup.is_some() || peer.negative.is_some() || !peer.held.is_empty(),
            };
            if !needed {
                over.push(*hoa);
            }
        }
        for hoa in over {
            let told = self.peers.remove(&hoa);
            if told.is_some_and(|peer| peer.shown.is_some()) {
                self.outputs.push_back(Output::RemovePeer(hoa));
            }
        }
    }

    fn timings(&self) -> Timings {
        Timings {
            hold: self.timing.hold,
            idle: self.timing.idle,
        }
    }

    pub(super) fn peer_timeout(&self, peer: &Peer) -> Option<Duration> {
        let Timings { hold, idle } = self.timings();
        let held = peer.held.front().map(|(at, _)| *at + hold);
        let over = peer.known.as_ref().map(|_| peer.kept_until(idle));
        let times = [
            held,
            over,
            peer.negative,
            self.lookup_timeout(peer),
            self.alert_timeout(peer),
        ];
        times.into_iter().flatten().min()
    }

    pub(super) fn peer_status(&self, now: Duration) -> Vec<PeerStatus> {
        let status = |(hoa, peer): (&Ipv6Addr, &Peer)| PeerStatus {
            hoa: *hoa,
            state: peer.state(),
            to: peer.to,
            moas: peer
                .known
                .as_ref()
                .map(|it| it.moas.clone())
                .unwrap_or_default(),
            age_s: peer
                .known
                .as_ref()
                .map(|it| now.saturating_sub(it.read).as_secs()),
            packets: peer.packets,
            bytes: peer.bytes,
        };
        self.peers.iter().map(status).collect()
    }
}

struct Timings {
    hold: Duration,
    idle: Duration,
}
