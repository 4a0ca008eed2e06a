//! Forwards packets for the addresses that a VM leaves to the VM's new address.
//!
//! ```text
//!  named by the VM           suspended               the time asked for is over
//!  -------------> Checking ------------> Forwarding -------------------------> (gone)
//!                    |                        | the VM runs on here, or the move has failed
//!                    |                        +--> Checking or gone, and neighbours are told
//!                    | somebody else has the address, or the VM has not answered for it
//!                    +--> it is not forwarded
//! ```
//!
//! Unread packets go first. While an address is in `Checking`, the gate keeps copies of the frames that
//! enter the TAP for the address ([`GateCommand::Record`](crate::proto::GateCommand::Record)). After
//! the stop, new packets wait in the TAP until the unread copies are forwarded
//! ([`GateCommand::Cut`](crate::proto::GateCommand::Cut)).
//!
//! A VM names its old addresses itself, so the agent probes each address on the link until the VM
//! answers. If somebody else answers, or nobody, the VM has no right to redirect the address's packets.
//! While packets are forwarded, this host answers Solicitations for the old addresses in place of the
//! VM.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{Forward, ForwardKey};
use common::mat::MAX_MOAS;
use tracing::{info, warn};

use crate::proto::context::Context;
use crate::proto::host::inventory::Inventory;
use crate::proto::record::ForwardRecord;
use crate::proto::timer::Timer;
use crate::proto::{DomainUuid, LinkAddress, Mac, Timestamp, mac_text};

use super::{AddressCommand, Addresses, Allowance, ForwardCommand, Leave, Said, adopted_until};

/// Interval of reading the counters and of resolving the next hops again.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Time after the stop during which packets wait in the TAP behind those that the VM did not read. The
/// agent has forwarded the unread packets by then, or never does.
const UNREAD_TIME: Duration = Duration::from_millis(500);

/// An old address of a VM, before and after the VM stops.
#[derive(Debug)]
pub(in crate::proto) struct Departure {
    pub(in crate::proto) uuid: DomainUuid,
    /// Number of the migration's record; `None` if an earlier agent began the forwarding.
    number: Option<u64>,
    /// New destination of the packets.
    to: Ipv6Addr,
    /// TAP of the NIC that has the address; 0 until that NIC answers.
    ifindex: u32,
    /// MACs of the domain, to recognize the domain's own answers.
    macs: Vec<Mac>,
    /// MAC of the NIC that has the address; `None` until that NIC answers.
    owner: Option<Mac>,
    lasting: Duration,
    /// End of forwarding; `None` before the stop.
    until: Option<Timestamp>,
    /// True once neighbours were told that this host takes the packets.
    answered: bool,
    answers: Allowance,
}

/// Destination of a departing VM.
pub(in crate::proto) struct Going<'a> {
    /// Address of the VM at the destination host.
    pub(in crate::proto) to: Ipv6Addr,
    /// Duration of forwarding, from the stop on.
    pub(in crate::proto) lasting: Duration,
    /// MACs of the domain.
    pub(in crate::proto) macs: &'a [Mac],
    /// Returns true for an address that another domain, arriving or arrived, claims.
    pub(in crate::proto) is_claimed: &'a dyn Fn(LinkAddress) -> bool,
}

impl Departure {
    fn leave(&self, address: LinkAddress) -> Leave {
        Leave {
            address,
            to: self.to,
            ifindex: self.ifindex,
            uuid: self.uuid,
        }
    }

    /// Returns true if the departure belongs to the migration with that record.
    pub(in crate::proto) fn is_of(&self, number: u64) -> bool {
        self.number == Some(number)
    }
}

impl Addresses {
    /// Probes the link for the VM's old addresses, and resolves the next hop to the new address.
    pub(in crate::proto) fn begin_departures(
        &mut self,
        cx: &mut Context,
        of: (u64, DomainUuid),
        named: impl Iterator<Item = Ipv6Addr>,
        going: &Going<'_>,
    ) {
        self.end_departures(cx, |_, departure| departure.is_of(of.0));
        if !going.lasting.is_zero() {
            for address in named.take(MAX_MOAS) {
                let on = cx.config.here(address);
                self.begin_departure(cx, of, on, going);
            }
        }
    }

    fn begin_departure(
        &mut self,
        cx: &mut Context,
        (number, uuid): (u64, DomainUuid),
        on: LinkAddress,
        going: &Going<'_>,
    ) {
        let LinkAddress { bridge, address } = on;
        let is_held = (going.is_claimed)(on) || self.holder(on, uuid, cx.now).is_some();
        if is_held || !cx.config.is_on_link(address) {
            cx.counters.forwards_refused += 1;
            warn!(number, %address, "Packets for an address are not sent on: it is not the VM's");
            return;
        }
        // An earlier migration may have left an entry.
        self.end_departures(cx, |departed, _| *departed == on);
        self.departures.insert(
            on,
            Departure {
                uuid,
                number: Some(number),
                to: going.to,
                ifindex: 0,
                macs: going.macs.to_vec(),
                owner: None,
                lasting: going.lasting,
                until: None,
                answered: false,
                answers: Allowance::default(),
            },
        );
        cx.address(bridge, AddressCommand::Watch { address });
        cx.address(bridge, AddressCommand::Probe { address });
        cx.forward(ForwardCommand::Resolve { to: going.to });
        cx.timers
            .set_earlier(Timer::Forwards, cx.now + LOOK_INTERVAL);
    }

