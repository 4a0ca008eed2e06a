//! Typed access to the maps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray, RingBuf};
use common::maps::Address;
use common::mat::counter::Counter;
use common::mat::maps::{NODE_SLOTS, Node, OwnMoa, Peer, PeerMoa};
use common::mat::neutral::difference;
use common::mat::translate::{address, words};
use linux::bpf::link::chain;
use nix::time::{ClockId, clock_gettime};

use super::DatapathError;

/// Usage of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Packets sent to the peer since it is known.
    pub packets: u64,
    /// Bytes of these packets, from the Ethernet header on.
    pub bytes: u64,
    /// Time since the last packet to or from the peer; `None` before the first one.
    pub idle: Option<Duration>,
}

/// The maps of the eBPF programs; see the [module documentation](self).
pub(super) struct Tables {
    node: Array<MapData, Node>,
    slot: Array<MapData, u32>,
    peers: HashMap<MapData, Address, Peer>,
    peer_moas: HashMap<MapData, Address, PeerMoa>,
    own_moas: HashMap<MapData, Address, OwnMoa>,
    counters: PerCpuArray<MapData, u64>,
    pub(super) held: RingBuf<MapData>,
}

impl Tables {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, DatapathError> {
        Ok(Self {
            node: convert("NODE", ebpf)?,
            slot: convert("NODE_SLOT", ebpf)?,
            peers: convert("PEERS", ebpf)?,
            peer_moas: convert("PEER_MOAS", ebpf)?,
            own_moas: convert("OWN_MOAS", ebpf)?,
            counters: convert("MAT_COUNTERS", ebpf)?,
            held: convert("HELD", ebpf)?,
        })
    }

    /// Returns the node's parameters that the programs use now.
    pub(super) fn node(&self) -> Result<Node, DatapathError> {
        let slot = self.slot.get(&0, 0).map_err(error("NODE_SLOT"))?;
        self.node.get(&slot, 0).map_err(error("NODE"))
    }

    /// Sets the node's parameters. The programs see the change atomically.
    pub(super) fn set_node(&mut self, node: Node) -> Result<(), DatapathError> {
        let slot = self.slot.get(&0, 0).map_err(error("NODE_SLOT"))?;
        let other = (slot + 1) % NODE_SLOTS;
        self.node.set(other, node, 0).map_err(error("NODE"))?;
        self.slot.set(0, other, 0).map_err(error("NODE_SLOT"))
    }

    /// Accepts packets to these addresses, and to no others, as packets to the HoA.
    pub(super) fn set_own(&mut self, hoa: Address, moas: &[Ipv6Addr]) -> Result<(), DatapathError> {
        let moas: BTreeSet<Address> = moas.iter().map(Ipv6Addr::octets).collect();
        for moa in &moas {
            let own = OwnMoa {
                difference: difference(*moa, hoa),
            };
            self.own_moas
                .insert(moa, own, 0)
                .map_err(error("OWN_MOAS"))?;
        }
        let known: Vec<Address> = keys(&self.own_moas, "OWN_MOAS")?;
        for moa in known.iter().filter(|it| !moas.contains(*it)) {
            remove(&mut self.own_moas, "OWN_MOAS", moa)?;
        }
        Ok(())
    }

    pub(super) fn set_peer(
        &mut self,
        hoa: Address,
        to: Address,
        from: &[Ipv6Addr],
    ) -> Result<(), DatapathError> {
        // First accept the addresses from which the peer may answer.
        self.accept(hoa, from)?;
        let peer = Peer {
            moa: words(to),
            difference: difference(hoa, to),
            next_hop_ifindex: 0,
            next_hop_until_ns: 0,
            ..self.peers.get(&hoa, 0).unwrap_or_default()
        };
        self.peers.insert(hoa, peer, 0).map_err(error("PEERS"))?;
        self.forget_moas(hoa, from)
    }

    pub(super) fn hold_peer(
        &mut self,
        hoa: Address,
        from: &[Ipv6Addr],
    ) -> Result<(), DatapathError> {
        remove(&mut self.peers, "PEERS", &hoa)?;
        self.accept(hoa, from)?;
        self.forget_moas(hoa, from)
    }

