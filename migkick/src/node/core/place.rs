//! Choice of the active address, and the fate of former addresses.
//!
//! A peer takes data from an unknown address for another node's, and its kernel resets the unknown
//! connection, which ends the session. The node therefore sends a peer nothing from an address
//! before the peer has acknowledged a mapping with that address. Until then the node uses the old
//! address while it works, and otherwise holds the peer's data. An answer to an echo from the new
//! address counts as an acknowledgement. An answer to an older address does not, because that
//! answer may arrive after the switch.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::mat::neutral::is_neutral;

use super::peer::Peer;
use super::{Core, MAX_REPLACED, MoveStage, NicState, Output, Place, Saved};

/// A place that a migration has left.
#[derive(Clone, Copy, Debug)]
pub(super) struct Left {
    pub(super) place: Place,
    /// End of forwarding: packets to the place arrive at least until this time.
    until: Duration,
    /// Latest time at which a peer still knows the place, acknowledged or not.
    at_most: Duration,
    /// Sequence number of the first mapping where the place has not priority 1.
    sequence: u64,
    /// Whether the address stays on its NIC afterwards.
    stays: bool,
}

impl Core {
    /// Restores the state of the last run; prefers its active address.
    pub(super) fn restore(&mut self, saved: Saved) {
        // The first list of NICs supplies the interface index.
        let place = |moa| Place { ifindex: 0, moa };
        self.active = saved.moa.map(place);
    }

    /// Handles the list of NICs that are up, with usable addresses, in order of preference.
    pub(crate) fn handle_nics(&mut self, now: Duration, nics: Vec<NicState>) {
        if self.nics == nics && self.active.is_none_or(|it| it.ifindex != 0) {
            return;
        }
        self.nics = nics;
        let best = self.best();
        let had = self.candidate.take();
        if best == self.active {
            if had.is_some() {
                self.changed(now);
            }
            return;
        }
        if let Some(place) = best
            && self.active.is_some_and(|active| self.is_usable(active))
        {
            self.candidate = Some(place);
            if had != self.candidate {
                self.changed(now);
            }
            return self.candidate_due(now);
        }
        self.active = best;
        // An address in use again no longer counts as left.
        self.left.retain(|left| Some(left.place) != best);
        if let Some(place) = best {
            let released = self.hold_unaware(now, place);
            self.outputs.push_back(Output::SetActive(place));
            self.outputs.push_back(Output::PathChanged);
            self.settle_all(now, released);
        }
        self.changed(now);
    }

    fn is_usable(&self, place: Place) -> bool {
        let mut all = self.nics.iter().flat_map(NicState::places);
        all.any(|it| it == place)
    }

    /// Whether a peer knows a mapping with the address, or needs none.
    pub(super) fn knows(&self, peer: &Peer, moa: Ipv6Addr) -> bool {
        let told = self.told.get(&moa);
        peer.to.is_none() || told.is_some_and(|told| peer.has_acknowledged(*told))
    }

    /// Sequence number that a peer must know before it receives data: the first mapping with the
    /// source address of the data.
    pub(super) fn source_told(&self) -> Option<u64> {
        let source = self.translated_to().or(self.active)?;
        self.told.get(&source.moa).copied()
    }

    fn all_know(&self, moa: Ipv6Addr) -> bool {
        self.peers.values().all(|it| self.knows(it, moa))
    }

    /// Activates the candidate once all peers know it. The node keeps receiving at the old place as
    /// long as after a migration. Waits during a migration, because the agents know which address
    /// the VM leaves.
    pub(super) fn candidate_due(&mut self, now: Duration) {
        if self.movement.is_some() {
            return;
        }
        let Some(place) = self.candidate.filter(|it| self.all_know(it.moa)) else {
            return;
        };
        self.candidate = None;
        self.left.retain(|left| left.place.moa != place.moa);
        if let Some(old) = self.active.replace(place) {
            let left = self.left_now(now, old);
            self.left.push(Left {
                stays: true,
                ..left
            });
        }
        self.outputs.push_back(Output::SetActive(place));
        self.outputs.push_back(Output::PathChanged);
        self.changed(now);
    }

    /// Holds data for peers that do not know `place` yet. Returns the peers that hold nothing any
    /// more; the caller settles them after the switch.
    pub(super) fn hold_unaware(&mut self, now: Duration, place: Place) -> Vec<Ipv6Addr> {
        // The sequence number of the next mapping, for a place without one.
        let next = self.sequence + 1;
        let told = self.told.get(&place.moa).copied().unwrap_or(next);
        let (mut unaware, mut released) = (Vec::new(), Vec::new());
        for (hoa, peer) in &mut self.peers {
            let held = peer.holds.is_some();
            peer.holds = (!peer.has_acknowledged(told)).then_some(told);
            match (held, peer.holds) {
                (_, Some(_)) => unaware.push(*hoa),
                (true, None) => released.push(*hoa),
                (false, None) => {}
            }
        }
        self.settle_all(now, unaware);
        released
    }

