//! System calls of the guest that no crate of the workspace wraps.
#![allow(
    unsafe_code,
    reason = "scheduling and module loading have no safe wrapper here"
)]

use std::{fs::File, io, os::fd::AsRawFd};

use libc::c_int;

/// Gives the calling thread real-time priority (`SCHED_FIFO`), so that the thread runs before every
/// thread without real-time priority.
///
/// # Errors
///
/// The kernel's error: `EPERM` if the thread lacks the privilege.
pub fn run_first() -> io::Result<()> {
    run_at(1)
}

/// Gives the calling thread a higher real-time priority than [`run_first`].
///
/// # Errors
///
/// As for [`run_first`].
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

/// Loads a kernel module from an open, uncompressed file. A module that is already loaded is no
/// error.
///
/// # Errors
///
/// The kernel's error: `ENOENT` for an unknown symbol, `ENOEXEC` for a module of another kernel.
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
