//! Kernel programs of the host: glue only. What a packet means is decided in `common`.
//!
//! | program | hook | does |
//! |---|---|---|
//! | `snoop` | TC ingress of every TAP | learns what the VM listens to, names it to the agent |
//! | `uplink` | TC ingress of the uplink | watches managed streams and the link's querier |
//!
//! # Minimum kernel version
//!
//! 5.17, for `bpf_loop`.

// For any other target it is a program that does nothing, so that lints can read it.
#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "a key or value that is passed whole may be copied on the stack of 512 bytes"
)]

mod atomic;
mod context;
mod maps;
mod snoop;
mod store;
mod uplink;

use aya_ebpf::bindings::xdp_action::XDP_PASS;
use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};

use crate::context::Skb;

/// What happens to the frame. Unspecific verdicts let other programs on the hook decide: it is
/// `TCX_NEXT` on TCX and "go on" on clsact.
#[derive(Clone, Copy)]
enum Verdict {
    Pass,
    Drop,
}

impl From<Verdict> for i32 {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Pass => TC_ACT_UNSPEC,
            Verdict::Drop => TC_ACT_SHOT as Self,
        }
    }
}

#[classifier]
fn snoop(ctx: TcContext) -> i32 {
    snoop::snoop(&Skb::new(&ctx)).into()
}

#[classifier]
fn uplink(ctx: TcContext) -> i32 {
    let skb = Skb::new(&ctx);
    uplink::uplink(&skb, &skb.arrival());
    Verdict::Pass.into()
}

#[xdp]
fn uplink_xdp(_ctx: XdpContext) -> u32 {
    XDP_PASS
}

#[classifier]
fn leak(_ctx: TcContext) -> i32 {
    Verdict::Pass.into()
}

#[classifier]
fn replicate(_ctx: TcContext) -> i32 {
    Verdict::Pass.into()
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
