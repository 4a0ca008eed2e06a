//! Kernel programs of the host. The programs connect hooks, maps and helpers; `common` parses the
//! packets and decides.
//!
//! | program | hook | task |
//! |---|---|---|
//! | `snoop` | TC ingress of every TAP | snoops MLD and reports listeners to the agent; forwards packets for addresses that VMs have left; translates packets from an address that this VM has left |
//! | `uplink` | TC ingress of the uplink | observes managed streams and the querier; restores relayed packets; passes one copy of each packet; forwards packets for addresses that VMs have left |
//! | `uplink_xdp` | XDP of the uplink | same as `uplink` |
//! | `leak` | TC egress of the uplink | drops packets that this host restored |
//! | `gate` | TC egress of every TAP | counts delivered packets; during a migration numbers and records them (source) or holds them (destination) |
//! | `replicate` | TC ingress of a relay's interface | copies stream packets to the subscribers |
//!
//! # Minimum kernel version
//!
//! 5.17 for `bpf_loop`; 5.18 for `bpf_xdp_load_bytes` and XDP fragments in `uplink_xdp`.

// On other targets the program has an empty `main`, so that lints can read the crate.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "a key or value that is passed whole may be copied on the stack of 512 bytes"
)]

mod context;
mod forward;
mod gate;
mod gso;
mod header_view;
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

// Without `frags` a driver refuses an MTU larger than one page.
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
