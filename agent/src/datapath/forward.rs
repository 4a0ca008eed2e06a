//! State of addresses that VMs have left: forwarding of packets to them, and translation of packets
//! from them.

use std::fs;

use aya::maps::{Array, MapData};
use common::maps::{Forward, ForwardKey, Translation, TranslationKey};

use super::attach::LOOPBACK_FORWARDING;
use super::table::Table;
use super::{Datapath, DatapathError, lock, map_error};

/// `FORWARDS`, `TRANSLATIONS` and `FORWARDING`. Only this process writes these maps, except for the
/// counts.
pub(super) struct Forwards {
    forwards: Table<ForwardKey, Forward>,
    translations: Table<TranslationKey, Translation>,
    forwarding: Array<MapData, u32>,
}

impl Forwards {
    /// Takes over the maps of an earlier agent.
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

    /// Recounts the entries into `FORWARDING`.
    fn count(&mut self) -> Result<(), DatapathError> {
        let entries = self.forwards.entries()?.len() + self.translations.entries()?.len();
        let entries = u32::try_from(entries).unwrap_or(u32::MAX);
        self.forwarding
            .set(0, entries, 0)
            .map_err(|error| map_error("FORWARDING", error))
    }
}

impl Datapath {
    /// Forwards packets to an address, or changes their destination or the end of the forwarding;
    /// the counts stay. Enables `net.ipv6.conf.lo.forwarding`, because the kernel looks up no
    /// routes for programs without it. The setting by itself lets no packet through this host.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`], for instance if `FORWARDS` is full,
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

    /// Stops forwarding packets to an address; returns the final entry with its counts.
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

    /// Translates packets from an address, or changes the new address or the end of the
    /// translation; the counts stay. Enables `net.ipv6.conf.lo.forwarding` like
    /// [`Self::forward_set`].
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`], for instance if `TRANSLATIONS` is full,
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

    /// Stops translating packets from an address; returns the final entry with its counts.
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

    /// Returns all addresses whose packets are translated.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn translations(&self) -> Result<Vec<(TranslationKey, Translation)>, DatapathError> {
        lock(&self.inner.forwards).translations.entries()
    }

    /// Returns all addresses whose packets are forwarded.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn forwards(&self) -> Result<Vec<(ForwardKey, Forward)>, DatapathError> {
        lock(&self.inner.forwards).forwards.entries()
    }
}
