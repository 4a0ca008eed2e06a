//! What a QEMU itself reads of a TAP that vhost-net serves.
//!
//! | map | key | value | written by |
//! |---|---|---|---|
//! | `READER` | 0 | [`Reader`] | agent |
//! | `READS` | descriptor of the TAP, `u32` | frames that were read of it, `u64` | agent (0), kernel |
//! | `READING` | 0 | descriptor that is being read plus 1, or 0, `u32` | kernel |
//!
//! The object is loaded for one TAP, while that is recorded.

/// Most queues of a TAP, each of which has its descriptor (`MAX_TAP_QUEUES` of Linux).
pub const MAX_DESCRIPTORS: u32 = 256;

/// The thread whose reads are counted, and how this machine calls `read`. 40 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reader {
    /// Device of the PID namespace in which the thread's number is meant (`st_dev` of
    /// `/proc/self/ns/pid`, in the kernel's own encoding).
    pub namespace_device: u64,
    /// Inode of that namespace.
    pub namespace_inode: u64,
    /// Number of the system call `read`.
    pub read: u64,
    /// Where a system call's first argument stands in the kernel's `struct pt_regs`, bytes.
    pub argument_at: u64,
    /// Number of the thread, which is also the number of its process.
    pub thread: u32,
    /// Zero.
    pub pad: u32,
}

const _: () = assert!(size_of::<Reader>() == 40);

#[cfg(feature = "pod")]
#[allow(
    unsafe_code,
    reason = "aya's marker for types that may be copied to and from the kernel"
)]
mod pod {
    use super::Reader;

    // SAFETY: `#[repr(C)]`, `Copy`, no padding (by the size asserted above), every bit pattern valid.
    unsafe impl aya::Pod for Reader {}
}
