//! Kernel programs of the host: glue only. What a packet means is decided in `common`.
//!
//! | program | hook | does |
//! |---|---|---|
//! | `snoop` | TC ingress of every TAP | learns what the VM listens to, names it to the agent; sends on what is for an address that its VM has left, and what comes from one that this VM has left from its new one |
//! | `uplink` | TC ingress of the uplink | watches managed streams and the link's querier; restores relayed packets; one copy of each passes; sends on what is for an address that its VM has left |
//! | `uplink_xdp` | XDP of the uplink | the same |
//! | `leak` | TC egress of the uplink | drops what was restored here |
//! | `gate` | TC egress of every TAP | counts what is delivered; numbers and records it, or holds it, while the VM moves |
//! | `replicate` | TC ingress of a relay's interface | sends copies of streams to the subscribers |
//!
//! # Minimum kernel version
//!
//! 5.17, for `bpf_loop`; 5.18 for `uplink_xdp`, for `bpf_xdp_load_bytes` and packets in fragments.

// For any other target it is a program that does nothing, so that lints can read it.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "a key or value that is passed whole may be copied on the stack of 512 bytes"
)]

mod aggregate;
mod context;
mod forward;
mod front;
mod gate;
mod leak;
mod maps;
mod replicate;
mod snoop;
mod store;
mod stream;
mod trace;
mod translate;
mod uplink;

use agent_ebpf::skb::Skb;
use agent_ebpf::verdict::Verdict;
use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::programs::{TcContext, XdpContext};

use crate::context::Xdp;

#[classifier]
fn snoop(ctx: TcContext) -> i32 {
    snoop::snoop(&Skb::new(&ctx)).into()
}

#[classifier]
fn uplink(ctx: TcContext) -> i32 {
    uplink::uplink(&Skb::new(&ctx)).into()
}

// Without `frags` a driver refuses an MTU beyond one page.
#[xdp(frags)]
fn uplink_xdp(ctx: XdpContext) -> u32 {
    match uplink::uplink(&Xdp::new(&ctx)) {
        Verdict::Pass => XDP_PASS,
        Verdict::Drop => XDP_DROP,
        Verdict::Redirect => XDP_REDIRECT,
        Verdict::Back => XDP_TX,
    }
}

#[classifier]
fn leak(ctx: TcContext) -> i32 {
    leak::leak(&Skb::new(&ctx)).into()
}

#[classifier]
fn gate(ctx: TcContext) -> i32 {
    gate::gate(&Skb::new(&ctx)).into()
}

#[classifier]
fn replicate(ctx: TcContext) -> i32 {
    replicate::replicate(&Skb::new(&ctx));
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
