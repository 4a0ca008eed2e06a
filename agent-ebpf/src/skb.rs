//! A packet at a TC hook: the only module that touches an skb.

#![allow(
    unsafe_code,
    reason = "packets are reached through raw pointers and helpers"
)]

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::{
    bpf_csum_update, bpf_ktime_get_ns, bpf_l4_csum_replace, bpf_skb_change_type,
    bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use common::packet::{PacketRead, Truncated};
use common::wire::checksum;
use common::wire::datagram::{CHECKSUM_OFFSET, HEADER_BYTES};

/// `PACKET_MULTICAST` of `if_packet.h`.
const PACKET_MULTICAST: u32 = 2;
/// `PACKET_OTHERHOST` of `if_packet.h`.
const PACKET_OTHERHOST: u32 = 3;

/// A frame at a TC hook: the `struct __sk_buff` of the program's context.
pub struct Skb {
    skb: *mut __sk_buff,
}

impl Skb {
    /// Wraps the context, without a check.
    #[inline(always)]
    pub fn new(ctx: &TcContext) -> Self {
        Self { skb: ctx.skb.skb }
    }

    /// EtherType in network order; the inner type when the VLAN tag is in the skb metadata.
    #[inline(always)]
    pub fn protocol(&self) -> u32 {
        // SAFETY: the pointer is the program's context, which is valid while it runs.
        unsafe { (*self.skb).protocol }
    }

    /// Interface of the hook.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: as in `protocol`.
        unsafe { (*self.skb).ifindex }
    }

    /// The program's context, for helpers.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut __sk_buff {
        self.skb
    }

    /// L4 payload of each segment of a GSO frame (`gso_size`), bytes; 0 without GSO.
    #[inline(always)]
    pub fn segment_bytes(&self) -> u32 {
        // SAFETY: as in `protocol`.
        unsafe { (*self.skb).gso_size }
    }

    /// Packets in the frame: the GSO segments, 1 without GSO. For GSO frames other than UDP over
    /// IPv6, use [`Self::segments_behind`].
    #[inline(always)]
    pub fn segments(&self) -> u32 {
        self.segments_behind(HEADER_BYTES)
    }

    /// Packets in the frame when each segment has `header_bytes` bytes of headers.
    #[inline(always)]
    pub fn segments_behind(&self, header_bytes: usize) -> u32 {
        let payload = self.segment_bytes();
        if payload == 0 {
            return 1;
        }
        // SAFETY: as in `protocol`.
        let segments = unsafe { (*self.skb).gso_segs };
        if segments != 0 {
            return segments;
        }
        // Another VM built the GSO frame, and the kernel has not set `gso_segs` yet.
        (self.len() as u32)
            .saturating_sub(header_bytes as u32)
            .div_ceil(payload)
    }

    /// `skb->mark`.
    #[inline(always)]
    pub fn mark(&self) -> u32 {
        // SAFETY: as in `protocol`.
        unsafe { (*self.skb).mark }
    }

    /// Sets `skb->mark`, which the receiving socket reads.
    #[inline(always)]
    pub fn set_mark(&self, mark: u32) {
        // SAFETY: as in `protocol`; the mark is writable at TC hooks.
        unsafe { (*self.skb).mark = mark }
    }

    /// Whether the device took the frame for another host's (`PACKET_OTHERHOST`).
    #[inline(always)]
    pub fn is_for_other_host(&self) -> bool {
        // SAFETY: as in `protocol`.
        unsafe { (*self.skb).pkt_type == PACKET_OTHERHOST }
    }

    /// Changes the packet type to `PACKET_MULTICAST`.
    #[inline(always)]
    pub fn set_multicast(&self) {
        // SAFETY: the pointer is the program's context.
        unsafe { bpf_skb_change_type(self.skb, PACKET_MULTICAST) };
    }

    /// Adds `difference` to `skb->csum`. Returns whether the skb has one (`CHECKSUM_COMPLETE`); the
    /// L4 checksum of such a packet is never partial.
    #[inline(always)]
    pub fn update_csum(&self, difference: u32) -> bool {
        // SAFETY: the pointer is the program's context.
        unsafe { bpf_csum_update(self.skb, difference) >= 0 }
    }

    /// Updates the UDP checksum of a packet whose checksum may be partial
    /// ([`checksum::may_be_partial`]), after a rewrite of addresses and ports that cancel out. A
    /// partial checksum covers the addresses only and takes their `difference`; a full checksum
    /// keeps the value `before`.
    #[inline(always)]
    pub fn update_checksum(&self, before: u16, difference: u32) {
        // Only the helper knows whether the checksum is partial. A sum of 0 becomes the other zero
        // of one's complement.
        let flags = u64::from(BPF_F_MARK_MANGLED_0) | u64::from(BPF_F_PSEUDO_HDR);
        // SAFETY: as in `update_csum`. The helper fails only when the header is not writable; the
        // rewrite has just written the header.
        unsafe {
            bpf_l4_csum_replace(
                self.skb,
                CHECKSUM_OFFSET as u32,
                0,
                difference.into(),
                flags,
            );
        }
        let partial_checksum = checksum::fold(u64::from(before) + u64::from(difference));
        if let Some(start) = self.start::<HEADER_BYTES>() {
            // SAFETY: `start` checked the bounds, and checksums have even offsets.
            unsafe {
                let place = start.add(CHECKSUM_OFFSET).cast::<u16>();
                if *place != partial_checksum {
                    // The helper updated a full checksum, which must keep its value.
                    *place = before;
                }
            }
        }
    }

    /// Returns the start of the frame when the linear part has at least `N` bytes.
    #[inline(always)]
    pub fn start<const N: usize>(&self) -> Option<*mut u8> {
        // SAFETY: as in `protocol`. The volatile reads repeat each time, because helpers change
        // both pointers.
        let (data, end) = unsafe {
            (
                (&raw const (*self.skb).data).read_volatile() as usize,
                (&raw const (*self.skb).data_end).read_volatile() as usize,
            )
        };
        (data + N <= end).then_some(data as *mut u8)
    }

    /// Returns the start of the frame with the first `N` bytes linear; pulls them from fragments
    /// when necessary. `None` for a shorter frame.
    #[inline(always)]
    pub fn pulled<const N: usize>(&self) -> Option<*mut u8> {
        if let Some(start) = self.start::<N>() {
            return Some(start);
        }
        if self.len() < N {
            return None;
        }
        // Some drivers leave part of the headers in fragments.
        // SAFETY: the pointer is the program's context.
        unsafe { bpf_skb_pull_data(self.skb, N as u32) };
        self.start::<N>()
    }

    /// Overwrites bytes of the frame; `false` when the frame is shorter. Invalidates pointers into
    /// the packet.
    #[inline(always)]
    pub fn write<const N: usize>(&self, offset: usize, bytes: &[u8; N]) -> bool {
        // SAFETY: the helper reads `N` bytes of the array, and checks the frame.
        let result = unsafe {
            bpf_skb_store_bytes(
                self.skb.cast(),
                offset as u32,
                bytes.as_ptr().cast(),
                N as u32,
                0,
            )
        };
        result == 0
    }

    /// Copies the first `length` bytes of the frame to `to`.
    ///
    /// # Safety
    ///
    /// `to` is valid for writes of `length` bytes, and `length` is not 0.
    #[inline(always)]
    pub unsafe fn copy_to(&self, to: *mut u8, length: u64) -> Result<(), Truncated> {
        // SAFETY: the caller guarantees the destination; the helper checks the source.
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
pub fn now_ns() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}
