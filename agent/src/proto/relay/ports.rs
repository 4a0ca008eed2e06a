//! Choice of the two ports that stand for a flow.
//!
//! The two are chosen so that the one's complement sum of addresses and ports stays what it was
//! ([`common::relay`]), so only their sum is given by the flow, and one of them is free. That one
//! is the agent's, from 49152 to 65535 (RFC 6335 §6), where it meets no service of the agent's
//! host. The relay's follows and is any port from 1024 on: for half of all flows no pair exists
//! with both ports from 49152 on, because two such ports only ever sum to 32769 to 65535 (in one's
//! complement).

use std::collections::{BTreeMap, BTreeSet};

use common::maps::{Address, StreamKey};
use common::relay::agent_port;

/// First port of an agent that datagrams are sent to.
pub(super) const FIRST_AGENT_PORT: u16 = 49_152;
/// Ports from there on.
const AGENT_PORTS: u16 = u16::MAX - FIRST_AGENT_PORT + 1;
/// First port of the relay that they are sent from.
pub(super) const FIRST_RELAY_PORT: u16 = 1024;

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
        let first = hash(stream) % AGENT_PORTS;
        let ports = (0..AGENT_PORTS)
            .map(|step| {
                let agent = FIRST_AGENT_PORT + (first + step) % AGENT_PORTS;
                // The sum is symmetric: what completes one port completes the other.
                let relay = agent_port(stream, relay_address, agent_address, agent);
                Ports { relay, agent }
            })
            .find(|ports| ports.relay >= FIRST_RELAY_PORT && !used.contains(ports));
        if let Some(ports) = ports {
            used.insert(ports);
        }
        ports
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

    #[cfg(test)]
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
