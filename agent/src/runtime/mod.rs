//! The running agent: connects the protocol to the kernel, the network, libvirt and the operator.
//!
//! ```text
//!   Links ──────┐ handle_*          poll_output ┌──▶ VmSocket, Peers
//!   Events ─────┤                               ├──▶ Memberships, Mdb
//!   VmSocket ───┼─────────▶ proto::Agent ───────┼──▶ Datapath
//!   Peers ──────┤                               ├──▶ Libvirt
//!   Libvirt ────┤                               ├──▶ Gates
//!   Gates ──────┤                               ├──▶ LinkAddresses, Neighbours
//!   LinkAddr. ──┤                               └──▶ operator's replies
//!   Hooks ──────┤
//!   operator ───┘
//! ```
//!
//! [`relay`], [`mcs`] and [`ims`] are the same for the other roles.
//!
//! One task owns everything (`event_loop`); what blocks for long runs elsewhere and comes back as
//! an event. What is pinned goes on working when this ends, however it ends.

mod event_loop;
pub mod gates;
pub mod hooks;
pub mod ims;
pub mod mcs;
mod perform;
mod registrar;
pub mod relay;
mod start;
mod stream_reads;
pub mod trace;
mod turns;
mod views;

use std::collections::BTreeMap;
use std::io;

use crate::config::{Config, Peer};
use crate::control::report::Hook;
use crate::control::server::ControlError;
use crate::datapath::{DatapathError, HookView};
use crate::hypervisor::libvirt::{LibvirtError, MigrateFlagsError};
use crate::net::addresses::AddressesError;
use crate::net::link_addresses::LinkAddressesError;
use crate::net::links::LinksError;
use crate::net::mdb::MdbError;
use crate::net::peers::{Endpoint, Peers, PeersError};
use crate::net::tls::TlsError;
use crate::net::vm_socket::VmSocketError;
use crate::role::Role;
use crate::shutdown::Shutdown;
use crate::telemetry;
use gates::GatesError;

/// Why the agent cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Kernel programs and maps.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// Gates of TAPs.
    #[error(transparent)]
    Gates(#[from] GatesError),
    /// Ports of the bridge.
    #[error(transparent)]
    Links(#[from] LinksError),
    /// Unicast addresses of moving VMs.
    #[error(transparent)]
    LinkAddresses(#[from] LinkAddressesError),
    /// The bridge's multicast database.
    #[error(transparent)]
    Mdb(#[from] MdbError),
    /// Addresses of the bridge.
    #[error(transparent)]
    Addresses(#[from] AddressesError),
    /// The bridge has no address that VMs can be given a prefix from.
    #[error(
        "Bridge {bridge} has no global IPv6 address; give it one, or set agent.address and agent.prefix"
    )]
    NoAddress {
        /// Its name.
        bridge: String,
    },
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Connections to peers.
    #[error(transparent)]
    Peers(#[from] PeersError),
    /// The socket for VMs.
    #[error(transparent)]
    VmSocket(#[from] VmSocketError),
    /// The operator's socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// libvirt.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// Flags of migrations.
    #[error(transparent)]
    MigrateFlags(#[from] MigrateFlagsError),
    /// The system refuses something basic.
    #[error("The system refuses {what}: {error}; run the agent as root")]
    System {
        /// What.
        what: &'static str,
        /// What it said.
        error: io::Error,
    },
}

/// Runs the agent until it is told to stop.
///
/// # Errors
///
/// See [`RuntimeError`]: at the start, and later when the bridge or the data path is lost.
pub async fn run(config: Config) -> Result<(), RuntimeError> {
    let refused = |what| move |error| RuntimeError::System { what, error };
    let mut shutdown = Shutdown::new().map_err(refused("signal handlers"))?;
    let mut agent = start::start(&config).await?;
    // Not under systemd: nobody to notify, which is no failure.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tokio::select! {
        result = agent.run() => result,
        signal = shutdown.recv() => {
            tracing::info!(signal, "Stopping; pinned programs and maps stay");
            Ok(())
        }
    }
}

/// A peer of the configuration by its name, as connections are made to it.
fn endpoint(peer: &Peer, role: Role) -> (String, Endpoint) {
    let address = peer.address.to_string();
    (peer.name.to_string(), Endpoint { role, address })
}

/// A role's own counters and those of its connections, as far as they are not zero.
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

/// The programs on an interface, for the operator.
fn hooks_of(hooks: &BTreeMap<u32, Vec<HookView>>, ifindex: u32) -> Vec<Hook> {
    let found = hooks.get(&ifindex).into_iter().flatten();
    found.map(Hook::from).collect()
}
