//! The unicast addresses that a VM which has come here has left, and still sends from.
//!
//! ```text
//!  AddressClaim           its TAPs are there            the time asked for is over
//!  ------------> (noted) -------------------> Translating -------------------------> (gone)
//!                                                 | the VM, or its claim, is gone
//!                                                 +---------------------------------> (gone)
//! ```
//!
//! From its resume until its node has switched to the NIC of this link the VM sends by the other one,
//! from the old address and to the router of the old link. Here nobody takes such frames. So by TAPs
//! of that VM, but for the one that is to have the new address, they are sent on as what they will be
//! in a moment: packets from the new address, which correspondents know already.
//!
//! The time counts from the switch. Old addresses of this very link need nothing.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{Translation, TranslationKey};
use common::signal::AddressClaim;
use tracing::info;

use crate::proto::record::TranslationRecord;
use crate::proto::timer::Timer;
use crate::proto::{Agent, DomainUuid, Output, Timestamp, TranslateCommand};

/// How often what was translated is read.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// An address whose VM still sends from it by a TAP.
#[derive(Clone, Copy, Debug)]
pub(in crate::proto) struct Translating {
    pub(in crate::proto) uuid: DomainUuid,
    /// The migration's record; `None` where an agent before this one has begun.
    number: Option<u64>,
    to: Ipv6Addr,
    until: Timestamp,
}

impl Translating {
    /// Whether it is of the migration with that record.
    pub(super) fn is_of(&self, number: u64) -> bool {
        self.number == Some(number)
    }
}

impl Agent {
    /// Takes in from which addresses an arriving VM may still send, as the source says.
    pub(super) fn take_left(&mut self, number: u64, said: &AddressClaim) {
        let left: Vec<Ipv6Addr> = said
            .translate
            .iter()
            .map(|it| Ipv6Addr::from(**it))
            .filter(|it| !it.is_multicast() && !it.is_unicast_link_local() && !self.is_on_link(*it))
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
        self.end_translations(|(_, address), it| it.is_of(number) && !left.contains(address));
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
        for (place, translating, is_final) in wanted {
            let known = self.addresses.translations.get(&place);
            let is_known = known.is_some_and(|known| {
                known.number == translating.number
                    && known.to == translating.to
                    && (!is_final || known.until >= translating.until)
            });
            if !is_known && translating.until > now {
                self.translate_from(place, translating);
            }
        }
    }

    fn translate_from(&mut self, place: (u32, Ipv6Addr), translating: Translating) {
        let (ifindex, address) = place;
        let Translating {
            uuid, to, until, ..
        } = translating;
        let known = self.addresses.translations.insert(place, translating);
        self.translate(TranslateCommand::Set {
            ifindex,
            address,
            to,
            until,
            uuid,
        });
        let due = until.min(self.cx.now + LOOK_INTERVAL);
        self.cx.timers.set_earlier(Timer::Translations, due);
        let Some(number) = translating.number else {
            return;
        };
        if known.is_none_or(|known| !known.is_of(number)) {
            info!(number, %address, %to, ifindex, "Packets from an address that was left are translated");
            self.cx.records.update(number, |record| {
                record.translated(TranslationRecord {
                    ifindex,
                    address,
                    packets: 0,
                    bytes: 0,
                    dropped: 0,
                });
            });
        }
    }

    /// Ends what is translated, also in the kernel.
    pub(in crate::proto) fn end_translations(
        &mut self,
        condition: impl Fn(&(u32, Ipv6Addr), &Translating) -> bool,
    ) {
        let ending: Vec<(u32, Ipv6Addr)> = self
            .addresses
            .translations
            .extract_if(.., |place, translating| condition(place, translating))
            .map(|(place, _)| place)
            .collect();
        for (ifindex, address) in ending {
            self.translate(TranslateCommand::Remove { ifindex, address });
        }
        if self.addresses.translations.is_empty() {
            self.cx.timers.stop(Timer::Translations);
        }
    }

    /// Reads what was translated, and ends what is over.
    pub(in crate::proto) fn look_at_translations(&mut self) {
        let now = self.cx.now;
        self.translate(TranslateCommand::Read);
        self.end_translations(|_, translating| translating.until <= now);
        let ends = self.addresses.translations.values().map(|it| it.until);
        if let Some(next) = ends.min() {
            let due = next.min(now + LOOK_INTERVAL);
            self.cx.timers.set(Timer::Translations, due);
        }
    }

    /// Takes over what an agent before this one has in the kernel.
    pub fn handle_translations(
        &mut self,
        now: Timestamp,
        translations: Vec<(TranslationKey, Translation)>,
    ) {
        self.begin(now);
        for (key, value) in translations {
            let (ifindex, address) = (key.ifindex, Ipv6Addr::from(key.address));
            let until = Timestamp(value.until_ns);
            if until <= self.cx.now || key.vlan != 0 {
                self.translate(TranslateCommand::Remove { ifindex, address });
                continue;
            }
            let to = Ipv6Addr::from(value.source);
            info!(%address, %to, ifindex, "Packets from an address that was left are translated, as an earlier agent has begun");
            let translating = Translating {
                uuid: DomainUuid(value.domain_uuid),
                number: None,
                to,
                until,
            };
            self.addresses
                .translations
                .insert((ifindex, address), translating);
            let due = until.min(self.cx.now + LOOK_INTERVAL);
            self.cx.timers.set_earlier(Timer::Translations, due);
        }
        self.end();
    }

    fn translate(&mut self, command: TranslateCommand) {
        self.cx.outputs.push_back(Output::Translate(command));
    }
}

#[cfg(test)]
#[path = "../tests/translate.rs"]
mod tests;
