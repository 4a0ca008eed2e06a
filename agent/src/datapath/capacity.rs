//! The maps: names, capacities, creation and adoption.

use aya::maps::MapInfo;
use aya::{Ebpf, EbpfLoader};
use common::maps::{BridgeNumber, RECORDS_PER_SLOT};

use super::bridges::BRIDGES;
use super::pins::Pins;
use super::{DatapathError, load_error};

/// Most slots whose entries a 32-bit index can address.
const MAX_RECORD_SLOTS: u32 = u32::MAX / RECORDS_PER_SLOT;

/// Capacities of the maps, in entries unless stated otherwise. A capacity applies when a map is
/// created; an adopted map keeps its capacity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capacities {
    /// `LISTENERS`: (port, VLAN, address) triples with a membership.
    pub listeners: u32,
    /// `LISTENER_SOURCES`: sources over all listeners.
    pub sources: u32,
    /// `PORTS`, `PORT_USAGE`, `GATES` and `GATE_USAGE`: TAPs.
    pub ports: u32,
    /// `MANAGED`: (VLAN, address) pairs watched for streams.
    pub managed: u32,
    /// `STREAMS`: flows of the watched addresses.
    pub streams: u32,
    /// `RELAY_FLOWS`: relayed flows that this agent restores.
    pub relay_flows: u32,
    /// `RELAYS`: pairs of relay address and address of this host.
    pub relays: u32,
    /// `FINGERPRINTS`: packets of the last seconds, over all addresses whose origin changes. The
    /// memory is allocated at creation, about 90 bytes per entry.
    pub fingerprints: u32,
    /// `RELAY_STREAMS`: flows that this relay serves.
    pub relay_streams: u32,
    /// `RELAY_SUBSCRIBERS` and `RELAY_USAGE`: subscribers over all flows.
    pub subscribers: u32,
    /// `DELIVERED`: flows into TAPs, over all TAPs.
    pub delivered: u32,
    /// Slots of `GATE_RECORDS`: VMs that may migrate away at the same time. The memory is allocated
    /// at creation, 512 KiB per slot.
    pub record_slots: u32,
    /// `HELD`, bytes: a power of two, at least 65536. Holds frames of all arriving VMs until the
    /// agent reads them.
    pub held_bytes: u32,
    /// `EVENTS`, bytes: a power of two and a multiple of the page size.
    pub events_bytes: u32,
}

impl Default for Capacities {
    fn default() -> Self {
        Self {
            listeners: 131_072,
            sources: 131_072,
            ports: 1024,
            managed: 16_384,
            streams: 65_536,
            relay_flows: 65_536,
            relays: 1024,
            fingerprints: 65_536,
            relay_streams: 16_384,
            subscribers: 65_536,
            delivered: 65_536,
            record_slots: 8,
            held_bytes: 8 << 20,
            events_bytes: 1 << 20,
        }
    }
}

impl Capacities {
    /// Checks the values that the kernel would refuse without a reason.
    ///
    /// # Errors
    ///
    /// [`DatapathError::RingCapacity`], [`DatapathError::RecordSlots`].
    pub(super) fn check(&self) -> Result<(), DatapathError> {
        for (name, bytes, least) in [
            ("events_bytes", self.events_bytes, 4096),
            ("held_bytes", self.held_bytes, 65_536),
        ] {
            if bytes < least || !bytes.is_power_of_two() {
                return Err(DatapathError::RingCapacity { name, bytes, least });
            }
        }
        if !(1..=MAX_RECORD_SLOTS).contains(&self.record_slots) {
            return Err(DatapathError::RecordSlots {
                slots: self.record_slots,
                most: MAX_RECORD_SLOTS,
            });
        }
        Ok(())
    }
}

/// All maps; [`super::Inner`] has their key and value types.
const MAPS: [&str; 24] = [
    BRIDGES,
    "LISTENERS",
    "LISTENER_SOURCES",
    "PORTS",
    "PORT_USAGE",
    "MANAGED",
    "STREAMS",
    "QUERIER",
    "RELAY_FLOWS",
    "RELAYS",
    "FORWARDS",
    "TRANSLATIONS",
    "FORWARDING",
    "FINGERPRINTS",
    "RELAY_STREAMS",
    "RELAY_SUBSCRIBERS",
    "RELAY_USAGE",
    "GATES",
    "GATE_USAGE",
    "GATE_RECORDS",
    "DELIVERED",
    "HELD",
    "COUNTERS",
    "EVENTS",
];

/// Returns the loader of objects, for the programs of a bridge. Its construction reads the BTF of
/// the whole kernel, which takes a tenth of a second, so all objects share one loader. The programs
/// do not need the BTF.
pub(super) fn loader(bridge: &'static BridgeNumber) -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    loader.btf(None);
    // Objects that work for no bridge lack the variable.
    loader.override_global("BRIDGE", bridge, false);
    loader
}

/// Creates or adopts all maps, and parses the programs of an object; the kernel gets the programs
/// later.
pub(super) fn load_maps(
    loader: &mut EbpfLoader<'static>,
    pins: &Pins,
    capacities: &Capacities,
    object: &[u8],
) -> Result<Ebpf, DatapathError> {
    let cpus = aya::util::nr_cpus().map_err(|(_, error)| load_error("HELD_SCRATCH", &error))?;
    loader.map_max_entries("HELD_SCRATCH", u32::try_from(cpus).unwrap_or(u32::MAX));
    for name in MAPS {
        let path = pins.map(name);
        let wanted = match name {
            "LISTENERS" => Some(capacities.listeners),
            "LISTENER_SOURCES" => Some(capacities.sources),
            "PORTS" | "PORT_USAGE" | "GATES" | "GATE_USAGE" => Some(capacities.ports),
            "MANAGED" => Some(capacities.managed),
            "STREAMS" => Some(capacities.streams),
            "RELAY_FLOWS" => Some(capacities.relay_flows),
            "RELAYS" => Some(capacities.relays),
            "FINGERPRINTS" => Some(capacities.fingerprints),
            "RELAY_STREAMS" => Some(capacities.relay_streams),
            "RELAY_SUBSCRIBERS" | "RELAY_USAGE" => Some(capacities.subscribers),
            "GATE_RECORDS" => Some(capacities.record_slots * RECORDS_PER_SLOT),
            "DELIVERED" => Some(capacities.delivered),
            "HELD" => Some(capacities.held_bytes),
            "EVENTS" => Some(capacities.events_bytes),
            _ => None,
        };
        if let Some(wanted) = wanted {
            // The loader maps an array with the size that it assumes, so the size must be that of
            // the adopted map.
            let adopted = path
                .exists()
                .then(|| MapInfo::from_pin(&path).ok())
                .flatten()
                .map(|info| info.max_entries());
            if let Some(adopted) = adopted
                && adopted != wanted
            {
                tracing::warn!(
                    map = name,
                    capacity = adopted,
                    configured = wanted,
                    "map in use keeps its capacity; remove its pin while no agent runs to change it"
                );
            }
            loader.map_max_entries(name, adopted.unwrap_or(wanted));
        }
        loader.map_pin_path(name, path);
    }
    loader
        .load(object)
        .map_err(|error| load_error("the maps", &error))
}
