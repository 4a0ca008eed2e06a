//! Packet access: the only place that touches an skb.

#![allow(
    unsafe_code,
    reason = "packets are reached through raw pointers and helpers"
)]

use core::mem::MaybeUninit;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_skb_load_bytes};
use aya_ebpf::programs::TcContext;
use common::packet::{PacketRead, Truncated};

/// A frame at a TC hook.
pub(crate) struct Skb {
    skb: *mut __sk_buff,
}

/// What is known of a packet besides its bytes.
pub(crate) struct Arrival {
    /// Interface it came in by.
    pub(crate) ifindex: u32,
    /// When, `CLOCK_MONOTONIC` nanoseconds.
    pub(crate) at_ns: u64,
    /// Packets on the wire that the frame stands for; more than 1 when they were aggregated.
    pub(crate) segments: u32,
}

impl Skb {
    #[inline(always)]
    pub(crate) fn new(ctx: &TcContext) -> Self {
        Self { skb: ctx.skb.skb }
    }

    /// EtherType in network order, with a tag that stands in metadata already passed.
    #[inline(always)]
    pub(crate) fn protocol(&self) -> u32 {
        // SAFETY: the pointer is the program's context, which is valid while it runs.
        unsafe { (*self.skb).protocol }
    }

    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        // SAFETY: as in `protocol`.
        unsafe { (*self.skb).ifindex }
    }

    /// Marks the frame, for the socket that receives it in the end.
    #[inline(always)]
    pub(crate) fn set_mark(&self, mark: u32) {
        // SAFETY: as in `protocol`; the mark is writable at TC hooks.
        unsafe { (*self.skb).mark = mark }
    }

    #[inline(always)]
    pub(crate) fn arrival(&self) -> Arrival {
        // SAFETY: as in `protocol`.
        let segments = unsafe { (*self.skb).gso_segs };
        Arrival {
            ifindex: self.ifindex(),
            at_ns: now_ns(),
            segments: if segments == 0 { 1 } else { segments },
        }
    }

    /// Copies the first `length` bytes of the frame to `to`.
    ///
    /// # Safety
    ///
    /// `to` is valid for writes of `length` bytes, and `length` is not 0.
    #[inline(always)]
    pub(crate) unsafe fn copy_to(&self, to: *mut u8, length: u64) -> Result<(), Truncated> {
        // SAFETY: the caller answers for the destination; the helper checks the source.
        match unsafe { bpf_skb_load_bytes(self.skb.cast(), 0, to.cast(), length as u32) } {
            0 => Ok(()),
            _ => Err(Truncated),
        }
    }
}

impl PacketRead for Skb {
    #[inline(always)]
    fn len(&self) -> usize {
        // SAFETY: as in `protocol`.
        unsafe { (*self.skb).len as usize }
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], Truncated> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes `N` bytes to the array, or fails.
        unsafe {
            match bpf_skb_load_bytes(
                self.skb.cast(),
                offset as u32,
                bytes.as_mut_ptr().cast(),
                N as u32,
            ) {
                0 => Ok(bytes.assume_init()),
                _ => Err(Truncated),
            }
        }
    }

    #[inline(always)]
    fn vlan_metadata(&self) -> u16 {
        // SAFETY: as in `protocol`.
        unsafe {
            if (*self.skb).vlan_present == 0 {
                0
            } else {
                (*self.skb).vlan_tci as u16
            }
        }
    }
}

/// `CLOCK_MONOTONIC`, nanoseconds.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}
