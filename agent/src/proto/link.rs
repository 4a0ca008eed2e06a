//! Connections to other agents, as far as the protocol sees them: up or down, and what a broken
//! one still has to be told.

use std::collections::BTreeMap;
use std::time::Duration;

use common::signal::{
    AgentRequest, DecodeError, ErrorMessage, MigrationAbort, PeerMessage, RelayRelease,
};
use tracing::{debug, info, warn};

use super::refusal::bounded;
use super::timer::Timer;
use super::{Agent, PeerEvent};

/// First delay before connecting again.
const BACKOFF_FIRST: Duration = Duration::from_millis(200);
/// Longest delay between two attempts to connect.
const BACKOFF_LAST: Duration = Duration::from_secs(5);
/// How long the end of a migration is offered to a destination that cannot be reached.
const CLOSING: Duration = Duration::from_secs(60);
/// Ends of migrations offered at once.
const MAX_CLOSINGS: usize = 64;

/// One connection.
#[derive(Debug, Default)]
pub(super) struct Link {
    pub(super) up: bool,
    pub(super) connecting: bool,
}

/// Growing delay between attempts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(BACKOFF_FIRST)
    }
}

impl Backoff {
    pub(super) fn next(&mut self) -> Duration {
        let delay = self.0;
        self.0 = (delay * 2).min(BACKOFF_LAST);
        delay
    }
}

/// The end of a migration that its destination has not been told yet.
#[derive(Debug)]
pub(super) struct Closing {
    peer: String,
    transaction: u64,
    /// What was asked for, told again first because a restarted destination has forgotten it.
    request: Option<AgentRequest>,
    end: PeerMessage,
    backoff: Backoff,
}

impl Agent {
    /// Sends the last message of a migration, later if the connection is down.
    pub(super) fn send_end(
        &mut self,
        number: u64,
        peer: &str,
        transaction: u64,
        request: Option<AgentRequest>,
        end: PeerMessage,
    ) {
        if self.cx.is_up(peer) {
            self.cx.send(peer, transaction, &end);
            return;
        }
        if self.closings.len() >= MAX_CLOSINGS {
            self.closings.pop_first();
        }
        let closing = Closing {
            peer: peer.to_owned(),
            transaction,
            request,
            end,
            backoff: Backoff::default(),
        };
        self.closings.insert(number, closing);
        self.cx
            .timers
            .set(Timer::Closing(number), self.cx.now + CLOSING);
        self.reconnect_later(number);
    }

    pub(super) fn on_peer(&mut self, peer: &str, event: PeerEvent) {
        match event {
            PeerEvent::Up { .. } => {
                let link = self.cx.links.entry(peer.to_owned()).or_default();
                *link = Link {
                    up: true,
                    connecting: false,
                };
                info!(peer, "Peer is connected");
                self.receptions.relay_up(&mut self.cx, peer);
                self.outgoing_peer_up(peer);
                self.flush_closings(peer);
                self.preparations_peer_up(peer);
            }
            PeerEvent::Down { reason } => {
                self.cx.links.remove(peer);
                if self.receptions.is_relay(peer) {
                    self.receptions.relay_down(&mut self.cx, peer, &reason);
                    return;
                }
                warn!(peer, %reason, "Peer is not connected");
                for number in self.closings_of(peer) {
                    self.reconnect_later(number);
                }
                self.outgoing_peer_down(peer, &reason);
                self.incoming_peer_down(peer);
                self.preparations_peer_down(peer, &reason);
            }
            PeerEvent::Frame(bytes) => self.on_frame(peer, &bytes),
        }
    }

    /// Arms the next attempt to reach the destination of a migration.
    pub(super) fn reconnect_later(&mut self, number: u64) {
        let delay = if let Some(outgoing) = self.outgoing.get_mut(&number) {
            outgoing.backoff.next()
        } else if let Some(closing) = self.closings.get_mut(&number) {
            closing.backoff.next()
        } else {
            return;
        };
        self.cx
            .timers
            .set(Timer::Reconnect(number), self.cx.now + delay);
    }

    pub(super) fn reconnect_now(&mut self, number: u64) {
        let peer = match (self.outgoing.get(&number), self.closings.get(&number)) {
            (Some(outgoing), _) => outgoing.destination.clone(),
            (None, Some(closing)) => closing.peer.clone(),
            (None, None) => return,
        };
        self.cx.connect(&peer);
    }

    pub(super) fn give_up_closing(&mut self, number: u64) {
        if let Some(closing) = self.closings.remove(&number) {
            self.cx.timers.stop(Timer::Reconnect(number));
            warn!(peer = %closing.peer, "Peer was never told how a migration ended");
        }
    }

    fn closings_of(&self, peer: &str) -> Vec<u64> {
        self.closings
            .iter()
            .filter(|(_, closing)| closing.peer == peer)
            .map(|(number, _)| *number)
            .collect()
    }

    fn flush_closings(&mut self, peer: &str) {
        for number in self.closings_of(peer) {
            let Some(closing) = self.closings.remove(&number) else {
                continue;
            };
            self.cx.timers.stop(Timer::Reconnect(number));
            self.cx.timers.stop(Timer::Closing(number));
            if let Some(request) = closing.request {
                self.cx.send(peer, closing.transaction, &request.into());
            }
            self.cx.send(peer, closing.transaction, &closing.end);
        }
    }

    fn on_frame(&mut self, peer: &str, bytes: &[u8]) {
        // A frame proves the connection, should its `Up` be overtaken.
        self.cx.links.entry(peer.to_owned()).or_default().up = true;
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
            PeerMessage::AgentResponse(body) => self.on_agent_response(peer, transaction, body),
            PeerMessage::MigrationProgress(body) => {
                self.on_peer_progress(peer, transaction, body);
            }
            PeerMessage::HandoverCut(body) => self.on_handover_cut(peer, transaction, &body),
            PeerMessage::ArrivalNotice(body) => self.on_arrival_notice(peer, transaction, &body),
            PeerMessage::AddressClaim(body) => self.on_address_claim(peer, transaction, &body),
            PeerMessage::AddressClaimReply(body) => {
                self.on_address_claim_reply(peer, transaction, &body);
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
                self.claim_not_understood(peer, transaction);
                self.on_peer_refusal(peer, transaction, &reason);
                self.on_peer_abort(peer, transaction, &reason);
                self.preparation_refused(peer, transaction, &reason);
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

/// Connections by the peers' names.
pub(super) type Links = BTreeMap<String, Link>;
