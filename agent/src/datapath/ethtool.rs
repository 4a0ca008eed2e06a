//! Requests to an interface's driver (`SIOCETHTOOL`).
#![allow(unsafe_code, reason = "SIOCETHTOOL is an ioctl")]

use std::ffi::CStr;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// A structure of `ethtool.h` that begins with its command number and is at least as large as what
/// the kernel writes.
pub(super) trait Command {}

/// `struct ifreq` with a data pointer: 40 bytes.
#[repr(C)]
struct Request {
    name: [u8; libc::IF_NAMESIZE],
    data: *mut libc::c_void,
    pad: [u8; 16],
}

const _: () = assert!(size_of::<Request>() == 40);

/// Sends a command and receives the answer, in the network namespace of the calling thread.
pub(super) fn ask<T: Command>(interface: &str, command: &mut T) -> io::Result<()> {
    let mut name = [0; libc::IF_NAMESIZE];
    name.get_mut(..interface.len())
        .filter(|_| interface.len() < libc::IF_NAMESIZE)
        .ok_or(io::ErrorKind::InvalidInput)?
        .copy_from_slice(interface.as_bytes());
    let mut request = Request {
        name,
        data: (&raw mut *command).cast(),
        pad: [0; 16],
    };
    let socket = socket(
        AddressFamily::Inet6,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: `request` and the command that it points to are live. The command is one of the
    // structures above, whose first field tells the kernel the size.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Returns the text before the first NUL.
pub(super) fn text(bytes: &[u8]) -> String {
    CStr::from_bytes_until_nul(bytes).map_or_else(
        |_| String::new(),
        |text| text.to_string_lossy().into_owned(),
    )
}
