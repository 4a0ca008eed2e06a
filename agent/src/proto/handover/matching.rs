//! Destination: which of a flow's packets are among those that the guest has had.

use std::collections::HashMap;
use std::time::Duration;

use super::records::FLOW_FINGERPRINTS;
use crate::proto::Timestamp;

/// A packet that is not among those of the source is new even if the destination has it before
/// one of them, but no longer than this: beyond, it was lost on the way to the source, and the
/// guest has long gone on without it. Paths reorder within less.
pub(super) const RECOVERY: Duration = Duration::from_millis(20);
/// A path lags by no more than this. Later, the same fingerprint is another packet.
const LAG: Duration = Duration::from_secs(2);

/// So many packets in a row that the source does not have are taken as lost on the way to it. If
/// more come before one that it has, that is another of the same payload, which the flow repeats
/// now and then.
const MISSING_IN_A_ROW: u32 = 16;

/// A place among the held packets: number of the frame, and of the packet within it.
pub(super) type Place = (u64, u16);

/// What a fingerprint tells of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The guest has had it.
    Delivered,
    /// The guest has not had it.
    New,
    /// Nothing; the time must tell.
    Unknown,
}

/// Finds the packets of one flow among the last ones that the guest has had at the source.
///
/// Below, the source's fingerprints are `a` to `e` with a repeated `n`, and the destination has
/// lost `c`, and has `e` before `d`. The *anchor* is the last of the source's that occurs once
/// on either side. Whatever came before it is taken as delivered, if not for a short time; after
/// it, what the source has, and as many of a repeated one as the source has after the anchor.
///
/// ```text
/// source        a  b  n  c  d  e  n |cut
/// destination   a  b  n     e  d  n  n  f  g
///                           ^  -  -  +  +  +     - delivered, + replayed
///                        anchor
/// ```
///
/// A destination that lags has not come to the end of the source's packets when it learns the cut.
/// The anchor then moves on with each one that arrives.
#[derive(Clone, Debug)]
pub(super) struct Matcher {
    /// Fingerprints of the source, oldest first.
    sequence: Vec<u64>,
    known: HashMap<u64, Known>,
    anchor: Option<Anchor>,
    /// First place from which on a delivered packet is in the sequence for sure. That has all of
    /// much more than [`RECOVERY`], unless it is as long as can be.
    covered: Option<Place>,
    /// Repeated fingerprints behind the anchor that have not come; `None` once a packet has come
    /// that the source does not have, because they come before it or never.
    pending: Option<HashMap<u64, u32>>,
    expires: Timestamp,
    /// The packets that were held when the cut came, until the anchor is chosen.
    held: Vec<(u64, Place, Timestamp)>,
    /// Whether all of them have been judged.
    is_live: bool,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    /// Its last place in the sequence.
    index: usize,
    /// Whether it is there, or was held, more than once.
    is_repeated: bool,
    is_seen: bool,
}

#[derive(Clone, Copy, Debug)]
struct Anchor {
    index: usize,
    place: Place,
    at: Timestamp,
}

impl Matcher {
    /// Takes the fingerprints of a [`common::signal::FlowCut`], which came at `now`.
    pub(super) fn new(fingerprints: &[u8], now: Timestamp) -> Self {
        let (words, _) = fingerprints.as_chunks::<8>();
        let sequence: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let mut known: HashMap<u64, Known> = HashMap::with_capacity(sequence.len());
        for (index, fingerprint) in sequence.iter().enumerate() {
            known
                .entry(*fingerprint)
                .and_modify(|known| {
                    known.index = index;
                    known.is_repeated = true;
                })
                .or_insert(Known {
                    index,
                    is_repeated: false,
                    is_seen: false,
                });
        }
        Self {
            sequence,
            known,
            anchor: None,
            covered: None,
            pending: None,
            expires: now + LAG,
            held: Vec::new(),
            is_live: false,
        }
    }

