//! Packet access that TC and XDP programs of the host share: the trait [`Packet`], implemented for
//! [`Skb`] and [`Xdp`].

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

use crate::forward::{Change, ChecksumFixup};
use crate::header_view::HeaderView;
use crate::trace::Traced;

/// A frame at a TC or XDP hook.
pub(crate) trait Packet: PacketRead + Traced {
    /// Returns a view of the Ethernet, IPv6 and UDP header, or `None` when the frame is shorter.
    /// One bounds check covers all three headers. The caller checks which headers the frame has.
    fn headers(&self) -> Option<HeaderView>;

    /// Reads the clock and the metadata of the frame.
    fn arrival(&self) -> Arrival;

    /// Turns a relayed datagram into a multicast packet ([`relay::restore`]) and updates the
    /// checksum.
    fn restore(&self, headers: HeaderView, flow: &RelayFlow);

    /// Returns the program's context, for helpers.
    fn context(&self) -> *mut c_void;

    /// Length of the packet on the wire from the IPv6 header on, bytes. For a GSO frame, the length
    /// of one segment with headers of minimum size.
    fn wire_bytes(&self) -> u16;

    /// Rewrites the destination ([`common::forward`]) and sends the packet there.
    fn send_on(&self, headers: HeaderView, change: &Change<'_>) -> Verdict;
}

/// IPv6 and TCP header without options, bytes.
const TCP_HEADERS_BYTES: u32 = 60;
/// Ethernet, IPv6 and TCP header up to the end of the TCP checksum, bytes.
const TCP_CHECKSUM_END: usize = 72;

/// Metadata of a received frame.
pub(crate) struct Arrival {
    /// Ingress interface.
    pub(crate) ifindex: u32,
    /// Time of arrival, `CLOCK_MONOTONIC` nanoseconds.
    pub(crate) at_ns: u64,
    /// Packets in the frame: the GSO segments, 1 without GSO.
    pub(crate) segments: u32,
}

impl Packet for Skb {
    #[inline(always)]
    fn headers(&self) -> Option<HeaderView> {
        let start = self.pulled::<HEADER_BYTES>()?;
        // SAFETY: the frame has `HEADER_BYTES` bytes, and no caller uses two views at once.
        Some(unsafe { HeaderView::new(start) })
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
    fn restore(&self, mut headers: HeaderView, flow: &RelayFlow) {
        let header = headers.header();
        let difference = relay::hop_limit_difference(header.hop_limit, RESTORED_HOP_LIMIT);
        let (checksum, may_be_partial) = (header.checksum, may_be_partial(self, headers));
        relay::restore(&mut headers, flow);
        if !self.update_csum(difference) && may_be_partial {
            self.update_checksum(checksum, flow.address_difference);
        }
        // The device set the packet type from the old destination MAC. A packet for the bridge's
        // MAC is `PACKET_OTHERHOST`, which sockets of this host would never receive.
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
    fn send_on(&self, mut headers: HeaderView, change: &Change<'_>) -> Verdict {
        change.apply(&mut headers);
        fix_checksums(self, &change.fixup);
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_redirect(change.route.ifindex, 0) };
        Verdict::Redirect
    }
}

/// Returns whether the UDP checksum of an skb may be partial ([`checksum::may_be_partial`]). The
/// checksum of a GSO frame is always partial, and the length in the pseudo-header may differ.
#[inline(always)]
pub(crate) fn may_be_partial(skb: &Skb, headers: HeaderView) -> bool {
    skb.segment_bytes() != 0 || headers.may_be_partial()
}

/// Updates `skb->csum` and the L4 checksum after a header rewrite.
#[inline(always)]
pub(crate) fn fix_checksums(skb: &Skb, fixup: &ChecksumFixup) {
    let hop_limit = fixup.hop_limit;
    let sum = relay::hop_limit_difference(hop_limit, hop_limit.wrapping_sub(1));
    let is_complete = skb.update_csum(sum);
    if fixup.checksum_offset == 0 {
        return;
    }
    // The change of the L4 checksum cancels the change of the address, so `skb->csum` stays.
    // `BPF_F_PSEUDO_HDR` would change `skb->csum` all the same.
    let pseudo = match is_complete {
        true => 0,
        false => u64::from(BPF_F_PSEUDO_HDR),
    };
    let zero = match fixup.next_header {
        udp::NEXT_HEADER => u64::from(BPF_F_MARK_MANGLED_0),
        _ => 0,
    };
    // SAFETY: the helper fails only when the header is not writable; the rewrite has just written
    // the header.
    unsafe {
        bpf_l4_csum_replace(
            skb.as_ptr(),
            fixup.checksum_offset as u32,
            0,
            fixup.difference.into(),
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

    /// Returns the start of the frame when the linear part has at least `N` bytes.
    #[inline(always)]
    pub(crate) fn start<const N: usize>(&self) -> Option<*mut u8> {
        let (data, end) = self.bounds();
        (data + N <= end).then_some(data as *mut u8)
    }
}

impl Xdp {
    /// Updates an L4 checksum within the first `N` bytes after the destination changed.
    #[inline(always)]
    fn change_checksum<const N: usize>(&self, fixup: &ChecksumFixup) {
        let (data, end) = self.bounds();
        let offset = fixup.checksum_offset;
        if data + N > end || offset + 2 > N {
            return;
        }
        let place = (data + offset) as *mut u16;
        // SAFETY: the bounds check above covers the checksum, and L4 checksums have even offsets.
        unsafe {
            let sum = u64::from(!*place) + u64::from(fixup.difference);
            let checksum = !checksum::fold(sum);
            *place = match fixup.next_header {
                udp::NEXT_HEADER if checksum == 0 => u16::MAX,
                _ => checksum,
            };
        }
    }
}

impl PacketRead for Xdp {
    #[inline(always)]
    fn len(&self) -> usize {
        // `data_end` ends the linear part only; a large frame continues in fragments. The helper
        // costs several ns, and the IPv6 header shows that most frames have none.
        let (data, end) = self.bounds();
        let linear = end - data;
        let headers = self.headers();
        if headers.is_some_and(|headers| headers.header().is_ipv6_within(linear)) {
            return linear;
        }
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
    fn headers(&self) -> Option<HeaderView> {
        let start = self.start::<HEADER_BYTES>()?;
        // SAFETY: as for `Skb`.
        Some(unsafe { HeaderView::new(start) })
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

    /// A checksum from the wire is never partial, so nothing else needs an update.
    #[inline(always)]
    fn restore(&self, mut headers: HeaderView, flow: &RelayFlow) {
        relay::restore(&mut headers, flow);
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
    fn send_on(&self, mut headers: HeaderView, change: &Change<'_>) -> Verdict {
        change.apply(&mut headers);
        if change.fixup.checksum_offset != 0 {
            let (data, end) = self.bounds();
            if data + TCP_CHECKSUM_END <= end {
                self.change_checksum::<TCP_CHECKSUM_END>(&change.fixup);
            } else {
                self.change_checksum::<HEADER_BYTES>(&change.fixup);
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
