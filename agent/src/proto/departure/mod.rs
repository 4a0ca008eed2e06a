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
//! `Copying` and `Switching` are steps of the last stage, `Moving`.
//!
//! A move that somebody else asks libvirt for begins with `ArrivalNotice` of the destination, goes
//! from `Requesting` to `Moving` at once, and is followed instead of started (`notice`): its first step
//! is `Awaited`, until libvirt is seen to move the domain.
//!
//! An agent that is started while libvirt moves a domain begins at `Copying` too. It knows neither who
//! asked nor the destination.
//!
//! A destination that has no place says so by `MigrationProgress`, and is asked again and again.
//!
//! Until START MIGRATION every failure undoes everything. From then on libvirt decides: a broken
//! connection to the peer is made again, and the peer, which may have been restarted, is asked
//! again.
//!
//! | module | holds |
//! |---|---|
//! | `stage` | the stages, and what each of them knows |
//! | `check` | whether a domain may go to a destination |
//! | `request` | what the destination is asked for |
//! | `dialogue` | what is said to the destination and to the VM until START MIGRATION |
//! | `notice` | moves that somebody else asks libvirt for |
//! | `address` | the address that the VM is going to have |
//! | `handover` | recording the VM's TAPs, and the cuts |
//! | `tell` | how a migration stands, for whom that concerns |
//! | `ending` | progress after START MIGRATION, and each end |

mod address;
mod check;
mod dialogue;
mod ending;
mod handover;
mod notice;
mod request;
mod stage;
mod tell;

use std::collections::BTreeMap;
use std::net::SocketAddrV6;
use std::time::Duration;

use common::maps::{ManagedKey, StreamKey};
use common::signal::{AgentRequest, MigrationProgress, MigrationRequest};
use tracing::info;

use super::addresses::Addresses;
use super::arrival::Arrivals;
use super::context::Context;
use super::host::inventory::Inventory;
use super::host::listeners::Mirror;
use super::links::vm::Caller;
use super::policy::Asker;
use super::record::Direction;
use super::refusal::{Refusal, bounded};
use super::timer::Timer;
use super::{CommandReply, Domain, DomainUuid, JobStats, Output, Stream, Timestamp, millis};

use check::{check_departing, check_pause};
use handover::LateCuts;
use request::{agent_request, departing_listeners};
use stage::{Mover, Moving, Stage, Step};

/// Stands for the destination of a migration that an agent before this one has started: libvirt
/// does not tell it. No agent has this name, since names have no spaces.
const UNKNOWN_DESTINATION: &str = "an unknown host";

/// How long the kernel's flows are waited for.
const STREAMS_TIMEOUT: Duration = Duration::from_millis(500);

/// Who asked for a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Requester {
    /// The VM itself.
    Vm {
        transaction: u64,
        /// Where its last datagram came from.
        to: SocketAddrV6,
    },
    /// `roamcast migrate`.
    Operator { command: u64 },
    /// Somebody who asked an agent before this one.
    Unknown,
    /// Somebody who has asked libvirt, as the destination says by its notice of that transaction.
    External { transaction: u64 },
}

/// Which domain moves where, and who wants it.
#[derive(Debug)]
struct Order {
    /// Number of the record.
    number: u64,
    /// Transaction between the agents.
    transaction: u64,
    uuid: DomainUuid,
    domain: String,
    destination: String,
    requester: Requester,
    started: Timestamp,
    /// What the destination is asked for, once the flows are known.
    request: Option<AgentRequest>,
}

impl Order {
    fn new(
        cx: &mut Context,
        number: u64,
        domain: &Domain,
        destination: &str,
        requester: Requester,
    ) -> Self {
        let transaction = match requester {
            Requester::External { transaction } => transaction,
            _ => cx.numbers.next(),
        };
        Self {
            number,
            transaction,
            uuid: domain.uuid,
            domain: domain.name.clone(),
            destination: destination.to_owned(),
            requester,
            started: cx.now,
            request: None,
        }
    }
}

/// A migration that leaves.
#[derive(Debug)]
struct Outgoing {
    order: Order,
    stage: Stage,
}

impl Outgoing {
    fn progress(&self, now: Timestamp) -> MigrationProgress {
        match &self.stage {
            Stage::Moving(moving) => moving.progress(&self.order, now),
            stage => stage::progress(&self.order, stage.phase(), &JobStats::default(), now),
        }
    }

