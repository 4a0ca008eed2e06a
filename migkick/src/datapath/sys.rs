//! Calls that need `unsafe`: records of the ring buffer, and taking a link off its hook, which aya 0.14
//! does only for its owner.
#![allow(unsafe_code, reason = "records and bpf(2) are plain memory")]

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use common::mat::maps::Held;

const BPF_OBJ_GET: libc::c_int = 7;
const BPF_LINK_DETACH: libc::c_int = 34;

/// Reads a record of `HELD`; `None` when there are too few bytes.
pub(super) fn held(bytes: &[u8]) -> Option<Held> {
    let bytes = bytes.get(..size_of::<Held>())?;
    // SAFETY: there are enough bytes, and any are a record.
    Some(unsafe { bytes.as_ptr().cast::<Held>().read_unaligned() })
}

/// `BPF_OBJ_GET` part of `union bpf_attr`: 16 bytes.
#[repr(C)]
struct PinAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Takes the program of a pinned link off its hook (kernel 5.9). Without this it would go a little
/// later than the pin.
pub(super) fn detach_link(pin: &Path) -> io::Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let attr = PinAttr {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    // SAFETY: the path is a live string that ends with a zero.
    let link = RawFd::try_from(unsafe { bpf(BPF_OBJ_GET, &attr) }?)
        .map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just opened it for this call.
    let link = unsafe { OwnedFd::from_raw_fd(link) };
    // SAFETY: the attribute of this command is the descriptor alone.
    unsafe { bpf(BPF_LINK_DETACH, &link.as_raw_fd().unsigned_abs()) }.map(drop)
}

/// # Safety
///
/// What the attribute points to is live and of the form that the command wants.
unsafe fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<libc::c_long> {
    // SAFETY: the attribute is live and its length given; the caller answers for the rest.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attr, size_of::<T>()) };
    if result >= 0 {
        Ok(result)
    } else {
        Err(io::Error::last_os_error())
    }
}
