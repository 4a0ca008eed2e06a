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
use tracing::info;

use crate::proto::context::Context;
use crate::proto::record::TranslationRecord;
use crate::proto::timer::Timer;
use crate::proto::{DomainUuid, Timestamp};

use super::{Addresses, TranslateCommand, adopted_until};

/// How often what was translated is read.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// An address whose VM still sends from it by a TAP.
#[derive(Clone, Copy, Debug)]
pub(in crate::proto) struct Translating {
    pub(in crate::proto) uuid: DomainUuid,
    /// The migration's record; `None` where an agent before this one has begun.
    pub(in crate::proto) number: Option<u64>,
    pub(in crate::proto) to: Ipv6Addr,
    pub(in crate::proto) until: Timestamp,
}

impl Translating {
    /// Whether it is of the migration with that record.
    pub(in crate::proto) fn is_of(&self, number: u64) -> bool {
        self.number == Some(number)
    }
}

impl Addresses {
    /// Has what arriving VMs send from addresses that they have left translated, at each TAP that is
    /// there. Whether its end is known for good goes with each.
    pub(in crate::proto) fn translate_left(
        &mut self,
        cx: &mut Context,
        wanted: Vec<((u32, Ipv6Addr), Translating, bool)>,
    ) {
        let now = cx.now;
        for (place, translating, is_final) in wanted {
            let known = self.translations.get(&place);
            let is_known = known.is_some_and(|known| {
                known.number == translating.number
                    && known.to == translating.to
                    && (!is_final || known.until >= translating.until)
            });
            if !is_known && translating.until > now {
                self.translate_from(cx, place, translating);
            }
        }
    }

    fn translate_from(
        &mut self,
        cx: &mut Context,
        place: (u32, Ipv6Addr),
        translating: Translating,
    ) {
        let (ifindex, address) = place;
        let Translating {
            uuid, to, until, ..
        } = translating;
        let known = self.translations.insert(place, translating);
        cx.translate(TranslateCommand::Set {
            ifindex,
            address,
            to,
            until,
            uuid,
        });
        let due = until.min(cx.now + LOOK_INTERVAL);
        cx.timers.set_earlier(Timer::Translations, due);
        let Some(number) = translating.number else {
            return;
        };
        if known.is_none_or(|known| !known.is_of(number)) {
            info!(number, %address, %to, ifindex, "Packets from an address that was left are translated");
            cx.records.update(number, |record| {
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
        cx: &mut Context,
        condition: impl Fn(&(u32, Ipv6Addr), &Translating) -> bool,
    ) {
        let ending: Vec<(u32, Ipv6Addr)> = self
            .translations
            .extract_if(.., |place, translating| condition(place, translating))
            .map(|(place, _)| place)
            .collect();
        for (ifindex, address) in ending {
            cx.translate(TranslateCommand::Remove { ifindex, address });
        }
        if self.translations.is_empty() {
            cx.timers.stop(Timer::Translations);
        }
    }

    /// Reads what was translated, and ends what is over.
    pub(in crate::proto) fn look_at_translations(&mut self, cx: &mut Context) {
        let now = cx.now;
        cx.translate(TranslateCommand::Read);
        self.end_translations(cx, |_, translating| translating.until <= now);
        let ends = self.translations.values().map(|it| it.until);
        if let Some(next) = ends.min() {
            let due = next.min(now + LOOK_INTERVAL);
            cx.timers.set(Timer::Translations, due);
        }
    }

    /// Takes over what an agent before this one has in the kernel.
    pub(in crate::proto) fn adopt_translations(
        &mut self,
        cx: &mut Context,
        translations: Vec<(TranslationKey, Translation)>,
    ) {
        for (key, value) in translations {
            let (ifindex, address) = (key.ifindex, Ipv6Addr::from(key.address));
            let until = adopted_until(cx, value.until_ns);
            if until <= cx.now || key.vlan != 0 {
                cx.translate(TranslateCommand::Remove { ifindex, address });
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
            self.translations.insert((ifindex, address), translating);
            let due = until.min(cx.now + LOOK_INTERVAL);
            cx.timers.set_earlier(Timer::Translations, due);
        }
    }
}

#[cfg(test)]
#[path = "../tests/translate.rs"]
mod tests;
