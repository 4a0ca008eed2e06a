//! Numbers of the bridges, which are part of the keys of the maps.
//!
//! `BRIDGES` keeps the numbers while no agent runs, so the next agent finds the entries of its
//! bridge under the same number. A bridge that was deleted and created again keeps its number by
//! its name. The number of any other bridge is free once the maps have no entry with this number.

use std::collections::BTreeMap;

use aya::maps::{Map, MapData};
use common::maps::{self, BridgeNumber, MAX_BRIDGES, NO_BRIDGE};

use super::pins::Pins;
use super::table::Table;
use super::{Datapath, DatapathError, map_error};

/// Name of the map.
pub(super) const BRIDGES: &str = "BRIDGES";

/// Every number, where the loader can borrow the number until the programs are loaded.
static NUMBERS: [BridgeNumber; MAX_BRIDGES as usize + 1] = {
    let mut numbers = [NO_BRIDGE; MAX_BRIDGES as usize + 1];
    let mut number = 0;
    while number <= MAX_BRIDGES {
        numbers[number as usize] = BridgeNumber(number);
        number += 1;
    }
    numbers
};

/// A bridge of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BridgeLink {
    /// Index of the bridge.
    pub ifindex: u32,
    /// Name of the bridge.
    pub name: String,
}

impl BridgeLink {
    /// Returns the value of `BRIDGES`.
    fn entry(&self) -> maps::Bridge {
        let mut name = [0; 16];
        for (slot, byte) in name.iter_mut().zip(self.name.bytes()) {
            *slot = byte;
        }
        maps::Bridge {
            ifindex: self.ifindex,
            name,
        }
    }
}

/// Chooses the number of a bridge, before the programs that will contain the number are loaded.
///
/// # Errors
///
/// [`DatapathError::Map`], [`DatapathError::Layout`], [`DatapathError::NoBridgeNumber`].
pub(super) fn choose(
    pins: &Pins,
    bridge: &BridgeLink,
) -> Result<&'static BridgeNumber, DatapathError> {
    let path = pins.map(BRIDGES);
    let known = if path.exists() {
        let map = MapData::from_pin(path).map_err(|error| map_error(BRIDGES, error))?;
        table(Some(Map::HashMap(map)))?.entries()?
    } else {
        Vec::new()
    };
    let number = number(&known.into_iter().collect(), &bridge.entry());
    number
        .and_then(|number| NUMBERS.get(usize::from(number.0)))
        .ok_or(DatapathError::NoBridgeNumber)
}

/// Takes over the map.
pub(super) fn table(map: Option<Map>) -> Result<Table<BridgeNumber, maps::Bridge>, DatapathError> {
    Table::new(BRIDGES, map)
}

/// Returns the number that the bridge has by its index, else by its name, else the lowest free one.
fn number(
    known: &BTreeMap<BridgeNumber, maps::Bridge>,
    bridge: &maps::Bridge,
) -> Option<BridgeNumber> {
    let by = |is_it: &dyn Fn(&maps::Bridge) -> bool| {
        let mut found = known.iter().filter(|(_, known)| is_it(known));
        found.next().map(|(number, _)| *number)
    };
    by(&|known| known.ifindex == bridge.ifindex)
        .or_else(|| by(&|known| known.name == bridge.name))
        .or_else(|| BridgeNumber::all().find(|number| !known.contains_key(number)))
}

impl Datapath {
    /// Returns the number of the bridge in the keys of the maps; [`NO_BRIDGE`] at a relay.
    pub fn bridge(&self) -> BridgeNumber {
        self.inner.bridge
    }

    /// Writes the number of the agent's bridge to `BRIDGES`. Removes the entries of all other
    /// bridges, and frees the numbers without any entry. A number whose entries were removed just
    /// now stays taken: an attached program of an earlier agent may still add entries with it.
    /// Reads whole maps if there is another bridge.
    pub(super) fn settle_bridges(&self, bridge: &BridgeLink) -> Result<(), DatapathError> {
        let bridges = &self.inner.bridges;
        bridges.insert(&self.inner.bridge, &bridge.entry())?;
        for (number, entry) in bridges.entries()? {
            if number == self.inner.bridge {
                continue;
            }
            let removed = self.forget_bridge(number)?;
            if removed == 0 {
                bridges.remove(&number)?;
            }
            tracing::info!(
                number = number.0,
                ifindex = entry.ifindex,
                removed,
                "removing the entries of a bridge that this agent does not have"
            );
        }
        Ok(())
    }

    /// Removes every entry with the number of a bridge; returns how many there were.
    fn forget_bridge(&self, number: BridgeNumber) -> Result<usize, DatapathError> {
        let inner = &self.inner;
        let mut removed = 0;
        let listeners = self.listeners()?.into_iter();
        let expired: Vec<_> = listeners
            .filter(|(key, _)| key.bridge == number)
            .map(|(key, _)| (key, u64::MAX))
            .collect();
        removed += self.expire(&expired)?.len();
        for (key, _) in self.sources()? {
            if key.listener.bridge == number {
                removed += usize::from(self.expire_source(&key, u64::MAX)?);
            }
        }
        for (key, _) in self.managed()? {
            if key.bridge == number {
                self.unmanage(&key)?;
                removed += 1;
            }
        }
        removed += inner.streams.remove_if(|key| key.bridge == number)?.len();
        removed += inner.queriers.remove_if(|key| key.bridge == number)?.len();
        let delivered = &inner.delivered;
        for (key, _) in delivered.remove_if(|key| key.stream.bridge == number)? {
            self.count_forgotten(key.ifindex, 1)?;
            removed += 1;
        }
        for (key, flow) in self.relay_flows()? {
            if flow.stream.bridge == number {
                removed += usize::from(self.relay_flow_remove(&key)?);
            }
        }
        for (key, _) in self.forwards()? {
            if key.bridge == number {
                removed += usize::from(self.forward_remove(&key)?.is_some());
            }
        }
        for (key, _) in self.translations()? {
            if key.bridge == number {
                removed += usize::from(self.translation_remove(&key)?.is_some());
            }
        }
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bridge(ifindex: u32, name: &str) -> maps::Bridge {
        let name = name.to_owned();
        BridgeLink { ifindex, name }.entry()
    }

    #[test]
    fn bridge_keeps_its_number_by_index_and_else_by_name() {
        let known = BTreeMap::from([
            (BridgeNumber(1), bridge(7, "br0")),
            (BridgeNumber(3), bridge(9, "br1")),
        ]);
        let of = |ifindex, name| number(&known, &bridge(ifindex, name)).unwrap().0;
        assert_eq!(of(9, "br1"), 3);
        assert_eq!(of(9, "br0"), 3, "renamed");
        assert_eq!(of(12, "br0"), 1, "created again");
        assert_eq!(of(12, "br2"), 2, "new");
    }

    #[test]
    fn no_number_is_given_twice() {
        let mut known = BTreeMap::new();
        for ifindex in 1..=u32::from(MAX_BRIDGES) {
            let bridge = bridge(ifindex, &format!("br{ifindex}"));
            let number = number(&known, &bridge).unwrap();
            assert_eq!(NUMBERS[usize::from(number.0)], number);
            assert_eq!(known.insert(number, bridge), None);
        }
        assert_eq!(number(&known, &bridge(100, "br100")), None);
    }
}
