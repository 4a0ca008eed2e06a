//! The machines of an agent, and which of them each input goes to.
//!
//! ```text
//!   input ---> Machines ---> one machine ---> outputs, timers (Context)
//!                 ^                |
//!                 '-- what it has found out goes to the others --'
//! ```
//!
//! No machine sees another one's fields: a machine is lent the others that it needs ([`Around`],
//! [`Host`]), and tells what it has found out as events that are polled here.

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

/// The state of one agent.
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

    /// Takes in something at `now`.
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

    /// The departures, and what they are lent.
    fn departing(&mut self) -> (&mut Departures, &mut Context, Around<'_>) {
        let around = Around {
            inventory: &self.inventory,
            mirror: &self.mirror,
            arrivals: &self.arrivals,
            addresses: &mut self.addresses,
        };
        (&mut self.departures, &mut self.cx, around)
    }

    /// Takes what machines have found out to those whom that concerns.
    pub(in crate::proto) fn settle(&mut self) {
        while let Some(changed) = self.receptions.poll_change() {
            self.arrivals.reception_changed(&mut self.cx, changed);
        }
        while let Some(address) = self.addresses.poll_freed() {
            self.arrivals
                .forget_address(&mut self.cx, &self.addresses, address, false);
        }
    }

    /// What listeners and arriving VMs want of an address together, as far as a relay is to hear of it.
    fn wanted(&self, key: &ManagedKey) -> Filter {
        self.arrivals.wanted(&self.cx, &self.mirror, key)
    }

    /// What is wanted of an address may have changed.
    fn refresh_filter(&mut self, key: ManagedKey) {
        self.with_arrivals(|arrivals, cx, host| arrivals.refresh_filter(cx, host, key));
    }

    /// Stops watching an address unless somebody needs it.
    pub(in crate::proto) fn unmanage_unneeded(&mut self, key: ManagedKey) {
        self.with_arrivals(|arrivals, cx, host| arrivals.unmanage_unneeded(cx, host, key));
    }

    /// Does what others are to do about what the kernel has reported of listeners.
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
                Effect::Queried { vlan, at } => {
                    self.arrivals
                        .query_came(&mut self.cx, &self.mirror, vlan, at);
                }
                Effect::EventsLost => self.arrivals.read_probed_streams(&mut self.cx),
            }
        }
    }

    /// Has arrivals do something, and lends them what they need.
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
