//! `[agent]`, `[limits]` and `[destination]`.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::super::section::{DEFAULT_CONTROL_SOCKET, MAX_MAP_ENTRIES, default_listen};
use super::super::value;
use crate::datapath::UplinkHook;
use crate::value::{InterfaceName, Name, Prefix};

/// Name, bridge and sockets of the agent.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agent {
    /// Name of this agent, as in its certificate.
    pub name: Name,
    /// Bridge whose ports are the VMs' TAPs.
    pub bridge: InterfaceName,
    /// Physical ports of the bridge; empty: every port that is not a TAP.
    #[serde(default)]
    pub uplinks: Vec<InterfaceName>,
    /// Hook for the program on the uplinks; `None`: the driver decides.
    #[serde(default)]
    pub uplink_hook: Option<UplinkHook>,
    /// Address and port to which peers connect.
    #[serde(default = "default_listen")]
    pub listen: SocketAddrV6,
    /// Path of the operator's socket.
    #[serde(default = "default_control_socket")]
    pub control_socket: PathBuf,
    /// Directory in a BPF file system for pinned maps and links.
    #[serde(default = "default_pin_root")]
    pub pin_root: PathBuf,
    /// Prefix from which arriving VMs take addresses; `None`: the prefix of the bridge's global
    /// address.
    #[serde(default)]
    pub prefix: Option<Prefix>,
    /// This host's address in that prefix; `None`: the bridge's global address.
    #[serde(default)]
    pub address: Option<Ipv6Addr>,
}

fn default_control_socket() -> PathBuf {
    PathBuf::from(DEFAULT_CONTROL_SOCKET)
}

fn default_pin_root() -> PathBuf {
    PathBuf::from("/sys/fs/bpf/roamcast")
}

/// Limits for each VM NIC (the first four) and for the host, and sizes of the maps.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Most multicast addresses to which the NIC listens, over all VLANs.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub listeners: u32,
    /// Most sources of these listeners, over all multicast addresses.
    #[serde(deserialize_with = "value::ranged::<0, MAX_MAP_ENTRIES, _, _>")]
    pub sources: u32,
    /// MLD Reports per second, and size of a burst.
    #[serde(deserialize_with = "value::ranged::<1, 1_000_000, _, _>")]
    pub reports_per_second: u32,
    /// Most flows to the NIC that the kernel counts.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub flows: u32,
    /// Most flows of one multicast address that the kernel counts on this host.
    #[serde(deserialize_with = "value::ranged::<1, 65_535, _, _>")]
    pub flows_per_address: u16,
    /// Entries of the map `LISTENERS`.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_listeners: u32,
    /// Entries of the map `LISTENER_SOURCES`.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_sources: u32,
    /// Entries of the map `STREAMS`: flows.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_streams: u32,
    /// Entries of the map `MANAGED`: multicast addresses on this host.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_managed: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            listeners: 1024,
            sources: 4096,
            reports_per_second: 2000,
            flows: 4096,
            flows_per_address: 1024,
            map_listeners: 131_072,
            map_sources: 131_072,
            map_streams: 65_536,
            map_managed: 16_384,
        }
    }
}

/// Timers of the joins for arriving domains.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Destination {
    /// Time that a multicast tree may take to grow; then the address counts as unreachable. The VM
    /// still receives at the source meanwhile, so waiting costs time but no packets. At most two
    /// thirds of the time for which the source waits for the answer.
    #[serde(
        rename = "tree_budget_ms",
        deserialize_with = "value::milliseconds::<10, 10_000, _>"
    )]
    pub tree_budget: Duration,
    /// Time for which a proxy join waits for a domain that does not arrive.
    #[serde(
        rename = "join_expiry_s",
        deserialize_with = "value::seconds::<10, 86_400, _>"
    )]
    pub join_expiry: Duration,
}

impl Default for Destination {
    fn default() -> Self {
        Self {
            tree_budget: Duration::from_millis(2500),
            join_expiry: Duration::from_secs(600),
        }
    }
}
