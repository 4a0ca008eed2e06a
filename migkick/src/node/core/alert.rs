//! Alerts and echoes between peers.
//!
//! The node repeats an [`Alert`] until its acknowledgement. The receiver reads the mapping from the
//! IMS again. When the alert comes from a MoA that the receiver knows already, the receiver also
//! sends an [`Echo`] to that MoA at once, so that a slow or absent server causes no delay. Only an
//! [`EchoReply`] to a new challenge moves data to another address, so a replayed message moves
//! nothing.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use common::mat::NODE_PORT;
use common::mat::message::{Alert, AlertAck, Echo, EchoReply, MatMessage};
use common::mat::seal::Keying;

use super::lookup::Cause;
use super::peer::Peer;
use super::{Core, Received};
use common::backoff::Repeat;

/// Limit of a peer's addresses that receive an alert.
const MAX_TARGETS: usize = 4;
/// Repetitions after which the node looks the peer up again, because the peer may have moved too.
const LOST: u32 = 2;
/// Longest time that a request of a peer waits for its answer.
const ASKED: Duration = Duration::from_secs(2);
/// Pause after an address that does not answer.
const UNREACHABLE: Duration = Duration::from_secs(2);

/// An alert without acknowledgement.
#[derive(Debug)]
pub(super) struct AlertOut {
    sequence: u64,
    transaction: u64,
    repeat: Repeat,
}

/// An echo without an answer.
#[derive(Debug)]
pub(super) struct EchoOut {
    address: Ipv6Addr,
    transaction: u64,
    repeat: Repeat,
}

/// An alert or echo from the peer.
#[derive(Debug)]
pub(super) struct Asked {
    at: Duration,
    pub(super) from: Ipv6Addr,
    local: Ipv6Addr,
    transaction: u64,
    sequence: u64,
}

impl Core {
    pub(super) fn handle_peer(
        &mut self,
        now: Duration,
        hoa: Ipv6Addr,
        received: &Received,
        transaction: u64,
        message: MatMessage,
    ) {
        if received.from.port() != NODE_PORT {
            self.counters.unexpected += 1;
            return;
        }
        let from = *received.from.ip();
        let asked = |sequence| Asked {
            at: now,
            from,
            local: received.local,
            transaction,
            sequence,
        };
        match message {
            MatMessage::Alert(alert) => self.handle_alert(now, hoa, asked(alert.sequence)),
            MatMessage::AlertAck(ack) => self.handle_ack(hoa, transaction, ack.sequence),
            MatMessage::Echo(Echo {}) => {
                let Some(peer) = self.peers.get_mut(&hoa) else {
                    return;
                };
                peer.heard_at = now;
                let listed = peer.has(from);
                peer.echo_in = Some(asked(0));
                if listed && peer.to.is_none() {
                    // First contact by the peer: the node verifies the peer's address as usual.
                    self.verify(now, hoa);
                } else if !listed {
                    self.look_up(now, hoa, Cause::Stranger);
                }
            }
            MatMessage::EchoReply(EchoReply {}) => {
                if !self.handle_check(now, received.local, transaction) {
                    self.handle_echo_reply(now, hoa, received, transaction);
                }
            }
            _ => self.counters.unexpected += 1,
        }
        self.settle(now, hoa);
    }

