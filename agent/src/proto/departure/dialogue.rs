//! What an outgoing migration says to its destination and to its VM until START MIGRATION.

use std::net::SocketAddrV6;
use std::time::Duration;

use common::signal::{AgentResponse, MigrationReady, MigrationResponse, Phase, VmMessage};
use tracing::{info, warn};

use super::{Requester, State};
use crate::proto::links::peers::Backoff;
use crate::proto::refusal::Refusal;
use crate::proto::timer::Timer;
use crate::proto::{Agent, CopyWay, DomainUuid, Encrypt, Output};

/// How often a destination is asked that has no place.
const ASK_INTERVAL: Duration = Duration::from_secs(2);

impl Agent {
    pub(super) fn send_request(&mut self, number: u64) {
        let Some(outgoing) = self.outgoing.get_mut(&number) else {
            return;
        };
        let Some(request) = outgoing.request.clone() else {
            return;
        };
        if outgoing.state == State::Connecting {
            outgoing.state = State::Requesting;
        }
        let (peer, transaction) = (outgoing.destination.clone(), outgoing.transaction);
        self.cx.send(&peer, transaction, &request.into());
    }

    /// The destination has no place for a domain yet: it is asked again, for as long as one can wait.
    /// `false` if it is no destination.
    pub(in crate::proto) fn told_to_wait(&mut self, peer: &str, transaction: u64) -> bool {
        let timing = self.cx.config.timing;
        let Some((number, outgoing)) = self.outgoing.iter_mut().find(|(_, outgoing)| {
            outgoing.transaction == transaction && outgoing.destination == peer
        }) else {
            return false;
        };
        let number = *number;
        self.cx
            .timers
            .set(Timer::Again(number), self.cx.now + ASK_INTERVAL);
        if outgoing.state == State::Requesting {
            outgoing.waits = true;
            let most = outgoing.started + timing.place_timeout;
            let deadline = most.min(self.cx.now + timing.response_timeout);
            self.cx.timers.set(Timer::Response(number), deadline);
            self.tell_operator(number);
        }
        true
    }

    pub(in crate::proto) fn ask_again(&mut self, number: u64) {
        let asks = |state: State| state == State::Requesting || state.is_started();
        let outgoing = self.outgoing.get(&number);
        if outgoing.is_some_and(|outgoing| asks(outgoing.state)) {
            self.send_request(number);
        }
    }

    pub(in crate::proto) fn outgoing_peer_up(&mut self, peer: &str) {
        let numbers: Vec<u64> = self.outgoing_to(peer);
        for number in numbers {
            self.cx.timers.stop(Timer::Reconnect(number));
            let Some(outgoing) = self.outgoing.get_mut(&number) else {
                continue;
            };
            outgoing.backoff = Backoff::default();
            let started = outgoing.state.is_started();
            self.send_request(number);
            self.claim_address(number);
            if started {
                self.tell_peer(number);
                self.tell_cuts(number);
            }
        }
    }

    pub(in crate::proto) fn outgoing_peer_down(&mut self, peer: &str, reason: &str) {
        for number in self.outgoing_to(peer) {
            let Some(outgoing) = self.outgoing.get_mut(&number) else {
                continue;
            };
            if outgoing.state.is_started() {
                self.cx.reconnect(number, &mut outgoing.backoff);
                continue;
            }
            let refusal = Refusal::Down {
                destination: peer.to_owned(),
                reason: reason.to_owned(),
            };
            self.fail(number, &refusal);
        }
    }

    fn outgoing_to(&self, peer: &str) -> Vec<u64> {
        self.outgoing
            .iter()
            .filter(|(_, outgoing)| outgoing.destination == peer)
            .map(|(number, _)| *number)
            .collect()
    }

    pub(in crate::proto) fn on_agent_response(
        &mut self,
        peer: &str,
        transaction: u64,
        mut response: AgentResponse,
    ) {
        let Some((number, outgoing)) = self.outgoing.iter_mut().find(|(_, outgoing)| {
            outgoing.transaction == transaction && outgoing.destination == peer
        }) else {
            return;
        };
        let number = *number;
        self.cx.timers.stop(Timer::Again(number));
        if outgoing.state != State::Requesting {
            return;
        }
        if response.prefix_length > 128 {
            let refusal = Refusal::Refused {
                destination: peer.to_owned(),
                reason: Refusal::BadField {
                    field: "prefix_length",
                }
                .to_string(),
            };
            self.fail(number, &refusal);
            return;
        }
        self.cx.timers.stop(Timer::Response(number));
        let signalling = self.cx.now.since(outgoing.started);
        let asked = outgoing.request.as_ref();
        response
            .receptions
            .truncate(asked.map_or(0, |request| request.listeners.len()));
        let receptions = response.receptions.clone();
        outgoing.response = Some(response);
        outgoing.state = State::Ready;
        let (requester, foreign) = (outgoing.requester, outgoing.foreign);
        self.cx.records.update(number, |record| {
            record.phase = Phase::Ready;
            record.signalling = Some(signalling);
            record.receptions = receptions;
        });
        match requester {
            Requester::Vm { .. } if !foreign => {
                let deadline = self.cx.now + self.cx.config.timing.ready_timeout;
                self.cx.timers.set(Timer::Ready(number), deadline);
                self.tell_requester(number);
            }
            Requester::Vm { .. } => {
                self.tell_requester(number);
                self.start(number);
            }
            Requester::Operator { .. } | Requester::Unknown | Requester::Nobody { .. } => {
                self.start(number);
            }
        }
    }

