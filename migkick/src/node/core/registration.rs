//! Registration of the node's mapping: each server separately, all with the same sequence number.
//!
//! Every change of the MoAs and every refresh has a new sequence number. The node repeats the
//! update at each server until that server accepts it. A server corrects the node's sequence number
//! when it is old, and the node's clock. The clock is the time of the node's start plus the
//! monotonic clock, so setting the system clock changes nothing.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use common::mat::MAX_MOAS;
use common::mat::message::{MatMessage, Moa, Outcome, UpdateReply, UpdateRequest};

use super::{Core, Output, Place, Saved, ServerState, ServerStatus};
use common::backoff::Repeat;

/// Shortest lifetime that the node accepts, so that no server keeps the node busy.
const MIN_LIFETIME: Duration = Duration::from_secs(10);

/// State of one server.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) address: SocketAddrV6,
    /// Smoothed round-trip time.
    pub(super) round_trip: Option<Duration>,
    /// Unanswered requests in a row.
    pub(super) silent: u32,
    /// Sequence number that the server has accepted.
    acknowledged: u64,
    /// When to refresh the server's mapping.
    refresh: Option<Duration>,
    repeat: Repeat,
    /// Outstanding update.
    pending: Option<Pending>,
    /// Server's clock at the node's time zero, milliseconds.
    epoch_ms: u64,
    /// Corrections since the last accepted update; the node follows the first one at once.
    corrections: u32,
    outcome: Option<Outcome>,
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    transaction: u64,
    sequence: u64,
    sent: Duration,
}

impl Server {
    pub(super) fn new(address: SocketAddrV6, epoch_ms: u64, distance: Duration) -> Self {
        Self {
            address,
            round_trip: None,
            silent: 0,
            acknowledged: 0,
            refresh: None,
            repeat: Repeat::new(Duration::ZERO, distance),
            pending: None,
            epoch_ms,
            corrections: 0,
            outcome: None,
        }
    }

    /// Records an answer to a request of time `sent`.
    pub(super) fn answered(&mut self, now: Duration, sent: Duration) {
        let sample = now.saturating_sub(sent);
        self.silent = 0;
        self.round_trip = Some(match self.round_trip {
            Some(known) => (known * 3 + sample) / 4,
            None => sample,
        });
    }

    fn status(&self, sequence: u64) -> ServerStatus {
        ServerStatus {
            address: self.address,
            state: match self.outcome {
                Some(Outcome::BadAddresses) => ServerState::BadAddresses,
                Some(Outcome::Failed) => ServerState::Failed,
                Some(Outcome::OldSequence) => ServerState::OldSequence,
                Some(Outcome::WrongTime) => ServerState::WrongTime,
                _ if self.acknowledged == sequence => ServerState::Registered,
                _ if self.silent > 2 => ServerState::Silent,
                _ => ServerState::Waiting,
            },
            round_trip_ms: self.round_trip.map(|it| it.as_secs_f64() * 1000.0),
            sequence: self.acknowledged,
        }
    }
}

impl Core {
    /// Whether any server has accepted the newest update.
    pub(super) fn is_registered(&self) -> bool {
        let mut servers = self.servers.iter();
        servers.any(|it| it.acknowledged >= self.changed_sequence)
    }

    pub(super) fn server_status(&self) -> Vec<ServerStatus> {
        let servers = self.servers.iter();
        servers.map(|it| it.status(self.sequence)).collect()
    }

    /// Handles a change of the mapping: updates all servers and alerts all peers.
    pub(super) fn changed(&mut self, now: Duration) {
        self.sequence += 1;
        self.changed_sequence = self.sequence;
        self.note_told();
        self.outputs.push_back(Output::SetOwn(self.own()));
        self.ask_all(now, 0);
        self.update_all(now);
        self.alert_all(now);
    }

    /// Makes the update due at all servers with that sequence number; the others keep their
    /// schedule.
    fn ask_all(&mut self, now: Duration, acknowledged: u64) {
        let servers = self.servers.iter_mut();
        for server in servers.filter(|it| it.acknowledged >= acknowledged) {
            server.repeat = Repeat::new(now, self.timing.update.0);
            server.corrections = 0;
            server.outcome = None;
        }
    }

    fn update_all(&mut self, now: Duration) {
        for server in &mut self.servers {
            server.refresh = None;
        }
        self.outputs.push_back(Output::Save(Saved {
            sequence: self.sequence,
            moa: self.active.map(|it| it.moa),
        }));
        self.update_due(now);
    }

    fn mapping(&self) -> Vec<Moa> {
        let Some(active) = self.active else {
            return Vec::new();
        };
        let moa = |place: &Place, priority| Moa {
            address: place.moa.octets().into(),
            priority,
        };
        let others = self.candidate.iter().chain(&self.standby);
        let others = others.chain(self.left.iter().map(|left| &left.place));
        let mut moas = vec![moa(&active, 1)];
        moas.extend(others.map(|place| moa(place, 2)).take(MAX_MOAS - 1));
        moas
    }

