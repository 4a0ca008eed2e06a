//! `[handover]` of the agent's configuration: how a migration neither loses nor doubles a packet.

use std::time::Duration;

use serde::Deserialize;

use super::super::section::MAX_MAP_ENTRIES;
use super::super::value;

/// Limits of the gates, which record packets at the source and hold packets at the destination.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Handover {
    /// False: gates neither record nor hold frames.
    pub enabled: bool,
    /// Memory for the held frames of one arriving NIC, MiB.
    #[serde(deserialize_with = "value::ranged::<1, 65_536, _, _>")]
    pub held_mib: u32,
    /// Highest age of a held frame.
    #[serde(
        rename = "held_ms",
        deserialize_with = "value::milliseconds::<100, 60_000, _>"
    )]
    pub held: Duration,
    /// Longest time that the gate of an arriving TAP stays closed.
    #[serde(
        rename = "gate_max_s",
        deserialize_with = "value::seconds::<1, 86_400, _>"
    )]
    pub gate_max: Duration,
    /// Size of the ring buffer `HELD`, through which the kernel passes frames to the agent, MiB; a
    /// power of two.
    #[serde(deserialize_with = "value::power_of_two::<1024, _>")]
    pub ring_mib: u32,
    /// Number of NICs of departing domains that the gates can record at the same time.
    #[serde(deserialize_with = "value::ranged::<1, 256, _, _>")]
    pub recorded_nics: u32,
    /// Entries of the map `DELIVERED`.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_delivered: u32,
}

impl Default for Handover {
    fn default() -> Self {
        Self {
            enabled: true,
            held_mib: 64,
            held: Duration::from_millis(15_000),
            gate_max: Duration::from_secs(600),
            ring_mib: 8,
            recorded_nics: 8,
            map_delivered: 65_536,
        }
    }
}
