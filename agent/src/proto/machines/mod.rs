//! The agent's state machines, and the dispatch of each input to them.
//!
//! ```text
//!   input ---> Machines ---> one machine ---> outputs, timers (Context)
//!                 ^                |
//!                 '-- its findings go to the other machines --'
//! ```
//!
//! No machine sees another machine's fields. `Machines` lends a machine the others that it needs
//! ([`Around`], [`Host`]), and polls the machine's findings as events.

mod route;

use common::maps::ManagedKey;

use super::addresses::Addresses;
use super::arrival::{Arrivals, Host};
use super::context::Context;
use super::departure::{Around, Departures};
use super::filter::Filter;
use super::host::inventory::Inventory;
use super::host::listeners::{Effect, Mirror};
use super::host::usage::Usage;
use super::reception::Receptions;
use super::{AgentConfig, DomainUuid, Output, Timestamp};

/// All state of one agent.
#[derive(Debug)]
pub(in crate::proto) struct Machines {
    pub(in crate::proto) cx: Context,
    pub(in crate::proto) inventory: Inventory,
    pub(in crate::proto) mirror: Mirror,
    pub(in crate::proto) departures: Departures,
    pub(in crate::proto) arrivals: Arrivals,
    pub(in crate::proto) receptions: Receptions,
    pub(in crate::proto) usage: Usage,
    pub(in crate::proto) addresses: Addresses,
}

impl Machines {
    pub(in crate::proto) fn new(config: AgentConfig, seed: u64) -> Self {
        Self {
            cx: Context::new(config, seed),
            inventory: Inventory::default(),
            mirror: Mirror::default(),
            departures: Departures::default(),
            arrivals: Arrivals::default(),
            receptions: Receptions::default(),
            usage: Usage::default(),
            addresses: Addresses::default(),
        }
    }

    /// Handles one input at `now`: calls `take`, then brings the machines into agreement.
    pub(in crate::proto) fn input(&mut self, now: Timestamp, take: impl FnOnce(&mut Self)) {
        if self.cx.begin(now) {
            Usage::due(&mut self.cx, &self.inventory);
        }
        take(self);
        self.settle();
        self.mirror.set_timer(&mut self.cx);
        self.departures.check(&self.cx);
        self.arrivals.check(&self.cx, &self.inventory);
    }

    /// Returns the departures with the shared context and the machines that departures read.
    fn departing(&mut self) -> (&mut Departures, &mut Context, Around<'_>) {
        let around = Around {
            inventory: &self.inventory,
            mirror: &self.mirror,
            arrivals: &self.arrivals,
            addresses: &mut self.addresses,
        };
        (&mut self.departures, &mut self.cx, around)
    }

    /// Passes the findings of the receptions and addresses to the arrivals.
    pub(in crate::proto) fn settle(&mut self) {
        while let Some(changed) = self.receptions.poll_change() {
            self.arrivals.reception_changed(&mut self.cx, changed);
        }
        while let Some(address) = self.addresses.poll_freed() {
            self.arrivals
                .forget_address(&mut self.cx, &self.addresses, address, false);
        }
    }

    /// Returns the merged filter of listeners and arriving VMs for an address, to the extent that
    /// relays need it.
    fn wanted(&self, key: &ManagedKey) -> Filter {
        self.arrivals.wanted(&self.cx, &self.mirror, key)
    }

    /// Recomputes the merged filter of an address after a possible change.
    fn refresh_filter(&mut self, key: ManagedKey) {
        self.with_arrivals(|arrivals, cx, host| arrivals.refresh_filter(cx, host, key));
    }

    /// Stops watching an address unless a listener or an arriving VM needs it.
    pub(in crate::proto) fn unmanage_unneeded(&mut self, key: ManagedKey) {
        self.with_arrivals(|arrivals, cx, host| arrivals.unmanage_unneeded(cx, host, key));
    }

    /// Reacts to the listener changes that the mirror collected.
    fn follow_mirror(&mut self) {
        while let Some(effect) = self.mirror.poll_effect(&mut self.cx) {
            match effect {
                Effect::Appeared(key) => {
                    let wanted = self.wanted(&key);
                    self.receptions.receive(&mut self.cx, key, wanted);
                }
                Effect::Vanished { key, told } => {
                    if !told && !self.arrivals.has_joined(&key) {
                        self.cx.outputs.push_back(Output::Prune(key));
                    }
                    self.unmanage_unneeded(key);
                }
                Effect::Wanted(key) => self.refresh_filter(key),
                Effect::Reported(listener) => self.with_arrivals(|arrivals, cx, host| {
                    arrivals.vm_reported(cx, host, &listener);
                }),
                Effect::Left(listener) => self.with_arrivals(|arrivals, cx, host| {
                    arrivals.vm_left(cx, host, &listener);
                }),
                Effect::Queried { network, at } => {
                    self.arrivals
                        .query_came(&mut self.cx, &self.mirror, network, at);
                }
                Effect::EventsLost => self.arrivals.read_probed_streams(&mut self.cx),
            }
        }
    }

    /// Calls `act` on the arrivals, with the machines that arrivals need.
    fn with_arrivals<T>(
        &mut self,
        act: impl FnOnce(&mut Arrivals, &mut Context, &mut Host<'_>) -> T,
    ) -> T {
        let mut host = Host {
            inventory: &self.inventory,
            mirror: &self.mirror,
            receptions: &mut self.receptions,
            addresses: &mut self.addresses,
        };
        act(&mut self.arrivals, &mut self.cx, &mut host)
    }

    fn ports_changed(&mut self) {
        self.with_arrivals(Arrivals::ports_changed);
    }

    fn check_name(&mut self, uuid: DomainUuid) {
        self.with_arrivals(|arrivals, cx, host| arrivals.check_name(cx, host, uuid));
    }

    fn runs_here(&mut self, uuid: DomainUuid, at: Timestamp) {
        self.with_arrivals(|arrivals, cx, host| arrivals.runs_here(cx, host, uuid, at));
    }
}
