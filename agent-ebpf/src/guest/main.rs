//! Kernel programs of a MAT node. The programs connect hooks, maps and helpers;
//! [`common::mat::translate`] decides about each packet.
//!
//! | program | hook | task |
//! |---|---|---|
//! | `mat_out` | TC egress of `mat0` | translates HoAs to MoAs; sends by the active NIC, MLD by the multicast NIC |
//! | `mat_in` | TC ingress of every NIC | translates MoAs to HoAs; delivers to `mat0` |
//!
//! # Minimum kernel version
//!
//! 6.5, for route look-ups in one table (`BPF_FIB_LOOKUP_TBID`).

// On other targets the program has an empty `main`, so that lints can read the crate.
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
