//! Source-specific joins, for which the socket crates have no call on IPv6 (RFC 3678 section 5).

use std::net::Ipv6Addr;

use anyhow::{Context, Result};
use linux::multicast;
use nix::net::if_::if_nametoindex;
use socket2::Socket;

/// Joins (`source`, `multicast_address`) on an interface of the calling thread's namespace, in
/// INCLUDE mode. Closing the socket leaves.
///
/// # Errors
///
/// When there is no such interface or the kernel refuses.
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
