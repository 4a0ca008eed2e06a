//! Migrations that leave this host.
//!
//! ```text
//!  MigrationRequest or `roamcast migrate`
//!     |
//!     v            flows read            connected            AgentResponse
//! Gathering ---------------> Connecting ----------> Requesting ------+------> Ready (a VM asked)
//!     |                          |                      |            |          | MigrationReady
//!     |                          |                      |            v          v
//!     +--------------------------+----------------------+----> Copying <--------+
//!        peer down, refusal, timeout, cancelled: failed           | suspended
//!                                                                 v
//!               completed or failed  <-- libvirt says so --  Switching
//! ```
//!
//! Until START MIGRATION every failure undoes everything. From then on libvirt decides: a broken
//! connection to the peer is made again, and the peer, which may have been restarted, is asked
//! again.

mod ending;
mod request;

use std::net::SocketAddrV6;
use std::time::Duration;

use common::maps::{ManagedKey, Stream, StreamKey};
use common::signal::{
    AgentRequest, AgentResponse, MigrationProgress, MigrationReady, MigrationRequest,
    MigrationResponse, Phase, VmMessage,
};
use tracing::info;

use super::link::Backoff;
use super::listener::managed;
use super::record::Direction;
use super::refusal::{Refusal, bounded};
use super::timer::Timer;
use super::{Agent, CommandReply, Domain, DomainUuid, JobStats, Output, Timestamp};

/// How long the kernel's flows are waited for.
const STREAMS_TIMEOUT: Duration = Duration::from_millis(500);

/// Who asked for a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Requester {
    /// The VM itself.
    Vm {
        transaction: u64,
        /// Where its last datagram came from.
        to: SocketAddrV6,
    },
    /// An operator.
    Operator { command: u64 },
}

/// Where an outgoing migration stands; see the module's diagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Waiting for the flows of the domain's addresses.
    Gathering { token: u64 },
    /// Waiting for the connection to the peer.
    Connecting,
    /// Waiting for `AgentResponse`.
    Requesting,
    /// Waiting for the VM's `MigrationReady`.
    Ready,
    /// libvirt copies memory.
    Copying,
    /// The VM is stopped for the switch.
    Switching,
}

impl State {
    pub(super) fn is_started(self) -> bool {
        matches!(self, Self::Copying | Self::Switching)
    }

    fn phase(self) -> Phase {
        match self {
            Self::Gathering { .. } | Self::Connecting | Self::Requesting => Phase::Preparing,
            Self::Ready => Phase::Ready,
            Self::Copying => Phase::Copying,
            Self::Switching => Phase::Switching,
        }
    }
}

/// An outgoing migration.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// Transaction between the agents.
    transaction: u64,
    uuid: DomainUuid,
    domain: String,
    pub(super) destination: String,
    requester: Requester,
    state: State,
    started: Timestamp,
    request: Option<AgentRequest>,
    response: Option<AgentResponse>,
    copy_started: Timestamp,
    suspended: Option<Timestamp>,
    stats: JobStats,
    peer_told: Timestamp,
    cancelled_by: Option<&'static str>,
    pub(super) backoff: Backoff,
}

impl Outgoing {
    fn progress(&self, now: Timestamp) -> MigrationProgress {
        MigrationProgress {
            phase: self.state.phase(),
            processed_bytes: self.stats.processed_bytes,
            total_bytes: self.stats.total_bytes,
            elapsed_ms: millis(now.since(self.started)),
            vm_pause_ms: self.stats.downtime.map(millis),
        }
    }

