//! Handling of an update: judged, stored, then visible and acknowledged.
//!
//! A HoA has at most one pending write. Meanwhile, only the newest update waits.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::mat::message::{Outcome, UpdateReply, UpdateRequest};
use tracing::{debug, warn};

use super::node::Node;
use super::{Enrolled, Hoa, Ims, Now, Path, Write, address, is_due, whole_seconds};

/// An update to be processed.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) path: Path,
    pub(super) transaction: u64,
    pub(super) body: UpdateRequest,
}

/// A pending write.
#[derive(Debug)]
pub(super) struct Staged {
    /// Node after the write.
    pub(super) node: Node,
    /// The update to acknowledge.
    pub(super) update: Option<Waiting>,
    /// Requests of operators to answer.
    pub(super) requests: Vec<u64>,
}

impl Staged {
    /// Returns true if the node holds an address after the write.
    pub(super) fn holds(&self, address: &[u8; 16]) -> bool {
        self.node.holds().any(|(held, _)| held == *address)
    }
}

impl Ims {
    pub(super) fn update(&mut self, now: Now, hoa: Hoa, request: Waiting) {
        if self.staged.contains_key(&hoa) {
            self.counters.updates_waited += 1;
            self.waiting.insert(hoa, request);
            return;
        }
        let Waiting {
            path,
            transaction,
            ref body,
        } = request;
        let Some(node) = self.nodes.get(&hoa) else {
            return;
        };
        let same = body.sequence == node.sequence && body.moas == node.moas;
        if same && (node.moas.is_empty() || node.lives(now.monotonic)) {
            self.counters.updates_repeated += 1;
            self.acknowledge(now, hoa, path, transaction, Outcome::Accepted);
            return;
        }
        if let Err(outcome) = self.judge(now, hoa, body) {
            self.acknowledge(now, hoa, path, transaction, outcome);
            return;
        }
        let lifetime = Duration::from_secs(body.lifetime_s.into())
            .clamp(self.config.min_lifetime, self.config.max_lifetime);
        let quarantine = now.monotonic + self.config.lookup_lifetime;
        let Some(node) = self.nodes.get(&hoa) else {
            return;
        };
        let node = node.updated(
            body.sequence,
            body.moas.clone(),
            lifetime,
            now.monotonic,
            quarantine,
        );
        // The addresses are closed to other nodes from now on, even while the write is pending.
        for moa in &node.moas {
            self.holders.hold(*moa.address, hoa, node.until);
        }
        self.stage(now, hoa, node, Some(request), Vec::new());
    }

    fn judge(&mut self, now: Now, hoa: Hoa, body: &UpdateRequest) -> Result<(), Outcome> {
        let known = self.nodes.get(&hoa).map_or(0, |node| node.sequence);
        if body.sequence <= known {
            self.counters.updates_old_sequence += 1;
            return Err(Outcome::OldSequence);
        }
        let window = self.config.time_window.as_millis();
        if u128::from(body.time_ms.abs_diff(now.wall_ms)) > window {
            self.counters.updates_wrong_time += 1;
            return Err(Outcome::WrongTime);
        }
        if !address::are_moas(&body.moas, self.config.home) {
            self.counters.updates_bad_addresses += 1;
            return Err(Outcome::BadAddresses);
        }
        let taken = body.moas.iter().find_map(|moa| {
            let holder = self.holders.other(&moa.address, &hoa, now.monotonic)?;
            Some((moa, holder))
        });
        if let Some((moa, holder)) = taken {
            self.counters.updates_taken_addresses += 1;
            if is_due(&mut self.taken_warning, now.monotonic) {
                warn!(
                    hoa = %Ipv6Addr::from(hoa),
                    moa = %Ipv6Addr::from(*moa.address),
                    holder = %Ipv6Addr::from(holder),
                    "Node asks for an address that another has, or had until a while ago"
                );
            }
            return Err(Outcome::BadAddresses);
        }
        Ok(())
    }

    /// Stores the current state of a node.
    pub(super) fn stage_current(&mut self, now: Now, hoa: Hoa, request: Option<u64>) {
        if let Some(staged) = self.staged.get_mut(&hoa) {
            staged.requests.extend(request);
            return;
        }
        if let Some(node) = self.nodes.get(&hoa) {
            let node = node.clone();
            self.stage(now, hoa, node, None, request.into_iter().collect());
        }
    }

    fn stage(
        &mut self,
        now: Now,
        hoa: Hoa,
        node: Node,
        update: Option<Waiting>,
        requests: Vec<u64>,
    ) {
        self.writes.push(Write {
            hoa,
            expected: node.stored,
            record: node.record(now),
        });
        let staged = Staged {
            node,
            update,
            requests,
        };
        self.staged.insert(hoa, staged);
    }

    /// Handles the end of a write.
    pub(super) fn conclude(&mut self, now: Now, hoa: Hoa, stored: bool) {
        let Some(staged) = self.staged.remove(&hoa) else {
            return;
        };
        let version = staged.node.version();
        if let Some(node) = self.nodes.get_mut(&hoa) {
            if stored {
                node.stored = node.stored.max(Some(version));
            }
            // The key was replaced meanwhile, or another server stored a newer state.
            if node.version() > version {
                self.repeat(now, hoa, staged);
                return;
            }
        }
        if let Some(Waiting {
            path, transaction, ..
        }) = staged.update
        {
            if stored {
                self.counters.updates_stored += 1;
                let node = &staged.node;
                debug!(hoa = %Ipv6Addr::from(hoa), sequence = node.sequence, moas = node.moas.len(), "Node is updated");
                self.settle(now, hoa, staged.node);
                self.acknowledge(now, hoa, path, transaction, Outcome::Accepted);
            } else {
                self.counters.updates_failed += 1;
                self.give_back(hoa, &staged.node);
                self.acknowledge(now, hoa, path, transaction, Outcome::Failed);
            }
        }
        let generation = self.nodes.get(&hoa).map(|node| node.generation);
        let generation = generation.filter(|_| stored);
        self.enrolled
            .extend(staged.requests.into_iter().map(|request| Enrolled {
                request,
                generation,
            }));
    }

    /// Judges the update that waited for the end of a write.
    pub(super) fn resume(&mut self, now: Now, hoa: Hoa) {
        if let Some(waiting) = self.waiting.remove(&hoa) {
            self.update(now, hoa, waiting);
        }
    }

    /// Releases the addresses of a refused update, except those that the node already holds.
    pub(super) fn give_back(&mut self, hoa: Hoa, refused: &Node) {
        for (address, _) in refused.holds() {
            self.holders.release(&address, &hoa);
        }
        if let Some(node) = self.nodes.get(&hoa) {
            for (address, until) in node.holds() {
                self.holders.hold(address, hoa, until);
            }
        }
    }

    fn acknowledge(&mut self, now: Now, hoa: Hoa, path: Path, transaction: u64, outcome: Outcome) {
        let Some(node) = self.nodes.get(&hoa) else {
            return;
        };
        let left = node.until.since(now.monotonic);
        let lives = outcome == Outcome::Accepted && node.lives(now.monotonic);
        let message = UpdateReply {
            outcome: outcome as u8,
            sequence: node.sequence,
            time_ms: now.wall_ms,
            lifetime_s: if lives { whole_seconds(left) } else { 0 },
        };
        self.reply(path, hoa, transaction, &message.into());
    }
}
