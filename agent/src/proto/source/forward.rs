//! The addresses that a VM leaves: packets that still come for them are sent on to the new one.
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
//! What the VM has not read of its TAP when it stops goes first: while it is checked, copies are kept
//! of what enters the TAP for the address, and what is sent on waits until those are
//! ([`GateCommand::Cut`](crate::proto::GateCommand::Cut)).
//!
//! A VM names its old addresses itself, so each is asked for on the link first, until the VM answers: one
//! that somebody else answers for, or nobody, is not this VM's to give away. While packets are sent on,
//! this host's bridge answers Solicitations for the old addresses in the place of the VM.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{Forward, ForwardKey};
use common::mat::MAX_MOAS;
use tracing::{info, warn};

use crate::proto::record::ForwardRecord;
use crate::proto::timer::Timer;
use crate::proto::unicast::{Allowance, Said};
use crate::proto::{
    AddressCommand, Agent, DomainUuid, ForwardCommand, Leave, Mac, Output, Timestamp, mac_text,
};

/// How often what was sent on is read, and next hops are looked up again.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// For so long after the stop packets wait in the TAP behind those that the VM has not read. The agent
/// has sent them on by then, or never does.
const UNREAD_TIME: Duration = Duration::from_millis(500);

/// An address that a VM leaves or has left.
#[derive(Debug)]
pub(in crate::proto) struct Departure {
    pub(in crate::proto) uuid: DomainUuid,
    /// The migration's record; `None` where an agent before this one has begun.
    number: Option<u64>,
    /// Where packets go.
    to: Ipv6Addr,
    /// The TAP of the NIC that has the address, once that has answered; 0 before.
    ifindex: u32,
    /// MACs of the domain, by which its own answers are known.
    macs: Vec<Mac>,
    /// The one of them that has the address, once it has answered.
    owner: Option<Mac>,
    lasting: Duration,
    /// Until when packets are sent on, while they are.
    until: Option<Timestamp>,
    /// Neighbours were told that this host takes the packets.
    answered: bool,
    answers: Allowance,
}

/// Where a VM goes.
pub(super) struct Going<'a> {
    /// Its address there.
    pub(super) to: Ipv6Addr,
    /// How long packets are sent on.
    pub(super) lasting: Duration,
    /// MACs of the domain.
    pub(super) macs: &'a [Mac],
}

impl Departure {
    fn leave(&self, address: Ipv6Addr) -> Leave {
        Leave {
            address,
            to: self.to,
            ifindex: self.ifindex,
            uuid: self.uuid,
        }
    }

    /// Whether it is of the migration with that record.
    pub(super) fn is_of(&self, number: u64) -> bool {
        self.number == Some(number)
    }
}

impl Agent {
    /// Asks on the link whether addresses are the VM's to leave, and looks for the way to the new one.
    pub(super) fn begin_departures(
        &mut self,
        of: (u64, DomainUuid),
        named: impl Iterator<Item = Ipv6Addr>,
        going: &Going<'_>,
    ) {
        self.end_departures(|_, departure| departure.is_of(of.0));
        if !going.lasting.is_zero() {
            for address in named.take(MAX_MOAS) {
                self.begin_departure(of, address, going);
            }
        }
    }

