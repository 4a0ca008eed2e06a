//! Unicast addresses of moving VMs on this link: who says what about them.
//!
//! A VM changes its address (MoA) when it moves. Both ends of the move speak for it meanwhile:
//!
//! | end | address | from | until | module |
//! |---|---|---|---|---|
//! | destination | the new one | the VM is ready | it speaks for itself | `arrival::claim` |
//! | destination | the old ones | its TAPs are there | the time asked for is over | `addresses::translate` |
//! | source | the new one, claimed at the destination | the VM is ready | the switch | `departure::address` |
//! | source | the old ones | the VM stands still | the time asked for is over | `addresses::forward` |
//!
//! Both ask the link first whether the address is somebody else's, by duplicate address detection
//! (RFC 4862 §5.4): the destination so that nobody is disturbed, the source so that nobody has
//! another's packets sent to itself. Until an address that was left may be had by another VM some
//! time passes, so that packets on their way reach nobody by mistake.
//!
//! Nothing here delays a move.

mod forward;
mod translate;

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv6Addr;
use std::time::Duration;

use super::context::Context;
use super::{DomainUuid, Mac, Output, Timestamp};

use forward::Departure;
pub(super) use forward::Going;
pub(super) use translate::Translating;

/// Addresses remembered of domains that are here, and of those that have left.
const MAX_ADDRESSES: usize = 4096;
/// Answers to Solicitations for one address in one second; neighbours ask again.
const ANSWERS_PER_SECOND: u32 = 50;

/// Until when something lasts that an agent before this one has left in the kernel. Nothing lasts
/// longer than what is begun now, whatever its entry says.
fn adopted_until(cx: &Context, until_ns: u64) -> Timestamp {
    Timestamp(until_ns).min(cx.now + cx.config.unicast.forward)
}

/// What is to be done about a unicast address of this link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressCommand {
    /// Listen to what is said about it, until [`AddressCommand::Forget`]: [`AddressEvent::Heard`].
    /// An address of this host is told at once: [`AddressEvent::Own`].
    Watch {
        /// The address.
        address: Ipv6Addr,
    },
    /// Ask whether somebody has it.
    Probe {
        /// The address.
        address: Ipv6Addr,
    },
    /// Say whose it is.
    Advertise {
        /// The address.
        address: Ipv6Addr,
        /// MAC of the owner; `None` for this host's bridge, which takes the packets in its place.
        owner: Option<Mac>,
        /// Whether neighbours are to forget what they knew before.
        overrides: bool,
        /// Who has asked; `None` for everybody.
        to: Option<(Ipv6Addr, Mac)>,
    },
    /// The TAP of its VM is there: keep frames for the VM in it, and listen for the VM's own:
    /// [`AddressEvent::Spoke`].
    Expect {
        /// The address.
        address: Ipv6Addr,
        /// MAC of the VM's NIC.
        mac: Mac,
        /// The TAP.
        ifindex: u32,
    },
    /// Listen to those who ask the VM itself, which has left.
    Replace {
        /// The address.
        address: Ipv6Addr,
    },
    /// Undo all of the above. Of a VM that has spoken the bridge keeps what it has learnt.
    Forget {
        /// The address.
        address: Ipv6Addr,
        /// Whether its VM has spoken.
        spoken: bool,
    },
}

/// An address that its VM leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leave {
    /// The address.
    pub address: Ipv6Addr,
    /// Where packets for it go then.
    pub to: Ipv6Addr,
    /// The TAP of the VM's NIC, 0 where it is not known.
    pub ifindex: u32,
    /// The domain.
    pub uuid: DomainUuid,
}

/// What is to be done about packets for an address that its VM leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForwardCommand {
    /// Find out, and keep, the link address on the way to where they will go.
    Resolve {
        /// Where they will go.
        to: Ipv6Addr,
    },
    /// No longer.
    Release {
        /// Where they went.
        to: Ipv6Addr,
    },
    /// The address is about to be left: have copies kept of what enters the TAP for it
    /// ([`GateCommand::Record`](super::GateCommand::Record)).
    Expect(Leave),
    /// Send them on.
    Set {
        /// Which, and where they go.
        leave: Leave,
        /// Until when.
        until: Timestamp,
        /// Until when they wait in the TAP while others do that came before.
        unread_until: Timestamp,
    },
    /// Send them on no more; answered by [`AddressEvent::Forwarded`] if they were.
    Remove {
        /// The address.
        address: Ipv6Addr,
    },
    /// Tell how many were sent on; answered by [`AddressEvent::Forwarded`] for each address.
    Read,
}

