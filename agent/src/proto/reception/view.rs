//! What the operator sees of receptions and relays.

use common::maps::{Address, ManagedKey, StreamKey};

use std::time::Duration;

use super::course::State;
use super::{Reception, Receptions};
use crate::proto::context::Context;
use crate::proto::{RelayCandidate, Timestamp};

/// How an address is received now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Natively.
    Native,
    /// From a relay.
    Relay,
    /// By both ways, the first copy of each packet passing.
    Both,
    /// Natively, should a packet come; a relay is not asked yet.
    Probing,
    /// Nothing comes; both ways are watched.
    Idle,
}

impl Mode {
    /// A word for a person.
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

/// How one address is received.
#[derive(Clone, Copy, Debug)]
pub struct ModeView {
    /// VLAN and address.
    pub key: ManagedKey,
    /// How.
    pub mode: Mode,
    /// Why, in a few words; empty while nothing has changed it.
    pub why: &'static str,
    /// For how long.
    pub age: Duration,
}

/// One relay.
#[derive(Clone, Debug)]
pub struct RelayView<'a> {
    /// The relay.
    pub candidate: &'a RelayCandidate,
    /// Whether the connection to it is up.
    pub up: bool,
    /// Why it was of no use last.
    pub reason: Option<&'a str>,
}

/// One session with a relay.
#[derive(Clone, Debug)]
pub struct SessionView<'a> {
    /// The multicast address.
    pub key: ManagedKey,
    /// Name of the relay; `None` if it is not found again yet after a restart.
    pub relay: Option<&'a str>,
    /// Whether it has answered.
    pub answered: bool,
    /// Whether it waits to take over from another.
    pub standby: bool,
    /// Source address of its datagrams, once known.
    pub address: Option<Address>,
    /// Flows that it has announced.
    pub flows: Vec<StreamKey>,
    /// What is left of its lease.
    pub lease_left: Duration,
    /// Why the address is received as it is.
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
    /// How each watched address is received.
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

    /// The relays that discovery has found.
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

    /// The sessions with relays.
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
