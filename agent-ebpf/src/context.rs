//! Packet access at all hooks of the host; of an skb by [`agent_ebpf::skb`].

#![allow(
    unsafe_code,
    reason = "packets are reached through raw pointers and helpers"
)]

use core::ffi::c_void;
use core::mem::MaybeUninit;

use agent_ebpf::skb::{Skb, now_ns};
use agent_ebpf::verdict::Verdict;
use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, xdp_md};
use aya_ebpf::helpers::{
    bpf_l4_csum_replace, bpf_redirect, bpf_xdp_get_buff_len, bpf_xdp_load_bytes,
};
use aya_ebpf::programs::XdpContext;
use common::maps::RelayFlow;
use common::packet::{PacketRead, Truncated};
use common::relay::{self, RESTORED_HOP_LIMIT};
use common::wire::datagram::HEADER_BYTES;
use common::wire::{checksum, ethernet, udp};

use crate::forward::{Change, Follow};
use crate::front::Front;
use crate::trace::Traced;

/// A frame at any hook.
pub(crate) trait Packet: PacketRead + Traced {
    /// Its first three headers where they lie, `None` when it is shorter. One check of bounds
    /// stands for all of them. What they are is for the caller to find out.
    fn front(&self) -> Option<Front>;

    /// What is known besides the bytes. Reads the clock.
    fn arrival(&self) -> Arrival;

    /// Makes a relayed datagram a multicast packet ([`relay::restore`]), its checksum included.
    fn restore(&self, front: Front, flow: &RelayFlow);

    /// The program's context, for helpers.
    fn context(&self) -> *mut c_void;

    /// Length of the packet on the wire, from the IPv6 header on; of the shortest headers where
    /// several were aggregated.
    fn wire_bytes(&self) -> u16;

    /// Gives the packet another destination ([`common::forward`]), and sends it there.
    fn send_on(&self, front: Front, change: &Change<'_>) -> Verdict;
}

/// IPv6 and TCP header without options, bytes.
const TCP_HEADERS_BYTES: u32 = 60;
/// Ethernet, IPv6 and TCP header up to behind the checksum, bytes.
const TCP_CHECKSUM_END: usize = 72;

/// What is known of a packet besides its bytes.
pub(crate) struct Arrival {
    /// Interface it came in by.
    pub(crate) ifindex: u32,
    /// When, `CLOCK_MONOTONIC` nanoseconds.
    pub(crate) at_ns: u64,
    /// Packets on the wire that the frame stands for; more than 1 when they were aggregated.
    pub(crate) segments: u32,
}

impl Packet for Skb {
    #[inline(always)]
    fn front(&self) -> Option<Front> {
        let start = self.pulled::<HEADER_BYTES>()?;
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
        let header = front.header();
        let difference = relay::hop_limit_difference(header.hop_limit, RESTORED_HOP_LIMIT);
        let (checksum, may_be_unfinished) = (header.checksum, may_be_unfinished(self, front));
        relay::restore(&mut front, flow);
        if !self.update_sum(difference) && may_be_unfinished {
            self.update_checksum(checksum, flow.address_difference);
        }
        // The device has derived the type from the destination MAC that was. Where that is the
        // bridge's and not its own, this host's listeners would get nothing.
        if self.is_for_other_host() {
            self.set_multicast();
        }
    }

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.as_ptr().cast()
    }

    #[inline(always)]
    fn wire_bytes(&self) -> u16 {
        match self.segment_bytes() {
            0 => (self.len() - ethernet::HEADER_BYTES) as u16,
            segment => (segment + TCP_HEADERS_BYTES) as u16,
        }
    }

    #[inline(always)]
    fn send_on(&self, mut front: Front, change: &Change<'_>) -> Verdict {
        change.apply(&mut front);
        follow(self, &change.follow);
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_redirect(change.route.ifindex, 0) };
        Verdict::Redirect
    }
}

