//! The running relay: connects its protocol to the kernel, the network and the operator.
//!
//! ```text
//!   Events ─────┐ handle_*                poll_output ┌──▶ Peers
//!   Peers ──────┼─────────▶ relay::RelayServer ───────┼──▶ StaticJoins, Memberships
//!   Neighbours ─┤                                     ├──▶ Datapath
//!   operator ───┘                                     └──▶ Neighbours
//! ```
//!
//! What is pinned, the joins that the kernel holds and the next hops that it keeps known go on
//! without this process, for as long as the leases last.

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

/// Why the relay cannot start, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// Kernel programs and maps.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// Addresses of the interfaces.
    #[error(transparent)]
    Addresses(#[from] AddressesError),
    /// The first interface has no address to send from.
    #[error("Interface {interface} has no global IPv6 address; give it one, or set relay.address")]
    NoAddress {
        /// Its name.
        interface: String,
    },
    /// Joins.
    #[error(transparent)]
    StaticJoin(#[from] StaticJoinError),
    /// Certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Connections to agents.
    #[error(transparent)]
    Peers(#[from] PeersError),
    /// The operator's socket.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The system refuses something basic.
    #[error("The system refuses {what}: {error}; run the relay as root")]
    System {
        /// What.
        what: &'static str,
        /// What it said.
        error: io::Error,
    },
}

/// Runs the relay until it is told to stop.
///
/// # Errors
///
/// See [`RelayError`]: at the start, and later when the data path is lost.
pub async fn run(config: RelayConfig) -> Result<(), RelayError> {
    let refused = |what| move |error| RelayError::System { what, error };
    let mut shutdown = Shutdown::new().map_err(refused("signal handlers"))?;
    let mut relay = start::start(&config)?;
    // Not under systemd: nobody to notify, which is no failure.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tokio::select! {
        result = relay.run() => result,
        signal = shutdown.recv() => {
            tracing::info!(signal, "Stopping; what is pinned and joined stays until its leases end");
            Ok(())
        }
    }
}
