//! Unicast addresses of moving VMs on this link, and what neighbours say about them.
//!
//! A VM changes its address (MoA) when the VM moves. Meanwhile both ends of the migration act for the
//! VM:
//!
//! | end | address | from | until | module |
//! |---|---|---|---|---|
//! | destination | new address | the VM is ready | the VM sends by itself | `arrival::claim` |
//! | destination | old addresses | the VM's TAPs exist | the requested time ends | `addresses::translate` |
//! | source | new address, claimed at the destination | the VM is ready | the switch | `departure::address` |
//! | source | old addresses | the VM stops | the requested time ends | `addresses::forward` |
//!
//! Both ends first run duplicate address detection (RFC 4862 §5.4) for each address. The destination
//! host thereby disturbs no other node, and no VM can redirect another node's packets. An address that
//! a VM left stays in quarantine, so that packets in flight do not reach another VM.
//!
//! Nothing in this module delays a migration.

mod forward;
mod translate;

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv6Addr;
use std::time::Duration;

use super::context::Context;
use super::{DomainUuid, LinkAddress, Mac, Output, Timestamp};
use common::maps::BridgeNumber;

use forward::Departure;
pub(super) use forward::Going;
pub(super) use translate::Translating;

/// Limit of remembered addresses, for domains on this host and for quarantined addresses each.
const MAX_ADDRESSES: usize = 4096;
/// Limit of answers to Solicitations for one address per second. Neighbours ask again.
const ANSWERS_PER_SECOND: u32 = 50;

/// Returns the end of a kernel entry that an earlier agent left. The configured duration from now caps
/// the value, whatever the entry says.
fn adopted_until(cx: &Context, until_ns: u64) -> Timestamp {
    Timestamp(until_ns).min(cx.now + cx.config.unicast.forward)
}

/// Command for a unicast address of this link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressCommand {
    /// Report neighbour messages about the address as [`AddressEvent::Heard`], until
    /// [`AddressCommand::Forget`]. For an address of this host, [`AddressEvent::Own`] follows at once.
    Watch {
        /// Address of a moving VM.
        address: Ipv6Addr,
    },
    /// Send a Solicitation of duplicate address detection (RFC 4862 §5.4.2).
    Probe {
        /// Address to probe.
        address: Ipv6Addr,
    },
    /// Send an Advertisement with the owner of the address.
    Advertise {
        /// Target of the Advertisement.
        address: Ipv6Addr,
        /// MAC of the owner; `None` for this host's bridge, which takes the packets in place of the VM.
        owner: Option<Mac>,
        /// Override flag: neighbours replace their cached link-layer address (RFC 4861 §4.4).
        overrides: bool,
        /// Node that asked; `None` for all nodes.
        to: Option<(Ipv6Addr, Mac)>,
    },
    /// The TAP of the arriving VM exists. Direct the VM's frames to that TAP, and report the VM's first
    /// own frame as [`AddressEvent::Spoke`].
    Expect {
        /// Address of the arriving VM.
        address: Ipv6Addr,
        /// MAC of the VM's NIC.
        mac: Mac,
        /// Interface index of the TAP.
        ifindex: u32,
    },
    /// Report Solicitations that neighbours send to the VM's own MAC although the VM left.
    Replace {
        /// Address that the VM left.
        address: Ipv6Addr,
    },
    /// Undo all commands for the address. If the VM sent frames itself, the bridge keeps the learnt
    /// forwarding entry.
    Forget {
        /// Address to forget.
        address: Ipv6Addr,
        /// Whether the VM sent a frame from the address.
        spoken: bool,
    },
}

/// An address that its VM leaves, with the packets' new destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leave {
    /// Old address of the VM.
    pub address: LinkAddress,
    /// New destination of packets for the old address.
    pub to: Ipv6Addr,
    /// TAP of the VM's NIC; 0 if unknown.
    pub ifindex: u32,
    /// UUID of the domain.
    pub uuid: DomainUuid,
}

/// Command for packets to an address that its VM leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForwardCommand {
    /// Resolve the next hop to a new destination, and keep the result current.
    Resolve {
        /// New destination of the packets.
        to: Ipv6Addr,
    },
    /// Stop resolving a next hop.
    Release {
        /// Former destination of the packets.
        to: Ipv6Addr,
    },
    /// The VM is about to leave the address: keep copies of the frames that enter the TAP for the
    /// address ([`GateCommand::Record`](super::GateCommand::Record)).
    Expect(Leave),
    /// Forward the packets.
    Set {
        /// Old address and new destination.
        leave: Leave,
        /// End of forwarding.
        until: Timestamp,
        /// End of the time during which packets wait in the TAP until the agent has forwarded the
        /// unread packets.
        unread_until: Timestamp,
    },
    /// Stop forwarding; [`AddressEvent::Forwarded`] answers if packets were forwarded.
    Remove {
        /// Old address of the VM.
        address: LinkAddress,
    },
    /// Read the counters; one [`AddressEvent::Forwarded`] per address answers.
    Read,
}

/// Command for packets that a VM sends from an address that the VM left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TranslateCommand {
    /// Rewrite the packets' source to the new address.
    Set {
        /// TAP that the packets enter through.
        ifindex: u32,
        /// Old address of the VM, and the TAP's bridge.
        address: LinkAddress,
        /// New address of the VM.
        to: Ipv6Addr,
        /// End of translation.
        until: Timestamp,
        /// UUID of the domain.
        uuid: DomainUuid,
    },
    /// Stop translating; [`AddressEvent::Translated`] answers.
    Remove {
        /// TAP that the packets enter through.
        ifindex: u32,
        /// Old address of the VM, and the TAP's bridge.
        address: LinkAddress,
    },
    /// Read the counters; one [`AddressEvent::Translated`] per TAP and address answers.
    Read,
}