    fn handle_alert(&mut self, now: Duration, hoa: Ipv6Addr, alert: Asked) {
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return;
        };
        let known = peer.known.as_ref().map_or(0, |it| it.sequence);
        let (sequence, from) = (alert.sequence, alert.from);
        if sequence <= known.max(peer.wanted) {
            self.counters.old_alerts += 1;
            if peer.answers.take(now) {
                peer.alert_in = Some(alert);
            } else {
                self.counters.limited += 1;
            }
            return;
        }
        peer.wanted = sequence;
        peer.rereads = 0;
        peer.heard_at = now;
        peer.alert_in = Some(alert);
        let elsewhere = peer.has(from) && peer.desired != Some(from);
        if elsewhere {
            peer.desired = Some(from);
            self.verify(now, hoa);
        }
        self.look_up(now, hoa, Cause::Peer);
    }

    fn handle_ack(&mut self, hoa: Ipv6Addr, transaction: u64, sequence: u64) {
        let peer = self.peers.get_mut(&hoa);
        let asked = |it: &&mut Peer| {
            it.alert
                .as_ref()
                .is_some_and(|it| it.transaction == transaction)
        };
        let Some(peer) = peer.filter(asked) else {
            self.counters.unexpected += 1;
            return;
        };
        if peer
            .alert
            .as_ref()
            .is_some_and(|it| sequence >= it.sequence)
        {
            peer.alert = None;
            peer.acknowledge(sequence);
        }
    }

    fn handle_echo_reply(
        &mut self,
        now: Duration,
        hoa: Ipv6Addr,
        received: &Received,
        transaction: u64,
    ) {
        let keepalive = self.timing.keepalive;
        let from = *received.from.ip();
        let told = self.told.get(&received.local).copied();
        let peer = self.peers.get_mut(&hoa);
        let asked = |it: &&mut Peer| {
            let echo = it.echo.as_ref();
            echo.is_some_and(|it| it.transaction == transaction && it.address == from)
        };
        let Some(peer) = peer.filter(asked) else {
            self.counters.unexpected += 1;
            return;
        };
        peer.echo = None;
        peer.to = Some(from);
        peer.verified = true;
        peer.negative = None;
        peer.keepalive = now + keepalive;
        // The peer answers only addresses of our mapping.
        if let Some(sequence) = told {
            peer.acknowledge(sequence);
        }
        if peer.desired != Some(from) {
            self.verify(now, hoa);
        }
    }

    /// Sends an echo to the desired MoA of a peer, or to the one in use.
    pub(super) fn verify(&mut self, now: Duration, hoa: Ipv6Addr) {
        let transaction = self.entropy.number();
        let first = self.timing.alert.0;
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return;
        };
        let Some(address) = peer.desired else {
            return;
        };
        if peer.echo.as_ref().is_none_or(|it| it.address != address) {
            peer.echo = Some(EchoOut {
                address,
                transaction,
                repeat: Repeat::new(now, first),
            });
        }
        self.alert_due(now, hoa);
    }

    /// Handles a mapping of the peer from a server.
    pub(super) fn peer_adopted(&mut self, now: Duration, hoa: Ipv6Addr, changed: bool) {
        let first = self.timing.alert.0;
        let sequence = self.changed_sequence;
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return;
        };
        if peer.to != peer.desired || !peer.verified {
            self.verify(now, hoa);
        }
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return;
        };
        if changed && peer.acknowledged < sequence {
            let transaction = self.entropy.number();
            peer.alert = Some(AlertOut {
                sequence,
                transaction,
                repeat: Repeat::new(now, first),
            });
            self.alert_due(now, hoa);
        }
    }

    /// Alerts every peer in use, because our mapping has changed.
    pub(super) fn alert_all(&mut self, now: Duration) {
        for peer in self.peers.values_mut().filter(|peer| peer.known.is_some()) {
            peer.alert = Some(AlertOut {
                sequence: self.changed_sequence,
                transaction: self.entropy.number(),
                repeat: Repeat::new(now, self.timing.alert.0),
            });
        }
        self.alerts_due(now);
    }

    /// Alerts one peer, unless an alert is in progress.
    pub(super) fn alert(&mut self, now: Duration, hoa: Ipv6Addr) {
        let alert = AlertOut {
            sequence: self.changed_sequence,
            transaction: self.entropy.number(),
            repeat: Repeat::new(now, self.timing.alert.0),
        };
        if let Some(peer) = self.peers.get_mut(&hoa)
            && peer.alert.is_none()
        {
            peer.alert = Some(alert);
            self.alert_due(now, hoa);
        }
    }

    /// Answers a peer's alert and echo once that is possible.
    pub(super) fn answer(&mut self, now: Duration, hoa: Ipv6Addr) {
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return;
        };
        let fresh = |asked: &Asked| now < asked.at + ASKED;
        let has = |asked: &Asked| peer.known.as_ref().is_some_and(|it| it.has(asked.from));
        let echo = peer.echo_in.take_if(|it| has(it) || !fresh(it));
        let sequence = peer.known.as_ref().map_or(0, |it| it.sequence);
        let settled = peer.verified && peer.to == peer.desired;
        let read = |asked: &Asked| settled && sequence >= asked.sequence && has(asked);
        let alert = peer.alert_in.take_if(|it| read(it) || !fresh(it));
        let echo = echo.filter(|it| has(it) && fresh(it));
        let alert = alert.filter(|it| read(it) && fresh(it));
        if let Some(Asked {
            from,
            local,
            transaction,
            ..
        }) = echo
        {
            self.tell(hoa, local, from, transaction, &EchoReply {}.into());
        }
        if let Some(Asked {
            from,
            local,
            transaction,
            ..
        }) = alert
        {
            self.tell(hoa, local, from, transaction, &AlertAck { sequence }.into());
        }
    }

    /// Sends the due messages to every peer.
    pub(super) fn alerts_due(&mut self, now: Duration) {
        let due = |(hoa, peer): (&Ipv6Addr, &Peer)| {
            self.alert_timeout(peer)
                .is_some_and(|at| now >= at)
                .then_some(*hoa)
        };
        let due: Vec<Ipv6Addr> = self.peers.iter().filter_map(due).collect();
        for hoa in due {
            self.alert_due(now, hoa);
        }
    }

    fn alert_due(&mut self, now: Duration, hoa: Ipv6Addr) {
        let (most, alerts, echoes) = (self.timing.alert.1, self.timing.alerts, self.timing.echoes);
        let keepalive = self.timing.keepalive;
        let Some(peer) = self.peers.get_mut(&hoa) else {
            return;
        };
        if peer.echo.is_none() && now >= peer.keepalive && peer.to.is_some() {
            peer.keepalive = now + keepalive;
            if now < peer.sent_at + keepalive * 2 {
                return self.verify(now, hoa);
            }
        }
        let mut messages: Vec<(Ipv6Addr, u64, MatMessage)> = Vec::new();
        let mut lost = false;
        if let Some(alert) = &mut peer.alert
            && alert.repeat.is_due(now, most)
        {
            if alert.repeat.times > alerts {
                peer.alert = None;
                self.counters.alerts_failed += 1;
            } else {
                lost |= alert.repeat.times > LOST;
                let sequence = alert.sequence;
                let known = peer.known.iter().flat_map(|it| &it.moas);
                let mut targets: Vec<Ipv6Addr> = peer.to.into_iter().collect();
                for (moa, _) in known {
                    if !targets.contains(moa) {
                        targets.push(*moa);
                    }
                }
                for to in targets.into_iter().take(MAX_TARGETS) {
                    messages.push((to, alert.transaction, Alert { sequence }.into()));
                    self.counters.alerts += 1;
                }
            }
        }
        let mut failed = false;
        if let Some(echo) = &mut peer.echo
            && echo.repeat.is_due(now, most)
        {
            if echo.repeat.times > echoes {
                peer.echo = None;
                self.counters.echoes_failed += 1;
                failed = true;
            } else {
                lost |= echo.repeat.times > LOST;
                messages.push((echo.address, echo.transaction, Echo {}.into()));
                self.counters.echoes += 1;
            }
        }
        if let Some(active) = self.active {
            for (to, transaction, message) in messages {
                self.tell(hoa, active.moa, to, transaction, &message);
            }
        }
        if failed {
            self.echo_failed(now, hoa);
        } else if lost {
            self.look_up(now, hoa, Cause::Own);
        }
    }

    /// Handles a MoA that does not answer. A MoA in use stays in use, because another may be no
    /// better. The same holds for a peer that we have answered: it may send, and the node must
    /// accept its data to keep the session. The node gives up any other peer.
    fn echo_failed(&mut self, now: Duration, hoa: Ipv6Addr) {
        let taken = self.peers.get(&hoa).is_some_and(|it| it.to.is_some());
        if taken {
            self.look_up(now, hoa, Cause::Own);
        } else {
            self.unreachable(now, hoa, UNREACHABLE);
        }
    }

    pub(super) fn alert_timeout(&self, peer: &Peer) -> Option<Duration> {
        let alert = peer.alert.as_ref().map(|it| it.repeat.next);
        let echo = peer.echo.as_ref().map(|it| it.repeat.next);
        let keepalive = (peer.to.is_some() && peer.echo.is_none()).then_some(peer.keepalive);
        alert.into_iter().chain(echo).chain(keepalive).min()
    }

    /// Seals and sends a message to a peer.
    pub(super) fn tell(
        &mut self,
        hoa: Ipv6Addr,
        from: Ipv6Addr,
        to: Ipv6Addr,
        transaction: u64,
        message: &MatMessage,
    ) {
        if let Some(key) = self.peers.get(&hoa).and_then(|peer| peer.key) {
            let to = SocketAddrV6::new(to, NODE_PORT, 0, 0);
            self.seal(Keying::Pair, &key, from, to, transaction, message);
        }
    }
}
