//! Relays from discovery: permanent connections, and round-robin selection.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::backoff::Backoff;
use common::maps::Address;
use common::signal::{Code, ErrorMessage, MigrationAbort, PeerMessage, Reason, RelayRelease};
use tracing::info;

use super::Receptions;
use crate::proto::context::Context;
use crate::proto::links::peers::Links;
use crate::proto::timer::Timer;
use crate::proto::{RelayCandidate, Timestamp};

/// Limit of known relays.
const MAX_RELAYS: usize = 64;
/// Delay between connection attempts.
const RECONNECT: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(10));
/// Interval between two log lines with the same complaint.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);

/// A relay with its connection state.
#[derive(Debug)]
pub(super) struct Relay {
    pub(super) candidate: RelayCandidate,
    /// Number of the relay's timer.
    number: u64,
    /// Whether the latest discovery still lists the relay.
    listed: bool,
    /// Cause of the last failure; `None` if the relay works or was not used yet.
    pub(super) reason: Option<String>,
    reconnect: Backoff,
    complained: Option<Timestamp>,
}

/// All known relays, with the round-robin position.
#[derive(Debug, Default)]
pub(super) struct Relays {
    pub(super) relays: Vec<Relay>,
    /// Index of the relay that is asked next.
    next: usize,
    numbers: u64,
    complained: Option<Timestamp>,
}

impl Relays {
    fn get_mut(&mut self, name: &str) -> Option<&mut Relay> {
        self.relays
            .iter_mut()
            .find(|relay| relay.candidate.name == name)
    }

    /// Returns true if a peer of that name is a relay.
    fn contains(&self, name: &str) -> bool {
        self.relays.iter().any(|relay| relay.candidate.name == name)
    }

    /// Returns the next relay that is connected and not in `tried`. With `address`, only a relay that
    /// listens there qualifies.
    pub(super) fn pick(
        &mut self,
        tried: &BTreeSet<String>,
        links: &Links,
        address: Option<&Address>,
    ) -> Option<String> {
        let count = self.relays.len();
        let found = (0..count)
            .map(|offset| (self.next + offset) % count)
            .find(|index| {
                let relay = &self.relays[*index];
                let name = &relay.candidate.name;
                relay.listed
                    && !tried.contains(name)
                    && links.is_up(name)
                    && address.is_none_or(|address| relay.is_at(address))
            })?;
        self.next = (found + 1) % count;
        Some(self.relays[found].candidate.name.clone())
    }

    /// Returns true if a known relay listens at an address.
    pub(super) fn any_at(&self, address: &Address) -> bool {
        self.relays.iter().any(|relay| relay.is_at(address))
    }

    /// Clears the failure of a relay that answered.
    pub(super) fn answered(&mut self, name: &str) {
        if let Some(relay) = self.get_mut(name) {
            relay.reason = None;
        }
    }

    /// Records the failure of a relay; returns true if the failure is due for a log line.
    pub(super) fn failed(&mut self, name: &str, why: &str, now: Timestamp) -> bool {
        let Some(relay) = self.get_mut(name) else {
            return false;
        };
        relay.reason = Some(why.to_owned());
        complain(&mut relay.complained, now)
    }

    /// Returns why no relay is available, if the complaint is due for a log line.
    pub(super) fn complaint(&mut self, now: Timestamp) -> Option<String> {
        if !complain(&mut self.complained, now) {
            return None;
        }
        if self.relays.is_empty() {
            return Some("no relay was found".to_owned());
        }
        let reasons = self.relays.iter().map(|relay| {
            let reason = relay.reason.as_deref().unwrap_or("not connected yet");
            format!("{}: {reason}", relay.candidate.name)
        });
        Some(reasons.collect::<Vec<_>>().join("; "))
    }
}

impl Relay {
    fn is_at(&self, address: &Address) -> bool {
        let text = &self.candidate.address;
        let host = match text.strip_prefix('[') {
            Some(rest) => rest.split_once(']').map_or(rest, |(host, _)| host),
            None => text,
        };
        host.parse::<std::net::Ipv6Addr>()
            .is_ok_and(|host| host.octets() == *address)
    }
}

fn complain(last: &mut Option<Timestamp>, now: Timestamp) -> bool {
    let due = last.is_none_or(|last| now.since(last) >= COMPLAINT_INTERVAL);
    if due {
        *last = Some(now);
    }
    due
}

