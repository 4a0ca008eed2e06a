//! Destination: search for a flow's packets among the packets that the guest received at the source
//! host.

use std::collections::HashMap;
use std::time::Duration;

use super::records::FLOW_FINGERPRINTS;
use crate::proto::Timestamp;

/// Maximum lead of a new packet before a packet of the source host. A packet missing in the source
/// host's list is new even if the destination host received the packet before a listed one. Beyond this
/// time, the packet was lost on the path to the source host, and the guest has long continued without
/// it. Paths reorder within less.
pub(super) const RECOVERY: Duration = Duration::from_millis(20);
/// Maximum lag of a path. Later, the same fingerprint belongs to another packet.
const LAG: Duration = Duration::from_secs(2);

/// Number of consecutive packets that may have been lost on the path to the source host. After a longer
/// run, a listed fingerprint belongs to another packet with the same payload, because the flow repeats
/// payloads.
const MISSING_IN_A_ROW: u32 = 16;

/// Position among the held packets: number of the frame, and of the packet within the frame.
pub(super) type Place = (u64, u16);

/// Information from a packet's fingerprint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The guest received the packet.
    Delivered,
    /// The guest did not receive the packet.
    New,
    /// No information; the arrival time must decide.
    Unknown,
}

/// Finds the packets of one flow among the last packets that the guest received at the source host.
///
/// In the example, the source host's fingerprints are `a` to `e` and a repeated `n`. The destination
/// host lost `c`, and received `e` before `d`. The *anchor* is the last fingerprint of the source host
/// that occurs exactly once at each end. Packets before the anchor count as delivered, except for a short
/// time before the anchor. After the anchor, packets of the source host's list count as delivered, and
/// a repeated fingerprint as often as the list repeats it after the anchor.
///
/// ```text
/// source        a  b  n  c  d  e  n |cut
/// destination   a  b  n     e  d  n  n  f  g
///                           ^  -  -  +  +  +     - delivered, + replayed
///                        anchor
/// ```
///
/// A lagging destination host has not received the end of the source host's packets when the cut
/// arrives. The anchor then advances with each arriving packet of the list.
#[derive(Clone, Debug)]
pub(super) struct Matcher {
    /// Fingerprints of the source host, oldest first.
    sequence: Vec<u64>,
    known: HashMap<u64, Known>,
    anchor: Option<Anchor>,
    /// First position from which every delivered packet is certainly in the sequence. The sequence
    /// spans much more than [`RECOVERY`], unless the sequence has its maximum length.
    covered: Option<Place>,
    /// Repeated fingerprints after the anchor that have not arrived; `None` once an unlisted packet
    /// arrived, because listed packets arrive before unlisted ones or never.
    pending: Option<HashMap<u64, u32>>,
    expires: Timestamp,
    /// Packets held at the cut, until the anchor is chosen.
    held: Vec<(u64, Place, Timestamp)>,
    /// Whether all held packets have been judged.
    is_live: bool,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    /// Last index in the sequence.
    index: usize,
    /// Whether the fingerprint occurs more than once in the sequence or among the held packets.
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
    /// Takes the fingerprints of a [`common::signal::FlowCut`] that arrived at `now`.
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

    /// Records a packet that was held at the cut; called in order of arrival.
    pub(super) fn see(&mut self, fingerprint: u64, place: Place, at: Timestamp) {
        if let Some(known) = self.known.get_mut(&fingerprint) {
            known.is_repeated |= known.is_seen;
            known.is_seen = true;
        }
        self.held.push((fingerprint, place, at));
    }

    /// Chooses the anchor, after all held packets were seen.
    pub(super) fn settle(&mut self) {
        let is_whole = self.sequence.len() < FLOW_FINGERPRINTS;
        // Packets delivered shortly before the first listed packet may arrive late.
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
            // Nothing is known about packets before the oldest listed packet.
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

    /// Ends the judgement of held packets; all packets from now on have just arrived.
    pub(super) fn go_live(&mut self) {
        self.is_live = true;
    }

    /// Returns the arrival time of the anchor; `None` without an anchor.
    pub(super) fn anchored_at(&self) -> Option<Timestamp> {
        self.anchor.map(|anchor| anchor.at)
    }

    /// Judges a packet; called in order of arrival per flow.
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

    /// Advances the anchor. Repeated fingerprints before the new anchor that have not arrived are lost.
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
