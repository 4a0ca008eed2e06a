//! Requests that wait for a place: how many domains arrive at once is bounded, for each peer and in
//! all.
//!
//! ```text
//!  AgentRequest --- a place is free -----------------------> (taken on)
//!      ^    |
//!      |    +--- none is ---> Waiting --- not asked again within [`PATIENCE`] ---> (forgotten)
//!      |                         |
//!      +--- every few seconds ---+  MigrationProgress (Preparing)
//! ```
//!
//! Only who waits is remembered: the source asks again until it is its turn. Turns are taken in the
//! order of the first requests, but nobody waits for a peer whose own places are taken.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use common::signal::{MigrationProgress, Phase};

use super::Arrivals;
use crate::proto::context::Context;
use crate::proto::millis;
use crate::proto::policy::Share;
use crate::proto::refusal::{Refusal, Whose};
use crate::proto::{DomainUuid, Timestamp};

/// How long a place is kept for somebody who does not ask again; longer than a source takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// One that waits.
#[derive(Debug)]
struct Waiter {
    peer: String,
    transaction: u64,
    uuid: DomainUuid,
    domain: String,
    since: Timestamp,
    asked: Timestamp,
}

/// A domain that waits for a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitingView<'a> {
    /// Its name.
    pub domain: &'a str,
    /// Where it is.
    pub source: &'a str,
    /// For how long.
    pub waited: Duration,
}

/// A domain that arrives, or is to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arriving<'a> {
    /// The agent where it is.
    pub(super) peer: &'a str,
    pub(super) uuid: DomainUuid,
}

/// Those that wait, in the order in which they have come.
#[derive(Debug, Default)]
pub(super) struct Queue(VecDeque<Waiter>);

impl Queue {
    fn place(&self, peer: &str, transaction: u64) -> Option<usize> {
        self.0
            .iter()
            .position(|it| it.transaction == transaction && it.peer == peer)
    }

    /// Whether a request has been asked before.
    pub(super) fn has(&self, peer: &str, transaction: u64) -> bool {
        self.place(peer, transaction).is_some()
    }

    /// Forgets a request.
    pub(super) fn remove(&mut self, peer: &str, transaction: u64) {
        if let Some(place) = self.place(peer, transaction) {
            self.0.remove(place);
        }
    }

    /// Domains that wait for a place at `now`, in the order of their turns.
    pub(super) fn waiting(&self, now: Timestamp) -> impl Iterator<Item = WaitingView<'_>> {
        let waiters = self.0.iter();
        let waiters = waiters.filter(move |it| now.since(it.asked) < PATIENCE);
        waiters.map(move |it| WaitingView {
            domain: &it.domain,
            source: &it.peer,
            waited: now.since(it.since),
        })
    }

    /// Whether a request can be taken on now, beside the domains that are arriving; `false` if it has been
    /// told to wait.
    ///
    /// # Errors
    ///
    /// Too many of that peer wait already.
    pub(super) fn take_turn(
        &mut self,
        cx: &mut Context,
        arriving: &[Arriving<'_>],
        asked: Arriving<'_>,
        transaction: u64,
        domain: &str,
    ) -> Result<bool, Refusal> {
        let now = cx.now;
        let peer = asked.peer;
        self.0.retain(|it| now.since(it.asked) < PATIENCE);
        let place = self.place(peer, transaction);
        let share = cx.config.policy.arriving();
        let Err(whose) = self.has_place(share, arriving, asked, place) else {
            self.remove(peer, transaction);
            return Ok(true);
        };
        let queue = &mut self.0;
        let since = if let Some(waiter) = place.and_then(|place| queue.get_mut(place)) {
            waiter.asked = now;
            waiter.since
        } else {
            let waiting = queue.iter().filter(|it| it.peer == peer).count();
            if waiting >= usize::from(cx.config.policy.waiting_per_peer) {
                return Err(Refusal::TooManyIncoming {
                    agent: cx.config.name.clone(),
                    limit: whose.limit(share),
                    whose,
                    waiting,
                });
            }
            tracing::info!(
                peer,
                domain,
                "Domain has to wait until another one has arrived"
            );
            queue.push_back(Waiter {
                peer: peer.to_owned(),
                transaction,
                uuid: asked.uuid,
                domain: domain.to_owned(),
                since: now,
                asked: now,
            });
            now
        };
        let waits = MigrationProgress {
            phase: Phase::Preparing,
            processed_bytes: 0,
            total_bytes: 0,
            elapsed_ms: millis(now.since(since)),
            vm_pause_ms: None,
            clock_ns: None,
        };
        cx.send(peer, transaction, &waits.into());
        Ok(false)
    }

    /// Whether there is a place for a domain, after those who wait before it.
    fn has_place(
        &self,
        Share { of_all, of_peer }: Share,
        arriving: &[Arriving<'_>],
        Arriving { peer, uuid }: Arriving<'_>,
        place: Option<usize>,
    ) -> Result<(), Whose> {
        let mut places: BTreeMap<&str, usize> = BTreeMap::new();
        let mut taken = 0;
        for arriving in arriving.iter().filter(|it| it.uuid != uuid) {
            taken += 1;
            *places.entry(arriving.peer).or_default() += 1;
        }
        let before = self.0.iter().take(place.unwrap_or(usize::MAX));
        for waiter in before.filter(|it| it.uuid != uuid) {
            let of_waiter = places.entry(&waiter.peer).or_default();
            if taken < of_all && *of_waiter < of_peer {
                taken += 1;
                *of_waiter += 1;
            }
        }
        if places.get(peer).is_some_and(|taken| *taken >= of_peer) {
            Err(Whose::Peer)
        } else if taken >= of_all {
            Err(Whose::All)
        } else {
            Ok(())
        }
    }
}

impl Arrivals {
    /// Domains that wait for a place at `now`, in the order of their turns.
    pub(in crate::proto) fn waiting(
        &self,
        now: Timestamp,
    ) -> impl Iterator<Item = WaitingView<'_>> {
        self.queue.waiting(now)
    }
}

#[cfg(test)]
#[path = "../tests/queue.rs"]
mod tests;