    /// Sends the due updates.
    pub(super) fn update_due(&mut self, now: Duration) {
        let refresh = self.servers.iter().filter_map(|it| it.refresh).min();
        if refresh.is_some_and(|at| now >= at) {
            self.ask_all(now, self.sequence);
            self.sequence += 1;
            return self.update_all(now);
        }
        let Some(active) = self.active else {
            return;
        };
        let most = self.timing.update.1;
        for index in 0..self.servers.len() {
            let sequence = self.sequence;
            let Some(server) = self.servers.get_mut(index) else {
                return;
            };
            if server.acknowledged >= sequence || !server.repeat.is_due(now, most) {
                continue;
            }
            if server.pending.is_some_and(|it| it.sequence == sequence) {
                server.silent = server.silent.saturating_add(1);
            }
            let transaction = self.entropy.number();
            server.pending = Some(Pending {
                transaction,
                sequence,
                sent: now,
            });
            let (to, epoch_ms) = (server.address, server.epoch_ms);
            let request = UpdateRequest {
                sequence,
                time_ms: epoch_ms.saturating_add(milliseconds(now)),
                lifetime_s: u32::try_from(self.timing.lifetime.as_secs()).unwrap_or(u32::MAX),
                moas: self.mapping(),
            };
            self.ask(active.moa, to, transaction, &request.into());
        }
    }

    pub(super) fn update_timeout(&self) -> Option<Duration> {
        self.active?;
        let due = |server: &Server| match server.refresh {
            _ if server.acknowledged < self.sequence => Some(server.repeat.next),
            refresh => refresh,
        };
        self.servers.iter().filter_map(due).min()
    }

    pub(super) fn handle_update_reply(
        &mut self,
        now: Duration,
        from: SocketAddrV6,
        transaction: u64,
        reply: &UpdateReply,
    ) {
        let sequence = self.sequence;
        let asked = |server: &&mut Server| {
            same_host(server.address, from)
                && server
                    .pending
                    .is_some_and(|it| it.transaction == transaction)
        };
        let Some(server) = self.servers.iter_mut().find(asked) else {
            self.counters.unexpected += 1;
            return;
        };
        let Some(pending) = server.pending.take() else {
            return;
        };
        server.answered(now, pending.sent);
        let outcome = Outcome::from_number(reply.outcome);
        if outcome == Some(Outcome::Accepted) {
            let lifetime = Duration::from_secs(reply.lifetime_s.into()).max(MIN_LIFETIME);
            server.acknowledged = pending.sequence;
            server.outcome = None;
            server.corrections = 0;
            if pending.sequence == sequence {
                server.refresh = Some(now + lifetime / 3);
            }
            if self.servers.iter().all(|it| it.acknowledged >= sequence) {
                self.replaced.clear();
            }
            return;
        }
        self.counters.updates_refused += 1;
        server.outcome = outcome;
        server.corrections += 1;
        // Later corrections follow the schedule of an unanswered update.
        if server.corrections == 1 {
            server.repeat = Repeat::new(now, self.timing.update.0);
        }
        match outcome {
            Some(Outcome::BadAddresses) if pending.sequence == sequence => self.replace_newest(),
            Some(Outcome::WrongTime) => {
                server.epoch_ms = reply.time_ms.saturating_sub(milliseconds(now));
            }
            Some(Outcome::OldSequence) if reply.sequence >= sequence => {
                let corrections = server.corrections;
                self.sequence = reply.sequence.saturating_add(1);
                self.changed_sequence = self.sequence;
                // Otherwise two nodes with one key would correct each other for ever.
                if corrections == 1 {
                    for server in &mut self.servers {
                        server.repeat = Repeat::new(now, self.timing.update.0);
                    }
                    self.alert_all(now);
                }
            }
            _ => {}
        }
        self.update_due(now);
    }

    /// Returns the indices of the servers, in the order of preference.
    pub(super) fn nearest(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.servers.len()).collect();
        order.sort_by_key(|&index| {
            let server = self.servers.get(index);
            server.map(|it| {
                (
                    it.silent > 0,
                    it.round_trip.unwrap_or(Duration::from_secs(1)),
                )
            })
        });
        order
    }

    /// Sends a request to a server.
    pub(super) fn ask(
        &mut self,
        from: Ipv6Addr,
        to: SocketAddrV6,
        transaction: u64,
        message: &MatMessage,
    ) {
        let key = self.identity.key;
        self.seal(super::Keying::Node, &key, from, to, transaction, message);
    }
}

/// Whether a datagram comes from the server.
pub(super) fn same_host(server: SocketAddrV6, from: SocketAddrV6) -> bool {
    server.ip() == from.ip() && server.port() == from.port()
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
