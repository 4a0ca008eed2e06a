//! The system call `bpf(2)`, for commands that aya 0.14 lacks or offers to an exclusive owner only.
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
/// Most programs on one TCX hook (`BPF_MPROG_MAX`).
const TCX_PROGRAMS: usize = 64;
/// Index of the loopback in every network namespace.
const LOOPBACK: u32 = 1;

/// Pin variant of `union bpf_attr`: 16 bytes.
#[repr(C)]
struct PinAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// Link variant of `union bpf_attr`: 4 bytes.
#[repr(C)]
struct LinkAttr {
    fd: u32,
}

/// Query variant of `union bpf_attr`: 64 bytes.
#[repr(C)]
struct QueryAttr {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    program_ids: u64,
    count: u32,
    pad: u32,
    /// Program flags, links, link flags, revision: 0, not requested.
    rest: [u64; 4],
}

const _: () = assert!(size_of::<QueryAttr>() == 64);

/// Calls `bpf(2)` and returns its result.
///
/// # Errors
///
/// The error number of the call.
///
/// # Safety
///
/// Every address in `attr` must be valid for the command.
pub unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is live and its size is given; the caller guarantees the addresses in it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    if result >= 0 {
        Ok(result)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Returns the identifiers of the programs on a TCX hook, in order; `EINVAL` if the kernel has no
/// TCX. aya requests more about each program, which needs `CAP_SYS_ADMIN`.
///
/// # Errors
///
/// The error of the kernel.
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
    // SAFETY: the address points to `count` identifiers that outlive the call.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr) }?;
    programs.truncate(attr.count as usize);
    Ok(programs)
}

/// Whether the kernel has TCX, found by a query of the loopback. A kernel that refuses this query
/// to the process also refuses to load programs, and reports the reason then.
pub fn has_tcx() -> bool {
    tcx_programs(LOOPBACK, true)
        .err()
        .is_none_or(|error| error.raw_os_error() != Some(libc::EINVAL))
}

/// Detaches the program of a pinned link from its hook (kernel 5.9). The removal of the pin would
/// do so too, but a moment later, and until then the hook stays occupied.
pub(super) fn detach_link(pin: &Path) -> io::Result<()> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let mut attr = PinAttr {
        path: path.as_ptr() as u64,
        fd: 0,
        flags: 0,
    };
    // SAFETY: the path is a live string with a final zero.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut attr) }?;
    let fd = RawFd::try_from(fd).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just opened the descriptor for this call.
    let link = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut attr = LinkAttr {
        fd: link.as_raw_fd().unsigned_abs(),
    };
    // SAFETY: the command uses no address.
    unsafe { bpf(BPF_LINK_DETACH, &mut attr) }.map(drop)
}
