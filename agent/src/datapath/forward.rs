//! Addresses that VMs have left: where packets for them are sent, and what those from them become.

use std::fs;

use aya::maps::{Array, MapData};
use common::maps::{Forward, ForwardKey, Translation, TranslationKey};

use super::attach::LOOPBACK_FORWARDING;
use super::table::Table;
use super::{Datapath, DatapathError, lock, map_error};

/// All three maps. Written by this process only, but for the counts.
pub(super) struct Forwards {
    forwards: Table<ForwardKey, Forward>,
    translations: Table<TranslationKey, Translation>,
    forwarding: Array<MapData, u32>,
}

impl Forwards {
    /// Takes the maps over.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub(super) fn adopt(
        forwards: Table<ForwardKey, Forward>,
        translations: Table<TranslationKey, Translation>,
        forwarding: Array<MapData, u32>,
    ) -> Result<Self, DatapathError> {
        let mut adopted = Self {
            forwards,
            translations,
            forwarding,
        };
        adopted.count()?;
        Ok(adopted)
    }

    /// Counts the entries anew.
    fn count(&mut self) -> Result<(), DatapathError> {
        let entries = self.forwards.entries()?.len() + self.translations.entries()?.len();
        let entries = u32::try_from(entries).unwrap_or(u32::MAX);
        self.forwarding
            .set(0, entries, 0)
            .map_err(|error| map_error("FORWARDING", error))
    }
}

impl Datapath {
    /// Sends packets for an address on from now on, or changes until when or where to; what was
    /// counted stays. Switches `net.ipv6.conf.lo.forwarding` on, without which the kernel looks up no
    /// routes for programs; it lets nothing through this host.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`], for instance because `FORWARDS` is full,
    /// [`DatapathError::Forwarding`].
    pub fn forward_set(&self, key: &ForwardKey, value: &Forward) -> Result<(), DatapathError> {
        fs::write(LOOPBACK_FORWARDING, "1").map_err(DatapathError::Forwarding)?;
        let mut forwards = lock(&self.inner.forwards);
        let counted = forwards.forwards.get(key)?.unwrap_or_default();
        let value = Forward {
            packets: counted.packets,
            bytes: counted.bytes,
            dropped: counted.dropped,
            ..*value
        };
        forwards.forwards.insert(key, &value)?;
        forwards.count()
    }

    /// Sends packets for an address on no more; returns what was counted.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn forward_remove(&self, key: &ForwardKey) -> Result<Option<Forward>, DatapathError> {
        let mut forwards = lock(&self.inner.forwards);
        let removed = forwards.forwards.take(key)?;
        forwards.count()?;
        Ok(removed)
    }

    /// Translates packets from an address from now on, or changes until when or to what; what was
    /// counted stays. Switches `net.ipv6.conf.lo.forwarding` on, as [`Self::forward_set`] does.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`], for instance because `TRANSLATIONS` is full,
    /// [`DatapathError::Forwarding`].
    pub fn translation_set(
        &self,
        key: &TranslationKey,
        value: &Translation,
    ) -> Result<(), DatapathError> {
        fs::write(LOOPBACK_FORWARDING, "1").map_err(DatapathError::Forwarding)?;
        let mut forwards = lock(&self.inner.forwards);
        let counted = forwards.translations.get(key)?.unwrap_or_default();
        let value = Translation {
            packets: counted.packets,
            bytes: counted.bytes,
            dropped: counted.dropped,
            ..*value
        };
        forwards.translations.insert(key, &value)?;
        forwards.count()
    }

    /// Translates packets from an address no more; returns what was counted.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn translation_remove(
        &self,
        key: &TranslationKey,
    ) -> Result<Option<Translation>, DatapathError> {
        let mut forwards = lock(&self.inner.forwards);
        let removed = forwards.translations.take(key)?;
        forwards.count()?;
        Ok(removed)
    }

    /// All addresses that packets are translated from.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn translations(&self) -> Result<Vec<(TranslationKey, Translation)>, DatapathError> {
        lock(&self.inner.forwards).translations.entries()
    }

    /// All addresses that packets are sent on for.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn forwards(&self) -> Result<Vec<(ForwardKey, Forward)>, DatapathError> {
        lock(&self.inner.forwards).forwards.entries()
    }
}
