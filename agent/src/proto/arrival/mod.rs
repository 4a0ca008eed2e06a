//! Incoming migrations: the destination host's side, from the source's request until the arrived VM
//! receives by itself.
//!
//! [`Arrivals`] is the state machine. Each arriving domain has one [`Incoming`] with its [`Stage`].
//! Each address that an arriving VM needs has one join, which all VMs that need the address share:
//!
//! ```text
//!            AgentRequest                          first packet
//!   (none) ---------------> Joining -> Probing -------------------> Native or Relay
//!                                        |  | silent at the source too        ^ ^ ^
//!                                        |  +-------------------------> Idle -+ | |
//!                                        | deadline                             | |
//!                                        +----------------------> Unreachable --+ |
//!                                        | refused by the kernel                  |
//!                                        +----------------------> Refused --------+
//!
//!   any --- the VM runs here ---> Held --- its Report answers a Query, or it leaves the group,
//!                                          or a listening interval passes ---> Released
//!   any --- abort, VM gone, or silence of the source -------------------------> Released
//! ```
//!
//! Joining and probing start at once for all addresses, so a request takes as long as its slowest
//! probe. A join ends when the last VM that needs it releases it.
//!
//! | module | content |
//! |---|---|
//! | `request` | the source's request, and the answer |
//! | `check` | whether a domain may come: the policy, and libvirt's name for the domain |
//! | `queue` | requests that wait for a place |
//! | `notice` | libvirt's hook: migrations that somebody else starts |
//! | `stage` | progress of an arrival, from its source, libvirt and its TAPs |
//! | `ending` | all endings of arrivals |
//! | `joins`, `probe` | joins on behalf of VMs, and their probes |
//! | `mdb` | the bridge's MDB entries for arriving VMs |
//! | `reports` | the arrived VM's own Reports, which end the joins |
//! | `finished` | answers to VMs that arrived |
//! | `tap` | assignment of TAPs to arrivals |
//! | `handover` | the gates of the TAPs |
//! | `claims`, `address`, `left` | the address that the VM adopts here, and the addresses that it left |

mod address;
mod check;
mod claims;
mod ending;
mod finished;
mod handover;
mod joins;
mod left;
mod mdb;
mod notice;
mod probe;
mod queue;
mod reports;
mod request;
mod stage;
mod tap;

use std::collections::BTreeMap;

use common::maps::ManagedKey;

use super::addresses::Addresses;
use super::context::Context;
use super::filter::Filter;
use super::host::inventory::Inventory;
use super::host::listeners::Mirror;
use super::rate::Rates;
use super::reception::Receptions;
use super::timer::Timer;
use super::{DomainUuid, Mac, Timestamp};

use address::Claim;
use finished::Finished;
use handover::Gates;
use joins::Joins;
pub use joins::ReceptionView;
pub(crate) use mdb::MDB_RENEWAL_LAST;
use mdb::Mdb;
use notice::Preparations;
use queue::Queue;
pub use queue::WaitingView;
use request::Answer;
use stage::{Stage, Told};
use tap::Taps;

/// Other machines of this host that arrivals use, besides the context.
pub(super) struct Host<'a> {
    pub(super) inventory: &'a Inventory,
    pub(super) mirror: &'a Mirror,
    pub(super) receptions: &'a mut Receptions,
    pub(super) addresses: &'a mut Addresses,
}

/// All incoming migrations, with everything that the host holds for them.
///
/// Invariants after each input:
///
/// - A domain has at most one arrival, and so has a transaction of a peer.
/// - An arrival and the joins list the same needs.
/// - An address that an answer waits for has no verdict, unless its VM has shown here that it needs
///   no join.
/// - An arrival whose domain or TAPs are here is at least at [`Stage::Coming`].
/// - A timer ends each arrival: [`Timer::Unused`] before the VM runs here, [`Timer::Hold`]
///   afterwards.
/// - A VM that runs here and waits for its cut gets its streams by [`Timer::Cut`] at the latest.
/// - The probe of a claimed address ends by [`Timer::Claim`].
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    incoming: ByNumber,
    joins: Joins,
    taps: Taps,
    /// libvirt's hooks that wait for an answer.
    preparations: Preparations,
    /// Requests that wait for a free place.
    queue: Queue,
    /// Requests that each peer may still make within the minute.
    rates: Rates,
    finished: Finished,
}

/// An incoming migration of one domain.
#[derive(Debug)]
struct Incoming {
    /// Number of the migration's record.
    number: u64,
    peer: String,
    transaction: u64,
    uuid: DomainUuid,
    domain: String,
    macs: Vec<Mac>,
    vm_transaction: Option<u64>,
    started: Timestamp,
    /// Token of the [`Output::ReadStreams`](crate::proto::Output::ReadStreams) for flows that this
    /// host already receives.
    token: u64,
    answer: Answer,
    stage: Stage,
    told: Told,
    /// Needs that the host still holds for the VM: address, MAC of the listening NIC, and filter.
    needs: BTreeMap<(ManagedKey, Mac), Filter>,
    mdb: Mdb,
    gates: Gates,
    /// Claim of the address that the VM adopts here; `None` without a claim.
    claim: Option<Claim>,
}