/// Whether the UDP checksum of an skb may be unfinished ([`checksum::may_be_unfinished`]). What stands
/// for several packets always is, and may have another length in its pseudo-header.
#[inline(always)]
pub(crate) fn may_be_unfinished(skb: &Skb, front: Front) -> bool {
    skb.segment_bytes() != 0 || front.may_be_unfinished()
}

/// Has the sums of an skb follow what was written to its headers.
#[inline(always)]
pub(crate) fn follow(skb: &Skb, follow: &Follow) {
    let hop_limit = follow.hop_limit;
    let sum = relay::hop_limit_difference(hop_limit, hop_limit.wrapping_sub(1));
    let is_finished = skb.update_sum(sum);
    if follow.checksum_offset == 0 {
        return;
    }
    // The sum over the whole packet stays as it is: the checksum makes up for the address.
    // The flag would have it follow all the same.
    let pseudo = match is_finished {
        true => 0,
        false => u64::from(BPF_F_PSEUDO_HDR),
    };
    let zero = match follow.next_header {
        udp::NEXT_HEADER => u64::from(BPF_F_MARK_MANGLED_0),
        _ => 0,
    };
    // SAFETY: the helper fails when the header cannot be written, but it just has been.
    unsafe {
        bpf_l4_csum_replace(
            skb.as_ptr(),
            follow.checksum_offset as u32,
            0,
            follow.difference.into(),
            pseudo | zero,
        );
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

    /// The first `N` bytes, if there are so many.
    #[inline(always)]
    pub(crate) fn start<const N: usize>(&self) -> Option<*mut u8> {
        let (data, end) = self.bounds();
        (data + N <= end).then_some(data as *mut u8)
    }
}

impl Xdp {
    /// Has a checksum within the first `N` bytes follow the other destination.
    #[inline(always)]
    fn change_checksum<const N: usize>(&self, follow: &Follow) {
        let (data, end) = self.bounds();
        let offset = follow.checksum_offset;
        if data + N > end || offset + 2 > N {
            return;
        }
        let place = (data + offset) as *mut u16;
        // SAFETY: so many bytes are there, and checksums stand at even offsets.
        unsafe {
            let sum = u64::from(!*place) + u64::from(follow.difference);
            let checksum = !checksum::fold(sum);
            *place = match follow.next_header {
                udp::NEXT_HEADER if checksum == 0 => u16::MAX,
                _ => checksum,
            };
        }
    }
}

impl PacketRead for Xdp {
    #[inline(always)]
    fn len(&self) -> usize {
        // Beyond `data_end` a large packet goes on in fragments.
        // SAFETY: the pointer is the program's context.
        unsafe { bpf_xdp_get_buff_len(self.xdp) as usize }
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
        let start = self.start::<HEADER_BYTES>()?;
        // SAFETY: as for `Skb`.
        Some(unsafe { Front::new(start) })
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

    #[inline(always)]
    fn context(&self) -> *mut c_void {
        self.xdp.cast()
    }

    #[inline(always)]
    fn wire_bytes(&self) -> u16 {
        self.len().wrapping_sub(ethernet::HEADER_BYTES) as u16
    }

    #[inline(always)]
    fn send_on(&self, mut front: Front, change: &Change<'_>) -> Verdict {
        change.apply(&mut front);
        if change.follow.checksum_offset != 0 {
            let (data, end) = self.bounds();
            if data + TCP_CHECKSUM_END <= end {
                self.change_checksum::<TCP_CHECKSUM_END>(&change.follow);
            } else {
                self.change_checksum::<HEADER_BYTES>(&change.follow);
            }
        }
        // SAFETY: as in `bounds`.
        let came_by = unsafe { (*self.xdp).ingress_ifindex };
        let ifindex = change.route.ifindex;
        if ifindex == came_by || ifindex == change.forward.bridge {
            return Verdict::Back;
        }
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_redirect(ifindex, 0) };
        Verdict::Redirect
    }
}
