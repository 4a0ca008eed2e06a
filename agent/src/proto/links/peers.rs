//! Connections to other agents, as far as the protocol sees them: up or down, and what a broken
//! one still has to be told.

use std::collections::BTreeMap;
use std::time::Duration;

use common::backoff::Backoff;
use common::signal::{
    AgentRequest, Code, DecodeError, ErrorMessage, PeerMessage, Reason, RelayRelease,
};
use tracing::{info, warn};

use crate::proto::context::Context;
use crate::proto::timer::{Timer, TimerTable};
use crate::proto::{Output, Timestamp};

/// Delays between attempts to connect.
pub(in crate::proto) const RECONNECT: Backoff =
    Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
/// How long the end of a migration is offered to a destination that cannot be reached.
const CLOSING: Duration = Duration::from_secs(60);
/// Ends of migrations offered at once.
const MAX_CLOSINGS: usize = 64;

/// Connections, and what peers that cannot be reached are still to be told.
#[derive(Debug, Default)]
pub(in crate::proto) struct Links {
    by_peer: BTreeMap<String, Link>,
    /// By the numbers of the migrations' records.
    closings: BTreeMap<u64, Closing>,
}

impl Links {
    pub(in crate::proto) fn is_up(&self, peer: &str) -> bool {
        self.by_peer.get(peer).is_some_and(|link| link.up)
    }

    /// The peers whose connection is up.
    pub(in crate::proto) fn connected(&self) -> impl Iterator<Item = &str> {
        let up = self.by_peer.iter().filter(|(_, link)| link.up);
        up.map(|(name, _)| name.as_str())
    }

    #[cfg(any(test, fuzzing))]
    pub(in crate::proto) fn have_nothing_to_tell(&self) -> bool {
        self.closings.is_empty()
    }
}

/// One connection.
#[derive(Debug, Default)]
struct Link {
    up: bool,
    connecting: bool,
}

/// The end of a migration that its destination has not been told yet.
#[derive(Debug)]
struct Closing {
    peer: String,
    transaction: u64,
    /// What was asked for, told again first because a restarted destination has forgotten it.
    request: Option<AgentRequest>,
    end: PeerMessage,
    backoff: Backoff,
}

impl Context {
    /// Whether the connection to a peer is up.
    pub(in crate::proto) fn is_up(&self, peer: &str) -> bool {
        self.links.is_up(peer)
    }

    /// Asks for a connection unless there is one or one is being made.
    pub(in crate::proto) fn connect(&mut self, peer: &str) {
        let link = self.links.by_peer.entry(peer.to_owned()).or_default();
        if !link.up && !link.connecting {
            link.connecting = true;
            self.outputs.push_back(Output::Connect {
                peer: peer.to_owned(),
            });
        }
    }

    /// Asks for a connection after a delay that grows.
    pub(in crate::proto) fn reconnect(&mut self, number: u64, backoff: &mut Backoff) {
        set_reconnect(&mut self.timers, self.now, number, backoff);
    }

    /// Sends a message if the connection is up.
    pub(in crate::proto) fn send(&mut self, peer: &str, transaction: u64, message: &PeerMessage) {
        if self.is_up(peer) {
            self.outputs.push_back(Output::Frame {
                peer: peer.to_owned(),
                bytes: message.encode(transaction),
            });
        }
    }

    /// Sends the last message of a migration, later if the connection is down.
    pub(in crate::proto) fn send_end(
        &mut self,
        number: u64,
        peer: &str,
        transaction: u64,
        request: Option<AgentRequest>,
        end: PeerMessage,
    ) {
        if self.is_up(peer) {
            self.send(peer, transaction, &end);
            return;
        }
        if self.links.closings.len() >= MAX_CLOSINGS {
            self.links.closings.pop_first();
        }
        let mut closing = Closing {
            peer: peer.to_owned(),
            transaction,
            request,
            end,
            backoff: RECONNECT,
        };
        self.timers.set(Timer::Closing(number), self.now + CLOSING);
        self.reconnect(number, &mut closing.backoff);
        self.links.closings.insert(number, closing);
    }

    /// Connects again for the end of a migration that is not told yet.
    pub(in crate::proto) fn reconnect_closing(&mut self, number: u64) {
        if let Some(closing) = self.links.closings.get(&number) {
            let peer = closing.peer.clone();
            self.connect(&peer);
        }
    }

    pub(in crate::proto) fn give_up_closing(&mut self, number: u64) {
        if let Some(closing) = self.links.closings.remove(&number) {
            self.timers.stop(Timer::Reconnect(number));
            warn!(peer = %closing.peer, "Peer was never told how a migration ended");
        }
    }

    /// The connection to a peer is up.
    pub(in crate::proto) fn link_up(&mut self, peer: &str) {
        let link = Link {
            up: true,
            connecting: false,
        };
        self.links.by_peer.insert(peer.to_owned(), link);
        info!(peer, "Peer is connected");
    }

    /// The connection to a peer is down.
    pub(in crate::proto) fn link_down(&mut self, peer: &str) {
        self.links.by_peer.remove(peer);
    }

    /// Takes in a frame. A newer peer than this agent hears why it is not understood.
    pub(in crate::proto) fn hear(
        &mut self,
        peer: &str,
        bytes: &[u8],
    ) -> Option<(u64, PeerMessage)> {
        // A frame proves the connection, should its `Up` be overtaken.
        self.links.by_peer.entry(peer.to_owned()).or_default().up = true;
        PeerMessage::decode(bytes)
            .inspect_err(|error| {
                self.counters.malformed_frames += 1;
                warn!(peer, %error, "Frame is not understood");
                if let DecodeError::Version { transaction, .. }
                | DecodeError::UnknownKind { transaction, .. }
                | DecodeError::Text { transaction } = error
                {
                    self.decline(
                        peer,
                        *transaction,
                        Reason::new(error.code(), error.to_string()),
                    );
                }
            })
            .ok()
    }

    /// Tells a peer that its message is none for this agent.
    pub(in crate::proto) fn decline(&mut self, peer: &str, transaction: u64, reason: Reason) {
        self.send(peer, transaction, &ErrorMessage(reason).into());
    }

    /// Tells a peer that takes this agent for a relay.
    pub(in crate::proto) fn release_as_no_relay(&mut self, peer: &str, transaction: u64) {
        let reason = format!("{} is an agent, not a relay", self.config.name);
        let reason = Reason::new(Code::UNSUPPORTED, reason);
        self.send(peer, transaction, &RelayRelease(reason).into());
    }

    /// Tells a peer that is connected again what it was to be told.
    pub(in crate::proto) fn flush_closings(&mut self, peer: &str) {
        let of_peer = self.links.closings.extract_if(.., |_, it| it.peer == peer);
        for (number, closing) in of_peer.collect::<Vec<_>>() {
            self.timers.stop(Timer::Reconnect(number));
            self.timers.stop(Timer::Closing(number));
            if let Some(request) = closing.request {
                self.send(peer, closing.transaction, &request.into());
            }
            self.send(peer, closing.transaction, &closing.end);
        }
    }

    /// The connection to a peer is down: it is made again for what the peer is still to be told.
    pub(in crate::proto) fn reconnect_closings(&mut self, peer: &str) {
        for (number, closing) in &mut self.links.closings {
            if closing.peer == peer {
                set_reconnect(&mut self.timers, self.now, *number, &mut closing.backoff);
            }
        }
    }
}

fn set_reconnect(timers: &mut TimerTable, now: Timestamp, number: u64, backoff: &mut Backoff) {
    timers.set(Timer::Reconnect(number), now + backoff.delay());
}
