//! Old addresses of an arriving VM, from which the VM still sends: which, and until when.
//! [`crate::proto::addresses`] translates them.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::AddressClaim;

use super::address::Claim;
use super::{Arrivals, Host};
use crate::proto::addresses::Translating;
use crate::proto::context::Context;
use crate::proto::{AgentConfig, LinkAddress};

/// Old addresses from which the VM may still send, and the time after the switch for which it may.
#[derive(Debug, Default)]
pub(super) struct Left {
    addresses: Vec<Ipv6Addr>,
    lasting: Duration,
}

impl Left {
    /// Filters the source's list: drops multicast and link-local addresses and addresses of this
    /// link.
    fn new(config: &AgentConfig, said: &AddressClaim) -> Self {
        let named = said.translate.iter().map(|it| Ipv6Addr::from(**it));
        let is_other_link = |it: &Ipv6Addr| {
            !it.is_multicast() && !it.is_unicast_link_local() && !config.is_on_link(*it)
        };
        let asked = Duration::from_secs(u64::from(said.translate_s));
        Self {
            addresses: named.filter(is_other_link).collect(),
            lasting: asked.min(config.unicast.forward),
        }
    }
}

impl Claim {
    /// Replaces the VM's old addresses by those in the source's claim.
    pub(super) fn take_left(
        &mut self,
        cx: &mut Context,
        host: &mut Host<'_>,
        number: u64,
        said: &AddressClaim,
    ) {
        self.left = Left::new(&cx.config, said);
        let left = &self.left.addresses;
        host.addresses.end_translations(cx, |(_, on), it| {
            it.is_of(number) && !left.contains(&on.address)
        });
    }
}

impl Arrivals {
    /// Translates what arriving VMs send from old addresses, at each of their TAPs, for the
    /// requested time after the switch.
    pub(super) fn translate_left(&self, cx: &mut Context, host: &mut Host<'_>) {
        let mut wanted = Vec::new();
        for incoming in self.incoming.iter() {
            let Some(claim) = &incoming.claim else {
                continue;
            };
            let switched = incoming.stage.arrived().or(incoming.told.switching);
            let translating = Translating {
                uuid: incoming.uuid,
                number: Some(incoming.number),
                to: claim.address.address,
                until: switched.unwrap_or(cx.now) + claim.left.lasting,
            };
            let ports = self.taps.of(host.inventory, incoming);
            for (ifindex, _) in ports.into_iter().filter(|(_, mac)| *mac != claim.mac) {
                let Some(bridge) = host.inventory.bridge_of(ifindex) else {
                    continue;
                };
                let places = claim.left.addresses.iter();
                let places = places.map(|&address| (ifindex, LinkAddress { bridge, address }));
                wanted.extend(places.map(|place| (place, translating, switched.is_some())));
            }
        }
        host.addresses.translate_left(cx, wanted);
    }
}