    fn is_asked_by(&self, uuid: &DomainUuid, vm_transaction: u64) -> bool {
        self.uuid == *uuid
            && matches!(self.requester, Requester::Vm { transaction, .. } if transaction == vm_transaction)
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Agent {
    /// A VM asks to be moved; its transaction is new.
    pub(super) fn request_from_vm(
        &mut self,
        domain: &Domain,
        transaction: u64,
        from: SocketAddrV6,
        request: &MigrationRequest,
    ) {
        let allowed = match &request.domain {
            Some(named) if *named != domain.name => Err(Refusal::OtherDomain {
                domain: domain.name.clone(),
                named: bounded(named),
            }),
            _ => self.check_departure(domain, &request.destination),
        };
        if let Err(refusal) = allowed {
            info!(domain = %domain.name, reason = %refusal, "Migration is refused");
            self.tell_refusal(domain.uuid, transaction, from, &refusal);
            return;
        }
        let requester = Requester::Vm {
            transaction,
            to: from,
        };
        self.depart(domain, &request.destination, requester);
    }

    /// An operator asks for a move.
    pub(super) fn command_migrate(&mut self, command: u64, domain: &str, destination: &str) {
        let found = self.inventory.domain_by_name(domain).cloned();
        let allowed = match &found {
            None if !self.inventory.hypervisor_connected => Err(Refusal::NoHypervisor {
                agent: self.config.name.clone(),
            }),
            None => Err(Refusal::UnknownDomain {
                agent: self.config.name.clone(),
                named: bounded(domain),
            }),
            Some(domain) if !domain.running => Err(Refusal::NotRunning {
                domain: domain.name.clone(),
            }),
            Some(domain) => self.check_departure(domain, destination),
        };
        match (found, allowed) {
            (Some(domain), Ok(())) => {
                self.depart(&domain, destination, Requester::Operator { command });
            }
            (_, Err(refusal)) => self.reply(command, CommandReply::Failed(refusal.to_string())),
            (None, Ok(())) => {}
        }
    }

    fn check_departure(&self, domain: &Domain, destination: &str) -> Result<(), Refusal> {
        let agent = self.config.name.clone();
        let domain_name = domain.name.clone();
        if destination != agent && !self.config.peers.iter().any(|peer| peer == destination) {
            return Err(Refusal::UnknownDestination {
                agent,
                named: bounded(destination),
                known: self.config.peers.join(", "),
            });
        }
        if destination == agent {
            return Err(Refusal::SameHost {
                domain: domain_name,
                agent,
            });
        }
        if !self
            .config
            .policy
            .allows_departure(&domain_name, destination)
        {
            return Err(Refusal::Departure {
                agent,
                domain: domain_name,
                destination: destination.to_owned(),
            });
        }
        if let Some(running) = self.outgoing.values().find(|o| o.uuid == domain.uuid) {
            return Err(Refusal::AlreadyMigrating {
                domain: domain_name,
                destination: running.destination.clone(),
            });
        }
        if !self.inventory.hypervisor_connected {
            return Err(Refusal::NoHypervisor { agent });
        }
        let limit = self.config.limits.outgoing;
        if self.outgoing.len() >= limit {
            return Err(Refusal::TooManyOutgoing { agent, limit });
        }
        Ok(())
    }

    fn depart(&mut self, domain: &Domain, destination: &str, requester: Requester) {
        let number = self.records.begin(
            self.now,
            Direction::Outgoing,
            domain.uuid,
            &domain.name,
            destination,
        );
        let token = self.numbers.next();
        let outgoing = Outgoing {
            transaction: self.numbers.next(),
            uuid: domain.uuid,
            domain: domain.name.clone(),
            destination: destination.to_owned(),
            requester,
            state: State::Gathering { token },
            started: self.now,
            request: None,
            response: None,
            copy_started: self.now,
            suspended: None,
            stats: JobStats::default(),
            peer_told: self.now,
            cancelled_by: None,
            backoff: Backoff::default(),
        };
        info!(domain = %domain.name, destination, number, "Migration is asked for");
        self.outgoing.insert(number, outgoing);
        let deadline = self.now + self.config.timing.response_timeout;
        self.timers.set(Timer::Response(number), deadline);
        self.connect(destination);
        let mut keys: Vec<ManagedKey> = self
            .departing_listeners(&domain.uuid)
            .map(|(view, _)| managed(&view.key))
            .collect();
        keys.sort_unstable();
        keys.dedup();
        if keys.is_empty() {
            self.gathered(number, &[]);
            return;
        }
        self.timers
            .set(Timer::Streams(number), self.now + STREAMS_TIMEOUT);
        self.outputs.push_back(Output::ReadStreams { token, keys });
    }

    /// Returns the migration that waits for an answer of [`Output::ReadStreams`].
    pub(super) fn outgoing_by_token(&self, token: u64) -> Option<u64> {
        self.outgoing
            .iter()
            .find(|(_, outgoing)| outgoing.state == State::Gathering { token })
            .map(|(number, _)| *number)
    }

    /// Goes on when the flows are known, or will not be.
    pub(super) fn gathered(&mut self, number: u64, streams: &[(StreamKey, Stream)]) {
        self.timers.stop(Timer::Streams(number));
        let Some(outgoing) = self.outgoing.get(&number) else {
            return;
        };
        if !matches!(outgoing.state, State::Gathering { .. }) {
            return;
        }
        let request = self.agent_request(outgoing, streams);
        let Some(outgoing) = self.outgoing.get_mut(&number) else {
            return;
        };
        outgoing.request = Some(request);
        outgoing.state = State::Connecting;
        let peer = outgoing.destination.clone();
        if self.is_up(&peer) {
            self.send_request(number);
        }
    }

    fn send_request(&mut self, number: u64) {
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
        self.send(&peer, transaction, &request.into());
    }

    pub(super) fn outgoing_peer_up(&mut self, peer: &str) {
        let numbers: Vec<u64> = self.outgoing_to(peer);
        for number in numbers {
            self.timers.stop(Timer::Reconnect(number));
            let Some(outgoing) = self.outgoing.get_mut(&number) else {
                continue;
            };
            outgoing.backoff = Backoff::default();
            let started = outgoing.state.is_started();
            self.send_request(number);
            if started {
                self.tell_peer(number);
            }
        }
    }

    pub(super) fn outgoing_peer_down(&mut self, peer: &str, reason: &str) {
        for number in self.outgoing_to(peer) {
            let Some(outgoing) = self.outgoing.get(&number) else {
                continue;
            };
            if outgoing.state.is_started() {
                self.reconnect_later(number);
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

    pub(super) fn on_agent_response(
        &mut self,
        peer: &str,
        transaction: u64,
        response: AgentResponse,
    ) {
        let Some((number, outgoing)) = self.outgoing.iter_mut().find(|(_, outgoing)| {
            outgoing.transaction == transaction && outgoing.destination == peer
        }) else {
            return;
        };
        let number = *number;
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
        self.timers.stop(Timer::Response(number));
        let signalling = self.now.since(outgoing.started);
        let receptions = response.receptions.clone();
        outgoing.response = Some(response);
        outgoing.state = State::Ready;
        let requester = outgoing.requester;
        self.records.update(number, |record| {
            record.phase = Phase::Ready;
            record.signalling = Some(signalling);
            record.receptions = receptions;
        });
        match requester {
            Requester::Vm { .. } => {
                let deadline = self.now + self.config.timing.ready_timeout;
                self.timers.set(Timer::Ready(number), deadline);
                self.tell_requester(number);
            }
            Requester::Operator { .. } => self.start(number),
        }
    }

    /// Answers a repeated `MigrationRequest` of a running migration.
    pub(super) fn answer_request_again(
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
    pub(super) fn ready_from_vm(
        &mut self,
        uuid: &DomainUuid,
        transaction: u64,
        from: SocketAddrV6,
        _ready: &MigrationReady,
    ) -> bool {
        let Some(number) = self.asked_by(uuid, transaction, from) else {
            return false;
        };
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
            None => outgoing.progress(self.now).into(),
        };
        self.tell(to, transaction, &message);
    }

    fn start(&mut self, number: u64) {
        let Some(outgoing) = self.outgoing.get_mut(&number) else {
            return;
        };
        let Some(response) = &outgoing.response else {
            return;
        };
        let start = Output::StartMigration {
            uuid: outgoing.uuid,
            connect_uri: response.connect_uri.clone(),
            migrate_uri: response.migrate_uri.clone(),
        };
        outgoing.state = State::Copying;
        outgoing.copy_started = self.now;
        info!(domain = %outgoing.domain, destination = %outgoing.destination, number, "Migration starts");
        self.timers.stop(Timer::Ready(number));
        self.records
            .update(number, |record| record.phase = Phase::Copying);
        self.outputs.push_back(start);
        self.tell_peer(number);
        self.tell_progress(number);
    }

    pub(super) fn reply(&mut self, command: u64, reply: CommandReply) {
        self.outputs.push_back(Output::Reply { command, reply });
    }
}

#[cfg(test)]
#[path = "../tests/source.rs"]
mod tests;