    /// Takes note of a packet that was held when the cut came; in their order.
    pub(super) fn see(&mut self, fingerprint: u64, place: Place, at: Timestamp) {
        if let Some(known) = self.known.get_mut(&fingerprint) {
            known.is_repeated |= known.is_seen;
            known.is_seen = true;
        }
        self.held.push((fingerprint, place, at));
    }

    /// Chooses the anchor, when all held packets have been seen.
    pub(super) fn settle(&mut self) {
        let is_whole = self.sequence.len() < FLOW_FINGERPRINTS;
        // What was delivered before the first of them may come late by some.
        let oldest = self.sequence.len() / 8;
        self.covered = is_whole.then(Place::default);
        let mut missing = 0;
        for (fingerprint, place, at) in std::mem::take(&mut self.held) {
            let Some(known) = self.known.get_mut(&fingerprint) else {
                missing += 1;
                continue;
            };
            if known.is_repeated {
                continue;
            }
            let index = known.index;
            // Before the oldest there is no telling.
            let is_credible = missing <= MISSING_IN_A_ROW || index == 0;
            missing = 0;
            if !is_credible {
                known.is_repeated = true;
                continue;
            }
            if index >= oldest {
                self.covered.get_or_insert(place);
            }
            if self.anchor.is_none_or(|anchor| anchor.index < index) {
                self.anchor = Some(Anchor { index, place, at });
            }
        }
        if let Some(anchor) = self.anchor {
            self.pending = Some(self.repeated_behind(anchor.index));
        }
    }

    /// Ends the judgement of held packets; what is judged from now on has just come.
    pub(super) fn go_live(&mut self) {
        self.is_live = true;
    }

    /// When the anchor came, if there is one.
    pub(super) fn anchored_at(&self) -> Option<Timestamp> {
        self.anchor.map(|anchor| anchor.at)
    }

    /// Judges a packet; those of one flow in their order.
    pub(super) fn judge(&mut self, fingerprint: u64, place: Place, at: Timestamp) -> Found {
        if at > self.expires {
            self.known.clear();
            self.pending = None;
        }
        let known = self.known.get_mut(&fingerprint);
        if let Some(known) = known
            && !known.is_repeated
        {
            if !self.is_live {
                return Found::Delivered;
            }
            if !known.is_seen {
                known.is_seen = true;
                let anchor = Anchor {
                    index: known.index,
                    place,
                    at,
                };
                self.advance(anchor);
                return Found::Delivered;
            }
        }
        let Some(anchor) = self.anchor else {
            return Found::Unknown;
        };
        let is_repeated = self.known.contains_key(&fingerprint);
        if place < anchor.place {
            let is_new = !is_repeated
                && self.covered.is_some_and(|covered| covered <= place)
                && anchor.at.since(at) <= RECOVERY;
            return if is_new { Found::New } else { Found::Delivered };
        }
        if !is_repeated {
            self.pending = None;
            return Found::New;
        }
        match self
            .pending
            .as_mut()
            .and_then(|pending| pending.get_mut(&fingerprint))
        {
            Some(left) if *left > 0 => {
                *left -= 1;
                Found::Delivered
            }
            _ => Found::New,
        }
    }

    /// Moves the anchor on. Repeated ones that stand before it and have not come are lost.
    fn advance(&mut self, anchor: Anchor) {
        if self
            .anchor
            .is_some_and(|before| before.index >= anchor.index)
        {
            return;
        }
        self.anchor = Some(anchor);
        let mut behind = self.repeated_behind(anchor.index);
        if let Some(before) = &self.pending {
            behind.retain(|fingerprint, left| {
                *left = (*left).min(before.get(fingerprint).copied().unwrap_or(0));
                *left > 0
            });
        }
        self.pending = Some(behind);
    }

    fn repeated_behind(&self, index: usize) -> HashMap<u64, u32> {
        let mut counts = HashMap::new();
        for fingerprint in self.sequence.iter().skip(index + 1) {
            if self
                .known
                .get(fingerprint)
                .is_some_and(|known| known.is_repeated)
            {
                *counts.entry(*fingerprint).or_insert(0) += 1;
            }
        }
        counts
    }
}
