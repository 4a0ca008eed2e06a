//! Socket options that no crate offers: `SO_RCVMARK` (Linux 5.19) and `SO_MEMINFO`.

#![allow(
    unsafe_code,
    reason = "no crate offers these options, and setsockopt(2) and getsockopt(2) are foreign calls"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Number of the option in the kernel's generic `socket.h`.
const SO_RCVMARK: libc::c_int = 75;
/// Numbers that `SO_MEMINFO` gives.
const SK_MEMINFO_VARS: usize = 9;
/// Which of them is that of dropped packets.
const SK_MEMINFO_DROPS: usize = 8;

/// Has the kernel report `skb->mark` of every packet received on `socket`.
pub(super) fn receive_mark(socket: &impl AsFd) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the descriptor is open while it is borrowed; `on` outlives the call, and the length
    // given is its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_RCVMARK,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Packets that the kernel had for the socket and has not put there: its filter did not take them,
/// or there was no room. Wraps.
pub(super) fn drops(socket: &impl AsFd) -> io::Result<u32> {
    let mut numbers = [0_u32; SK_MEMINFO_VARS];
    let mut length = size_of_val(&numbers) as libc::socklen_t;
    // SAFETY: the descriptor is open while it is borrowed; the array outlives the call, and the
    // length given is its size.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            numbers.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    match numbers.get(SK_MEMINFO_DROPS) {
        Some(&drops) if result == 0 => Ok(drops),
        _ => Err(io::Error::last_os_error()),
    }
}