/// What is to be done about packets that a VM sends from an address that it has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TranslateCommand {
    /// Send them from its new one.
    Set {
        /// The TAP that they come in by.
        ifindex: u32,
        /// The address that was left.
        address: Ipv6Addr,
        /// The new one.
        to: Ipv6Addr,
        /// Until when.
        until: Timestamp,
        /// The domain.
        uuid: DomainUuid,
    },
    /// No longer; answered by [`AddressEvent::Translated`].
    Remove {
        /// The TAP.
        ifindex: u32,
        /// The address that was left.
        address: Ipv6Addr,
    },
    /// Tell how many there were; answered by [`AddressEvent::Translated`] for each.
    Read,
}

/// What somebody has said about an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// He has it.
    Has,
    /// He wants it, if nobody has it.
    Wants,
    /// He asks for it, from that address.
    Asks(Ipv6Addr),
}

/// What has happened about an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressEvent {
    /// Somebody on the link has said something.
    Heard {
        /// The address.
        address: Ipv6Addr,
        /// What.
        said: Said,
        /// Link address of who has, wants or asks for it.
        by: Mac,
    },
    /// It is this host's own.
    Own {
        /// The address.
        address: Ipv6Addr,
    },
    /// The VM has sent a frame from it, by its TAP.
    Spoke {
        /// The address.
        address: Ipv6Addr,
    },
    /// What was sent on so far.
    Forwarded {
        /// The address.
        address: Ipv6Addr,
        /// Packets.
        packets: u64,
        /// Their bytes.
        bytes: u64,
        /// Packets that could not be.
        dropped: u64,
    },
    /// What was translated so far.
    Translated {
        /// The TAP.
        ifindex: u32,
        /// The address.
        address: Ipv6Addr,
        /// Packets.
        packets: u64,
        /// Their bytes.
        bytes: u64,
        /// Packets that could not be.
        dropped: u64,
    },
}

/// What is known of addresses besides the arrivals' own claims.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    /// Addresses that VMs of this host have, and how long nobody else gets them once they are left.
    owned: BTreeMap<Ipv6Addr, (DomainUuid, Duration)>,
    /// Addresses that were left, by whom, and until when nobody else gets them.
    quarantine: BTreeMap<Ipv6Addr, (DomainUuid, Timestamp)>,
    /// Addresses that VMs leave or have left, whose packets are sent on.
    departures: BTreeMap<Ipv6Addr, Departure>,
    /// Addresses that VMs which have come still send from, by TAP.
    translations: BTreeMap<(u32, Ipv6Addr), Translating>,
    /// Addresses that are not sent on for any more, until the agent hears of it.
    freed: VecDeque<Ipv6Addr>,
}

/// Who else has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// A VM of this host, or one that comes.
    Vm(DomainUuid),
    /// Nobody, but one had it until just now.
    Left {
        /// For so long still.
        wait: Duration,
    },
}

/// How often an address may be answered for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Allowance {
    since: Timestamp,
    given: u32,
}

impl Allowance {
    pub(super) fn allows(&mut self, now: Timestamp) -> bool {
        if now.since(self.since) >= Duration::from_secs(1) {
            *self = Self {
                since: now,
                given: 0,
            };
        }
        self.given += 1;
        self.given <= ANSWERS_PER_SECOND
    }
}

impl Addresses {
    /// Which other domain has or leaves an address, or has left it just now.
    pub(super) fn holder(
        &mut self,
        address: Ipv6Addr,
        uuid: DomainUuid,
        now: Timestamp,
    ) -> Option<Holder> {
        self.quarantine.retain(|_, (_, until)| *until > now);
        let departing = self.departures.get(&address).map(|it| it.uuid);
        let owned = self.owned.get(&address).map(|(of, _)| *of);
        let other = [departing, owned].into_iter().flatten();
        if let Some(other) = other.into_iter().find(|other| *other != uuid) {
            return Some(Holder::Vm(other));
        }
        let left = self.quarantine.get(&address).filter(|(of, _)| *of != uuid);
        left.map(|(_, until)| Holder::Left {
            wait: until.since(now),
        })
    }

