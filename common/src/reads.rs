//! Layouts of the programs that count QEMU's own reads from a TAP that vhost-net serves.
//!
//! | map | key | value | written by |
//! |---|---|---|---|
//! | `READER` | 0 | [`Reader`] | agent |
//! | `READS` | descriptor of the TAP, `u32` | frames read, `u64` | agent (0), kernel |
//! | `READING` | 0 | descriptor of the current read plus 1, or 0, `u32` | kernel |
//!
//! The agent loads one object per TAP, for the time of its recording.

/// Limit of a TAP's queues, each with its own descriptor (`MAX_TAP_QUEUES` of Linux).
pub const MAX_DESCRIPTORS: u32 = 256;

/// The thread whose reads count, and this machine's convention for `read`: 40 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reader {
    /// Device of the PID namespace of `thread` (`st_dev` of `/proc/self/ns/pid`, in the kernel's
    /// encoding).
    pub namespace_device: u64,
    /// Inode of the PID namespace of `thread` (`st_ino` of `/proc/self/ns/pid`).
    pub namespace_inode: u64,
    /// Number of the system call `read`.
    pub read: u64,
    /// Offset of a system call's first argument in the kernel's `struct pt_regs`, bytes.
    pub argument_at: u64,
    /// Thread identifier of QEMU's main thread, equal to its process identifier.
    pub thread: u32,
    /// Padding, always zero.
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
