//! Packet access at all hooks of the host; of an skb by [`agent_ebpf::skb`].

#![allow(
    unsafe_code,
    reason = "packets are reached through raw pointers and helpers"
)]

use core::mem::MaybeUninit;

use agent_ebpf::skb::{Skb, now_ns};
use aya_ebpf::bindings::xdp_md;
use aya_ebpf::helpers::{bpf_skb_change_type, bpf_xdp_load_bytes};
use aya_ebpf::programs::XdpContext;
use common::maps::RelayFlow;
use common::packet::{PacketRead, Truncated};
use common::relay::{self, Differences, RESTORED_HOP_LIMIT};
use common::wire::datagram::HEADER_BYTES;

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
        unsafe { bpf_skb_change_type(self.as_ptr(), PACKET_MULTICAST) };
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
