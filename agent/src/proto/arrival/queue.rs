//! Queue of requests for a place. The policy limits the domains that arrive at once, for each peer
//! and in total.
//!
//! ```text
//!  AgentRequest --- a place is free -----------------------> (accepted)
//!      ^    |
//!      |    +--- none is ---> Waiting --- not repeated within [`PATIENCE`] ---> (forgotten)
//!      |                         |
//!      +--- every few seconds ---+  MigrationProgress (Preparing)
//! ```
//!
//! The queue stores only the requests' identities: the source repeats its request until it is its
//! turn. The order is that of the first requests. A peer whose own places are taken does not block
//! the others.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use common::signal::{MigrationProgress, Phase};

use super::Arrivals;
use crate::proto::context::Context;
use crate::proto::millis;
use crate::proto::policy::Share;
use crate::proto::refusal::{Refusal, Whose};
use crate::proto::{DomainUuid, Timestamp};

/// Time for which a waiting request keeps its turn without being repeated; longer than a source's
/// interval.
const PATIENCE: Duration = Duration::from_secs(10);

/// One waiting request.
#[derive(Debug)]
struct Waiter {
    peer: String,
    transaction: u64,
    uuid: DomainUuid,
    domain: String,
    since: Timestamp,
    asked: Timestamp,
}

/// Operator's view of a domain that waits for a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitingView<'a> {
    /// libvirt's name of the domain.
    pub domain: &'a str,
    /// Name of the agent on the source host.
    pub source: &'a str,
    /// Time since the first request.
    pub waited: Duration,
}

/// A domain that arrives or asks to arrive.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arriving<'a> {
    /// Name of the agent on the source host.
    pub(super) peer: &'a str,
    pub(super) uuid: DomainUuid,
}

/// Waiting requests in the order of their arrival.
#[derive(Debug, Default)]
pub(super) struct Queue(VecDeque<Waiter>);

impl Queue {
    fn place(&self, peer: &str, transaction: u64) -> Option<usize> {
        self.0
            .iter()
            .position(|it| it.transaction == transaction && it.peer == peer)
    }

    /// Returns true if the request is waiting.
    pub(super) fn has(&self, peer: &str, transaction: u64) -> bool {
        self.place(peer, transaction).is_some()
    }

    /// Removes a request, if it is waiting.
    pub(super) fn remove(&mut self, peer: &str, transaction: u64) {
        if let Some(place) = self.place(peer, transaction) {
            self.0.remove(place);
        }
    }

    /// Returns the waiting domains in the order of their turns.
    pub(super) fn waiting(&self, now: Timestamp) -> impl Iterator<Item = WaitingView<'_>> {
        let waiters = self.0.iter();
        let waiters = waiters.filter(move |it| now.since(it.asked) < PATIENCE);
        waiters.map(move |it| WaitingView {
            domain: &it.domain,
            source: &it.peer,
            waited: now.since(it.since),
        })
    }

    /// Returns true if a request can be accepted now, beside the `arriving` domains; otherwise
    /// tells the source to wait and returns false.
    ///
    /// # Errors
    ///
    /// Returns the refusal if too many requests of that peer wait already.
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

    /// Checks for a free place after serving the requests in front of `place`.
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
    /// Returns the domains that wait for a place at `now`, in the order of their turns.
    pub(in crate::proto) fn waiting(
        &self,
        now: Timestamp,
    ) -> impl Iterator<Item = WaitingView<'_>> {
        self.queue.waiting(now)
    }
}

#[cfg(test)]
mod tests;