    /// Handles a neighbour message about an address that a VM leaves. Returns the migration whose
    /// destination host must hear that the VM does not have the address.
    pub(in crate::proto) fn departure_heard(
        &mut self,
        cx: &mut Context,
        inventory: &Inventory,
        on: LinkAddress,
        said: Said,
        by: Mac,
    ) -> Option<u64> {
        let now = cx.now;
        let departure = self.departures.get_mut(&on)?;
        let LinkAddress { bridge, address } = on;
        let is_own = departure.macs.contains(&by);
        match said {
            Said::Has if is_own => {
                // A VM may repeat its answer at will; only the first one counts.
                if departure.owner.replace(by) != Some(by) {
                    let uuid = departure.uuid;
                    let ports = inventory.ports_of_domain(&uuid);
                    if let Some((ifindex, _)) = ports.iter().find(|(_, mac)| *mac == by) {
                        self.expect(cx, on, *ifindex);
                    }
                }
            }
            _ if is_own => {}
            Said::Asks(_) | Said::Wants if departure.until.is_some() => {
                if departure.answers.allows(now) {
                    departure.answered = true;
                    let to = match said {
                        Said::Asks(from) => Some((from, by)),
                        Said::Has | Said::Wants => None,
                    };
                    let advertise = AddressCommand::Advertise {
                        address,
                        owner: None,
                        overrides: true,
                        to,
                    };
                    cx.address(bridge, advertise);
                }
            }
            Said::Asks(_) | Said::Wants => {}
            Said::Has if departure.number.is_none() && departure.macs.is_empty() => {
                // An adopted entry does not keep the domain's MACs, so an answer may be the domain's
                // own.
            }
            Said::Has => {
                cx.counters.addresses_disputed += 1;
                warn!(%address, mac = mac_text(&by), "Packets for an address are not sent on: somebody else has it");
                let number = departure.number;
                self.end_departures(cx, |departed, _| *departed == on);
                return number;
            }
        }
        None
    }

    pub(in crate::proto) fn departure_of_own(&mut self, cx: &mut Context, address: LinkAddress) {
        self.end_departures(cx, |departed, _| *departed == address);
    }

    /// Starts to forward packets for the addresses of a stopped VM.
    pub(in crate::proto) fn forward_departures(&mut self, cx: &mut Context, number: u64) {
        let now = cx.now;
        let mut begun = Vec::new();
        let mut silent = Vec::new();
        for (address, departure) in &mut self.departures {
            if departure.number != Some(number) || departure.until.is_some() {
                continue;
            }
            if departure.owner.is_none() {
                silent.push(*address);
                continue;
            }
            let until = now + departure.lasting;
            departure.until = Some(until);
            begun.push((departure.leave(*address), until));
        }
        for address in silent {
            cx.counters.forwards_refused += 1;
            warn!(number, %address, "Packets for an address are not sent on: the VM has not answered for it");
            self.end_departure(cx, address, true);
        }
        for (leave, until) in begun {
            let Leave {
                address: on, to, ..
            } = leave;
            let LinkAddress { bridge, address } = on;
            info!(number, %address, %to, "Packets are sent on");
            cx.forward(ForwardCommand::Set {
                leave,
                until,
                unread_until: now + UNREAD_TIME,
            });
            cx.address(bridge, AddressCommand::Replace { address });
            cx.timers.set_earlier(Timer::Forwards, until);
            let forward = ForwardRecord {
                address,
                to,
                packets: 0,
                bytes: 0,
                dropped: 0,
            };
            cx.records
                .update(number, |record| record.forwarded(forward));
        }
    }

    /// Stops forwarding for a VM that resumes on this host.
    pub(in crate::proto) fn keep_departures(&mut self, cx: &mut Context, number: u64) {
        let stopped: Vec<LinkAddress> = self
            .departures
            .iter_mut()
            .filter(|(_, departure)| departure.number == Some(number))
            .filter_map(|(address, departure)| departure.until.take().map(|_| *address))
            .collect();
        for address in stopped {
            self.give_back(cx, address);
            if let Some(departure) = self.departures.get(&address) {
                self.expect(cx, address, departure.ifindex);
            }
        }
    }

    /// Has the gate keep copies of the frames that enter a TAP for an address, since the VM may stop
    /// before reading them.
    fn expect(&mut self, cx: &mut Context, address: LinkAddress, ifindex: u32) {
        if let Some(departure) = self.departures.get_mut(&address)
            && departure.until.is_none()
            && ifindex != 0
        {
            departure.ifindex = ifindex;
            let leave = departure.leave(address);
            cx.forward(ForwardCommand::Expect(leave));
        }
    }

