//! Outgoing migrations: the source host's side, from the request to the end of the migration.
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
//! A migration that somebody else starts in libvirt begins with an `ArrivalNotice` of the
//! destination and goes from `Requesting` to `Moving` at once. The agent follows the migration
//! instead of starting it (`notice`). The first step is then `Awaited`, until libvirt reports the
//! migration.
//!
//! If libvirt is migrating a domain when the agent starts, the migration begins at `Copying` too.
//! The agent then knows neither the requester nor the destination.
//!
//! A destination without a free place says so in `MigrationProgress`; the source repeats its
//! request until a timeout.
//!
//! Before START MIGRATION, every failure undoes everything. After START MIGRATION, libvirt decides:
//! the agent reconnects to the destination after a broken connection, and repeats the request
//! because the peer's agent may have restarted.
//!
//! | module | content |
//! |---|---|
//! | `stage` | the stages, and the data of each stage |
//! | `check` | whether a domain may go to a destination |
//! | `request` | the request to the destination |
//! | `dialogue` | messages with the destination and the VM before START MIGRATION |
//! | `notice` | migrations that somebody else starts in libvirt |
//! | `address` | the VM's future address |
//! | `handover` | recording the VM's TAPs, and the cuts |
//! | `tell` | progress messages to the requester and the destination |
//! | `ending` | progress after START MIGRATION, and all endings |

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
use super::{
    CommandReply, Domain, DomainUuid, JobStats, Output, Stream, Timestamp, VmAddress, millis,
};

use check::{check_departing, check_pause};
use handover::LateCuts;
use request::{agent_request, departing_listeners};
use stage::{Mover, Moving, Stage, Step};

/// Placeholder destination of a migration that an earlier agent started; libvirt does not name the
/// real one. Agent names contain no spaces, so no agent has this name.
const UNKNOWN_DESTINATION: &str = "an unknown host";

/// Longest wait for the kernel's flows before the request goes out without them.
const STREAMS_TIMEOUT: Duration = Duration::from_millis(500);

/// Originator of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Requester {
    /// The VM itself, by `MigrationRequest`.
    Vm {
        transaction: u64,
        /// Source address of the VM's last datagram.
        to: VmAddress,
    },
    /// An operator, by `roamcast migrate`; `command` receives the replies.
    Operator { command: u64 },
    /// Unknown: the migration started before this agent.
    Unknown,
    /// Somebody who uses libvirt directly. The destination reported the migration in its notice
    /// with this transaction.
    External { transaction: u64 },
}

/// Domain, destination and requester of a migration.
#[derive(Debug)]
struct Order {
    /// Number of the migration's record.
    number: u64,
    /// Transaction number in the messages between the two agents.
    transaction: u64,
    uuid: DomainUuid,
    domain: String,
    destination: String,
    requester: Requester,
    started: Timestamp,
    /// Request to the destination; `None` until the flows are known, or if the destination is unknown.
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

/// An outgoing migration with its current stage.
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

    /// Returns true if only a peer reported the migration, and libvirt has not confirmed it.
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

/// Other machines that departures read, and the addresses, which departures also change.
pub(super) struct Around<'a> {
    pub(super) inventory: &'a Inventory,
    pub(super) mirror: &'a Mirror,
    pub(super) arrivals: &'a Arrivals,
    pub(super) addresses: &'a mut Addresses,
}

/// All outgoing migrations, by record number.
///
/// Invariants after each input ([`Departures::check`]):
/// - A domain has at most one outgoing migration.
/// - A migration that libvirt does not run yet has a deadline.
/// - The request exists as soon as the flows are known. The destination is unknown only if an
///   earlier agent started the migration.
/// - Late cuts exist only after their migration ended, and only while a cut is missing.
#[derive(Debug, Default)]
pub(super) struct Departures {
    outgoing: BTreeMap<u64, Outgoing>,
    /// Cuts still missing for domains that left, by record number.
    late_cuts: BTreeMap<u64, LateCuts>,
}

impl Departures {
    /// Handles a VM's request for its own migration, with a new transaction.
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

    /// Handles `roamcast migrate`.
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

    /// Handles the answer to [`Output::ReadStreams`]. Returns false if no outgoing migration asked.
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

    /// Proceeds without the flows after [`STREAMS_TIMEOUT`].
    pub(super) fn streams_timed_out(&mut self, cx: &mut Context, around: &Around<'_>, number: u64) {
        if let Some(outgoing) = self.outgoing.get_mut(&number) {
            outgoing.gathered(cx, around, &[]);
        }
    }

    fn of_domain(&mut self, uuid: DomainUuid) -> Option<&mut Outgoing> {
        self.outgoing.values_mut().find(|it| it.order.uuid == uuid)
    }

    /// Returns the migration to that peer whose request had the transaction.
    fn by_transaction(&mut self, (peer, transaction): (&str, u64)) -> Option<&mut Outgoing> {
        self.outgoing
            .values_mut()
            .find(|it| it.order.transaction == transaction && it.order.destination == peer)
    }

    fn bound_for(&mut self, peer: &str) -> impl Iterator<Item = &mut Outgoing> {
        let all = self.outgoing.values_mut();
        all.filter(move |it| it.order.destination == peer)
    }

    /// Returns a domain's migration if it reached [`Stage::Moving`].
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

    /// Checks the invariants of [`Departures`] in debug builds.
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
mod tests;