    /// Answers a repeated `MigrationRequest` of a running migration.
    pub(in crate::proto) fn answer_request_again(
        &mut self,
        uuid: &DomainUuid,
        transaction: u64,
        from: SocketAddrV6,
    ) -> bool {
        let Some(number) = self.asked_by(uuid, transaction, from) else {
            return false;
        };
        self.tell_requester(number);
        true
    }

    /// Takes in `MigrationReady`, which is also how a VM asks for progress. `false` if the
    /// transaction is unknown.
    pub(in crate::proto) fn ready_from_vm(
        &mut self,
        uuid: &DomainUuid,
        transaction: u64,
        from: SocketAddrV6,
        ready: &MigrationReady,
    ) -> bool {
        let Some(number) = self.asked_by(uuid, transaction, from) else {
            return false;
        };
        self.addresses_change(number, ready);
        let state = self.outgoing.get(&number).map(|outgoing| outgoing.state);
        if state == Some(State::Ready) {
            self.start(number);
        } else {
            self.tell_progress(number);
        }
        true
    }

    /// Returns a running migration by the VM's transaction, and notes where the VM is.
    fn asked_by(&mut self, uuid: &DomainUuid, asked: u64, from: SocketAddrV6) -> Option<u64> {
        let (number, outgoing) = self
            .outgoing
            .iter_mut()
            .find(|(_, outgoing)| outgoing.is_asked_by(uuid, asked))?;
        if let Requester::Vm { to, .. } = &mut outgoing.requester {
            *to = from;
        }
        Some(*number)
    }

    /// Tells a VM that has asked for its move how it stands: `MigrationResponse` once there is
    /// one, `Preparing` before.
    fn tell_requester(&mut self, number: u64) {
        let Some(outgoing) = self.outgoing.get(&number) else {
            return;
        };
        let Requester::Vm { transaction, to } = outgoing.requester else {
            return;
        };
        let message = match &outgoing.response {
            Some(response) => VmMessage::from(MigrationResponse {
                prefix: response.prefix,
                prefix_length: response.prefix_length,
                agent_address: response.agent_address,
            }),
            None => outgoing.progress(self.cx.now).into(),
        };
        self.cx.tell(to, transaction, &message);
    }

    pub(super) fn start(&mut self, number: u64) {
        let way = match self.way_of(number) {
            Ok(way) => way,
            Err(refusal) => return self.fail(number, &refusal),
        };
        let Some(outgoing) = self.outgoing.get_mut(&number) else {
            return;
        };
        let Some(peer) = self.cx.config.peer(&outgoing.destination) else {
            return;
        };
        let uuid = outgoing.uuid;
        let start = if outgoing.foreign {
            outgoing.awaited = true;
            Output::FollowMigration { uuid }
        } else {
            Output::StartMigration {
                uuid,
                connect_uri: peer.connect_uri.clone(),
                migrate_uri: peer.migrate_uri.clone(),
                tls: way == Some(CopyWay::Tls),
            }
        };
        outgoing.state = State::Copying;
        outgoing.copy_started = self.cx.now;
        if matches!(outgoing.requester, Requester::Vm { .. }) {
            self.cx.vms.has_moved(uuid, self.cx.now);
        }
        info!(domain = %outgoing.domain, destination = %outgoing.destination, number, "Migration starts");
        if let Some(CopyWay::Clear(why)) = &way
            && self.cx.config.copy.encrypt != Encrypt::Never
        {
            warn!(domain = %outgoing.domain, destination = %outgoing.destination, number, %why, "Memory is copied in the clear");
        }
        self.cx.timers.stop(Timer::Ready(number));
        self.cx.records.update(number, |record| {
            record.phase = Phase::Copying;
            record.way = way;
        });
        self.record_departure(number);
        self.cx.outputs.push_back(start);
        self.tell_peer(number);
        self.tell_progress(number);
    }

    /// How the memory of a departing domain is copied; `None` where somebody else has said so.
    fn way_of(&self, number: u64) -> Result<Option<CopyWay>, Refusal> {
        let Some(outgoing) = self.outgoing.get(&number).filter(|it| !it.foreign) else {
            return Ok(None);
        };
        let there = outgoing.response.as_ref().is_some_and(|it| it.copy_tls);
        self.cx.copy_way(&outgoing.destination, there).map(Some)
    }
}
