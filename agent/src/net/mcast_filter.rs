//! Source filters of a socket: the protocol-independent calls of RFC 3678 §5.
#![allow(
    unsafe_code,
    reason = "no crate wraps MCAST_JOIN_SOURCE_GROUP and MCAST_MSFILTER for IPv6"
)]

use std::io;
use std::mem::size_of;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, AsRawFd};

use common::maps::FilterMode;

/// `struct sockaddr_storage` holding a `struct sockaddr_in6`: 128 bytes, align 8.
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Address {
    family: u16,
    port: u16,
    flowinfo: u32,
    address: [u8; 16],
    scope_id: u32,
    padding: [u8; 100],
}

impl Address {
    fn new(address: Ipv6Addr) -> Self {
        Self {
            family: libc::AF_INET6 as u16,
            port: 0,
            flowinfo: 0,
            address: address.octets(),
            scope_id: 0,
            padding: [0; 100],
        }
    }
}

/// `struct group_source_req`: 264 bytes.
#[repr(C)]
struct GroupSourceRequest {
    ifindex: u32,
    padding: u32,
    multicast_address: Address,
    source: Address,
}

/// Head of `struct group_filter`, before its sources: 144 bytes.
#[repr(C)]
struct GroupFilterHead {
    ifindex: u32,
    padding: u32,
    multicast_address: Address,
    filter_mode: u32,
    source_count: u32,
}

const _: () = {
    assert!(size_of::<Address>() == size_of::<libc::sockaddr_storage>());
    assert!(size_of::<GroupSourceRequest>() == 264);
    assert!(size_of::<GroupFilterHead>() == 144);
};

const MCAST_JOIN_SOURCE_GROUP: libc::c_int = 46;
const MCAST_MSFILTER: libc::c_int = 48;
const MCAST_EXCLUDE: u32 = 0;
const MCAST_INCLUDE: u32 = 1;

/// Joins one source of a multicast address (INCLUDE).
///
/// # Errors
///
/// What `setsockopt(2)` says; `ENOBUFS` and `ENOMEM` stand for a limit of the socket.
pub(super) fn join_source(
    socket: &impl AsFd,
    ifindex: u32,
    multicast_address: Ipv6Addr,
    source: Ipv6Addr,
) -> io::Result<()> {
    let request = GroupSourceRequest {
        ifindex,
        padding: 0,
        multicast_address: Address::new(multicast_address),
        source: Address::new(source),
    };
    // SAFETY: the value is a live `repr(C)` struct of the layout asserted above, without
    // uninitialised bytes, and the length is its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_IPV6,
            MCAST_JOIN_SOURCE_GROUP,
            (&raw const request).cast(),
            size_of::<GroupSourceRequest>() as libc::socklen_t,
        )
    };
    check(result)
}

/// Replaces mode and sources of a multicast address that the socket has joined, in one step.
///
/// # Errors
///
/// What `setsockopt(2)` says; `ENOBUFS` and `ENOMEM` stand for a limit of the socket.
pub(super) fn set_filter(
    socket: &impl AsFd,
    ifindex: u32,
    multicast_address: Ipv6Addr,
    filter_mode: FilterMode,
    sources: &[Ipv6Addr],
) -> io::Result<()> {
    let head = GroupFilterHead {
        ifindex,
        padding: 0,
        multicast_address: Address::new(multicast_address),
        filter_mode: match filter_mode {
            FilterMode::Include => MCAST_INCLUDE,
            FilterMode::Exclude => MCAST_EXCLUDE,
        },
        source_count: u32::try_from(sources.len()).unwrap_or(u32::MAX),
    };
    let mut bytes =
        Vec::with_capacity(size_of::<GroupFilterHead>() + sources.len() * size_of::<Address>());
    append(&mut bytes, &head);
    for source in sources {
        append(&mut bytes, &Address::new(*source));
    }
    // SAFETY: the pointer and length describe the live vector; the kernel copies from it.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_IPV6,
            MCAST_MSFILTER,
            bytes.as_ptr().cast(),
            bytes.len() as libc::socklen_t,
        )
    };
    check(result)
}

/// Appends the bytes of one of the structs of this file.
fn append<T>(bytes: &mut Vec<u8>, value: &T) {
    // SAFETY: only called with the `repr(C)` structs above, whose padding is in named fields, so
    // that all `size_of::<T>()` bytes are initialised.
    let raw = unsafe { std::slice::from_raw_parts((&raw const *value).cast(), size_of::<T>()) };
    bytes.extend_from_slice(raw);
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
