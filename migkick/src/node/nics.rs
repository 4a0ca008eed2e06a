//! The node's NICs: which NICs may be active, and the neutral addresses that the node adds to them.

use std::net::Ipv6Addr;

use crate::interface::Interface;
use anyhow::Context;
use common::mat::neutral::is_neutral;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressFlags;

use super::config::{Config, contains};
use super::core::{NicState, Place};
use super::daemon::Daemon;
use super::links::Address;
use crate::identifier::{self, Scheme, Secret};
use crate::nic::address_message;

impl Daemon {
    /// Handles a change of NICs or addresses.
    pub(super) fn nics_changed(&mut self) -> anyhow::Result<()> {
        let all = self.links.interfaces().context("Cannot list the NICs")?;
        let interfaces = used(&self.config, all);
        for nic in &interfaces {
            if !self.interfaces.iter().any(|it| it.ifindex == nic.ifindex) {
                self.datapath.add_nic(nic)?;
            }
        }
        let gone = |it: &&Interface| !interfaces.iter().any(|nic| nic.ifindex == it.ifindex);
        for nic in self.interfaces.iter().filter(gone) {
            self.datapath.remove_nic(nic.ifindex)?;
        }
        self.interfaces = interfaces;
        let stays = |ifindex: &u32| self.interfaces.iter().any(|it| it.ifindex == *ifindex);
        let first = self.interfaces.first().map(|it| it.ifindex);
        self.multicast = self.multicast.filter(stays).or(first);
        let multicast = self.interfaces.iter();
        if let Some(nic) = multicast
            .clone()
            .find(|it| Some(it.ifindex) == self.multicast)
        {
            // The link-local address may have appeared only now.
            self.datapath.set_multicast_nic(nic)?;
        }
        let addresses = self
            .links
            .addresses()
            .context("Cannot list the addresses")?;
        self.take_neutral_addresses(&addresses);
        let nics = self.interfaces.iter().filter(|it| it.up).map(|nic| {
            let usable = addresses
                .iter()
                .filter(|it| it.ifindex == nic.ifindex && it.is_usable() && self.may_be_moa(it));
            NicState {
                ifindex: nic.ifindex,
                addresses: usable.map(|it| it.address).collect(),
            }
        });
        let nics = nics.collect();
        let now = self.now();
        self.core.handle_nics(now, nics);
        self.flush();
        Ok(())
    }

    fn may_be_moa(&self, address: &Address) -> bool {
        let left = |(ifindex, moa): &(u32, Ipv6Addr)| {
            *ifindex == address.ifindex && contains((*moa, address.length), address.address)
        };
        !contains(self.config.identity.home, address.address) && !self.abandoned.iter().any(left)
    }

    /// Adds a neutral address in each network where a NIC has an address. The kernel runs duplicate
    /// address detection.
    fn take_neutral_addresses(&mut self, addresses: &[Address]) {
        if !self.config.neutral {
            return;
        }
        let hoa = self.config.identity.hoa;
        let neutral = |it: &Address| is_neutral(it.address.octets(), hoa.octets());
        for address in addresses.iter().filter(|it| it.is_double() && neutral(it)) {
            self.taken.insert(address.address);
            let place = Place {
                ifindex: address.ifindex,
                moa: address.address,
            };
            if let Err(error) = self.remove_address(place) {
                self.say(&format!("{error:#}"));
            }
        }
        for nic in self.interfaces.clone() {
            let mut own = addresses.iter().filter(|it| it.ifindex == nic.ifindex);
            let given = own.clone().find(|it| {
                it.is_usable() && !neutral(it) && it.length <= 64 && self.may_be_moa(it)
            });
            let moving = self
                .moving
                .as_ref()
                .is_some_and(|it| it.ifindex() == nic.ifindex);
            if moving || own.any(|it| neutral(it) && !it.is_double()) {
                continue;
            }
            if let Some(given) = given
                && let Err(error) = self.add_neutral_address(&nic, given)
            {
                self.say(&format!("{error:#}"));
            }
        }
    }

    fn add_neutral_address(&mut self, nic: &Interface, given: &Address) -> anyhow::Result<()> {
        let host = u128::MAX.checked_shr(given.length.into()).unwrap_or(0);
        let prefix = Ipv6Addr::from_bits(given.address.to_bits() & !host);
        let scheme = match Secret::of_machine() {
            Ok(_) => Scheme::StablePrivacy,
            Err(_) => Scheme::Eui64,
        };
        let address = identifier::neutral_address(
            scheme,
            Secret::of_machine,
            (prefix, given.length),
            nic.mac,
            self.config.identity.hoa,
            |it| self.taken.contains(&it),
        )?;
        let prefix = (address, given.length);
        let message = address_message(nic.ifindex, prefix, AddressFlags::empty());
        let message = RouteNetlinkMessage::NewAddress(message);
        self.links
            .netlink()
            .change(message, NLM_F_CREATE | NLM_F_EXCL)
            .with_context(|| format!("Cannot add {address} to {}", nic.name))
    }

    /// Another node has an address at a mapping server: has the next one taken, as one takes the next
    /// DAD_Counter of RFC 7217 for an address that another has on the link. One that was given to the NIC
    /// stays.
    pub(super) fn replace(&mut self, place: Place) -> anyhow::Result<()> {
        self.taken.insert(place.moa);
        if let Some(moving) = &mut self.moving
            && moving.address() == place.moa
        {
            // Whoever moves the VM has it prepared anew.
            moving.is_taken = true;
            return Ok(());
        }
        let moa = place.moa;
        self.say(&format!(
            "A mapping server says that another node has {moa}; if that was taken by the node, it takes another"
        ));
        let is_own = is_neutral(moa.octets(), self.config.identity.hoa.octets());
        if !self.config.neutral || !is_own {
            return Ok(());
        }
        let addresses = self
            .links
            .addresses()
            .context("Cannot list the addresses")?;
        let nic = self.interfaces.iter();
        let nic = nic.clone().find(|it| it.ifindex == place.ifindex).cloned();
        let given = addresses.iter();
        let given = given
            .clone()
            .find(|it| it.ifindex == place.ifindex && it.address == moa);
        if let (Some(nic), Some(given)) = (nic, given) {
            // Where there is no other, as with EUI-64, the node keeps what it has.
            self.add_neutral_address(&nic, given)?;
            self.remove_address(place)?;
        }
        Ok(())
    }

    pub(super) fn remove_address(&mut self, place: Place) -> anyhow::Result<()> {
        let addresses = self
            .links
            .addresses()
            .context("Cannot list the addresses")?;
        let found = addresses
            .iter()
            .find(|it| it.ifindex == place.ifindex && it.address == place.moa);
        let Some(found) = found else {
            return Ok(());
        };
        let prefix = (place.moa, found.length);
        let message = address_message(place.ifindex, prefix, AddressFlags::empty());
        match self
            .links
            .netlink()
            .change(RouteNetlinkMessage::DelAddress(message), 0)
        {
            Err(error) if !error.is_one_of(&[libc::EADDRNOTAVAIL]) => {
                Err(error).with_context(|| format!("Cannot remove {}", place.moa))
            }
            _ => Ok(()),
        }
    }
}

/// Returns the NICs that the configuration allows.
pub(super) fn used(config: &Config, interfaces: Vec<Interface>) -> Vec<Interface> {
    let wanted =
        |it: &Interface| config.interfaces.is_empty() || config.interfaces.contains(&it.name);
    interfaces.into_iter().filter(wanted).collect()
}
