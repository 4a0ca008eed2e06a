//! System calls of the guest that no crate of the workspace wraps.
#![allow(
    unsafe_code,
    reason = "socket options and module loading have no safe wrapper here"
)]

use std::{
    fs::File,
    io, mem,
    net::{Ipv6Addr, SocketAddrV6},
    os::fd::{AsFd, AsRawFd},
};

use libc::{c_int, c_void, sockaddr_in6, sockaddr_storage, socklen_t};

/// Listen to one source of a multicast address (RFC 3678 section 5.1).
pub const MCAST_JOIN_SOURCE_GROUP: c_int = 46;
/// Stop listening to one source of a joined multicast address (RFC 3678 section 5.1).
pub const MCAST_BLOCK_SOURCE: c_int = 43;
/// Whether a socket also receives what other sockets joined; zero to receive only its own joins.
const IPV6_MULTICAST_ALL: c_int = 29;

/// `struct group_source_req` of RFC 3678 section 5.1: 264 bytes, 4 of padding after the index.
#[repr(C)]
struct GroupSourceReq {
    interface: u32,
    group: sockaddr_storage,
    source: sockaddr_storage,
}

/// Applies a source to a multicast address on a socket.
///
/// `option` is [`MCAST_JOIN_SOURCE_GROUP`] or [`MCAST_BLOCK_SOURCE`].
///
/// # Errors
///
/// The kernel's: `ENODEV` for an unknown interface, `ENOBUFS` for too many sources.
pub fn source_filter(
    socket: impl AsFd,
    option: c_int,
    ifindex: u32,
    multicast_address: Ipv6Addr,
    source: Ipv6Addr,
) -> io::Result<()> {
    let request = GroupSourceReq {
        interface: ifindex,
        group: storage(multicast_address),
        source: storage(source),
    };
    set_option(socket, option, &request)
}

/// Limits a socket to the multicast addresses it joined itself.
///
/// # Errors
///
/// The kernel's; none is known for a UDP socket over IPv6.
pub fn receive_own_joins_only(socket: impl AsFd) -> io::Result<()> {
    let off: c_int = 0;
    set_option(socket, IPV6_MULTICAST_ALL, &off)
}

/// Gives the calling thread real-time priority (`SCHED_FIFO`): it runs whenever it can.
///
/// # Errors
///
/// The kernel's: `EPERM` without the right to do so.
pub fn run_first() -> io::Result<()> {
    run_at(1)
}

/// The same, before those that [`run_first`].
///
/// # Errors
///
/// As there.
pub fn run_before_all() -> io::Result<()> {
    run_at(2)
}

fn run_at(sched_priority: c_int) -> io::Result<()> {
    let parameters = libc::sched_param { sched_priority };
    // SAFETY: the structure lives through the call, and 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Loads a kernel module from an open, uncompressed file. A module that is loaded already is fine.
///
/// # Errors
///
/// The kernel's: `ENOENT` for an unknown symbol, `ENOEXEC` for a module of another kernel.
pub fn load_module(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for the whole call and the empty string is NUL-terminated.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    match io::Error::last_os_error() {
        _ if result == 0 => Ok(()),
        error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        error => Err(error),
    }
}

fn storage(address: Ipv6Addr) -> sockaddr_storage {
    let address = socket2::SockAddr::from(SocketAddrV6::new(address, 0, 0, 0));
    // SAFETY: an all-zero sockaddr_storage is a valid value.
    let mut storage: sockaddr_storage = unsafe { mem::zeroed() };
    debug_assert!(address.len() as usize <= size_of::<sockaddr_in6>());
    // SAFETY: a sockaddr_in6 is smaller than a sockaddr_storage and the two do not overlap.
    unsafe {
        std::ptr::copy_nonoverlapping(
            address.as_ptr().cast::<u8>(),
            (&raw mut storage).cast::<u8>(),
            address.len() as usize,
        );
    }
    storage
}

fn set_option<T>(socket: impl AsFd, option: c_int, value: &T) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `value`, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_IPV6,
            option,
            std::ptr::from_ref(value).cast::<c_void>(),
            size_of::<T>() as socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
