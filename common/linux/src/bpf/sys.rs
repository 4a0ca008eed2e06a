//! The system call `bpf(2)`, with commands that aya 0.14 lacks or has only for an exclusive owner.
#![allow(unsafe_code, reason = "bpf(2) is a raw system call")]

use std::ffi::CString;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_LINK_DETACH: libc::c_int = 34;

const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
/// Most programs at one TCX hook (`BPF_MPROG_MAX`).
const TCX_PROGRAMS: usize = 64;
/// Interface index of the loopback, in every network namespace.
const LOOPBACK: u32 = 1;

/// Pin part of `union bpf_attr`: 16 bytes.
#[repr(C)]
struct PinAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Link part of `union bpf_attr`: 4 bytes.
#[repr(C)]
struct LinkAttr {
    fd: u32,
}

/// Query part of `union bpf_attr`: 64 bytes.
#[repr(C)]
struct QueryAttr {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    count: u32,
    pad: u32,
    /// Flags of programs, links, flags of links, revision: not asked for.
    rest: [u64; 4],
}

const _: () = assert!(size_of::<QueryAttr>() == 64);

/// Calls `bpf(2)` and returns what the kernel returns.
///
/// # Errors
///
/// What the kernel says.
///
/// # Safety
///
/// Every address in `attr` must be valid for what the command does with it.
pub unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is live and its size is given; what it points to is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    if result >= 0 {
        Ok(result)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Identifiers of the programs at a TCX hook, in their order. `EINVAL` where the kernel has no TCX. aya
/// asks for more of each program, which takes `CAP_SYS_ADMIN`.
///
/// # Errors
///
/// What the kernel says.
pub fn tcx_programs(ifindex: u32, is_ingress: bool) -> io::Result<Vec<u32>> {
    let mut programs = vec![0_u32; TCX_PROGRAMS];
    let mut attr = QueryAttr {
        target_ifindex: ifindex,
        attach_type: if is_ingress {
            BPF_TCX_INGRESS
        } else {
            BPF_TCX_EGRESS
        },
        query_flags: 0,
        attach_flags: 0,
        program_ids: programs.as_mut_ptr() as u64,
        count: programs.len() as u32,
        pad: 0,
        rest: [0; 4],
    };
    // SAFETY: the address is that of `count` identifiers, which live longer than the call.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr) }?;
    programs.truncate(attr.count as usize);
    Ok(programs)
}

/// Whether programs can be attached by TCX: the kernel is asked who is there on the loopback. A kernel
/// that does not let this process ask does not let it load programs, either, and says so then.
pub fn has_tcx() -> bool {
    tcx_programs(LOOPBACK, true)
        .err()
        .is_none_or(|error| error.raw_os_error() != Some(libc::EINVAL))
}

/// Takes the program of a pinned link off its hook (kernel 5.9). Without the pin the kernel would
/// do so too, but a moment later, and until then the hook is taken.
pub(super) fn detach_link(pin: &Path) -> io::Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attr = PinAttr {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    // SAFETY: the path is a live string that ends with a zero.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut attr) }?;
    let fd = RawFd::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just opened it for this call.
    let link = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut attr = LinkAttr {
        fd: link.as_raw_fd().unsigned_abs(),
    };
    // SAFETY: the command takes no address.
    unsafe { bpf(BPF_LINK_DETACH, &mut attr) }.map(drop)
}
