//! One exchange with a node: its sealed request is opened, a lookup is answered, the answer is sealed.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::mat::key::{Key, Party};
use common::mat::message::{LookupReply, LookupRequest, Mapping, MatMessage};
use common::mat::seal::{Keying, Sealed, seal};
use tracing::warn;

use super::{AHEAD, Hoa, Ims, Now, Opened, Path, Reply, is_due};

impl Ims {
    /// Opens a datagram with the key of its HoA, possibly of a newer generation than the known one.
    pub(super) fn open(&mut self, now: Now, source: Ipv6Addr, datagram: &[u8]) -> Option<Opened> {
        let Ok(sealed) = Sealed::parse(datagram) else {
            self.counters.malformed += 1;
            return None;
        };
        let hoa = sealed.hoa;
        if sealed.keying != Keying::Node {
            self.counters.unexpected += 1;
            return None;
        }
        if !self.config.home.contains(hoa.into()) {
            self.counters.foreign += 1;
            return None;
        }
        let node = self.nodes.get(&hoa);
        if let Some(message) = node.and_then(|node| sealed.open(&node.key).ok()) {
            return Some(Opened { hoa, message });
        }
        let known = node.map_or(0, |node| node.generation);
        if !self.ahead_allowance.take(now.monotonic, source) {
            self.counters.forged += 1;
            return None;
        }
        for generation in known.saturating_add(1)..=known.saturating_add(AHEAD) {
            if let Ok(message) = sealed.open(&self.secret.node(hoa, generation)) {
                self.counters.generations_learnt += 1;
                self.renew(now, hoa, generation);
                self.stage_current(now, hoa, None);
                return Some(Opened { hoa, message });
            }
        }
        let before = known.checked_sub(1).filter(|it| *it > 0);
        if before.is_some_and(|it| sealed.open(&self.secret.node(hoa, it)).is_ok()) {
            self.counters.old_keys += 1;
            if is_due(&mut self.old_key_warning, now.monotonic) {
                let hoa = Ipv6Addr::from(hoa);
                warn!(%hoa, generation = known, "Node uses a key that was replaced; give it its newest key file");
            }
        } else {
            self.counters.forged += 1;
        }
        None
    }

    pub(super) fn lookup(
        &mut self,
        now: Now,
        path: Path,
        hoa: Hoa,
        transaction: u64,
        body: &LookupRequest,
    ) {
        let wanted: Hoa = *body.hoa;
        let known = self
            .nodes
            .get(&wanted)
            .filter(|node| node.lives(now.monotonic));
        let (mapping, lifetime) = match known {
            Some(node) => {
                self.counters.lookups_found += 1;
                let mapping = Mapping {
                    sequence: node.sequence,
                    moas: node.moas.clone(),
                };
                let rest = node.until.since(now.monotonic);
                (Some(mapping), rest.min(self.config.lookup_lifetime))
            }
            None => {
                self.counters.lookups_not_found += 1;
                (None, self.config.negative_lifetime)
            }
        };
        let message = LookupReply {
            hoa: body.hoa,
            mapping,
            pair_key: self.pair_key(hoa, wanted).0.into(),
            // An answer valid for zero seconds would be useless.
            lifetime_s: whole_seconds(lifetime).max(1),
        };
        self.reply(path, hoa, transaction, &message.into());
    }

    /// Returns the key of a pair of nodes; a new generation of either node changes the key.
    fn pair_key(&self, one: Hoa, other: Hoa) -> Key {
        let party = |hoa: Hoa| Party {
            hoa,
            generation: self.nodes.get(&hoa).map_or(0, |node| node.generation),
        };
        self.secret.pair(party(one), party(other))
    }

    pub(super) fn reply(&mut self, path: Path, hoa: Hoa, transaction: u64, message: &MatMessage) {
        let Some(key) = self.nodes.get(&hoa).map(|node| node.key) else {
            return;
        };
        let Some(nonce) = self.entropy.nonce() else {
            self.counters.no_random_numbers += 1;
            return;
        };
        let bytes = seal(Keying::Node, hoa, &key, nonce, &message.encode(transaction));
        self.replies.push_back(Reply { path, bytes });
    }
}

pub(super) fn whole_seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX)
}
