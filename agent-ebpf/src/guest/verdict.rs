//! Carries out the decisions of the translation rules.

#![allow(
    unsafe_code,
    reason = "helpers and records of the ring buffer are reached through raw pointers"
)]

use agent_ebpf::instruction;
use agent_ebpf::route::INET6;
use agent_ebpf::verdict::Verdict;
use aya_ebpf::bindings::{BPF_F_INGRESS, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1};
use aya_ebpf::helpers::{bpf_clone_redirect, bpf_redirect, bpf_redirect_neigh};
use common::mat::counter::Counter;
use common::mat::maps::{HELD_FRAME_BYTES, Held};
use common::mat::translate::{Action, Decision, Packet as _};
use common::packet::PacketRead as _;

use crate::frame::Frame;
use crate::maps::{HELD, count};
use crate::tables::Maps;

const INGRESS: u64 = BPF_F_INGRESS as u64;

/// Carries out a decision; returns the program's return code.
#[inline(always)]
pub(crate) fn carry_out(frame: &Frame, maps: &Maps, decision: Decision) -> i32 {
    if let Some(reason) = decision.reason {
        count(reason, frame.skb().segments().into());
    }
    let ifindex = decision.ifindex;
    let verdict = match decision.action {
        Action::Pass => Verdict::Pass,
        Action::Drop => Verdict::Drop,
        Action::Send => return send(frame, maps, ifindex),
        Action::Redirect => return redirect(ifindex, 0),
        Action::Deliver => return redirect(ifindex, INGRESS),
        Action::Copy => {
            // SAFETY: the pointer is the program's context.
            let result = unsafe { bpf_clone_redirect(frame.skb().as_ptr(), ifindex, INGRESS) };
            let reason = if result == 0 {
                Counter::InMulticast
            } else {
                Counter::InMulticastLost
            };
            count(reason, frame.skb().segments().into());
            Verdict::Pass
        }
        Action::Hold => hold(frame),
    };
    verdict.into()
}

/// Sends to the cached next hop; without one the helper looks up the next hop.
#[inline(always)]
fn send(frame: &Frame, maps: &Maps, ifindex: u32) -> i32 {
    let Some([first, second]) = maps.next_hop(frame, ifindex) else {
        // SAFETY: the helper has no preconditions.
        return unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 };
    };
    let ([a, b], [c, d]) = (instruction::halves(first), instruction::halves(second));
    let mut next_hop = bpf_redir_neigh {
        nh_family: INET6,
        __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 {
            ipv6_nh: [a, b, c, d],
        },
    };
    let size = size_of::<bpf_redir_neigh>() as i32;
    // SAFETY: the structure has the kernel's layout and size.
    unsafe { bpf_redirect_neigh(ifindex, &raw mut next_hop, size, 0) as i32 }
}

#[inline(always)]
fn redirect(ifindex: u32, flags: u64) -> i32 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_redirect(ifindex, flags) as i32 }
}

/// Copies the frame to `HELD`. The frame then passes, and `mat0` discards it: a drop would signal
/// congestion to the sender. When the copy is lost, the drop makes the sender retransmit.
#[inline(never)]
fn hold(frame: &Frame) -> Verdict {
    let skb = frame.skb();
    let Some((_, head)) = frame.head() else {
        return Verdict::Drop;
    };
    let Some(mut entry) = HELD.reserve_untyped::<Held>(0) else {
        count(Counter::HeldFull, 1);
        return Verdict::Drop;
    };
    let held: *mut Held = entry.as_mut_ptr();
    let length = match skb.segment_bytes() {
        0 => instruction::size::<HELD_FRAME_BYTES>(frame.len()),
        _ => None,
    };
    // SAFETY: the record belongs to this program until `submit`; `length` is at most the size of
    // `frame`.
    let copied = unsafe {
        (&raw mut (*held).peer).write(head.destination);
        (&raw mut (*held).pad).write(0);
        let to = (&raw mut (*held).frame).cast();
        let copied = length.filter(|length| skb.copy_to(to, *length).is_ok());
        (&raw mut (*held).length).write(copied.map_or(0, |length| length as u32));
        copied.is_some()
    };
    entry.submit(0);
    if copied {
        count(Counter::Held, 1);
        Verdict::Pass
    } else {
        count(Counter::HeldTooLong, 1);
        Verdict::Drop
    }
}
