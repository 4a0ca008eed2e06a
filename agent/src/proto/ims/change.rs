//! Changes that other servers make in a shared store.
//!
//! ```text
//!   handle_change ---- newer than what is known? --> replaces it
//!   handle_swapped --- Lost: takes in the winner, then judges the update against it:
//!                        sequence still newer -> next write | else -> OldSequence, as ever
//! ```
//!
//! A swap protects one HoA. Two servers may therefore give one address to two HoAs at the same time.
//! Each server then keeps the mapping that ends last, as after a start ([`Ims::restore`]).

use std::collections::BTreeSet;

use tracing::debug;

use super::node::Node;
use super::update::Staged;
use super::{Enrolled, Hoa, Ims, Now, Record, Swapped};

impl Ims {
    /// Takes in a record that another server stored; an older one than the known has no effect.
    pub fn handle_change(&mut self, now: Now, hoa: Hoa, record: Record) {
        let stored = self.nodes.get(&hoa).and_then(|node| node.stored);
        if stored < Some(record.version()) {
            self.take(now, hoa, record);
        }
    }

    /// Handles the outcome of a write. A write that lost is prepared anew if it is still newer than
    /// the winner.
    pub fn handle_swapped(&mut self, now: Now, hoa: Hoa, swapped: Swapped) {
        let winner = match swapped {
            Swapped::Stored => return self.handle_stored(now, &[hoa], true),
            Swapped::Lost(winner) => winner,
        };
        let Some(staged) = self.staged.remove(&hoa) else {
            return;
        };
        self.counters.writes_lost += 1;
        match winner {
            Some(record) => self.take(now, hoa, record),
            None => {
                if let Some(node) = self.nodes.get_mut(&hoa) {
                    node.stored = None;
                }
            }
        }
        self.repeat(now, hoa, staged);
        self.resume(now, hoa);
    }

    /// Notes what is stored; replaces the known state if that is older.
    fn take(&mut self, now: Now, hoa: Hoa, record: Record) {
        let version = record.version();
        if let Some(node) = self.nodes.get_mut(&hoa) {
            node.stored = Some(version);
            if node.version() >= version {
                return;
            }
        }
        self.counters.changes_by_others += 1;
        debug!(hoa = %std::net::Ipv6Addr::from(hoa), ?version, "Another server changed a node");
        let key = self.secret.node(hoa, version.generation);
        let node = Node::restore(record, key, now, self.config.max_lifetime);
        self.settle(now, hoa, node);
    }

    /// Judges a write again whose node has changed meanwhile.
    pub(super) fn repeat(&mut self, now: Now, hoa: Hoa, staged: Staged) {
        self.give_back(hoa, &staged.node);
        // After a change of the key, the former key's update is void, and nobody can read an answer
        // with the former key.
        let generation = self.nodes.get(&hoa).map(|node| node.generation);
        if let Some(update) = staged.update
            && generation == Some(staged.node.generation)
        {
            self.update(now, hoa, update);
        }
        if self.nodes.get(&hoa).is_some_and(|node| !node.is_stored()) {
            self.stage_current(now, hoa, None);
        }
        match self.staged.get_mut(&hoa) {
            Some(next) => next.requests.extend(staged.requests),
            None => self
                .enrolled
                .extend(staged.requests.into_iter().map(|request| Enrolled {
                    request,
                    generation,
                })),
        }
    }

    /// Inserts a node that is stored. Of two nodes with one address, the one whose mapping ends last
    /// keeps its mapping; a mapping counts for more than a quarantine.
    pub(super) fn settle(&mut self, now: Now, hoa: Hoa, mut node: Node) {
        let rivals: BTreeSet<Hoa> = node
            .moas
            .iter()
            .filter_map(|moa| self.holders.other(&moa.address, &hoa, now.monotonic))
            .collect();
        let is_older = rivals.iter().any(|rival| {
            let rival = self.nodes.get(rival);
            rival.is_some_and(|rival| rival.maps_any_of(&node) && rival.until >= node.until)
        });
        if is_older {
            node.moas.clear();
        }
        for rival in rivals.into_iter().filter(|_| !is_older) {
            if let Some(mut other) = self.nodes.get(&rival).cloned() {
                other.yield_to(&node);
                self.place(rival, other);
            }
            // A pending write of the rival may hold an address too.
            for moa in &node.moas {
                self.holders.release(&moa.address, &rival);
            }
        }
        node.freed.retain(|freed| {
            let holder = self.holders.other(&freed.address, &hoa, now.monotonic);
            holder.is_none()
        });
        self.place(hoa, node);
    }
}
