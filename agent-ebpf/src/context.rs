//! Packet access: the only place that touches an skb or an XDP buffer.

#![allow(
    unsafe_code,
    reason = "packets are reached through raw pointers and helpers"
)]

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, xdp_md};
use aya_ebpf::helpers::{
    bpf_csum_update, bpf_ktime_get_ns, bpf_l4_csum_replace, bpf_skb_change_type,
    bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes, bpf_xdp_load_bytes,
};
use aya_ebpf::programs::{TcContext, XdpContext};
use common::maps::RelayFlow;
use common::packet::{PacketRead, Truncated};
use common::relay::{self, Differences, RESTORED_HOP_LIMIT};
use common::wire::datagram::{CHECKSUM_OFFSET, HEADER_BYTES};

use crate::front::Front;

/// `PACKET_MULTICAST` of `if_packet.h`.
const PACKET_MULTICAST: u32 = 2;

/// A frame at any hook.
pub(crate) trait Packet: PacketRead {
    /// Its first three headers where they lie, `None` when it is shorter. One check of bounds
    /// stands for all of them. What they are is for the caller to find out.
    fn front(&self) -> Option<Front>;

    /// What is known besides the bytes. Reads the clock.
    fn arrival(&self) -> Arrival;

    /// Makes a relayed datagram a multicast packet ([`relay::restore`]), its checksum included.
    fn restore(&self, front: Front, flow: &RelayFlow);
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

/// A frame at a TC hook.
pub(crate) struct Skb {
    skb: *mut __sk_buff,
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

    /// The context, for helpers.
    #[inline(always)]
    pub(crate) fn as_ptr(&self) -> *mut __sk_buff {
        self.skb
    }

    /// UDP payload of each packet that an aggregated frame stands for, bytes; 0 for a single one.
    #[inline(always)]
    pub(crate) fn segment_bytes(&self) -> u32 {
        // SAFETY: as in `protocol`.
        unsafe { (*self.skb).gso_size }
    }

    /// Packets on the wire that the frame stands for; more than 1 when they were aggregated.
    #[inline(always)]
    pub(crate) fn segments(&self) -> u32 {
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
            .saturating_sub(HEADER_BYTES as u32)
            .div_ceil(payload)
    }

    /// Marks the frame, for the socket that receives it in the end.
    #[inline(always)]
    pub(crate) fn set_mark(&self, mark: u32) {
        // SAFETY: as in `protocol`; the mark is writable at TC hooks.
        unsafe { (*self.skb).mark = mark }
    }

    /// Brings the sum over the whole packet, which some cards deliver with it, up to date; returns
    /// whether there is one. Such a packet has a finished UDP checksum.
    #[inline(always)]
    pub(crate) fn update_sum(&self, difference: u32) -> bool {
        // SAFETY: the pointer is the program's context.
        unsafe { bpf_csum_update(self.skb, difference) >= 0 }
    }

    /// Brings the UDP checksum up to date after a rewrite of addresses and ports. One that covers
    /// only the addresses yet gets their difference; a finished one gets both, which cancel out.
    #[inline(always)]
    pub(crate) fn update_checksum(&self, differences: &Differences) {
        // Should a finished checksum become 0 on the way, it is the other zero of one's complement.
        let flags = u64::from(BPF_F_MARK_MANGLED_0);
        let pseudo = flags | u64::from(BPF_F_PSEUDO_HDR);
        // SAFETY: as in `update_sum`. The helpers fail when the header cannot be written, but it
        // just has been.
        unsafe {
            bpf_l4_csum_replace(
                self.skb,
                CHECKSUM_OFFSET as u32,
                0,
                differences.address.into(),
                pseudo,
            );
            bpf_l4_csum_replace(
                self.skb,
                CHECKSUM_OFFSET as u32,
                0,
                differences.port.into(),
                flags,
            );
        }
    }

    /// The bytes from `data` on that are there in one piece, if they are at least `N`.
    #[inline(always)]
    pub(crate) fn start<const N: usize>(&self) -> Option<*mut u8> {
        // SAFETY: as in `protocol`. Both are read anew, because helpers change them.
        let (data, end) = unsafe {
            (
                (&raw const (*self.skb).data).read_volatile() as usize,
                (&raw const (*self.skb).data_end).read_volatile() as usize,
            )
        };
        (data + N <= end).then_some(data as *mut u8)
    }