impl Incoming {
    /// Returns true if the VM no longer runs on the source host.
    fn is_switched_to(&self) -> bool {
        self.stage.arrived().is_some() || self.told.is_switched()
    }

    /// Returns the NICs that need an address, with their filters.
    fn needing(&self, key: &ManagedKey) -> impl Iterator<Item = (Mac, &Filter)> {
        let needs = self.needs.range((*key, [0; 6])..=(*key, [0xff; 6]));
        needs.map(|((_, mac), filter)| (*mac, filter))
    }

    fn is(&self, peer: &str, transaction: u64) -> bool {
        self.transaction == transaction && self.peer == peer
    }
}

/// Arrivals by record number.
#[derive(Debug, Default)]
struct ByNumber(BTreeMap<u64, Incoming>);

impl ByNumber {
    fn get(&self, number: u64) -> Option<&Incoming> {
        self.0.get(&number)
    }

    fn get_mut(&mut self, number: u64) -> Option<&mut Incoming> {
        self.0.get_mut(&number)
    }

    fn insert(&mut self, incoming: Incoming) {
        self.0.insert(incoming.number, incoming);
    }

    fn remove(&mut self, number: u64) -> Option<Incoming> {
        self.0.remove(&number)
    }

    fn iter(&self) -> impl DoubleEndedIterator<Item = &Incoming> {
        self.0.values()
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut Incoming> {
        self.0.values_mut()
    }

    /// Returns the newest arrival of a domain.
    fn of_domain(&self, uuid: DomainUuid) -> Option<&Incoming> {
        self.iter().rev().find(|it| it.uuid == uuid)
    }

    fn of_domain_mut(&mut self, uuid: DomainUuid) -> Option<&mut Incoming> {
        self.0.values_mut().rev().find(|it| it.uuid == uuid)
    }

    fn of_transaction(&self, peer: &str, transaction: u64) -> Option<&Incoming> {
        self.iter().find(|it| it.is(peer, transaction))
    }

    fn of_transaction_mut(&mut self, peer: &str, transaction: u64) -> Option<&mut Incoming> {
        self.iter_mut().find(|it| it.is(peer, transaction))
    }
}

impl Arrivals {
    /// Returns true if the domain is arriving or held, so a transaction of its VM may still become
    /// known.
    pub(super) fn expects(&self, uuid: DomainUuid) -> bool {
        self.incoming.of_domain(uuid).is_some()
    }

    /// Returns the needs of an arrived domain, as its source stated them, that the VM's own Reports
    /// have not replaced yet.
    pub(super) fn held_for(
        &self,
        uuid: DomainUuid,
    ) -> impl Iterator<Item = (ManagedKey, Mac, &Filter)> {
        self.incoming
            .of_domain(uuid)
            .filter(|incoming| incoming.stage.arrived().is_some())
            .into_iter()
            .flat_map(|incoming| &incoming.needs)
            .map(|((key, mac), filter)| (*key, *mac, filter))
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn is_empty(&self) -> bool {
        self.incoming.0.is_empty() && self.joins.is_empty() && self.preparations.is_empty()
    }

    /// Checks the invariants of [`Arrivals`] in debug builds.
    pub(super) fn check(&self, cx: &Context, inventory: &Inventory) {
        if !cfg!(debug_assertions) {
            return;
        }
        for incoming in self.incoming.iter() {
            let number = incoming.number;
            let is_set = |timer| cx.timers.get(timer).is_some();
            let others = || self.incoming.iter().filter(|it| it.number != number);
            debug_assert!(others().all(|it| it.uuid != incoming.uuid));
            debug_assert!(others().all(|it| !it.is(&incoming.peer, incoming.transaction)));
            debug_assert!(self.joins.have(incoming));
            let pending = incoming
                .answer
                .pending()
                .filter(|key| incoming.needing(key).next().is_some());
            debug_assert!(self.joins.are_undecided(pending));
            let is_here = self.taps.are_here(inventory, incoming);
            debug_assert!(!is_here || incoming.stage.has_begun());
            let has_arrived = incoming.stage.arrived().is_some();
            debug_assert_eq!(has_arrived, is_set(Timer::Hold(number)));
            debug_assert_eq!(!has_arrived, is_set(Timer::Unused(number)));
            debug_assert!(!incoming.waits_for_cut() || is_set(Timer::Cut(number)));
            let is_probed = incoming.claim.as_ref().is_some_and(Claim::is_probed);
            debug_assert!(!is_probed || is_set(Timer::Claim(number)));
        }
        let needs = self.incoming.iter().map(|it| it.needs.len());
        debug_assert_eq!(needs.sum::<usize>(), self.joins.needs());
    }
}

#[cfg(test)]
pub(super) mod tests;