    /// Notes the own addresses that the current mapping has for the first time.
    pub(super) fn note_told(&mut self) {
        let own = self.own();
        self.told
            .retain(|moa, _| own.iter().any(|it| it.moa == *moa));
        for place in own {
            self.told.entry(place.moa).or_insert(self.sequence);
        }
    }

    /// A server refuses the addresses: another node has one of them. That can only be the newest, since
    /// those before were taken. Whoever knows or guesses where a node will be can register there first, but
    /// not at all the addresses that the node may take instead.
    pub(super) fn replace_newest(&mut self) {
        let newest = match (self.stage(), self.standby) {
            (Some(MoveStage::Prepared), Some(standby)) => Some(standby),
            // The agents have been told of it. If the VM arrives it is the active one.
            (_, Some(_)) => None,
            (_, None) => self.candidate.or(self.active),
        };
        if let Some(place) = newest
            && self.replaced.len() < MAX_REPLACED
            && self.replaced.insert(place.moa)
        {
            self.outputs.push_back(Output::Replace(place));
        }
    }

    /// Returns the active place while it is usable, else the next best; prefers a neutral address
    /// among those of a NIC.
    fn best(&self) -> Option<Place> {
        let is_free = |place: &Place| Some(place.moa) != self.standby.map(|it| it.moa);
        let neutral = |place: &Place| is_neutral(place.moa.octets(), self.identity.hoa.octets());
        let all = self.nics.iter().flat_map(NicState::places);
        let usable: Vec<Place> = all.filter(is_free).collect();
        let active = self.active.and_then(|active| {
            let mut usable = usable.iter();
            usable.find(|it| it.moa == active.moa && [0, it.ifindex].contains(&active.ifindex))
        });
        if let Some(active) = active {
            let better = |it: &&Place| it.ifindex == active.ifindex && neutral(it);
            let better = usable
                .iter()
                .filter(|it| !self.is_left(it.moa))
                .find(better);
            return match better {
                Some(better) if !neutral(active) => Some(*better),
                _ => Some(*active),
            };
        }
        // A place that was left is the last choice.
        let rank = |place: &&Place| (self.is_left(place.moa), !neutral(place));
        usable.iter().min_by_key(rank).copied()
    }

    fn is_left(&self, moa: Ipv6Addr) -> bool {
        self.left.iter().any(|left| left.place.moa == moa)
    }

    /// Returns all own addresses that receive data.
    pub(crate) fn own(&self) -> Vec<Place> {
        let left = self.left.iter().map(|left| left.place);
        self.active
            .into_iter()
            .chain(self.candidate)
            .chain(self.standby)
            .chain(left)
            .collect()
    }

    /// Leaves a place after a migration.
    pub(super) fn leave(&mut self, now: Duration, place: Place) {
        self.left.retain(|left| left.place.moa != place.moa);
        self.left.push(self.left_now(now, place));
        self.outputs.push_back(Output::Leave(place));
    }

    fn left_now(&self, now: Duration, place: Place) -> Left {
        Left {
            place,
            until: now + self.timing.forward,
            at_most: now + self.timing.forward.max(self.timing.lifetime),
            sequence: self.sequence + 1,
            stays: false,
        }
    }

    /// Forgets a place that no peer sends to.
    pub(super) fn place_due(&mut self, now: Duration) {
        let settled = |left: &Left| {
            let peers = || {
                self.peers
                    .values()
                    .all(|it| it.has_acknowledged(left.sequence))
            };
            now >= left.at_most || now >= left.until && peers()
        };
        let over: Vec<Left> = self.left.iter().copied().filter(settled).collect();
        if over.is_empty() {
            return;
        }
        let gone = |place: &Place| over.iter().any(|left| left.place.moa == place.moa);
        self.left.retain(|left| !gone(&left.place));
        self.changed(now);
        for left in over.into_iter().filter(|left| !left.stays) {
            self.outputs.push_back(Output::RemoveAddress(left.place));
        }
    }

    pub(super) fn place_timeout(&self) -> Option<Duration> {
        // A later acknowledgement is an input, after which the caller polls again.
        let due = |left: &Left| {
            let peers = || {
                self.peers
                    .values()
                    .all(|it| it.has_acknowledged(left.sequence))
            };
            if peers() { left.until } else { left.at_most }
        };
        self.left.iter().map(due).min()
    }
}

impl NicState {
    fn places(&self) -> impl Iterator<Item = Place> {
        let place = |moa: &Ipv6Addr| Place {
            ifindex: self.ifindex,
            moa: *moa,
        };
        self.addresses.iter().map(place)
    }
}
