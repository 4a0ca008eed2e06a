//! The addresses that a VM which has come here has left, and still sends from: which, and until when.
//! What is done about them is in [`crate::proto::addresses`].

use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::AddressClaim;

use crate::proto::Agent;
use crate::proto::addresses::Translating;

impl Agent {
    /// Takes in from which addresses an arriving VM may still send, as the source says.
    pub(super) fn take_left(&mut self, number: u64, said: &AddressClaim) {
        let left: Vec<Ipv6Addr> = said
            .translate
            .iter()
            .map(|it| Ipv6Addr::from(**it))
            .filter(|it| {
                !it.is_multicast() && !it.is_unicast_link_local() && !self.cx.config.is_on_link(*it)
            })
            .collect();
        let asked = Duration::from_secs(u64::from(said.translate_s));
        let translate = asked.min(self.cx.config.unicast.forward);
        let claim = self
            .incoming
            .get_mut(&number)
            .and_then(|it| it.claim.as_mut());
        let Some(claim) = claim else {
            return;
        };
        claim.translate = translate;
        claim.left.clone_from(&left);
        self.addresses
            .end_translations(&mut self.cx, |(_, address), it| {
                it.is_of(number) && !left.contains(address)
            });
        self.translate_left();
    }

    /// Has what arriving VMs send from addresses that they have left translated, at each TAP that is
    /// there; for as long as was asked for from the switch on, once that is known.
    pub(super) fn translate_left(&mut self) {
        let now = self.cx.now;
        let mut wanted = Vec::new();
        for (number, incoming) in &self.incoming {
            let Some(claim) = &incoming.claim else {
                continue;
            };
            let switched = incoming.arrived.or(incoming.switching);
            let until = switched.unwrap_or(now) + claim.translate;
            let ports = self
                .inventory
                .ports_of_arrival(&incoming.uuid, &incoming.macs);
            for (ifindex, _) in ports.into_iter().filter(|(_, mac)| *mac != claim.mac) {
                let translating = Translating {
                    uuid: incoming.uuid,
                    number: Some(*number),
                    to: claim.address,
                    until,
                };
                let places = claim.left.iter().map(|address| (ifindex, *address));
                wanted.extend(places.map(|place| (place, translating, switched.is_some())));
            }
        }
        self.addresses.translate_left(&mut self.cx, wanted);
    }
}
