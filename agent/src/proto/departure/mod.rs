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
//! A move that somebody else asks libvirt for begins with `ArrivalNotice` of the destination, goes
//! from `Requesting` to `Copying` at once, and is followed instead of started (`notice`).
//!
//! An agent that is started while libvirt moves a domain begins at `Copying` too, knowing neither
//! who asked nor the destination.
//!
//! A destination that has no place says so by `MigrationProgress`, and is asked again and again.
//!
//! Until START MIGRATION every failure undoes everything. From then on libvirt decides: a broken
//! connection to the peer is made again, and the peer, which may have been restarted, is asked
//! again.

mod address;
mod dialogue;
mod ending;
mod handover;
mod notice;
mod request;

use std::collections::BTreeMap;
use std::net::SocketAddrV6;
use std::time::Duration;

use common::maps::{ManagedKey, StreamKey};
use common::signal::{AgentRequest, AgentResponse, MigrationProgress, MigrationRequest, Phase};
use common::text::is_plain_text;
use tracing::{info, warn};

use super::links::peers::Backoff;
use super::policy::Asker;
use super::record::Direction;
use super::refusal::{Refusal, Whose, bounded};
use super::timer::Timer;
use super::{Agent, CommandReply, Domain, DomainUuid, JobStats, Output, Stream, Timestamp};

use address::Leaving;
pub(super) use handover::LateCuts;
use handover::Recorded;

