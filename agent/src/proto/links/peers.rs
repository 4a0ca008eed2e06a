//! Connections to other agents, as the protocol sees them: up or down, with the messages that wait for
//! a connection.

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

/// Delay between connection attempts.
pub(in crate::proto) const RECONNECT: Backoff =
    Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
/// Time during which the end of a migration is retried to an unreachable destination host.
const CLOSING: Duration = Duration::from_secs(60);
/// Limit of undelivered ends of migrations.
const MAX_CLOSINGS: usize = 64;

/// Connections, and undelivered messages for unreachable peers.
#[derive(Debug, Default)]
pub(in crate::proto) struct Links {
    by_peer: BTreeMap<String, Link>,
    /// Undelivered ends, by the number of the migration's record.
    closings: BTreeMap<u64, Closing>,
}

impl Links {
    pub(in crate::proto) fn is_up(&self, peer: &str) -> bool {
        self.by_peer.get(peer).is_some_and(|link| link.up)
    }

    /// Returns the peers with an established connection.
    pub(in crate::proto) fn connected(&self) -> impl Iterator<Item = &str> {
        let up = self.by_peer.iter().filter(|(_, link)| link.up);
        up.map(|(name, _)| name.as_str())
    }

    #[cfg(any(test, fuzzing))]
    pub(in crate::proto) fn have_nothing_to_tell(&self) -> bool {
        self.closings.is_empty()
    }
}

/// State of one connection.
#[derive(Debug, Default)]
struct Link {
    up: bool,
    connecting: bool,
}

/// Undelivered end of a migration.
#[derive(Debug)]
struct Closing {
    peer: String,
    transaction: u64,
    /// Original request, sent again before the end, because a restarted destination host has lost the
    /// request.
    request: Option<AgentRequest>,
    end: PeerMessage,
    backoff: Backoff,
}

impl Context {
    /// Returns true if the connection to a peer is up.
    pub(in crate::proto) fn is_up(&self, peer: &str) -> bool {
        self.links.is_up(peer)
    }

    /// Requests a connection unless the connection is up or in progress.
    pub(in crate::proto) fn connect(&mut self, peer: &str) {
        let link = self.links.by_peer.entry(peer.to_owned()).or_default();
        if !link.up && !link.connecting {
            link.connecting = true;
            self.outputs.push_back(Output::Connect {
                peer: peer.to_owned(),
            });
        }
    }

    /// Requests a connection after a growing delay.
    pub(in crate::proto) fn reconnect(&mut self, number: u64, backoff: &mut Backoff) {
        set_reconnect(&mut self.timers, self.now, number, backoff);
    }

    /// Sends a message if the connection is up; drops the message otherwise.
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

    /// Requests a connection for an undelivered end of a migration.
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

    /// Records that the connection to a peer is up.
    pub(in crate::proto) fn link_up(&mut self, peer: &str) {
        let link = Link {
            up: true,
            connecting: false,
        };
        self.links.by_peer.insert(peer.to_owned(), link);
        info!(peer, "Peer is connected");
    }

    /// Records that the connection to a peer is down.
    pub(in crate::proto) fn link_down(&mut self, peer: &str) {
        self.links.by_peer.remove(peer);
    }

    /// Decodes a frame. A peer newer than this agent gets the reason if the agent cannot decode the
    /// frame.
    pub(in crate::proto) fn hear(
        &mut self,
        peer: &str,
        bytes: &[u8],
    ) -> Option<(u64, PeerMessage)> {
        // A frame proves the connection, even if the frame overtakes its `Up`.
        self.links.by_peer.entry(peer.to_owned()).or_default().up = true;
        PeerMessage::decode(bytes)
            .inspect_err(|error| {
                self.counters.malformed_frames += 1;
                warn!(peer, %error, "Frame is not understood");
                if let DecodeError::Version { transaction, .. }
                | DecodeError::UnknownKind { transaction, .. }
                | DecodeError::Text { transaction } = error
                {
                    self.decline(peer, *transaction, Reason::from(error));
                }
            })
            .ok()
    }

    /// Tells a peer that this agent does not handle the message.
    pub(in crate::proto) fn decline(&mut self, peer: &str, transaction: u64, reason: Reason) {
        self.send(peer, transaction, &ErrorMessage(reason).into());
    }

    /// Tells a peer that this agent is not a relay.
    pub(in crate::proto) fn release_as_no_relay(&mut self, peer: &str, transaction: u64) {
        let reason = format!("{} is an agent, not a relay", self.config.name);
        let reason = Reason::new(Code::UNSUPPORTED, reason);
        self.send(peer, transaction, &RelayRelease(reason).into());
    }

    /// Sends the undelivered ends to a reconnected peer.
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

    /// Schedules a reconnect to a peer with undelivered ends.
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
