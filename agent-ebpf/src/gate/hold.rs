//! `gate` at the destination of a migration: multicast frames wait in `HELD` until the agent has
//! delivered the frames before them.

#![allow(
    unsafe_code,
    reason = "map values are reached through raw pointers, and the memory of a record as bytes"
)]

use core::mem::offset_of;
use core::slice;

use agent_ebpf::instruction;
use agent_ebpf::skb::{Skb, now_ns};
use aya_ebpf::helpers::bpf_get_smp_processor_id;
use common::counter::Counter;
use common::maps::{Gate, GateUsage, HELD_FRAME_BYTES, HeldFrame};
use common::packet::PacketRead as _;
use common::trace::{Decision, Reason, Uncounted};
use common::wire::ethernet;

use super::tell;
use crate::maps::{self, HELD, HELD_SCRATCH, HeldRecord};

/// Returns whether the gate holds the frame. A held frame gets the next number and enters `HELD`;
/// the frame is lost when `HELD` has no room.
#[inline(always)]
pub(super) fn held(skb: &Skb, ifindex: u32, gate: &Gate, usage: *mut GateUsage) -> bool {
    // SAFETY: the pointer refers to a live map value.
    let word = unsafe { &raw mut (*usage).held };
    // SAFETY: as above; another CPU may write the word at any time.
    let found = unsafe { word.read_volatile() };
    if found & GateUsage::OPEN != 0 {
        tell(skb, Decision::Passed, Uncounted::GateOpen, 0);
        return false;
    }
    let at_ns = now_ns();
    if at_ns > gate.until_ns {
        maps::count(Counter::HeldExpired, 1);
        tell(skb, Decision::Passed, Counter::HeldExpired, 0);
        return false;
    }
    // This one step opens the gate: a frame on another CPU has a smaller number, or finds the gate
    // open.
    // SAFETY: as above.
    if found == gate.replayed
        && unsafe { instruction::compare_exchange(word, found, found | GateUsage::OPEN) } == found
    {
        tell(skb, Decision::Opened, Reason::NONE, found);
        return false;
    }
    // SAFETY: as above.
    let found = unsafe { instruction::fetch_add(word, 1) };
    if found & GateUsage::OPEN != 0 {
        tell(skb, Decision::Passed, Uncounted::GateOpen, 0);
        return false;
    }
    if output(skb, ifindex, found + 1, at_ns) {
        maps::count(Counter::HeldFrames, 1);
        tell(skb, Decision::Held, Reason::NONE, found + 1);
    } else {
        let reason = if skb.len() > HELD_FRAME_BYTES {
            Counter::HeldOversized
        } else {
            Counter::HeldLost
        };
        maps::count(reason, 1);
        tell(skb, Decision::Dropped, reason, found + 1);
        // SAFETY: the pointer refers to a live map value.
        unsafe { instruction::add_u64(&raw mut (*usage).lost, 1) }
    }
    true
}

/// Copies a frame into `HELD`. Returns `false` when `HELD` has no room or the frame is too long.
#[inline(always)]
pub(super) fn output(skb: &Skb, ifindex: u32, number: u64, at_ns: u64) -> bool {
    // SAFETY: the helper has no preconditions.
    let cpu = unsafe { bpf_get_smp_processor_id() } as u32;
    let Some(record) = HELD_SCRATCH.get_ptr_mut(cpu) else {
        return false;
    };
    let Some(length) = instruction::size::<HELD_FRAME_BYTES>(skb.len()) else {
        return false;
    };
    // SAFETY: the slot belongs to this CPU, and the program does not interrupt itself; `length` is
    // at most the size of `frame`, so head and frame are within the slot.
    unsafe {
        (&raw mut (*record).head).write(HeldFrame {
            number,
            at_ns,
            ifindex,
            length: length as u32,
            vlan: skb.vlan_metadata() & ethernet::VLAN_IDENTIFIER,
            segment_bytes: skb.segment_bytes() as u16,
            pad: 0,
        });
        if skb
            .copy_to((&raw mut (*record).frame).cast(), length)
            .is_err()
        {
            return false;
        }
        let bytes = offset_of!(HeldRecord, frame) + length as usize;
        let record = slice::from_raw_parts(record.cast_const().cast(), bytes);
        HELD.output_untyped::<[u8]>(record, 0).is_ok()
    }
}