/// Stands for the destination of a migration that an agent before this one has started: libvirt
/// does not tell it. No agent has this name, since names have no spaces.
const UNKNOWN_DESTINATION: &str = "an unknown host";

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
    /// Somebody who asked an agent before this one.
    Unknown,
    /// Somebody who has asked libvirt, as the destination says by its notice of that transaction.
    Nobody { transaction: u64 },
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
    /// Somebody else has libvirt move it: the migration is followed, not started.
    foreign: bool,
    /// libvirt has not been seen to move it yet.
    awaited: bool,
    state: State,
    /// The destination has said that it has no place yet.
    waits: bool,
    started: Timestamp,
    request: Option<AgentRequest>,
    response: Option<AgentResponse>,
    copy_started: Timestamp,
    suspended: Option<Timestamp>,
    stats: JobStats,
    peer_told: Timestamp,
    cancelled_by: Option<&'static str>,
    /// Why it was stopped, if it was by the destination.
    stopped_for: Option<Refusal>,
    /// Where the VM is going to be, as it says.
    leaving: Option<Leaving>,
    /// TAPs that are recorded, and what the VM has had by them.
    recorded: Recorded,
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
            clock_ns: None,
        }
    }

    /// Whether a peer has said that libvirt moves it, and libvirt has not been seen to.
    fn is_only_told(&self) -> bool {
        matches!(self.requester, Requester::Nobody { .. })
            && self.foreign
            && (!self.state.is_started() || self.awaited)
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
            _ => self
                .check_departure(domain, &request.destination, Asker::Vm)
                .and_then(|()| self.check_pause(domain)),
        };
        if let Err(refusal) = allowed {
            info!(domain = %domain.name, reason = %refusal, "Migration is refused");
            self.cx
                .tell_refusal(domain.uuid, transaction, from, &refusal);
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
                agent: self.cx.config.name.clone(),
            }),
            None => Err(Refusal::UnknownDomain {
                agent: self.cx.config.name.clone(),
                named: bounded(domain),
            }),
            Some(domain) if !domain.running => Err(Refusal::NotRunning {
                domain: domain.name.clone(),
            }),
            Some(domain) => self.check_departure(domain, destination, Asker::Operator),
        };
        match (found, allowed) {
            (Some(domain), Ok(())) => {
                self.depart(&domain, destination, Requester::Operator { command });
            }
            (_, Err(refusal)) => self
                .cx
                .reply(command, CommandReply::Failed(refusal.to_string())),
            (None, Ok(())) => {}
        }
    }

    /// Whether a domain may ever go to a destination if somebody asks.
    fn check_route(&self, domain: &Domain, destination: &str, by: Asker) -> Result<(), Refusal> {
        let agent = self.cx.config.name.clone();
        let domain_name = domain.name.clone();
        if !is_plain_text(&domain_name) {
            return Err(Refusal::Name {
                domain: bounded(&domain_name),
            });
        }
        if destination != agent && self.cx.config.peer(destination).is_none() {
            return Err(Refusal::UnknownDestination {
                agent,
                named: bounded(destination),
                known: self.cx.config.peer_names(),
            });
        }
        if destination == agent {
            return Err(Refusal::SameHost {
                domain: domain_name,
                agent,
            });
        }
        if !self
            .cx
            .config
            .policy
            .allows_departure(&domain_name, destination, by)
        {
            return Err(Refusal::Departure {
                agent,
                domain: domain_name,
                destination: destination.to_owned(),
                by,
            });
        }
        Ok(())
    }

    /// Whether a domain may go to a destination now.
    fn check_departure(
        &self,
        domain: &Domain,
        destination: &str,
        by: Asker,
    ) -> Result<(), Refusal> {
        self.check_route(domain, destination, by)?;
        let agent = self.cx.config.name.clone();
        let domain_name = domain.name.clone();
        let running = self.outgoing.values().find(|o| o.uuid == domain.uuid);
        // What a peer says keeps nobody from moving a domain.
        let only_told = |outgoing: &&Outgoing| by != Asker::Hook && outgoing.is_only_told();
        if let Some(running) = running.filter(|it| !only_told(it)) {
            return Err(Refusal::AlreadyMigrating {
                domain: domain_name,
                destination: running.destination.clone(),
            });
        }
        if !self.inventory.hypervisor_connected {
            return Err(Refusal::NoHypervisor { agent });
        }
        let share = self.cx.config.policy.departing();
        let others = || self.outgoing.values().filter(|o| o.uuid != domain.uuid);
        let to_peer = others().filter(|o| o.destination == destination).count();
        let whose = if to_peer >= share.of_peer {
            Whose::Peer
        } else if others().count() >= share.of_all {
            Whose::All
        } else {
            return Ok(());
        };
        Err(Refusal::TooManyOutgoing {
            agent,
            limit: whose.limit(share),
            whose,
        })
    }

    /// Whether a VM may ask for a move again.
    fn check_pause(&mut self, domain: &Domain) -> Result<(), Refusal> {
        let pause = self.cx.config.policy.vm_pause();
        match self.cx.vms.has_to_wait(domain.uuid, self.cx.now, pause) {
            None => Ok(()),
            Some(wait) => Err(Refusal::Pause {
                domain: domain.name.clone(),
                wait,
            }),
        }
    }

    /// Ends what a peer has only told of a domain, for somebody else who moves it.
    fn supersede(&mut self, domain: &Domain, asker: &'static str) {
        let told = self
            .outgoing
            .iter()
            .find(|(_, it)| it.uuid == domain.uuid && it.is_only_told());
        if let Some((number, _)) = told {
            let domain = domain.name.clone();
            self.fail(*number, &Refusal::Superseded { domain, asker });
        }
    }

    fn depart(&mut self, domain: &Domain, destination: &str, requester: Requester) {
        match requester {
            Requester::Operator { .. } => self.supersede(domain, "An operator"),
            Requester::Vm { .. } => self.supersede(domain, "The VM"),
            Requester::Unknown | Requester::Nobody { .. } => {}
        }
        let number = self.cx.records.begin(
            self.cx.now,
            Direction::Outgoing,
            domain.uuid,
            &domain.name,
            destination,
        );
        let outgoing = self.outgoing_to_be(domain, destination, requester);
        let State::Gathering { token } = outgoing.state else {
            return;
        };
        info!(domain = %domain.name, destination, number, "Migration is asked for");
        self.outgoing.insert(number, outgoing);
        self.tell_operator(number);
        let deadline = self.cx.now + self.cx.config.timing.response_timeout;
        self.cx.timers.set(Timer::Response(number), deadline);
        self.cx.connect(destination);
        let mut keys: Vec<ManagedKey> = self
            .departing_listeners(&domain.uuid)
            .map(|(view, _)| view.key.managed())
            .chain(self.held_for(&domain.uuid).map(|(key, ..)| key))
            .collect();
        keys.sort_unstable();
        keys.dedup();
        if keys.is_empty() {
            self.gathered(number, &[]);
            return;
        }
        self.cx
            .timers
            .set(Timer::Streams(number), self.cx.now + STREAMS_TIMEOUT);
        self.cx
            .outputs
            .push_back(Output::ReadStreams { token, keys });
    }

    /// libvirt moves a domain: the one that is followed, or one on behalf of an agent before this
    /// one. Of the latter the destination hears nothing from this agent, unless it gives notice: it
    /// goes by its own libvirt.
    pub(super) fn departure_found(&mut self, uuid: DomainUuid) {
        let known = self.outgoing.values_mut().find(|o| o.uuid == uuid);
        if let Some(outgoing) = known {
            outgoing.awaited = false;
            return;
        }
        let Some(domain) = self.inventory.domains.get(&uuid).cloned() else {
            return;
        };
        let number = self.cx.records.begin(
            self.cx.now,
            Direction::Outgoing,
            uuid,
            &domain.name,
            UNKNOWN_DESTINATION,
        );
        self.cx
            .records
            .update(number, |record| record.phase = Phase::Copying);
        warn!(
            domain = %domain.name,
            number,
            "Migration that was started before this agent goes on; libvirt brings it to its end"
        );
        let mut outgoing = self.outgoing_to_be(&domain, UNKNOWN_DESTINATION, Requester::Unknown);
        outgoing.state = State::Copying;
        self.outgoing.insert(number, outgoing);
    }

    fn outgoing_to_be(
        &mut self,
        domain: &Domain,
        destination: &str,
        requester: Requester,
    ) -> Outgoing {
        let token = self.cx.numbers.next();
        let (transaction, foreign) = match requester {
            Requester::Nobody { transaction } => (transaction, true),
            _ => (self.cx.numbers.next(), false),
        };
        Outgoing {
            transaction,
            uuid: domain.uuid,
            domain: domain.name.clone(),
            destination: destination.to_owned(),
            requester,
            foreign,
            awaited: false,
            state: State::Gathering { token },
            waits: false,
            started: self.cx.now,
            request: None,
            response: None,
            copy_started: self.cx.now,
            suspended: None,
            stats: JobStats::default(),
            peer_told: self.cx.now,
            cancelled_by: None,
            stopped_for: None,
            leaving: None,
            recorded: BTreeMap::new(),
            backoff: Backoff::default(),
        }
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
        self.cx.timers.stop(Timer::Streams(number));
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
        if self.cx.is_up(&peer) {
            self.send_request(number);
        }
    }
}

#[cfg(test)]
#[path = "../tests/departure.rs"]
mod tests;
