//! What the rules of translation decide, carried out.

#![allow(
    unsafe_code,
    reason = "helpers and records of the ring buffer are reached through raw pointers"
)]

use agent_ebpf::instruction;
use agent_ebpf::verdict::Verdict;
use aya_ebpf::bindings::BPF_F_INGRESS;
use aya_ebpf::helpers::{bpf_clone_redirect, bpf_redirect, bpf_redirect_neigh};
use common::mat::counter::Counter;
use common::mat::maps::{HELD_FRAME_BYTES, Held};
use common::mat::translate::{Inbound, Outbound, Words, address};
use common::packet::PacketRead as _;

use crate::frame::Frame;
use crate::maps::{HELD, count};

const INGRESS: u64 = BPF_F_INGRESS as u64;

#[inline(always)]
pub(crate) fn outbound(frame: &Frame, outbound: Outbound) -> i32 {
    match outbound {
        Outbound::Send(ifindex) => {
            count(Counter::OutTranslated, frame.skb().segments().into());
            // SAFETY: without parameters the helper looks the next hop up.
            unsafe { bpf_redirect_neigh(ifindex, core::ptr::null_mut(), 0, 0) as i32 }
        }
        Outbound::Mld(ifindex) => {
            count(Counter::OutMld, 1);
            redirect(ifindex, 0)
        }
        Outbound::Refused(ifindex) => {
            count(Counter::OutRefused, 1);
            redirect(ifindex, INGRESS)
        }
        Outbound::Hold(peer) => hold(frame, peer).into(),
        Outbound::Drop(reason) => {
            count(reason, 1);
            Verdict::Drop.into()
        }
    }
}

#[inline(always)]
pub(crate) fn inbound(frame: &Frame, inbound: Inbound) -> i32 {
    let verdict = match inbound {
        Inbound::Pass => Verdict::Pass,
        Inbound::Signalling => {
            count(Counter::InSignalling, 1);
            Verdict::Pass
        }
        Inbound::Deliver(ifindex, reason) => {
            count(reason, frame.skb().segments().into());
            return redirect(ifindex, INGRESS);
        }
        Inbound::Copy(ifindex) => {
            // SAFETY: the context.
            let result = unsafe { bpf_clone_redirect(frame.skb().as_ptr(), ifindex, INGRESS) };
            if result == 0 {
                count(Counter::InMulticast, 1);
            } else {
                count(Counter::InMulticastLost, 1);
            }
            Verdict::Pass
        }
        Inbound::Drop(reason) => {
            count(reason, 1);
            Verdict::Drop
        }
    };
    verdict.into()
}

#[inline(always)]
fn redirect(ifindex: u32, flags: u64) -> i32 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_redirect(ifindex, flags) as i32 }
}

/// Puts the frame into `HELD`. The frame itself then goes on: the device behind swallows it, while a
/// drop would tell its sender of a congestion that is none. Where the frame is lost that is what
/// the sender is told, so that it tries again.
#[inline(never)]
fn hold(frame: &Frame, peer: Words) -> Verdict {
    let skb = frame.skb();
    let Some(mut entry) = HELD.reserve_untyped::<Held>(0) else {
        count(Counter::HeldFull, 1);
        return Verdict::Drop;
    };
    let held: *mut Held = entry.as_mut_ptr();
    // Verifier: the bounds have to be known of the number that the helper gets.
    let length = instruction::opaque(frame.len() as u64);
    let fits = skb.segment_bytes() == 0 && length != 0 && length <= HELD_FRAME_BYTES as u64;
    // SAFETY: the record is this program's until it is submitted; `length` is at most that of
    // `frame`.
    let copied = unsafe {
        (&raw mut (*held).peer).write(address(peer));
        (&raw mut (*held).pad).write(0);
        let copied = fits && skb.copy_to((&raw mut (*held).frame).cast(), length).is_ok();
        let length = if copied { length as u32 } else { 0 };
        (&raw mut (*held).length).write(length);
        copied
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
