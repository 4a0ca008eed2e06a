//! Kernel programs of a node of MAT: glue only. What becomes of a packet is decided in
//! [`common::mat::translate`].
//!
//! | program | hook | does |
//! |---|---|---|
//! | `mat_out` | TC egress of `mat0` | HoAs become MoAs; sends by the active NIC, MLD by the multicast NIC |
//! | `mat_in` | TC ingress of every NIC | MoAs become HoAs; hands to `mat0` |
//!
//! # Minimum kernel version
//!
//! 6.5, for look-ups of routes in one table.

// For any other target it is a program that does nothing, so that lints can read it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

mod frame;
mod maps;
mod tables;
mod verdict;

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use common::mat::translate;

use crate::frame::Frame;
use crate::tables::Maps;

#[classifier]
fn mat_out(ctx: TcContext) -> i32 {
    let mut frame = Frame::new(&ctx);
    let maps = Maps::for_packet(&frame);
    let decision = translate::outbound(&mut frame, &maps);
    verdict::carry_out(&frame, &maps, decision)
}

#[classifier]
fn mat_in(ctx: TcContext) -> i32 {
    let mut frame = Frame::new(&ctx);
    let maps = Maps::for_packet(&frame);
    let ifindex = frame.ifindex();
    let decision = translate::inbound(&mut frame, &maps, ifindex);
    verdict::carry_out(&frame, &maps, decision)
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
#[allow(
    unsafe_code,
    reason = "the kernel looks for the license in this section"
)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
