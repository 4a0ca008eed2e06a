//! The running roles. Each role connects its protocol to the kernel, the network and the operator.
//! The agent also connects to libvirt.

#[cfg(feature = "agent")]
pub mod agent;
#[cfg(feature = "ims")]
pub mod ims;
#[cfg(feature = "mcs")]
pub mod mcs;
#[cfg(feature = "programs")]
mod registrar;
#[cfg(feature = "relay")]
pub mod relay;
#[cfg(feature = "programs")]
mod stream_reads;
#[cfg(feature = "programs")]
mod tidy;
#[cfg(feature = "programs")]
pub mod trace;

use std::collections::BTreeMap;

use crate::config::Peer;
#[cfg(feature = "programs")]
use crate::control::report::Hook;
#[cfg(feature = "programs")]
use crate::datapath::HookView;
use crate::net::peers::{Endpoint, Peers};
use crate::role::Role;
use crate::telemetry;

/// Returns a configured peer's name and the endpoint to dial, which must have `role`.
fn endpoint(peer: &Peer, role: Role) -> (String, Endpoint) {
    let address = peer.address.to_string();
    (peer.name.to_string(), Endpoint { role, address })
}

/// Returns the non-zero counters of a role and of its connections.
fn counters(
    own: impl IntoIterator<Item = (&'static str, u64)>,
    peers: &Peers,
) -> BTreeMap<String, u64> {
    own.into_iter()
        .map(|(name, count)| (name.to_owned(), count))
        .chain(
            peers
                .counters()
                .into_iter()
                .map(|(name, count)| (format!("connections_{name}"), count)),
        )
        .chain([("log_lines_dropped".to_owned(), telemetry::dropped())])
        .filter(|(_, count)| *count > 0)
        .collect()
}

/// Returns the operator's table rows for the eBPF programs on an interface.
#[cfg(feature = "programs")]
fn hooks_of(hooks: &BTreeMap<u32, Vec<HookView>>, ifindex: u32) -> Vec<Hook> {
    let found = hooks.get(&ifindex).into_iter().flatten();
    found.map(Hook::from).collect()
}
