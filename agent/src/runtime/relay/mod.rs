//! The running relay: connects its protocol to the kernel, the network and the operator.
//!
//! ```text
//!   Events ─────┐ handle_*                poll_output ┌──▶ Peers
//!   Peers ──────┼─────────▶ relay::RelayServer ───────┼──▶ StaticJoins, Memberships
//!   Neighbours ─┤                                     ├──▶ Datapath
//!   operator ───┘                                     └──▶ Neighbours
//! ```
//!
//! Pinned maps and programs, and the joins and next hops that the kernel holds, keep working
//! without this process until the leases end.

mod event_loop;
mod interface;
mod perform;
mod start;
mod views;

use std::io;

use crate::config::RelayConfig;
use crate::control::server::ControlError;
use crate::datapath::DatapathError;
use crate::net::addresses::AddressesError;
use crate::net::peers::PeersError;
use crate::net::static_join::StaticJoinError;
use crate::net::tls::TlsError;
use crate::shutdown::Shutdown;

/// Why the relay cannot start or continue.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// Kernel programs or maps failed.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// Reading the interfaces' addresses failed.
    #[error(transparent)]
    Addresses(#[from] AddressesError),
    /// The first interface has no source address for the copies.
    #[error("Interface {interface} has no global IPv6 address; give it one, or set relay.address")]
    NoAddress {
        /// Name of the interface.
        interface: String,
    },
    /// A join failed.
    #[error(transparent)]
    StaticJoin(#[from] StaticJoinError),
    /// The TLS files are unusable.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Connections to agents failed.
    #[error(transparent)]
    Peers(#[from] PeersError),
    /// The operator's socket failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A system call that every relay needs failed.
    #[error("The system refuses {what}: {error}; run the relay as root")]
    System {
        /// Refused operation, as the error sentence names it.
        what: &'static str,
        /// Error of the system call.
        error: io::Error,
    },
}

/// Runs the relay until a signal stops it.
///
/// # Errors
///
/// See [`RelayError`]: at the start, and later if the relay loses the datapath.
pub async fn run(config: RelayConfig) -> Result<(), RelayError> {
    let refused = |what| move |error| RelayError::System { what, error };
    let mut shutdown = Shutdown::new().map_err(refused("signal handlers"))?;
    let mut relay = start::start(&config)?;
    // Without systemd nobody listens, which is no failure.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tokio::select! {
        result = relay.run() => result,
        signal = shutdown.recv() => {
            tracing::info!(signal, "Stopping; what is pinned and joined stays until its leases end");
            Ok(())
        }
    }
}