impl Receptions {
    /// Takes the complete list of relays from discovery.
    pub(in crate::proto) fn found(&mut self, cx: &mut Context, candidates: Vec<RelayCandidate>) {
        for relay in &mut self.relays.relays {
            relay.listed = false;
        }
        for candidate in candidates.into_iter().take(MAX_RELAYS) {
            if let Some(relay) = self.relays.get_mut(&candidate.name) {
                relay.listed = true;
                relay.candidate = candidate;
                continue;
            }
            info!(
                relay = candidate.name,
                address = candidate.address,
                found_by = candidate.found_by,
                "Relay is found"
            );
            self.relays.numbers += 1;
            let name = candidate.name.clone();
            self.relays.relays.push(Relay {
                candidate,
                number: self.relays.numbers,
                listed: true,
                reason: None,
                reconnect: RECONNECT,
                complained: None,
            });
            cx.connect(&name);
        }
        self.forget_relays(cx);
    }

    /// Returns true if a peer of that name is a relay.
    pub(in crate::proto) fn is_relay(&self, name: &str) -> bool {
        self.relays.contains(name)
    }

    /// Forgets relays that discovery no longer lists and that no session uses.
    fn forget_relays(&mut self, cx: &mut Context) {
        let used: BTreeSet<&str> = self
            .by_address
            .values()
            .flat_map(|reception| reception.session.iter().chain(&reception.standby))
            .filter_map(|session| session.relay.as_deref())
            .collect();
        let gone = |relay: &Relay| !relay.listed && !used.contains(&*relay.candidate.name);
        let numbers: BTreeMap<u64, bool> = self
            .relays
            .relays
            .iter()
            .map(|relay| (relay.number, gone(relay)))
            .collect();
        self.relays.relays.retain(|relay| !numbers[&relay.number]);
        for (number, _) in numbers.into_iter().filter(|(_, gone)| *gone) {
            cx.timers.stop(Timer::Relay(number));
        }
        self.relays.next = 0;
    }

    /// Handles a new connection to a relay: receptions that wait for a relay ask again.
    pub(in crate::proto) fn relay_up(&mut self, cx: &mut Context, name: &str) {
        let now = cx.now;
        let Some(relay) = self.relays.get_mut(name) else {
            return;
        };
        relay.reconnect.reset();
        relay.reason = None;
        let number = relay.number;
        cx.timers.stop(Timer::Relay(number));
        self.reclaim(cx);
        let keys: Vec<_> = self.by_address.keys().copied().collect();
        for key in keys {
            let Some(reception) = self.by_address.get_mut(&key) else {
                continue;
            };
            if reception.session.is_none() {
                reception.retry = None;
            }
            if let Some(session) = &mut reception.session {
                session.ask_again(name, now);
            }
            reception.exhausted = false;
            self.tend(cx, key);
            self.look(cx, key);
        }
    }

    /// Handles a lost or failed connection to a relay.
    pub(in crate::proto) fn relay_down(&mut self, cx: &mut Context, name: &str, reason: &str) {
        let now = cx.now;
        let Some(relay) = self.relays.get_mut(name) else {
            return;
        };
        relay.reason = Some(reason.to_owned());
        let (number, delay) = (relay.number, relay.reconnect.delay());
        if complain(&mut relay.complained, now) {
            tracing::warn!(relay = name, reason, "Relay is not connected");
        }
        cx.timers.set(Timer::Relay(number), now + delay);
        self.forget_relays(cx);
        let keys: Vec<_> = self.by_address.keys().copied().collect();
        for key in keys {
            self.tend(cx, key);
            self.look(cx, key);
        }
    }

    /// Handles a message from a relay; only messages about the relay's sessions are accepted.
    pub(in crate::proto) fn relay_said(
        &mut self,
        cx: &mut Context,
        relay: &str,
        transaction: u64,
        message: &PeerMessage,
    ) {
        match message {
            PeerMessage::RelayResponse(body) => {
                self.relay_responded(cx, relay, transaction, body);
            }
            PeerMessage::RelayRelease(RelayRelease(reason))
            | PeerMessage::MigrationAbort(MigrationAbort(reason))
            | PeerMessage::Error(ErrorMessage(reason)) => {
                self.relay_released(cx, relay, transaction, reason);
            }
            PeerMessage::AgentRequest(_)
            | PeerMessage::AgentResponse(_)
            | PeerMessage::MigrationProgress(_)
            | PeerMessage::HandoverCut(_)
            | PeerMessage::ArrivalNotice(_)
            | PeerMessage::AddressClaim(_)
            | PeerMessage::AddressClaimReply(_)
            | PeerMessage::RelayRequest(_) => {
                let reason = format!("{} knows {relay} as a relay only", cx.config.name);
                cx.decline(relay, transaction, Reason::new(Code::UNSUPPORTED, reason));
            }
        }
    }

    pub(in crate::proto) fn reconnect(&mut self, cx: &mut Context, number: u64) {
        let relay = self.relays.relays.iter().find(|r| r.number == number);
        if let Some(relay) = relay {
            let name = relay.candidate.name.clone();
            cx.connect(&name);
        }
    }
}