/// Content of a neighbour message about an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// An Advertisement: the sender has the address.
    Has,
    /// A Solicitation of duplicate address detection: the sender wants the address.
    Wants,
    /// A Solicitation from the given address: the sender resolves the address.
    Asks(Ipv6Addr),
}

/// Event for a unicast address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AddressEvent {
    /// A node on the link sent a neighbour message about a watched address.
    Heard {
        /// Target address of the message.
        address: Ipv6Addr,
        /// Content of the message.
        said: Said,
        /// Link-layer address of the sender.
        by: Mac,
    },
    /// A watched address is an address of this host.
    Own {
        /// Address from [`AddressCommand::Watch`].
        address: Ipv6Addr,
    },
    /// The VM sent a frame from the address through its TAP.
    Spoke {
        /// Address from [`AddressCommand::Expect`].
        address: Ipv6Addr,
    },
    /// Counters of forwarding so far.
    Forwarded {
        /// Old address of the VM.
        address: Ipv6Addr,
        /// Number of forwarded packets.
        packets: u64,
        /// Bytes of the forwarded packets.
        bytes: u64,
        /// Packets that could not be forwarded.
        dropped: u64,
    },
    /// Counters of translation so far.
    Translated {
        /// TAP that the packets entered through.
        ifindex: u32,
        /// Old address of the VM.
        address: Ipv6Addr,
        /// Number of translated packets.
        packets: u64,
        /// Bytes of the translated packets.
        bytes: u64,
        /// Packets that could not be translated.
        dropped: u64,
    },
}

/// Known addresses besides the claims of arrivals.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    /// Addresses of the VMs on this host, and the duration of each address's quarantine.
    owned: BTreeMap<LinkAddress, (DomainUuid, Duration)>,
    /// Quarantined addresses: former owner and end of the quarantine.
    quarantine: BTreeMap<LinkAddress, (DomainUuid, Timestamp)>,
    /// Old addresses of departing and departed VMs.
    departures: BTreeMap<LinkAddress, Departure>,
    /// Old addresses that arrived VMs still send from, by TAP.
    translations: BTreeMap<(u32, LinkAddress), Translating>,
    /// Addresses whose forwarding ended, until the agent polls them.
    freed: VecDeque<LinkAddress>,
}

/// Who else holds an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// Another VM: on this host, arriving or departing.
    Vm(DomainUuid),
    /// A VM that left; the address is in quarantine.
    Left {
        /// Time until the quarantine ends.
        wait: Duration,
    },
}

/// Rate limit of answers for one address.
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
    /// Returns another domain that has, leaves or lately left an address.
    pub(super) fn holder(
        &mut self,
        address: LinkAddress,
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

    /// Returns true if a VM leaves the address.
    pub(super) fn is_left(&self, address: LinkAddress) -> bool {
        self.departures.contains_key(&address)
    }

    /// Returns the addresses that a VM leaves by that migration.
    pub(super) fn left_by(&self, number: u64) -> impl Iterator<Item = Ipv6Addr> {
        let departures = self.departures.iter();
        let of_it = departures.filter(move |(_, departure)| departure.is_of(number));
        of_it.map(|(on, _)| on.address)
    }

    /// Returns the next address whose forwarding ended.
    pub(super) fn poll_freed(&mut self) -> Option<LinkAddress> {
        self.freed.pop_front()
    }

    /// Quarantines the addresses of a domain that left this host.
    pub(super) fn domain_gone(&mut self, cx: &mut Context, uuid: DomainUuid) {
        self.end_translations(cx, |_, translating| translating.uuid == uuid);
        let left = self.owned.extract_if(.., |_, (of, _)| *of == uuid);
        for (address, (_, quarantine)) in left.collect::<Vec<_>>() {
            self.keep(address, uuid, cx.now + quarantine);
        }
    }

    /// Ends the translations at a TAP that was deleted.
    pub(super) fn port_gone(&mut self, cx: &mut Context, ifindex: u32) {
        self.end_translations(cx, |(by, _), _| *by == ifindex);
    }

    /// Records that a VM has an address.
    pub(super) fn own(&mut self, address: LinkAddress, uuid: DomainUuid, quarantine: Duration) {
        if self.owned.len() < MAX_ADDRESSES {
            self.owned.insert(address, (uuid, quarantine));
        }
    }

    /// Quarantines an address.
    pub(super) fn keep(&mut self, address: LinkAddress, uuid: DomainUuid, until: Timestamp) {
        if self.quarantine.len() < MAX_ADDRESSES {
            self.quarantine.insert(address, (uuid, until));
        }
    }
}

impl Context {
    pub(super) fn address(&mut self, bridge: BridgeNumber, command: AddressCommand) {
        self.outputs.push_back(Output::Address(bridge, command));
    }

    fn forward(&mut self, command: ForwardCommand) {
        self.outputs.push_back(Output::Forward(command));
    }

    fn translate(&mut self, command: TranslateCommand) {
        self.outputs.push_back(Output::Translate(command));
    }
}

/// Returns true if an address is a host's unicast address in the prefix given by `prefix` and `length`.
pub(super) fn is_in(address: Ipv6Addr, prefix: Ipv6Addr, length: u8) -> bool {
    let host_bits = 128_u32.saturating_sub(u32::from(length));
    let mask = u128::MAX.checked_shl(host_bits).unwrap_or(0);
    let is_multicast = address.is_multicast();
    let (address, prefix) = (u128::from(address), u128::from(prefix));
    // All zeros after the prefix is the Subnet-Router anycast address (RFC 4291 §2.6.1).
    let is_anycast = host_bits > 1 && address & !mask == 0;
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
