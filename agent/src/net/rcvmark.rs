//! `SO_RCVMARK`: the mark of a received packet as a control message (Linux 5.19).

#![allow(
    unsafe_code,
    reason = "no crate offers this socket option, and setsockopt(2) is a foreign call"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Number of the option in the kernel's generic `socket.h`.
const SO_RCVMARK: libc::c_int = 75;

/// Has the kernel report `skb->mark` of every packet received on `socket`.
pub(super) fn enable(socket: &impl AsFd) -> io::Result<()> {
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