    /// Accepts packets from these addresses as the peer's.
    fn accept(&mut self, hoa: Address, from: &[Ipv6Addr]) -> Result<(), DatapathError> {
        for moa in from.iter().map(Ipv6Addr::octets) {
            let known = self.peer_moas.get(&moa, 0).ok();
            let last_used_ns = known
                .filter(|it| it.hoa == words(hoa))
                .map_or(0, |it| it.last_used_ns);
            let value = PeerMoa {
                hoa: words(hoa),
                last_used_ns,
                difference: difference(moa, hoa),
                pad: 0,
            };
            self.peer_moas
                .insert(moa, value, 0)
                .map_err(error("PEER_MOAS"))?;
        }
        Ok(())
    }

    pub(super) fn remove_peer(&mut self, hoa: Address) -> Result<(), DatapathError> {
        remove(&mut self.peers, "PEERS", &hoa)?;
        self.forget_moas(hoa, &[])
    }

    /// Removes the MoAs of a peer except those in `but`.
    fn forget_moas(&mut self, hoa: Address, but: &[Ipv6Addr]) -> Result<(), DatapathError> {
        let mut old = Vec::new();
        for entry in self.peer_moas.iter() {
            let (moa, value) = entry.map_err(error("PEER_MOAS"))?;
            if value.hoa == words(hoa) && !but.contains(&Ipv6Addr::from(moa)) {
                old.push(moa);
            }
        }
        for moa in old {
            remove(&mut self.peer_moas, "PEER_MOAS", &moa)?;
        }
        Ok(())
    }

    pub(super) fn peers_used(&self) -> Result<Vec<(Ipv6Addr, Usage)>, DatapathError> {
        let mut last: BTreeMap<Address, u64> = BTreeMap::new();
        for entry in self.peer_moas.iter() {
            let (_, moa) = entry.map_err(error("PEER_MOAS"))?;
            let newest = last.entry(address(moa.hoa)).or_default();
            *newest = moa.last_used_ns.max(*newest);
        }
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(|error| DatapathError::Map {
            name: "PEERS",
            reason: error.to_string(),
        })?;
        let now = Duration::from(now);
        self.peers
            .iter()
            .map(|entry| {
                let (hoa, peer) = entry.map_err(error("PEERS"))?;
                let received = last.get(&hoa).copied().unwrap_or(0);
                let last = peer.last_used_ns.max(received);
                let usage = Usage {
                    packets: peer.packets,
                    bytes: peer.bytes,
                    idle: (last != 0).then(|| now.saturating_sub(Duration::from_nanos(last))),
                };
                Ok((Ipv6Addr::from(hoa), usage))
            })
            .collect()
    }

    pub(super) fn counters(&self) -> Result<Vec<(Counter, u64)>, DatapathError> {
        (0..)
            .zip(Counter::ALL)
            .map(|(index, counter)| {
                let values = self
                    .counters
                    .get(&index, 0)
                    .map_err(error("MAT_COUNTERS"))?;
                Ok((*counter, values.iter().sum()))
            })
            .collect()
    }
}

fn convert<T: TryFrom<Map>>(name: &'static str, ebpf: &mut Ebpf) -> Result<T, DatapathError> {
    ebpf.take_map(name)
        .and_then(|map| T::try_from(map).ok())
        .ok_or(DatapathError::Layout { name })
}

fn keys<V: aya::Pod>(
    map: &HashMap<MapData, Address, V>,
    name: &'static str,
) -> Result<Vec<Address>, DatapathError> {
    map.keys().map(|key| key.map_err(error(name))).collect()
}

/// Removes a key. A missing key is no error.
fn remove<V: aya::Pod>(
    map: &mut HashMap<MapData, Address, V>,
    name: &'static str,
    key: &Address,
) -> Result<(), DatapathError> {
    match map.remove(key) {
        Ok(()) | Err(aya::maps::MapError::KeyNotFound) => Ok(()),
        Err(aya::maps::MapError::SyscallError(e))
            if e.io_error.kind() == std::io::ErrorKind::NotFound =>
        {
            Ok(())
        }
        Err(e) => Err(error(name)(e)),
    }
}

fn error(name: &'static str) -> impl Fn(aya::maps::MapError) -> DatapathError {
    move |error| DatapathError::Map {
        name,
        reason: chain(&error),
    }
}
