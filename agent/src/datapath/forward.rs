//! Addresses that VMs have left, and where packets for them are sent.

use std::fs;

use aya::maps::{Array, MapData};
use common::maps::{Forward, ForwardKey};

use super::attach::LOOPBACK_FORWARDING;
use super::table::Table;
use super::{Datapath, DatapathError, lock};

/// Both maps. Written by this process only, but for the counts.
pub(super) struct Forwards {
    forwards: Table<ForwardKey, Forward>,
    forwarding: Array<MapData, u32>,
}

impl Forwards {
    /// Takes both maps over.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub(super) fn adopt(
        forwards: Table<ForwardKey, Forward>,
        forwarding: Array<MapData, u32>,
    ) -> Result<Self, DatapathError> {
        let mut adopted = Self {
            forwards,
            forwarding,
        };
        adopted.count()?;
        Ok(adopted)
    }

    /// Counts the entries anew.
    fn count(&mut self) -> Result<(), DatapathError> {
        let entries = self.forwards.entries()?.len();
        let entries = u32::try_from(entries).unwrap_or(u32::MAX);
        self.forwarding
            .set(0, entries, 0)
            .map_err(|error| DatapathError::Map {
                name: "FORWARDING",
                error: std::io::Error::other(error),
            })
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

    /// All addresses that packets are sent on for.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn forwards(&self) -> Result<Vec<(ForwardKey, Forward)>, DatapathError> {
        lock(&self.inner.forwards).forwards.entries()
    }
}