    /// Removes the matching departures, also in the kernel.
    pub(in crate::proto) fn end_departures(
        &mut self,
        cx: &mut Context,
        condition: impl Fn(&LinkAddress, &Departure) -> bool,
    ) {
        let ending: Vec<LinkAddress> = self
            .departures
            .iter()
            .filter(|(address, departure)| condition(address, departure))
            .map(|(address, _)| *address)
            .collect();
        for address in ending {
            self.end_departure(cx, address, true);
        }
        if self.departures.is_empty() {
            cx.timers.stop(Timer::Forwards);
        }
    }

    /// Ends the departures that an earlier agent began for a domain that runs here: the domain did not
    /// leave.
    pub(in crate::proto) fn end_adopted_departures(&mut self, cx: &mut Context, uuid: DomainUuid) {
        self.end_departures(cx, |_, departure| {
            departure.uuid == uuid && departure.number.is_none()
        });
    }

    fn end_departure(&mut self, cx: &mut Context, address: LinkAddress, give_back: bool) {
        let active = self
            .departures
            .get_mut(&address)
            .and_then(|departure| departure.until.take());
        if active.is_some() && give_back {
            self.give_back(cx, address);
        } else {
            cx.forward(ForwardCommand::Remove { address });
        }
        let Some(departure) = self.departures.remove(&address) else {
            return;
        };
        let to = departure.to;
        if !self.departures.values().any(|it| it.to == to) {
            cx.forward(ForwardCommand::Release { to });
        }
        self.freed.push_back(address);
    }

    /// Stops forwarding for an address, and corrects neighbours that were told about this host.
    fn give_back(&mut self, cx: &mut Context, address: LinkAddress) {
        cx.forward(ForwardCommand::Remove { address });
        let Some(departure) = self.departures.get_mut(&address) else {
            return;
        };
        if std::mem::take(&mut departure.answered)
            && let Some(owner) = departure.owner
        {
            let LinkAddress { bridge, address } = address;
            let advertise = AddressCommand::Advertise {
                address,
                owner: Some(owner),
                overrides: true,
                to: None,
            };
            cx.address(bridge, advertise);
        }
    }

    /// Reads the counters, resolves next hops again, and ends what has expired.
    pub(in crate::proto) fn look_at_forwards(&mut self, cx: &mut Context) {
        let now = cx.now;
        cx.forward(ForwardCommand::Read);
        let over: Vec<LinkAddress> = self
            .departures
            .iter()
            .filter(|(_, departure)| departure.until.is_some_and(|until| until <= now))
            .map(|(address, _)| *address)
            .collect();
        for address in over {
            info!(%address, "Packets are sent on no more: their time is over");
            self.end_departure(cx, address, false);
        }
        let silent = self.departures.iter();
        let silent = silent.filter(|(_, it)| it.owner.is_none() && it.until.is_none());
        let silent: Vec<LinkAddress> = silent.map(|(address, _)| *address).collect();
        for LinkAddress { bridge, address } in silent {
            cx.address(bridge, AddressCommand::Probe { address });
        }
        let mut next = None;
        let mut ways: Vec<Ipv6Addr> = Vec::new();
        for departure in self.departures.values() {
            ways.push(departure.to);
            let due = departure.until.unwrap_or(now + LOOK_INTERVAL);
            let due = due.min(now + LOOK_INTERVAL);
            next = Some(next.map_or(due, |next: Timestamp| next.min(due)));
        }
        ways.sort_unstable();
        ways.dedup();
        for to in ways {
            cx.forward(ForwardCommand::Resolve { to });
        }
        if let Some(next) = next {
            cx.timers.set(Timer::Forwards, next);
        }
    }

    /// Adopts the kernel's entries of an earlier agent.
    pub(in crate::proto) fn adopt_forwards(
        &mut self,
        cx: &mut Context,
        forwards: Vec<(ForwardKey, Forward)>,
    ) {
        for (key, value) in forwards {
            let (bridge, address) = (key.bridge, Ipv6Addr::from(key.address));
            let on = LinkAddress { bridge, address };
            let until = adopted_until(cx, value.until_ns);
            if until <= cx.now || key.vlan != 0 {
                cx.forward(ForwardCommand::Remove { address: on });
                continue;
            }
            let to = Ipv6Addr::from(value.destination);
            info!(%address, %to, "Packets are sent on, as an earlier agent has begun");
            self.departures.insert(
                on,
                Departure {
                    uuid: DomainUuid(value.domain_uuid),
                    number: None,
                    to,
                    ifindex: 0,
                    macs: Vec::new(),
                    owner: None,
                    lasting: until.since(cx.now),
                    until: Some(until),
                    answered: false,
                    answers: Allowance::default(),
                },
            );
            cx.address(bridge, AddressCommand::Watch { address });
            cx.address(bridge, AddressCommand::Replace { address });
            cx.forward(ForwardCommand::Resolve { to });
            cx.timers
                .set_earlier(Timer::Forwards, until.min(cx.now + LOOK_INTERVAL));
        }
    }
}

#[cfg(test)]
mod tests;
