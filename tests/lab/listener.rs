//! Source-specific joins, for which the socket crates have no call on IPv6 (RFC 3678 section 5).

#![allow(unsafe_code, reason = "MCAST_JOIN_SOURCE_GROUP has no safe wrapper")]

use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use socket2::{SockAddr, SockAddrStorage, Socket};

/// `MCAST_JOIN_SOURCE_GROUP` of `include/uapi/linux/in.h`.
const MCAST_JOIN_SOURCE_GROUP: libc::c_int = 46;

/// `struct group_source_req`.
#[repr(C)]
struct GroupSourceRequest {
    interface: u32,
    multicast_address: SockAddrStorage,
    source: SockAddrStorage,
}

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
    let storage = |address| SockAddr::from(SocketAddrV6::new(address, 0, 0, 0)).as_storage();
    let request = GroupSourceRequest {
        interface: ifindex,
        multicast_address: storage(multicast_address),
        source: storage(source),
    };
    let size = libc::socklen_t::try_from(size_of::<GroupSourceRequest>())
        .context("Option value too large")?;
    // SAFETY: the pointer and size are those of a live value of the layout the option takes.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            MCAST_JOIN_SOURCE_GROUP,
            std::ptr::from_ref(&request).cast(),
            size,
        )
    };
    Errno::result(result)
        .with_context(|| format!("Failed to join {multicast_address} from {source}"))?;
    Ok(())
}