    /// A peer has said that libvirt moves the domain, and libvirt has not been seen to.
    fn is_only_told(&self) -> bool {
        let is_seen = |moving: &Moving| moving.step != Step::Awaited;
        matches!(self.order.requester, Requester::External { .. })
            && !matches!(&self.stage, Stage::Moving(moving) if is_seen(moving))
    }

    fn is_asked_by(&self, caller: &Caller) -> bool {
        self.order.uuid == caller.domain.uuid
            && matches!(self.order.requester, Requester::Vm { transaction, .. } if transaction == caller.transaction)
    }
}

/// What departures read of other machines, and the addresses that their VMs leave.
pub(super) struct Around<'a> {
    pub(super) inventory: &'a Inventory,
    pub(super) mirror: &'a Mirror,
    pub(super) arrivals: &'a Arrivals,
    pub(super) addresses: &'a mut Addresses,
}

/// The migrations that leave, by the numbers of their records.
///
/// After each input ([`Departures::check`]):
/// - a domain leaves by one migration at most;
/// - a migration that libvirt does not make yet has a deadline;
/// - the destination is asked for something as soon as the flows are known, and is unknown only where
///   an agent before this one has started the migration;
/// - cuts are late only after their migration has ended, and as long as one of them is missing.
#[derive(Debug, Default)]
pub(super) struct Departures {
    outgoing: BTreeMap<u64, Outgoing>,
    /// Domains that have left before all of their cuts were placed.
    late_cuts: BTreeMap<u64, LateCuts>,
}

impl Departures {
    /// A VM asks to be moved; its transaction is new.
    pub(super) fn request_from_vm(
        &mut self,
        cx: &mut Context,
        mut around: Around<'_>,
        caller: &Caller,
        mut request: MigrationRequest,
    ) {
        request.destination.make_ascii_lowercase();
        let (domain, transaction, from) = (&caller.domain, caller.transaction, caller.from);
        let allowed = match &request.domain {
            Some(named) if *named != domain.name => Err(Refusal::OtherDomain {
                domain: domain.name.clone(),
                named: bounded(named),
            }),
            _ => self
                .check_departure(
                    cx,
                    around.inventory,
                    domain,
                    &request.destination,
                    Asker::Vm,
                )
                .and_then(|()| check_pause(cx, domain)),
        };
        if let Err(refusal) = allowed {
            info!(domain = %domain.name, reason = %refusal, "Migration is refused");
            cx.tell_refusal(domain.uuid, transaction, from, &refusal);
            return;
        }
        let requester = Requester::Vm {
            transaction,
            to: from,
        };
        self.depart(cx, &mut around, domain, &request.destination, requester);
    }

    /// `roamcast migrate`.
    pub(super) fn command_migrate(
        &mut self,
        cx: &mut Context,
        mut around: Around<'_>,
        command: u64,
        named: &str,
        destination: &str,
    ) {
        let inventory = around.inventory;
        let allowed = check_departing(cx, inventory, named).and_then(|domain| {
            self.check_departure(cx, inventory, domain, destination, Asker::Operator)?;
            Ok(domain)
        });
        match allowed {
            Ok(domain) => {
                let requester = Requester::Operator { command };
                self.depart(cx, &mut around, domain, destination, requester);
            }
            Err(refusal) => cx.reply(command, CommandReply::Failed(refusal.to_string())),
        }
    }

    fn depart(
        &mut self,
        cx: &mut Context,
        around: &mut Around<'_>,
        domain: &Domain,
        destination: &str,
        requester: Requester,
    ) {
        let mover = match requester {
            Requester::Operator { .. } => {
                self.supersede(cx, around.addresses, domain, "An operator");
                Mover::Agent
            }
            Requester::Vm { .. } => {
                self.supersede(cx, around.addresses, domain, "The VM");
                Mover::Agent
            }
            Requester::Unknown | Requester::External { .. } => Mover::External,
        };
        let number = begin_record(cx, domain, destination);
        let token = cx.numbers.next();
        let outgoing = Outgoing {
            order: Order::new(cx, number, domain, destination, requester),
            stage: Stage::Gathering { token, mover },
        };
        info!(domain = %domain.name, destination, number, "Migration is asked for");
        outgoing.tell_operator(cx);
        let outgoing = self.outgoing.entry(number).or_insert(outgoing);
        let deadline = cx.now + cx.config.timing.response_timeout;
        cx.timers.set(Timer::Response(number), deadline);
        cx.connect(destination);
        let mut keys: Vec<ManagedKey> =
            departing_listeners(around.inventory, around.mirror, &domain.uuid)
                .map(|(view, _)| view.key.managed())
                .chain(around.arrivals.held_for(domain.uuid).map(|(key, ..)| key))
                .collect();
        keys.sort_unstable();
        keys.dedup();
        if keys.is_empty() {
            outgoing.gathered(cx, around, &[]);
            return;
        }
        cx.timers
            .set(Timer::Streams(number), cx.now + STREAMS_TIMEOUT);
        cx.outputs.push_back(Output::ReadStreams { token, keys });
    }