    /// Whether a VM leaves an address.
    pub(super) fn is_left(&self, address: Ipv6Addr) -> bool {
        self.departures.contains_key(&address)
    }

    /// The addresses that a VM leaves by that migration.
    pub(super) fn left_by(&self, number: u64) -> impl Iterator<Item = Ipv6Addr> {
        let departures = self.departures.iter();
        let of_it = departures.filter(move |(_, departure)| departure.is_of(number));
        of_it.map(|(address, _)| *address)
    }

    /// Returns the next address that is not sent on for any more.
    pub(super) fn poll_freed(&mut self) -> Option<Ipv6Addr> {
        self.freed.pop_front()
    }

    /// A domain is gone: its addresses are nobody's for a while.
    pub(super) fn domain_gone(&mut self, cx: &mut Context, uuid: DomainUuid) {
        self.end_translations(cx, |_, translating| translating.uuid == uuid);
        let left = self.owned.extract_if(.., |_, (of, _)| *of == uuid);
        for (address, (_, quarantine)) in left.collect::<Vec<_>>() {
            self.keep(address, uuid, cx.now + quarantine);
        }
    }

    /// A TAP is gone: nothing is translated there any more.
    pub(super) fn port_gone(&mut self, cx: &mut Context, ifindex: u32) {
        self.end_translations(cx, |(by, _), _| *by == ifindex);
    }

    /// Notes that a VM has an address.
    pub(super) fn own(&mut self, address: Ipv6Addr, uuid: DomainUuid, quarantine: Duration) {
        if self.owned.len() < MAX_ADDRESSES {
            self.owned.insert(address, (uuid, quarantine));
        }
    }

    /// Keeps an address from others for a while.
    pub(super) fn keep(&mut self, address: Ipv6Addr, uuid: DomainUuid, until: Timestamp) {
        if self.quarantine.len() < MAX_ADDRESSES {
            self.quarantine.insert(address, (uuid, until));
        }
    }
}

impl Context {
    pub(super) fn address(&mut self, command: AddressCommand) {
        self.outputs.push_back(Output::Address(command));
    }

    fn forward(&mut self, command: ForwardCommand) {
        self.outputs.push_back(Output::Forward(command));
    }

    fn translate(&mut self, command: TranslateCommand) {
        self.outputs.push_back(Output::Translate(command));
    }
}

/// Whether an address is a host's in a prefix, which another address and a length give.
pub(super) fn is_in(address: Ipv6Addr, prefix: Ipv6Addr, length: u8) -> bool {
    let host_bits = 128_u32.saturating_sub(u32::from(length));
    let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
    let (address, prefix) = (u128::from(address), u128::from(prefix));
    // All zeros behind the prefix is the routers' anycast address (RFC 4291 §2.6.1).
    let is_anycast = host_bits > 1 && address & !mask == 0;
    let is_multicast = address >> 120 == 0xff;
    address & mask == prefix & mask && !is_anycast && !is_multicast
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hosts_addresses_of_the_prefix_are_on_link() {
        let agent: Ipv6Addr = "2001:db8:1::10".parse().unwrap();
        for (address, expected) in [
            ("2001:db8:1::77", true),
            ("2001:db8:1:0:ffff::1", true),
            ("2001:db8:1::", false),
            ("2001:db8:2::77", false),
            ("fe80::1", false),
            ("ff02::1", false),
        ] {
            assert_eq!(
                is_in(address.parse().unwrap(), agent, 64),
                expected,
                "{address}"
            );
        }
        assert!(is_in(agent, agent, 128));
        assert!(!is_in("ff02::1".parse().unwrap(), Ipv6Addr::UNSPECIFIED, 0));
    }

    #[test]
    fn allowance_is_renewed_each_second() {
        let mut allowance = Allowance::default();
        let now = Timestamp(5_000_000_000);
        let given = (0..200).filter(|_| allowance.allows(now)).count();
        assert_eq!(given, ANSWERS_PER_SECOND as usize);
        assert!(allowance.allows(now + Duration::from_secs(1)));
    }
}
