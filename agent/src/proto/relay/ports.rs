//! Choice of the two ports that represent a flow.
//!
//! The ports keep the one's complement sum of addresses and ports unchanged ([`common::relay`]). The
//! flow therefore determines only the sum of the ports, and one port is free. A blind attacker who
//! forges the relay's datagrams has to guess the pair. So the choice depends on a secret of this
//! process.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher as _, RandomState};

use common::maps::{Address, StreamKey};
use common::relay::{FIRST_PORT, FIRST_RELAY_PORT, agent_port, port_pairs};

/// Number of random relay ports to try before a search through all pairs, which takes much longer. At
/// least one in five relay ports makes a pair.
const DRAWS: u32 = 64;
/// Number of ports that a relay can use.
const RELAY_PORTS: u64 = (u16::MAX - FIRST_RELAY_PORT) as u64 + 1;

/// Port pair of one flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) relay: u16,
    pub(super) agent: u16,
}

/// Port pairs in use, by agent address.
#[derive(Debug, Default)]
pub(super) struct PortTable {
    used: BTreeMap<Address, BTreeSet<Ports>>,
    /// Holds the secret of this process.
    hasher: RandomState,
}

impl PortTable {
    /// Chooses and reserves an unused pair; `None` if all pairs are in use. The choice is deterministic
    /// where possible, so a returning flow gets its old ports.
    pub(super) fn take(
        &mut self,
        stream: &StreamKey,
        relay_address: &Address,
        agent_address: &Address,
    ) -> Option<Ports> {
        let used = self.used.entry(*agent_address).or_default();
        let drawn = (0..DRAWS).map(|draw| {
            let number = self.hasher.hash_one((stream, agent_address, draw)) % RELAY_PORTS;
            let relay = FIRST_RELAY_PORT + number as u16;
            (
                relay,
                agent_port(stream, relay_address, agent_address, relay),
            )
        });
        let ports = drawn
            .filter(|(_, agent)| *agent >= FIRST_PORT)
            .chain(port_pairs(stream, relay_address, agent_address))
            .map(|(relay, agent)| Ports { relay, agent })
            .find(|ports| !used.contains(ports))?;
        used.insert(ports);
        Some(ports)
    }

    /// Reserves the given pair; returns true if the pair was free.
    pub(super) fn take_given(&mut self, agent_address: &Address, ports: Ports) -> bool {
        let used = self.used.entry(*agent_address).or_default();
        used.insert(ports)
    }

    /// Releases a pair.
    pub(super) fn release(&mut self, agent_address: &Address, ports: Ports) {
        if let Some(used) = self.used.get_mut(agent_address) {
            used.remove(&ports);
            if used.is_empty() {
                self.used.remove(agent_address);
            }
        }
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn in_use(&self) -> usize {
        self.used.values().map(BTreeSet::len).sum()
    }
}

#[cfg(test)]
mod tests {
    use common::maps::NO_BRIDGE;

    use super::*;

    const RELAY: Address = [1; 16];
    const AGENT: Address = [2; 16];

    fn stream(number: u16) -> StreamKey {
        StreamKey {
            multicast_address: [0xff; 16],
            source: [3; 16],
            source_port: number,
            destination_port: 5004,
            vlan: 0,
            bridge: NO_BRIDGE,
        }
    }

    fn take(table: &mut PortTable, number: u16) -> Ports {
        table.take(&stream(number), &RELAY, &AGENT).unwrap()
    }

    #[test]
    fn ports_of_a_flow_cannot_be_known_from_what_everybody_knows() {
        let (mut one, mut other) = (PortTable::default(), PortTable::default());
        let same = (0..100).filter(|&flow| take(&mut one, flow) == take(&mut other, flow));
        // Two secrets agree on a pair in one of some 15,000 cases.
        let same = same.count();
        assert!(same < 3, "{same} of 100");
    }

    #[test]
    fn flow_that_comes_back_has_its_ports() {
        let mut table = PortTable::default();
        let ports = take(&mut table, 1);
        table.release(&AGENT, ports);
        assert_eq!(take(&mut table, 1), ports);
    }
}
