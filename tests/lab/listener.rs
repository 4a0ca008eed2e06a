//! Source-specific joins on IPv6 (RFC 3678 section 5), which the socket crates do not offer.

use std::net::Ipv6Addr;

use anyhow::{Context, Result};
use linux::multicast;
use nix::net::if_::if_nametoindex;
use socket2::Socket;

/// Joins (`source`, `multicast_address`) in INCLUDE mode on an interface of the calling thread's
/// namespace. Closing the socket leaves the address.
///
/// # Errors
///
/// When the interface does not exist or the kernel refuses the join.
pub fn join_source(
    socket: &Socket,
    interface: &str,
    multicast_address: Ipv6Addr,
    source: Ipv6Addr,
) -> Result<()> {
    let ifindex =
        if_nametoindex(interface).with_context(|| format!("There is no interface {interface}"))?;
    multicast::join_source(socket, ifindex, multicast_address, source)
        .with_context(|| format!("Failed to join {multicast_address} from {source}"))
}
