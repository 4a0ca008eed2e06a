//! Connections to other agents, as far as the protocol sees them: up or down, and what a broken
//! one still has to be told.

use std::collections::BTreeMap;
use std::time::Duration;

use common::signal::{
    AgentRequest, DecodeError, ErrorMessage, MigrationAbort, PeerMessage, Phase, RelayRelease,
};
use tracing::{debug, info, warn};

use crate::proto::context::Context;
use crate::proto::refusal::bounded;
use crate::proto::timer::{Timer, TimerTable};
use crate::proto::{Agent, Output, PeerEvent, Timestamp};

/// First delay before connecting again.
const BACKOFF_FIRST: Duration = Duration::from_millis(200);
/// Longest delay between two attempts to connect.
const BACKOFF_LAST: Duration = Duration::from_secs(5);
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

/// Growing delay between attempts.
#[derive(Clone, Copy, Debug)]
pub(in crate::proto) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(BACKOFF_FIRST)
    }
}

impl Backoff {
    pub(in crate::proto) fn next(&mut self) -> Duration {
        let delay = self.0;
        self.0 = (delay * 2).min(BACKOFF_LAST);
        delay
    }
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
            backoff: Backoff::default(),
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
    fn link_up(&mut self, peer: &str) {
        let link = Link {
            up: true,
            connecting: false,
        };
        self.links.by_peer.insert(peer.to_owned(), link);
    }

    /// Tells a peer that is connected again what it was to be told.
    fn flush_closings(&mut self, peer: &str) {
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
    fn reconnect_closings(&mut self, peer: &str) {
        for (number, closing) in &mut self.links.closings {
            if closing.peer == peer {
                set_reconnect(&mut self.timers, self.now, *number, &mut closing.backoff);
            }
        }
    }
}

fn set_reconnect(timers: &mut TimerTable, now: Timestamp, number: u64, backoff: &mut Backoff) {
    timers.set(Timer::Reconnect(number), now + backoff.next());
}

impl Agent {
    pub(in crate::proto) fn on_peer(&mut self, peer: &str, event: PeerEvent) {
        match event {
            PeerEvent::Up { .. } => {
                self.cx.link_up(peer);
                info!(peer, "Peer is connected");
                self.receptions.relay_up(&mut self.cx, peer);
                self.departures.peer_up(&mut self.cx, &self.addresses, peer);
                self.cx.flush_closings(peer);
                self.preparations.peer_up(&mut self.cx, peer);
            }
            PeerEvent::Down { reason } => {
                self.cx.links.by_peer.remove(peer);
                if self.receptions.is_relay(peer) {
                    self.receptions.relay_down(&mut self.cx, peer, &reason);
                    return;
                }
                warn!(peer, %reason, "Peer is not connected");
                self.cx.reconnect_closings(peer);
                self.departures
                    .peer_down(&mut self.cx, &mut self.addresses, peer, &reason);
                self.incoming_peer_down(peer);
                self.preparations.peer_down(&mut self.cx, peer, &reason);
            }
            PeerEvent::Frame(bytes) => self.on_frame(peer, &bytes),
        }
    }

    /// Connects again to the destination of a migration.
    pub(in crate::proto) fn reconnect_now(&mut self, number: u64) {
        if !self.departures.reconnect(&mut self.cx, number) {
            self.cx.reconnect_closing(number);
        }
    }

    fn on_frame(&mut self, peer: &str, bytes: &[u8]) {
        // A frame proves the connection, should its `Up` be overtaken.
        self.cx.links.by_peer.entry(peer.to_owned()).or_default().up = true;
        let (transaction, message) = match PeerMessage::decode(bytes) {
            Ok(decoded) => decoded,
            Err(error) => {
                self.cx.counters.malformed_frames += 1;
                warn!(peer, %error, "Frame is not understood");
                if let DecodeError::Version { transaction, .. }
                | DecodeError::UnknownKind { transaction, .. }
                | DecodeError::Text { transaction } = error
                {
                    let reason = error.to_string();
                    self.cx
                        .send(peer, transaction, &ErrorMessage { reason }.into());
                }
                return;
            }
        };
        if self.receptions.is_relay(peer) {
            self.on_relay_message(peer, transaction, message);
            return;
        }
        match message {
            PeerMessage::AgentRequest(body) => self.on_agent_request(peer, transaction, body),
            PeerMessage::AgentResponse(body) => {
                let (departures, cx, around) = self.departing();
                let from = (peer, transaction);
                departures.on_agent_response(cx, around.inventory, around.addresses, from, body);
            }
            PeerMessage::MigrationProgress(body) => {
                if body.phase != Phase::Preparing
                    || !self
                        .departures
                        .told_to_wait(&mut self.cx, peer, transaction)
                {
                    self.on_peer_progress(peer, transaction, body);
                }
            }
            PeerMessage::HandoverCut(body) => self.on_handover_cut(peer, transaction, &body),
            PeerMessage::ArrivalNotice(body) => {
                let allowed = self.check_rate(peer, transaction);
                let (departures, cx, around) = self.departing();
                departures.on_arrival_notice(cx, around, (peer, transaction), &body, allowed);
            }
            PeerMessage::AddressClaim(body) => self.on_address_claim(peer, transaction, &body),
            PeerMessage::AddressClaimReply(body) => {
                let from = (peer, transaction);
                let addresses = &mut self.addresses;
                self.departures
                    .on_address_claim_reply(&mut self.cx, addresses, from, &body);
            }
            PeerMessage::RelayRequest(_) => {
                let reason = format!("{} is an agent, not a relay", self.cx.config.name);
                self.cx
                    .send(peer, transaction, &RelayRelease { reason }.into());
            }
            PeerMessage::RelayResponse(_) | PeerMessage::RelayRelease(_) => {}
            PeerMessage::MigrationAbort(MigrationAbort { reason })
            | PeerMessage::Error(ErrorMessage { reason }) => {
                let reason = bounded(&reason);
                debug!(peer, transaction, %reason, "Peer ends a migration");
                self.departures
                    .claim_not_understood(&mut self.cx, peer, transaction);
                let from = (peer, transaction);
                let addresses = &mut self.addresses;
                self.departures
                    .peer_refused(&mut self.cx, addresses, from, &reason);
                self.on_peer_abort(peer, transaction, &reason);
                self.preparations
                    .refused(&mut self.cx, peer, transaction, &reason);
            }
        }
    }
}

impl Agent {
    /// A relay is heard only about its sessions.
    fn on_relay_message(&mut self, relay: &str, transaction: u64, message: PeerMessage) {
        match message {
            PeerMessage::RelayResponse(body) => {
                self.receptions
                    .relay_responded(&mut self.cx, relay, transaction, &body);
            }
            PeerMessage::RelayRelease(RelayRelease { reason })
            | PeerMessage::MigrationAbort(MigrationAbort { reason })
            | PeerMessage::Error(ErrorMessage { reason }) => {
                self.receptions
                    .relay_released(&mut self.cx, relay, transaction, &reason);
            }
            PeerMessage::AgentRequest(_)
            | PeerMessage::AgentResponse(_)
            | PeerMessage::MigrationProgress(_)
            | PeerMessage::HandoverCut(_)
            | PeerMessage::ArrivalNotice(_)
            | PeerMessage::AddressClaim(_)
            | PeerMessage::AddressClaimReply(_)
            | PeerMessage::RelayRequest(_) => {
                let reason = format!("{} knows {relay} as a relay only", self.cx.config.name);
                self.cx
                    .send(relay, transaction, &ErrorMessage { reason }.into());
            }
        }
    }
}
