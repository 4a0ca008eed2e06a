//! Layouts of managed addresses, their flows, and the queriers of the links.
//!
//! | map | key | value | written by |
//! |---|---|---|---|
//! | `MANAGED` | [`ManagedKey`] | [`Managed`] | agent; kernel `told` and `flows` |
//! | `STREAMS` | [`StreamKey`] | [`StreamUsage`] | kernel; the agent removes entries |
//! | `QUERIER` | [`QuerierKey`] | [`Querier`] | kernel; the agent removes entries |

#[cfg(doc)]
use super::NO_BRIDGE;
use super::{Address, BridgeNumber, Network, Origins};

/// Key of `MANAGED`: 20 bytes, align 2. A multicast address whose streams the programs observe.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ManagedKey {
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Bridge of the listeners; [`NO_BRIDGE`] at a relay.
    pub bridge: BridgeNumber,
    /// Multicast address, network order.
    pub multicast_address: Address,
}

impl ManagedKey {
    /// Network in which the address is watched.
    pub fn network(&self) -> Network {
        Network {
            bridge: self.bridge,
            vlan: self.vlan,
        }
    }
}

/// Value of `MANAGED`: 16 bytes, align 8. The agent writes the value; the kernel updates `told` and
/// `flows`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Managed {
    /// The first packet of each flow and origin after this time raises an event.
    pub watch_since_ns: u64,
    /// Bits of [`Origins`]: which copies pass.
    pub origins: u8,
    /// [`Managed::slot`] of the last event about a flow without room; 0 before the first event.
    pub told: u8,
    /// Limit of flows in `STREAMS`.
    pub max_flows: u16,
    /// Flows in `STREAMS`. A write of the agent may overwrite increments of the kernel until the
    /// agent counts again.
    pub flows: u32,
}

impl Managed {
    /// Value of an address without flows.
    pub fn new(watch_since_ns: u64, origins: Origins, max_flows: u16) -> Self {
        Self {
            watch_since_ns,
            origins: origins as u8,
            told: 0,
            max_flows,
            flows: 0,
        }
    }

    /// Number of the time slot of 134 ms that contains `at_ns`: 1 to 255, repeating.
    #[inline(always)]
    pub fn slot(at_ns: u64) -> u8 {
        ((at_ns >> 27) % 255) as u8 + 1
    }
}

/// Key of `STREAMS`: 40 bytes, align 2. The value counts natively received packets of the flow.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamKey {
    /// Multicast address, network order.
    pub multicast_address: Address,
    /// Source address, network order.
    pub source: Address,
    /// UDP source port, host order; 0 without UDP.
    pub source_port: u16,
    /// UDP destination port, host order; 0 without UDP.
    pub destination_port: u16,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Bridge that the flow enters; [`NO_BRIDGE`] at a relay.
    pub bridge: BridgeNumber,
}

impl StreamKey {
    /// Key of `MANAGED` for the flow's address.
    pub fn managed(&self) -> ManagedKey {
        ManagedKey {
            vlan: self.vlan,
            bridge: self.bridge,
            multicast_address: self.multicast_address,
        }
    }
}

/// Value of `STREAMS`, and part of the value of `RELAY_FLOWS`: 48 bytes, align 8. Packets of one
/// flow and one origin.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamUsage {
    /// Received packets.
    pub packets: u64,
    /// Bytes of these packets, from the Ethernet header on.
    pub bytes: u64,
    /// Arrival of the first packet.
    pub first_ns: u64,
    /// Arrival of the last packet.
    pub last_ns: u64,
    /// Moving average of the inter-arrival time (weight of the newest packet: 1/8).
    pub interarrival_ns: u64,
    /// Packets that did not pass: second copies, and all packets while [`Managed::origins`]
    /// excludes the origin.
    pub dropped: u64,
}

impl StreamUsage {
    /// Adds the usage of the same flow and origin from another place.
    pub fn add(&mut self, other: &Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
        self.dropped += other.dropped;
        if self.first_ns == 0 || other.first_ns != 0 && other.first_ns < self.first_ns {
            self.first_ns = other.first_ns;
        }
        if other.last_ns > self.last_ns {
            self.last_ns = other.last_ns;
            self.interarrival_ns = other.interarrival_ns;
        }
    }
}

/// Key of `QUERIER`: 8 bytes, align 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QuerierKey {
    /// Uplink that received the Query.
    pub ifindex: u32,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Bridge of the uplink.
    pub bridge: BridgeNumber,
}

impl QuerierKey {
    /// Network whose listeners the querier asks.
    pub fn network(&self) -> Network {
        Network {
            bridge: self.bridge,
            vlan: self.vlan,
        }
    }
}

/// Value of `QUERIER`: 40 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Querier {
    /// Arrival of the last General Query.
    pub last_query_ns: u64,
    /// Link-local address of the querier.
    pub address: Address,
    /// Querier's Query Interval, milliseconds (RFC 9777 §9.2; 125 s for MLDv1).
    pub query_interval_ms: u32,
    /// Query Response Interval, milliseconds (RFC 9777 §9.3).
    pub query_response_interval_ms: u32,
    /// Robustness Variable (RFC 9777 §9.1).
    pub robustness: u8,
    /// MLD version of the Query: 1 or 2.
    pub mld_version: u8,
    /// Padding, always zero.
    pub pad: [u16; 3],
}

const _: () = {
    assert!(size_of::<ManagedKey>() == 20 && align_of::<ManagedKey>() == 2);
    assert!(size_of::<Managed>() == 16 && align_of::<Managed>() == 8);
    assert!(size_of::<StreamKey>() == 40 && align_of::<StreamKey>() == 2);
    assert!(size_of::<StreamUsage>() == 48 && align_of::<StreamUsage>() == 8);
    assert!(size_of::<QuerierKey>() == 8 && align_of::<QuerierKey>() == 4);
    assert!(size_of::<Querier>() == 40 && align_of::<Querier>() == 8);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_flow_without_room_is_told_whatever_the_time() {
        let fresh = Managed::new(0, Origins::Native, 1);
        let slots = (0..1000_u64).map(|slot| Managed::slot(slot << 27));
        assert_eq!(slots.filter(|slot| *slot == fresh.told).count(), 0);
    }
}
