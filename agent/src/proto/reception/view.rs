//! Operator's view of receptions and relays.

use common::maps::{Address, ManagedKey, StreamKey};

use std::time::Duration;

use super::course::State;
use super::{Reception, Receptions};
use crate::proto::context::Context;
use crate::proto::{RelayCandidate, Timestamp};

/// Mode of an address's reception.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Native packets only.
    Native,
    /// Relayed packets only.
    Relay,
    /// Both paths; the first copy of each packet passes.
    Both,
    /// Native packets pass if any come; no relay has been asked yet.
    Probing,
    /// No packets come; both paths are watched.
    Idle,
}

impl Mode {
    /// Returns the mode as one word for a person.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Relay => "relay",
            Self::Both => "both",
            Self::Probing => "probing",
            Self::Idle => "idle",
        }
    }
}

/// Reception of one address.
#[derive(Clone, Copy, Debug)]
pub struct ModeView {
    /// VLAN and multicast address.
    pub key: ManagedKey,
    /// Current mode.
    pub mode: Mode,
    /// Reason in a few words; empty while nothing has changed the mode.
    pub why: &'static str,
    /// Time since the last state change.
    pub age: Duration,
}

/// State of one relay.
#[derive(Clone, Debug)]
pub struct RelayView<'a> {
    /// Name and address of the relay, from discovery.
    pub candidate: &'a RelayCandidate,
    /// Whether the connection to the relay is up.
    pub up: bool,
    /// Cause of the last failure; `None` if the relay works or was not used yet.
    pub reason: Option<&'a str>,
}

/// State of one session with a relay.
#[derive(Clone, Debug)]
pub struct SessionView<'a> {
    /// VLAN and multicast address.
    pub key: ManagedKey,
    /// Name of the relay; `None` for an adopted session until its relay is found again.
    pub relay: Option<&'a str>,
    /// Whether the relay has answered.
    pub answered: bool,
    /// Whether the session waits to replace another session.
    pub standby: bool,
    /// Source address of the relay's datagrams; `None` before the first answer.
    pub address: Option<Address>,
    /// Flows that the relay announced.
    pub flows: Vec<StreamKey>,
    /// Remaining time of the lease.
    pub lease_left: Duration,
    /// Reason for the address's current state.
    pub why: &'static str,
}

impl Reception {
    pub(super) fn mode(&self) -> Mode {
        match self.state {
            State::Native | State::ToNative { .. } | State::Doubtful { ask_at: None } => {
                Mode::Native
            }
            State::Doubtful { ask_at: Some(_) } => Mode::Probing,
            State::Both if self.idle => Mode::Idle,
            State::Both => Mode::Both,
            State::ToRelay { .. } | State::Relay | State::FromRelay { .. } => Mode::Relay,
        }
    }
}

impl Receptions {
    /// Returns the mode of each watched address.
    pub(in crate::proto) fn modes(&self, now: Timestamp) -> impl Iterator<Item = ModeView> {
        self.by_address
            .iter()
            .map(move |(key, reception)| ModeView {
                key: *key,
                mode: reception.mode(),
                why: reception.why,
                age: now.since(reception.entered),
            })
    }

    /// Returns the relays that discovery found.
    pub(in crate::proto) fn relays<'a>(
        &'a self,
        cx: &'a Context,
    ) -> impl Iterator<Item = RelayView<'a>> {
        self.relays.relays.iter().map(|relay| RelayView {
            candidate: &relay.candidate,
            up: cx.is_up(&relay.candidate.name),
            reason: relay.reason.as_deref(),
        })
    }

    /// Returns all sessions with relays.
    pub(in crate::proto) fn sessions(
        &self,
        now: Timestamp,
    ) -> impl Iterator<Item = SessionView<'_>> {
        self.by_address.iter().flat_map(move |(key, reception)| {
            let session = reception.session.iter().map(move |it| (it, false));
            let standby = reception.standby.iter().map(move |it| (it, true));
            session
                .chain(standby)
                .map(move |(session, standby)| SessionView {
                    key: *key,
                    relay: session.relay.as_deref(),
                    answered: session.answered.is_some(),
                    standby,
                    address: session.address,
                    flows: session.flows.values().map(|flow| flow.stream).collect(),
                    lease_left: session.lease_left(now),
                    why: reception.why,
                })
        })
    }
}
