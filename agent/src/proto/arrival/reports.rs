//! The arrived VM's own Reports, which end the joins.
//!
//! An unsolicited Report (the VM's NIC announces itself after the switch) does not prove that the
//! querier received it. Only a Report that answers a General Query after the arrival does.

use std::time::Duration;

use common::maps::{ListenerKey, Network};
use tracing::debug;

use super::stage::{Arrived, Stage};
use super::{Arrivals, Host, Incoming};
use crate::proto::context::Context;
use crate::proto::host::inventory::Inventory;
use crate::proto::host::listeners::{Mirror, listener_key};
use crate::proto::timer::Timer;
use crate::proto::{Mac, Output, Timestamp};

/// Interval at which an arrived VM's listener entries are read while it should answer a Query.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Time after the Query Response Interval for which the entries are still read.
const POLL_MARGIN: Duration = Duration::from_secs(2);

impl Incoming {
    /// Stops polling and MDB renewal if nothing is held any more. The arrival itself stays until
    /// the hold ends, because the source may still send the VM's pause.
    pub(super) fn finish_if_released(&self, cx: &mut Context) {
        let has_arrived = self.stage.arrived().is_some();
        if self.needs.is_empty() && has_arrived && self.answer.is_given() {
            debug!(domain = %self.domain, "Nothing is held for the domain any more");
            cx.timers.stop(Timer::Poll(self.number));
            cx.timers.stop(Timer::MdbRenewal(self.number));
        }
    }
}

impl Arrivals {
    /// Handles a General Query in a network.
    pub(in crate::proto) fn query_came(
        &mut self,
        cx: &mut Context,
        mirror: &Mirror,
        network: Network,
        at: Timestamp,
    ) {
        let until = cx.now + mirror.queriers().response_interval(network, at) + POLL_MARGIN;
        for incoming in self.incoming.iter_mut() {
            if let Stage::Arrived(arrived) = &mut incoming.stage
                && at > arrived.at
            {
                arrived.queried.entry(network).or_insert(at);
                arrived.poll_until = until;
                let poll = Timer::Poll(incoming.number);
                cx.timers.set_earlier(poll, cx.now + POLL_INTERVAL);
            }
        }
    }

    /// Reads the listener entries that an arrived VM should have refreshed. The kernel's event may
    /// be lost, or absent because nothing changed.
    pub(in crate::proto) fn poll_answers(
        &self,
        cx: &mut Context,
        inventory: &Inventory,
        number: u64,
    ) {
        let Some(incoming) = self.incoming.get(number) else {
            return;
        };
        let Stage::Arrived(arrived) = &incoming.stage else {
            return;
        };
        let ports = self.taps.of(inventory, incoming);
        let listeners: Vec<ListenerKey> = incoming
            .needs
            .keys()
            .filter_map(|(key, mac)| {
                let (ifindex, _) = ports.iter().find(|(_, of)| of == mac)?;
                Some(listener_key(*ifindex, key))
            })
            .collect();
        if cx.now < arrived.poll_until {
            cx.timers.set(Timer::Poll(number), cx.now + POLL_INTERVAL);
        }
        if !listeners.is_empty() {
            cx.outputs.push_back(Output::ReadListeners {
                listeners,
                sources: Vec::new(),
            });
        }
    }

    /// Handles a listener's new state. A Report that answers a Query after the arrival ends the
    /// join.
    pub(in crate::proto) fn vm_reported(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        listener: &ListenerKey,
    ) {
        let Some(value) = host.mirror.get(listener) else {
            return;
        };
        let answered = Timestamp(value.last_answer_ns);
        self.release_where(cx, host, listener, |arrived| {
            let queried = arrived.queried.get(&listener.network());
            queried.is_some_and(|queried| answered > *queried)
        });
    }

    /// Ends the join of a listener whose VM left the group.
    pub(in crate::proto) fn vm_left(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        listener: &ListenerKey,
    ) {
        self.release_where(cx, host, listener, |_| true);
    }

    fn release_where(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        listener: &ListenerKey,
        condition: impl Fn(&Arrived) -> bool,
    ) {
        let (ifindex, key) = (listener.ifindex, listener.managed());
        for incoming in self.incoming.iter_mut() {
            match &incoming.stage {
                Stage::Arrived(arrived) if condition(arrived) => {}
                _ => continue,
            }
            let mut macs: Vec<Mac> = incoming.needing(&key).map(|(mac, _)| mac).collect();
            if macs.is_empty() {
                continue;
            }
            let ports = self.taps.of(host.inventory, incoming);
            macs.retain(|mac| ports.contains(&(ifindex, *mac)));
            for mac in macs {
                incoming.needs.remove(&(key, mac));
                // From now on, the VM's own Reports renew the bridge's entry.
                incoming.mdb.made.remove(&(ifindex, key));
                self.joins.release(cx, host, incoming.number, key, mac);
                incoming.finish_if_released(cx);
            }
        }
    }
}
