//! The running agent: connects the protocol to the kernel, the network, libvirt and the operator.
//!
//! ```text
//!   Bridges ────┐ handle_*          poll_output ┌──▶ Bridges: datagrams, joins, MDB, addresses
//!   Events ─────┤                               ├──▶ Peers
//!   Peers ──────┼─────────▶ proto::Agent ───────┼──▶ Datapath
//!   Libvirt ────┤                               ├──▶ Libvirt
//!   Gates ──────┤                               ├──▶ Gates
//!   Hooks ──────┤                               ├──▶ Neighbours
//!   operator ───┘                               └──▶ operator's replies
//! ```
//!
//! One task owns all of these (`event_loop`). `bridge` has the parts that each bridge has for
//! itself. Blocking work runs elsewhere and returns its result as an event. Pinned maps and programs
//! keep working after the agent ends, for whatever reason.

mod bridge;
mod event_loop;
pub mod gates;
pub mod hooks;
mod perform;
mod start;
mod turns;
mod views;

use std::io;

use crate::config::Config;
use crate::control::server::ControlError;
use crate::datapath::DatapathError;
use crate::hypervisor::libvirt::{LibvirtError, MigrateFlagsError};
use crate::net::addresses::AddressesError;
use crate::net::link_addresses::LinkAddressesError;
use crate::net::links::LinksError;
use crate::net::mdb::MdbError;
use crate::net::peers::PeersError;
use crate::net::tls::TlsError;
use crate::net::vm_socket::VmSocketError;
use crate::shutdown::Shutdown;
use gates::GatesError;

/// Error that prevents or ends the agent's run.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Loading, attaching or locking the eBPF programs and maps failed.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// Making the gates of TAPs failed.
    #[error(transparent)]
    Gates(#[from] GatesError),
    /// Watching the bridge's ports failed.
    #[error(transparent)]
    Links(#[from] LinksError),
    /// A socket or netlink request for the unicast addresses of moving VMs failed.
    #[error(transparent)]
    LinkAddresses(#[from] LinkAddressesError),
    /// A request for the bridge's multicast database (MDB) failed.
    #[error(transparent)]
    Mdb(#[from] MdbError),
    /// Reading the bridge's addresses failed.
    #[error(transparent)]
    Addresses(#[from] AddressesError),
    /// The bridge has no global address, so arriving VMs have no prefix.
    #[error(
        "Bridge {bridge} has no global IPv6 address; give it one, or set agent.address and agent.prefix"
    )]
    NoAddress {
        /// Name of the bridge.
        bridge: String,
    },
    /// The TLS files are unusable.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Listening for peers failed, or the configured peers are unusable.
    #[error(transparent)]
    Peers(#[from] PeersError),
    /// Opening or reading the socket for the VMs' datagrams failed.
    #[error(transparent)]
    VmSocket(#[from] VmSocketError),
    /// Opening or serving the operator's socket failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// libvirt's event loop or thread cannot start.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// The migration flags contradict each other.
    #[error(transparent)]
    MigrateFlags(#[from] MigrateFlagsError),
    /// A system call that every agent needs failed.
    #[error("The system refuses {what}: {error}; run the agent as root")]
    System {
        /// Refused operation, as the error sentence names it.
        what: &'static str,
        /// Error that the system call returned.
        error: io::Error,
    },
}

/// Runs the agent until a signal stops it.
///
/// # Errors
///
/// See [`RuntimeError`]: at the start, and later if the agent loses the bridge or the datapath.
pub async fn run(config: Config) -> Result<(), RuntimeError> {
    let refused = |what| move |error| RuntimeError::System { what, error };
    let mut shutdown = Shutdown::new().map_err(refused("signal handlers"))?;
    let mut agent = start::start(&config).await?;
    // The send fails without systemd, which is fine.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tokio::select! {
        result = agent.run() => result,
        signal = shutdown.recv() => {
            tracing::info!(signal, "Stopping; pinned programs and maps stay");
            Ok(())
        }
    }
}
