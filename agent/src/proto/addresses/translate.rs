//! Translates packets that an arrived VM still sends from its old unicast addresses.
//!
//! ```text
//!  AddressClaim           its TAPs are there            the time asked for is over
//!  ------------> (noted) -------------------> Translating -------------------------> (gone)
//!                                                 | the VM, or its claim, is gone
//!                                                 +---------------------------------> (gone)
//! ```
//!
//! After the resume, the VM sends through its other NIC until its node has switched to the NIC of this
//! link. Those frames carry the old source address and the MAC of the old link's router, which nobody
//! accepts on this link. So the agent has the kernel rewrite the frames at every TAP of the VM except
//! the TAP of the new address. The rewritten packets carry the new source address, which correspondents
//! already know.
//!
//! The time counts from the switch. Old addresses of this very link need no translation.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{Translation, TranslationKey};
use tracing::info;

use crate::proto::context::Context;
use crate::proto::record::TranslationRecord;
use crate::proto::timer::Timer;
use crate::proto::{DomainUuid, LinkAddress, Timestamp};

use super::{Addresses, TranslateCommand, adopted_until};

/// Interval of reading the counters.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// An old address that its VM still sends from through a TAP.
#[derive(Clone, Copy, Debug)]
pub(in crate::proto) struct Translating {
    pub(in crate::proto) uuid: DomainUuid,
    /// Number of the migration's record; `None` if an earlier agent began the translation.
    pub(in crate::proto) number: Option<u64>,
    pub(in crate::proto) to: Ipv6Addr,
    pub(in crate::proto) until: Timestamp,
}

impl Translating {
    /// Returns true if the translation belongs to the migration with that record.
    pub(in crate::proto) fn is_of(&self, number: u64) -> bool {
        self.number == Some(number)
    }
}

impl Addresses {
    /// Starts the translation of arriving VMs' old addresses, at each existing TAP. The `bool` of each
    /// entry tells whether the end is final.
    pub(in crate::proto) fn translate_left(
        &mut self,
        cx: &mut Context,
        wanted: Vec<((u32, LinkAddress), Translating, bool)>,
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
        place: (u32, LinkAddress),
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
                    address: address.address,
                    packets: 0,
                    bytes: 0,
                    dropped: 0,
                });
            });
        }
    }

    /// Removes the matching translations, also in the kernel.
    pub(in crate::proto) fn end_translations(
        &mut self,
        cx: &mut Context,
        condition: impl Fn(&(u32, LinkAddress), &Translating) -> bool,
    ) {
        let ending: Vec<(u32, LinkAddress)> = self
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

    /// Reads the counters, and ends what has expired.
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

    /// Adopts the kernel's entries of an earlier agent.
    pub(in crate::proto) fn adopt_translations(
        &mut self,
        cx: &mut Context,
        translations: Vec<(TranslationKey, Translation)>,
    ) {
        for (key, value) in translations {
            let (ifindex, bridge) = (key.ifindex, key.bridge);
            let address = LinkAddress {
                bridge,
                address: key.address.into(),
            };
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
mod tests;
