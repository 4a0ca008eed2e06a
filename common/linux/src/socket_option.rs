//! Socket options that no crate offers, by raw `setsockopt(2)` and `getsockopt(2)`.
#![allow(
    unsafe_code,
    reason = "no crate offers these options, and setsockopt(2) and getsockopt(2) are foreign calls"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// `SO_RCVMARK` (Linux 5.19) in the kernel's generic `socket.h`.
const SO_RCVMARK: libc::c_int = 75;
/// Count of the numbers that `SO_MEMINFO` returns.
const SK_MEMINFO_VARS: usize = 9;
/// Index of the number of dropped packets among them.
const SK_MEMINFO_DROPS: usize = 8;

/// Makes the kernel report `skb->mark` of every packet received on `socket`.
///
/// # Errors
///
/// The error of `setsockopt(2)`; kernels before 5.19 lack the option.
pub fn receive_mark(socket: &impl AsFd) -> io::Result<()> {
    set_number(socket, libc::SOL_SOCKET, SO_RCVMARK, 1)
}

/// Returns the number of packets for this socket that the kernel dropped, because the socket's
/// filter refused them or the buffer was full. The counter wraps.
///
/// # Errors
///
/// The error of `getsockopt(2)`.
pub fn drops(socket: &impl AsFd) -> io::Result<u32> {
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

/// Sets an option that has a number as its value.
pub(crate) fn set_number(
    socket: &impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    set(socket, level, option, &value.to_ne_bytes())
}

/// Sets an option that has plain bytes without pointers as its value.
pub(crate) fn set(
    socket: &impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: &[u8],
) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the descriptor is open while it is borrowed; the bytes outlive the call, and the
    // length given is their length.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            value.as_ptr().cast(),
            length,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
