//! A packet at a TC hook: the only place that touches an skb.

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

/// A frame at a TC hook.
pub struct Skb {
    skb: *mut __sk_buff,
}

impl Skb {
    /// The frame of a program's context.
    #[inline(always)]
    pub fn new(ctx: &TcContext) -> Self {
        Self { skb: ctx.skb.skb }
    }

    /// EtherType in network order, with a tag that stands in metadata already passed.
    #[inline(always)]
    pub fn protocol(&self) -> u32 {
        // SAFETY: the pointer is the program's context, which is valid while it runs.
        unsafe { (*self.skb).protocol }
    }

    /// Interface that the program is attached to.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        // SAFETY: as in `protocol`.
        unsafe { (*self.skb).ifindex }
    }

    /// The context, for helpers.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut __sk_buff {
        self.skb
    }

    /// UDP payload of each packet that an aggregated frame stands for, bytes; 0 for a single one.
    #[inline(always)]
    pub fn segment_bytes(&self) -> u32 {
        // SAFETY: as in `protocol`.
        unsafe { (*self.skb).gso_size }
    }

    /// Packets on the wire that the frame stands for; more than 1 when they were aggregated. Those of an
    /// aggregate that is not UDP in IPv6 are [`Self::segments_behind`] its headers.
    #[inline(always)]
    pub fn segments(&self) -> u32 {
        self.segments_behind(HEADER_BYTES)
    }

    /// The same, where each has so many bytes of headers.
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
        // One that another VM has aggregated, whose number nobody has looked at yet.
        (self.len() as u32)
            .saturating_sub(header_bytes as u32)
            .div_ceil(payload)
    }

    /// The frame's mark.
    #[inline(always)]
    pub fn mark(&self) -> u32 {
        // SAFETY: as in `protocol`.
        unsafe { (*self.skb).mark }
    }

    /// Marks the frame, for the socket that receives it in the end.
    #[inline(always)]
    pub fn set_mark(&self, mark: u32) {
        // SAFETY: as in `protocol`; the mark is writable at TC hooks.
        unsafe { (*self.skb).mark = mark }
    }

    /// Whether the device took the frame for one to somebody else.
    #[inline(always)]
    pub fn is_for_other_host(&self) -> bool {
        // SAFETY: as in `protocol`.
        unsafe { (*self.skb).pkt_type == PACKET_OTHERHOST }
    }

    /// Has the frame taken for a multicast one.
    #[inline(always)]
    pub fn set_multicast(&self) {
        // SAFETY: the pointer is the program's context.
        unsafe { bpf_skb_change_type(self.skb, PACKET_MULTICAST) };
    }

    /// Brings the sum over the whole packet, which some cards deliver with it, up to date; returns
    /// whether there is one. Such a packet has a finished UDP checksum.
    #[inline(always)]
    pub fn update_sum(&self, difference: u32) -> bool {
        // SAFETY: the pointer is the program's context.
        unsafe { bpf_csum_update(self.skb, difference) >= 0 }
    }

    /// Brings a UDP checksum that may be unfinished ([`checksum::may_be_unfinished`]) up to date after a
    /// rewrite of addresses and ports which cancel out: it follows the addresses, whose `difference`
    /// is given, unless it was finished. `before` is what it was.
    #[inline(always)]
    pub fn update_checksum(&self, before: u16, difference: u32) {
        // Only the helper knows which it is. A sum of 0 is the other zero of one's complement.
        let flags = u64::from(BPF_F_MARK_MANGLED_0) | u64::from(BPF_F_PSEUDO_HDR);
        // SAFETY: as in `update_sum`. The helper fails when the header cannot be written, but it
        // just has been.
        unsafe {
            bpf_l4_csum_replace(
                self.skb,
                CHECKSUM_OFFSET as u32,
                0,
                difference.into(),
                flags,
            );
        }
        let unfinished = checksum::fold(u64::from(before) + u64::from(difference));
        if let Some(start) = self.start::<HEADER_BYTES>() {
            // SAFETY: so many bytes are there, and checksums stand at even offsets.
            unsafe {
                let place = start.add(CHECKSUM_OFFSET).cast::<u16>();
                if *place != unfinished {
                    // The helper took it for a finished one, and away what it adds to the other.
                    *place = before;
                }
            }
        }
    }

    /// The bytes from `data` on that are there in one piece, if they are at least `N`.
    #[inline(always)]
    pub fn start<const N: usize>(&self) -> Option<*mut u8> {
        // SAFETY: as in `protocol`. Both are read anew, because helpers change them.
        let (data, end) = unsafe {
            (
                (&raw const (*self.skb).data).read_volatile() as usize,
                (&raw const (*self.skb).data_end).read_volatile() as usize,
            )
        };
        (data + N <= end).then_some(data as *mut u8)
    }

    /// The first `N` bytes in one piece, which they are made if need be; `None` for a shorter frame.
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

    /// Overwrites bytes of the frame; `false` if it has none there. What was found by pointers
    /// before is to be found anew.
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
pub fn now_ns() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}
