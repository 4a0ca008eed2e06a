//! `[handover]`: how a move loses and doubles no packet.

use std::time::Duration;

use serde::Deserialize;

use super::section::MAX_MAP_ENTRIES;
use super::value;

/// `[handover]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Handover {
    /// Whether gates record and hold frames at all.
    pub enabled: bool,
    /// Most memory for the frames held for one arriving NIC, MiB.
    #[serde(deserialize_with = "value::ranged::<1, 65_536, _, _>")]
    pub held_mib: u32,
    /// How old a held frame may get.
    #[serde(
        rename = "held_ms",
        deserialize_with = "value::milliseconds::<100, 60_000, _>"
    )]
    pub held: Duration,
    /// For how long the gate of an arriving TAP is closed at most.
    #[serde(
        rename = "gate_max_s",
        deserialize_with = "value::seconds::<1, 86_400, _>"
    )]
    pub gate_max: Duration,
    /// Room of `HELD` for frames on their way from the kernel to the agent, MiB; a power of two.
    #[serde(deserialize_with = "value::power_of_two::<1024, _>")]
    pub ring_mib: u32,
    /// NICs of departing domains that can be recorded at once.
    #[serde(deserialize_with = "value::ranged::<1, 256, _, _>")]
    pub recorded_nics: u32,
    /// Capacity of `DELIVERED`.
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
