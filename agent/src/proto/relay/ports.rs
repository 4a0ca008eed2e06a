//! Choice of the two ports that stand for a flow.
//!
//! The two are chosen so that the one's complement sum of addresses and ports stays what it was
//! ([`common::relay`]), so only their sum is given by the flow, and one of them is free.

use std::collections::{BTreeMap, BTreeSet};

use common::maps::{Address, StreamKey};
use common::relay::port_pairs;

/// The search begins at one of so many pairs; there are at least as many for any flow.
const STARTS: usize = 8192;

/// The ports of one flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub(super) relay: u16,
    pub(super) agent: u16,
}

/// Ports in use, by agent address.
#[derive(Debug, Default)]
pub(super) struct PortTable(BTreeMap<Address, BTreeSet<Ports>>);

impl PortTable {
    /// Chooses a pair that is not in use, and takes it; `None` when all are. The choice depends
    /// on the flow alone where it can, so a flow that comes back has its old ports.
    pub(super) fn take(
        &mut self,
        stream: &StreamKey,
        relay_address: &Address,
        agent_address: &Address,
    ) -> Option<Ports> {
        let used = self.0.entry(*agent_address).or_default();
        let pairs = || port_pairs(stream, relay_address, agent_address);
        // Flows of one sender would otherwise all want the same pair.
        let first = usize::from(hash(stream)) % STARTS;
        let ports = pairs()
            .skip(first)
            .chain(pairs().take(first))
            .map(|(relay, agent)| Ports { relay, agent })
            .find(|ports| !used.contains(ports))?;
        used.insert(ports);
        Some(ports)
    }

    /// Takes a pair that is given; says whether it was free.
    pub(super) fn take_given(&mut self, agent_address: &Address, ports: Ports) -> bool {
        self.0.entry(*agent_address).or_default().insert(ports)
    }

    /// Gives a pair back.
    pub(super) fn release(&mut self, agent_address: &Address, ports: Ports) {
        if let Some(used) = self.0.get_mut(agent_address) {
            used.remove(&ports);
            if used.is_empty() {
                self.0.remove(agent_address);
            }
        }
    }

    #[cfg(any(test, fuzzing))]
    pub(super) fn in_use(&self) -> usize {
        self.0.values().map(BTreeSet::len).sum()
    }
}

/// FNV-1a over the flow, folded to 16 bits.
fn hash(stream: &StreamKey) -> u16 {
    let ports = [stream.source_port, stream.destination_port].map(u16::to_be_bytes);
    let bytes = stream
        .multicast_address
        .iter()
        .chain(&stream.source)
        .chain(ports.iter().flatten());
    let hash = bytes.fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    });
    let [a, b, c, d] = hash.to_be_bytes();
    u16::from_be_bytes([a ^ c, b ^ d])
}
