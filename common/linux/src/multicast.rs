//! Multicast source filters of a socket: the protocol-independent options of RFC 3678 §5, which no
//! crate offers for IPv6.
//!
//! ```text
//! struct group_source_req  { u32 ifindex, pad[4], sockaddr_storage address, sockaddr_storage source }
//! struct group_filter      { u32 ifindex, pad[4], sockaddr_storage address, u32 mode, u32 count,
//!                            sockaddr_storage sources[count] }
//! ```

use std::io;
use std::net::Ipv6Addr;
use std::os::fd::AsFd;

use common::maps::FilterMode;

use crate::socket_option;

const MCAST_BLOCK_SOURCE: libc::c_int = 43;
const MCAST_JOIN_SOURCE_GROUP: libc::c_int = 46;
const MCAST_MSFILTER: libc::c_int = 48;
const MCAST_EXCLUDE: u32 = 0;
const MCAST_INCLUDE: u32 = 1;
const IPV6_MULTICAST_ALL: libc::c_int = 29;

/// Length of `struct sockaddr_storage`, bytes.
const ADDRESS_BYTES: usize = size_of::<libc::sockaddr_storage>();
/// Offset of the address in `struct sockaddr_in6`, after family, port and flow information.
const ADDRESS_OFFSET: usize = 8;

/// Joins one source of a multicast address (INCLUDE).
///
/// # Errors
///
/// The error of `setsockopt(2)`; `ENOBUFS` and `ENOMEM` mean that a limit of the socket is reached.
pub fn join_source(
    socket: &impl AsFd,
    ifindex: u32,
    multicast_address: Ipv6Addr,
    source: Ipv6Addr,
) -> io::Result<()> {
    let request = source_request(ifindex, multicast_address, source);
    set(socket, MCAST_JOIN_SOURCE_GROUP, &request)
}

/// Blocks one source of a multicast address that the socket has joined for any source (EXCLUDE).
///
/// # Errors
///
/// As [`join_source`].
pub fn block_source(
    socket: &impl AsFd,
    ifindex: u32,
    multicast_address: Ipv6Addr,
    source: Ipv6Addr,
) -> io::Result<()> {
    let request = source_request(ifindex, multicast_address, source);
    set(socket, MCAST_BLOCK_SOURCE, &request)
}

/// Atomically replaces filter mode and source list of a multicast address that the socket has
/// joined.
///
/// # Errors
///
/// As [`join_source`].
pub fn set_filter(
    socket: &impl AsFd,
    ifindex: u32,
    multicast_address: Ipv6Addr,
    filter_mode: FilterMode,
    sources: &[Ipv6Addr],
) -> io::Result<()> {
    let mode = match filter_mode {
        FilterMode::Include => MCAST_INCLUDE,
        FilterMode::Exclude => MCAST_EXCLUDE,
    };
    let count = u32::try_from(sources.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut filter = head(ifindex, multicast_address);
    filter.extend(mode.to_ne_bytes());
    filter.extend(count.to_ne_bytes());
    filter.extend(sources.iter().flat_map(|source| socket_address(*source)));
    set(socket, MCAST_MSFILTER, &filter)
}

/// Restricts a socket to the multicast addresses that the socket itself has joined
/// (`IPV6_MULTICAST_ALL` 0).
///
/// # Errors
///
/// The error of `setsockopt(2)`.
pub fn receive_own_joins_only(socket: &impl AsFd) -> io::Result<()> {
    socket_option::set_number(socket, libc::IPPROTO_IPV6, IPV6_MULTICAST_ALL, 0)
}

fn set(socket: &impl AsFd, option: libc::c_int, value: &[u8]) -> io::Result<()> {
    socket_option::set(socket, libc::IPPROTO_IPV6, option, value)
}

fn source_request(ifindex: u32, multicast_address: Ipv6Addr, source: Ipv6Addr) -> Vec<u8> {
    let mut request = head(ifindex, multicast_address);
    request.extend(socket_address(source));
    request
}

/// Builds the common beginning of both structures.
fn head(ifindex: u32, multicast_address: Ipv6Addr) -> Vec<u8> {
    let mut head = ifindex.to_ne_bytes().to_vec();
    head.extend([0; 4]);
    head.extend(socket_address(multicast_address));
    head
}

/// Builds a `struct sockaddr_storage` with a `struct sockaddr_in6`.
fn socket_address(address: Ipv6Addr) -> [u8; ADDRESS_BYTES] {
    const ADDRESS_END: usize = ADDRESS_OFFSET + 16;
    let mut bytes = [0; ADDRESS_BYTES];
    bytes[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
    bytes[ADDRESS_OFFSET..ADDRESS_END].copy_from_slice(&address.octets());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_layout_of_the_kernel() {
        let multicast_address = "ff3e::1".parse().unwrap();
        let source: Ipv6Addr = "2001:db8::5".parse().unwrap();
        let request = source_request(7, multicast_address, source);
        assert_eq!(request.len(), 264);
        assert_eq!(request[..4], 7_u32.to_ne_bytes());
        assert_eq!(request[8..10], 10_u16.to_ne_bytes());
        assert_eq!(request[16..32], multicast_address.octets());
        assert_eq!(request[144..160], source.octets());
        assert_eq!(head(7, multicast_address).len(), 136);
    }
}