    fn begin_departure(
        &mut self,
        (number, uuid): (u64, DomainUuid),
        address: Ipv6Addr,
        going: &Going<'_>,
    ) {
        if !self.is_on_link(address) || self.holder_of(address, uuid).is_some() {
            self.cx.counters.forwards_refused += 1;
            warn!(number, %address, "Packets for an address are not sent on: it is not the VM's");
            return;
        }
        // Of an earlier move.
        self.end_departures(|departed, _| *departed == address);
        self.addresses.departures.insert(
            address,
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
        self.address(AddressCommand::Watch { address });
        self.address(AddressCommand::Probe { address });
        self.forward(ForwardCommand::Resolve { to: going.to });
        self.cx
            .timers
            .set_earlier(Timer::Forwards, self.cx.now + LOOK_INTERVAL);
    }

    /// Somebody has said something about an address that a VM leaves.
    pub(in crate::proto) fn departure_heard(&mut self, address: Ipv6Addr, said: Said, by: Mac) {
        let now = self.cx.now;
        let Some(departure) = self.addresses.departures.get_mut(&address) else {
            return;
        };
        let is_own = departure.macs.contains(&by);
        match said {
            Said::Has if is_own => {
                // A VM may say it as often as it likes.
                if departure.owner.replace(by) != Some(by) {
                    let uuid = departure.uuid;
                    let ports = self.inventory.ports_of_domain(&uuid);
                    if let Some((ifindex, _)) = ports.iter().find(|(_, mac)| *mac == by) {
                        self.expect(address, *ifindex);
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
                    self.address(AddressCommand::Advertise {
                        address,
                        owner: None,
                        overrides: true,
                        to,
                    });
                }
            }
            Said::Asks(_) | Said::Wants => {}
            Said::Has if departure.number.is_none() && departure.macs.is_empty() => {
                // Adopted: which MACs were the domain's is not known any more.
            }
            Said::Has => {
                self.cx.counters.addresses_disputed += 1;
                warn!(%address, mac = mac_text(&by), "Packets for an address are not sent on: somebody else has it");
                let number = departure.number;
                self.end_departures(|departed, _| *departed == address);
                if let Some(number) = number {
                    self.claim_address(number);
                }
            }
        }
    }

    pub(in crate::proto) fn departure_of_own(&mut self, address: Ipv6Addr) {
        self.end_departures(|departed, _| *departed == address);
    }

    /// The VM stands still: from now on packets for its addresses are sent on.
    pub(super) fn forward_departures(&mut self, number: u64) {
        let now = self.cx.now;
        let mut begun = Vec::new();
        let mut silent = Vec::new();
        for (address, departure) in &mut self.addresses.departures {
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
            self.cx.counters.forwards_refused += 1;
            warn!(number, %address, "Packets for an address are not sent on: the VM has not answered for it");
            self.end_departure(address, true);
        }
        for (leave, until) in begun {
            let Leave { address, to, .. } = leave;
            info!(number, %address, %to, "Packets are sent on");
            self.forward(ForwardCommand::Set {
                leave,
                until,
                unread_until: now + UNREAD_TIME,
            });
            self.address(AddressCommand::Replace { address });
            self.cx.timers.set_earlier(Timer::Forwards, until);
            let forward = ForwardRecord {
                address,
                to,
                packets: 0,
                bytes: 0,
                dropped: 0,
            };
            self.cx
                .records
                .update(number, |record| record.forwarded(forward));
        }
    }

    /// The VM runs on here: its packets are its own again.
    pub(super) fn keep_departures(&mut self, number: u64) {
        let stopped: Vec<Ipv6Addr> = self
            .addresses
            .departures
            .iter_mut()
            .filter(|(_, departure)| departure.number == Some(number))
            .filter_map(|(address, departure)| departure.until.take().map(|_| *address))
            .collect();
        for address in stopped {
            self.give_back(address);
            if let Some(departure) = self.addresses.departures.get(&address) {
                self.expect(address, departure.ifindex);
            }
        }
    }

    /// Has copies kept of what enters a TAP for an address, because the VM may not read it any more.
    fn expect(&mut self, address: Ipv6Addr, ifindex: u32) {
        if let Some(departure) = self.addresses.departures.get_mut(&address)
            && departure.until.is_none()
            && ifindex != 0
        {
            departure.ifindex = ifindex;
            let leave = departure.leave(address);
            self.forward(ForwardCommand::Expect(leave));
        }
    }

    /// Ends what is done for addresses, also in the kernel.
    pub(in crate::proto) fn end_departures(
        &mut self,
        condition: impl Fn(&Ipv6Addr, &Departure) -> bool,
    ) {
        let ending: Vec<Ipv6Addr> = self
            .addresses
            .departures
            .iter()
            .filter(|(address, departure)| condition(address, departure))
            .map(|(address, _)| *address)
            .collect();
        for address in ending {
            self.end_departure(address, true);
        }
        if self.addresses.departures.is_empty() {
            self.cx.timers.stop(Timer::Forwards);
        }
    }

    /// A domain runs here that an agent before this one saw leave: it has not.
    pub(in crate::proto) fn end_adopted_departures(&mut self, uuid: DomainUuid) {
        self.end_departures(|_, departure| departure.uuid == uuid && departure.number.is_none());
    }

    fn end_departure(&mut self, address: Ipv6Addr, give_back: bool) {
        let active = self
            .addresses
            .departures
            .get_mut(&address)
            .and_then(|departure| departure.until.take());
        if active.is_some() && give_back {
            self.give_back(address);
        } else {
            self.forward(ForwardCommand::Remove { address });
        }
        let Some(departure) = self.addresses.departures.remove(&address) else {
            return;
        };
        let to = departure.to;
        if !self.addresses.departures.values().any(|it| it.to == to) {
            self.forward(ForwardCommand::Release { to });
        }
        self.forget_address(address, false);
    }

    /// Sends packets for an address on no more, and tells neighbours who were told otherwise that
    /// its VM has it.
    fn give_back(&mut self, address: Ipv6Addr) {
        self.forward(ForwardCommand::Remove { address });
        let Some(departure) = self.addresses.departures.get_mut(&address) else {
            return;
        };
        if std::mem::take(&mut departure.answered)
            && let Some(owner) = departure.owner
        {
            self.address(AddressCommand::Advertise {
                address,
                owner: Some(owner),
                overrides: true,
                to: None,
            });
        }
    }

    /// Reads what was sent on, keeps next hops known, and ends what is over.
    pub(in crate::proto) fn look_at_forwards(&mut self) {
        let now = self.cx.now;
        self.forward(ForwardCommand::Read);
        let over: Vec<Ipv6Addr> = self
            .addresses
            .departures
            .iter()
            .filter(|(_, departure)| departure.until.is_some_and(|until| until <= now))
            .map(|(address, _)| *address)
            .collect();
        for address in over {
            info!(%address, "Packets are sent on no more: their time is over");
            self.end_departure(address, false);
        }
        let silent = self.addresses.departures.iter();
        let silent = silent.filter(|(_, it)| it.owner.is_none() && it.until.is_none());
        let silent: Vec<Ipv6Addr> = silent.map(|(address, _)| *address).collect();
        for address in silent {
            self.address(AddressCommand::Probe { address });
        }
        let mut next = None;
        let mut ways: Vec<Ipv6Addr> = Vec::new();
        for departure in self.addresses.departures.values() {
            ways.push(departure.to);
            let due = departure.until.unwrap_or(now + LOOK_INTERVAL);
            let due = due.min(now + LOOK_INTERVAL);
            next = Some(next.map_or(due, |next: Timestamp| next.min(due)));
        }
        ways.sort_unstable();
        ways.dedup();
        for to in ways {
            self.forward(ForwardCommand::Resolve { to });
        }
        if let Some(next) = next {
            self.cx.timers.set(Timer::Forwards, next);
        }
    }

    /// Takes over what an agent before this one has in the kernel.
    pub fn handle_forwards(&mut self, now: Timestamp, forwards: Vec<(ForwardKey, Forward)>) {
        self.begin(now);
        for (key, value) in forwards {
            let address = Ipv6Addr::from(key.address);
            let until = Timestamp(value.until_ns);
            if until <= self.cx.now || key.vlan != 0 {
                self.forward(ForwardCommand::Remove { address });
                continue;
            }
            let to = Ipv6Addr::from(value.destination);
            info!(%address, %to, "Packets are sent on, as an earlier agent has begun");
            self.addresses.departures.insert(
                address,
                Departure {
                    uuid: DomainUuid(value.domain_uuid),
                    number: None,
                    to,
                    ifindex: 0,
                    macs: Vec::new(),
                    owner: None,
                    lasting: until.since(self.cx.now),
                    until: Some(until),
                    answered: false,
                    answers: Allowance::default(),
                },
            );
            self.address(AddressCommand::Watch { address });
            self.address(AddressCommand::Replace { address });
            self.forward(ForwardCommand::Resolve { to });
            self.cx
                .timers
                .set_earlier(Timer::Forwards, until.min(self.cx.now + LOOK_INTERVAL));
        }
        self.end();
    }

    fn forward(&mut self, command: ForwardCommand) {
        self.cx.outputs.push_back(Output::Forward(command));
    }
}

#[cfg(test)]
#[path = "../tests/forward.rs"]
mod tests;
