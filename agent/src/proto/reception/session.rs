//! One session with a relay.

use std::collections::BTreeMap;
use std::time::Duration;

use common::maps::{Address, ManagedKey, RelayFlow, RelayFlowKey};

use super::Receptions;
use crate::proto::Timestamp;
use crate::proto::filter::Filter;

/// Time that a relay has to answer.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// A session with a relay.
#[derive(Debug)]
pub(super) struct Session {
    /// Name of the relay; `None` for an adopted session until its relay is found again.
    pub(super) relay: Option<String>,
    pub(super) transaction: u64,
    /// Earliest time of the session's packets.
    pub(super) began: Timestamp,
    /// Time of the first answer; `None` before.
    pub(super) answered: Option<Timestamp>,
    /// Send time of the oldest unanswered request; `None` if all are answered.
    pub(super) asked: Option<Timestamp>,
    pub(super) lease_end: Timestamp,
    pub(super) lease: Duration,
    /// Time of the next renewal.
    pub(super) renew_at: Timestamp,
    /// Requested filter and the filter before; an answer may still refer to the latter.
    pub(super) filters: [Filter; 2],
    /// Source address of the relay's datagrams; `None` before the first answer.
    pub(super) address: Option<Address>,
    pub(super) flows: BTreeMap<RelayFlowKey, RelayFlow>,
}

impl Session {
    pub(super) fn new(relay: Option<String>, transaction: u64, now: Timestamp) -> Self {
        Self {
            relay,
            transaction,
            began: now,
            answered: None,
            asked: None,
            lease_end: now,
            lease: Duration::ZERO,
            renew_at: now,
            filters: [Filter::nothing(), Filter::nothing()],
            address: None,
            flows: BTreeMap::new(),
        }
    }

    pub(super) fn is_with(&self, relay: &str, transaction: u64) -> bool {
        self.transaction == transaction && self.relay.as_deref() == Some(relay)
    }

    pub(super) fn is_overdue(&self, now: Timestamp) -> bool {
        self.asked
            .is_some_and(|asked| now.since(asked) >= ANSWER_TIMEOUT)
    }

    /// Returns the time at which another relay is asked, if the lease was not renewed.
    pub(super) fn last_third(&self) -> Timestamp {
        self.lease_end - self.lease / 3
    }
}

/// Role of a session of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Session,
    Standby,
}

impl Session {
    /// Assigns the relay that was found again after a restart; the lease is renewed at once.
    pub(super) fn reclaimed_by(&mut self, relay: String, now: Timestamp) {
        self.relay = Some(relay);
        self.asked = None;
        self.renew_at = now;
    }

    /// Renews the lease after a reconnect: an answer to a request on the old connection is lost, and
    /// the relay may have restarted.
    pub(super) fn ask_again(&mut self, relay: &str, now: Timestamp) {
        if self.relay.as_deref() == Some(relay) && self.answered.is_some() {
            self.asked = None;
            self.renew_at = now;
        }
    }
}

impl Receptions {
    pub(super) fn session(&self, key: ManagedKey, place: Place) -> Option<&Session> {
        let reception = self.by_address.get(&key)?;
        match place {
            Place::Session => reception.session.as_ref(),
            Place::Standby => reception.standby.as_ref(),
        }
    }

    pub(super) fn session_mut(&mut self, key: ManagedKey, place: Place) -> Option<&mut Session> {
        let reception = self.by_address.get_mut(&key)?;
        match place {
            Place::Session => reception.session.as_mut(),
            Place::Standby => reception.standby.as_mut(),
        }
    }
}