    /// Overwrites bytes of the frame; `false` if it has none there. What was found by pointers
    /// before is to be found anew.
    #[inline(always)]
    pub(crate) fn write<const N: usize>(&self, offset: usize, bytes: &[u8; N]) -> bool {
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
    pub(crate) unsafe fn copy_to(&self, to: *mut u8, length: u64) -> Result<(), Truncated> {
        // SAFETY: the caller answers for the destination; the helper checks the source.
        match unsafe { bpf_skb_load_bytes(self.skb.cast(), 0, to.cast(), length as u32) } {
            0 => Ok(()),
            _ => Err(Truncated),
        }
    }
}

impl Packet for Skb {
    #[inline(always)]
    fn front(&self) -> Option<Front> {
        let start = match self.start::<HEADER_BYTES>() {
            Some(start) => start,
            None => {
                if self.len() < HEADER_BYTES {
                    return None;
                }
                // Some drivers leave part of the headers in fragments.
                // SAFETY: the pointer is the program's context.
                unsafe { bpf_skb_pull_data(self.skb, HEADER_BYTES as u32) };
                self.start::<HEADER_BYTES>()?
            }
        };
        // SAFETY: so many bytes are there, and no two of these are in use at once.
        Some(unsafe { Front::new(start) })
    }

    #[inline(always)]
    fn arrival(&self) -> Arrival {
        Arrival {
            ifindex: self.ifindex(),
            at_ns: now_ns(),
            segments: self.segments(),
        }
    }

    #[inline(always)]
    fn restore(&self, mut front: Front, flow: &RelayFlow) {
        let hop_limit = front.header().hop_limit;
        let difference = relay::hop_limit_difference(hop_limit, RESTORED_HOP_LIMIT);
        relay::restore(&mut front, flow);
        if !self.update_sum(difference) {
            self.update_checksum(&Differences {
                address: flow.address_difference,
                port: flow.port_difference,
            });
        }
        // What the device has derived from the destination MAC.
        // SAFETY: the pointer is the program's context.
        unsafe { bpf_skb_change_type(self.skb, PACKET_MULTICAST) };
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

/// A frame at an XDP hook.
pub(crate) struct Xdp {
    xdp: *mut xdp_md,
}

impl Xdp {
    #[inline(always)]
    pub(crate) fn new(ctx: &XdpContext) -> Self {
        Self { xdp: ctx.ctx }
    }

    #[inline(always)]
    fn bounds(&self) -> (usize, usize) {
        // SAFETY: the pointer is the program's context, which is valid while it runs.
        unsafe {
            (
                (&raw const (*self.xdp).data).read_volatile() as usize,
                (&raw const (*self.xdp).data_end).read_volatile() as usize,
            )
        }
    }
}

impl PacketRead for Xdp {
    #[inline(always)]
    fn len(&self) -> usize {
        let (data, end) = self.bounds();
        end - data
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], Truncated> {
        let mut bytes = MaybeUninit::<[u8; N]>::uninit();
        // SAFETY: the helper writes `N` bytes to the array, or fails.
        unsafe {
            match bpf_xdp_load_bytes(self.xdp, offset as u32, bytes.as_mut_ptr().cast(), N as u32) {
                0 => Ok(bytes.assume_init()),
                _ => Err(Truncated),
            }
        }
    }
}

impl Packet for Xdp {
    #[inline(always)]
    fn front(&self) -> Option<Front> {
        let (data, end) = self.bounds();
        // SAFETY: as for `Skb`.
        (data + HEADER_BYTES <= end).then(|| unsafe { Front::new(data as *mut u8) })
    }

    #[inline(always)]
    fn arrival(&self) -> Arrival {
        Arrival {
            // SAFETY: as in `bounds`.
            ifindex: unsafe { (*self.xdp).ingress_ifindex },
            at_ns: now_ns(),
            segments: 1,
        }
    }

    /// Checksums from a wire are finished, and need nothing.
    #[inline(always)]
    fn restore(&self, mut front: Front, flow: &RelayFlow) {
        relay::restore(&mut front, flow);
    }
}

/// `CLOCK_MONOTONIC`, nanoseconds.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_ktime_get_ns() }
}
