//! Migrations that arrive at this host.
//!
//! [`Arrivals`] is the machine. Each arriving domain has one [`Incoming`], whose [`Stage`] says
//! how far the domain is. Each address that an arriving VM needs has one join, shared by all VMs that need
//! the address:
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
//!   any --- the VM runs here ---> Held --- its Report answers a Query, or it left,
//!                                          or a listening interval has passed ---> Released
//!   any --- abort, VM gone, or nothing heard any more ---------------------------> Released
//! ```
//!
//! Joining and probing begin at once for all addresses, so a request takes as long as its slowest
//! probe. A join ends when the last VM that needs it releases it.
//!
//! | module | holds |
//! |---|---|
//! | `request` | a source's request, and the answer |
//! | `check` | whether a domain may come: policy, and what libvirt says of its name |
//! | `queue` | requests that wait for a place |
//! | `notice` | libvirt's hook: domains that somebody else moves |
//! | `stage` | how far an arrival is: what its source, libvirt and its TAPs say |
//! | `ending` | how arrivals end |
//! | `joins`, `probe` | joins by proxy and their probes |
//! | `mdb` | the bridge's entries for arriving VMs |
//! | `reports` | the arrived VM's own Reports, which end the joins |
//! | `finished` | what VMs that have arrived are answered |
//! | `tap` | which TAP is kept for which arrival |
//! | `handover` | the gates of the TAPs |
//! | `claims`, `address`, `left` | the address that the VM takes on, and those that it has left |

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

/// What arrivals are lent besides the context: the other machines of this host.
pub(super) struct Host<'a> {
    pub(super) inventory: &'a Inventory,
    pub(super) mirror: &'a Mirror,
    pub(super) receptions: &'a mut Receptions,
    pub(super) addresses: &'a mut Addresses,
}

/// The domains that arrive, and all that is held for them.
///
/// After each input:
///
/// - A domain has one arrival, and so has a transaction of a peer.
/// - An arrival and its joins name the same needs.
/// - An address that an answer waits for has no verdict, unless its VM has told here that it needs no join.
/// - An arrival whose domain or TAPs are here is at least at [`Stage::Coming`].
/// - Something ends each arrival: [`Timer::Unused`] before the VM runs here, [`Timer::Hold`] after.
/// - A VM that runs here and waits for its cut gets its streams by [`Timer::Cut`] at the latest.
/// - The probe of a claimed address ends by [`Timer::Claim`].
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    incoming: ByNumber,
    joins: Joins,
    taps: Taps,
    /// Hooks of libvirt that wait.
    preparations: Preparations,
    /// Requests that wait for a place.
    queue: Queue,
    /// What peers may still ask for within a minute.
    rates: Rates,
    finished: Finished,
}

/// An arriving domain.
#[derive(Debug)]
struct Incoming {
    /// The number of its record.
    number: u64,
    peer: String,
    transaction: u64,
    uuid: DomainUuid,
    domain: String,
    macs: Vec<Mac>,
    vm_transaction: Option<u64>,
    started: Timestamp,
    /// Of the flows that are known here already.
    token: u64,
    answer: Answer,
    stage: Stage,
    told: Told,
    /// What is still held for it: the address, and the NIC that listens to it.
    needs: BTreeMap<(ManagedKey, Mac), Filter>,
    mdb: Mdb,
    gates: Gates,
    /// The address that it is going to have here.
    claim: Option<Claim>,
}

impl Incoming {
    /// Whether the VM no longer runs at its source.
    fn is_switched_to(&self) -> bool {
        self.stage.arrived().is_some() || self.told.is_switched()
    }

    /// The NICs that need an address.
    fn needing(&self, key: &ManagedKey) -> impl Iterator<Item = (Mac, &Filter)> {
        let needs = self.needs.range((*key, [0; 6])..=(*key, [0xff; 6]));
        needs.map(|((_, mac), filter)| (*mac, filter))
    }

    fn is(&self, peer: &str, transaction: u64) -> bool {
        self.transaction == transaction && self.peer == peer
    }
}

/// The arrivals by the numbers of their records.
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
    /// Whether a domain is expected or held for, so that its transaction may yet become known.
    pub(super) fn expects(&self, uuid: DomainUuid) -> bool {
        self.incoming.of_domain(uuid).is_some()
    }

    /// What an arrived domain listens to as its source said, but has not answered for here yet.
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

    /// Checks in debug builds what is said at the type.
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
#[path = "../tests/destination.rs"]
pub(super) mod tests;