    /// Takes in an answer of [`Output::ReadStreams`]; `false` if no departure has asked.
    pub(super) fn streams_read(
        &mut self,
        cx: &mut Context,
        around: &Around<'_>,
        asked: u64,
        streams: &[(StreamKey, Stream)],
    ) -> bool {
        let waits = |it: &&mut Outgoing| matches!(it.stage, Stage::Gathering { token, .. } if token == asked);
        let Some(outgoing) = self.outgoing.values_mut().find(waits) else {
            return false;
        };
        outgoing.gathered(cx, around, streams);
        true
    }

    /// The flows have not come in time.
    pub(super) fn streams_timed_out(&mut self, cx: &mut Context, around: &Around<'_>, number: u64) {
        if let Some(outgoing) = self.outgoing.get_mut(&number) {
            outgoing.gathered(cx, around, &[]);
        }
    }

    fn of_domain(&mut self, uuid: DomainUuid) -> Option<&mut Outgoing> {
        self.outgoing.values_mut().find(|it| it.order.uuid == uuid)
    }

    /// The migration whose request had that transaction.
    fn by_transaction(&mut self, (peer, transaction): (&str, u64)) -> Option<&mut Outgoing> {
        self.outgoing
            .values_mut()
            .find(|it| it.order.transaction == transaction && it.order.destination == peer)
    }

    fn bound_for(&mut self, peer: &str) -> impl Iterator<Item = &mut Outgoing> {
        let all = self.outgoing.values_mut();
        all.filter(move |it| it.order.destination == peer)
    }

    /// A domain's migration that libvirt makes.
    fn moving_of(&mut self, uuid: DomainUuid) -> Option<(&Order, &mut Moving)> {
        self.outgoing.values_mut().find_map(|it| match it {
            Outgoing {
                order,
                stage: Stage::Moving(moving),
            } if order.uuid == uuid => Some((&*order, &mut **moving)),
            _ => None,
        })
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn is_empty(&self) -> bool {
        self.outgoing.is_empty() && self.late_cuts.is_empty()
    }

    /// Checks in debug builds what the type's doc says.
    pub(super) fn check(&self, cx: &Context) {
        if !cfg!(debug_assertions) {
            return;
        }
        let mut domains = std::collections::BTreeSet::new();
        for (number, Outgoing { order, stage }) in &self.outgoing {
            debug_assert_eq!(*number, order.number);
            debug_assert!(domains.insert(order.uuid), "{} leaves twice", order.domain);
            let is_unknown = order.requester == Requester::Unknown;
            debug_assert_eq!(is_unknown, order.destination == UNKNOWN_DESTINATION);
            let is_gathering = matches!(stage, Stage::Gathering { .. });
            debug_assert_eq!(order.request.is_none(), is_gathering || is_unknown);
            let deadline = match stage {
                Stage::Gathering { .. } | Stage::Connecting { .. } | Stage::Requesting { .. } => {
                    Timer::Response(*number)
                }
                Stage::Ready(_) => Timer::Ready(*number),
                Stage::Moving(_) => continue,
            };
            debug_assert!(!is_unknown, "{} is libvirt's", order.domain);
            debug_assert!(
                cx.timers.get(deadline).is_some(),
                "{} waits for ever",
                order.domain
            );
        }
        for (number, late) in &self.late_cuts {
            debug_assert!(!self.outgoing.contains_key(number));
            debug_assert!(!late.is_complete());
            debug_assert!(cx.timers.get(Timer::LateCuts(*number)).is_some());
        }
    }
}

fn begin_record(cx: &mut Context, domain: &Domain, destination: &str) -> u64 {
    let outgoing = Direction::Outgoing;
    cx.records
        .begin(cx.now, outgoing, domain.uuid, &domain.name, destination)
}

#[cfg(test)]
#[path = "../tests/departure.rs"]
mod tests;
