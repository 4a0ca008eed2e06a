//! `gate` at the source of a migration: numbers and records the frames that enter the TAP, so that
//! the agents know later which packets the VM has read.

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

use core::ffi::c_void;

use agent_ebpf::instruction;
use agent_ebpf::skb::{Skb, now_ns};
use aya_ebpf::helpers::{bpf_clone_redirect, bpf_loop};
use common::counter::Counter;
use common::forward::stays;
use common::handover::{self, Payload};
use common::maps::{GateUsage, RECORDS_PER_SLOT};
use common::packet::PacketRead as _;
use common::trace::Decision;
use common::wire::ethernet;

use super::hold::output;
use super::{Multicast, tell};
use crate::context::Packet as _;
use crate::forward;
use crate::gso;
use crate::maps::{self, GATE_RECORDS, GATE_USAGE, GATES};

/// Most segments of a GSO frame that the gate records (the kernel's `UDP_MAX_SEGMENTS`).
const MAX_PACKETS: u32 = 128;

/// Returns whether a frame is for an address that the VM of this TAP leaves.
#[inline(never)]
pub(super) fn is_left(skb: &Skb, ifindex: u32) -> bool {
    let Some(headers) = skb.headers() else {
        return false;
    };
    if !headers.header().is_ipv6() || stays(headers.header()) {
        return false;
    }
    // SAFETY: the pointer refers to a live map value.
    forward::entry(skb, headers).is_some_and(|forward| unsafe { (*forward).ifindex } == ifindex)
}

/// Copies a frame for an address that the VM leaves, in case the VM stops before it reads the
/// frame.
#[inline(never)]
pub(super) fn keep(skb: &Skb, ifindex: u32, usage: *mut GateUsage, number: u64) {
    // SAFETY: the pointer refers to a live map value.
    unsafe { instruction::add_u64(&raw mut (*usage).held, 1) }
    // Traffic for a departing VM must not take the room of frames for arriving VMs.
    if maps::held_has_half() && output(skb, ifindex, number, now_ns()) {
        maps::count(Counter::UnreadKept, 1);
        tell(skb, Decision::Recorded, Counter::UnreadKept, number);
    } else {
        maps::count(Counter::UnreadLost, 1);
        tell(skb, Decision::Recorded, Counter::UnreadLost, number);
        // SAFETY: as above.
        unsafe { instruction::add_u64(&raw mut (*usage).lost, 1) }
    }
}

/// Sends a probe into the TAP through this program: a clone of the frame with another Ethernet
/// header. Restores the header of the frame afterwards.
#[inline(always)]
pub(super) fn probe(skb: &Skb, ifindex: u32) -> bool {
    let Ok(header) = skb.read::<{ ethernet::HEADER_BYTES }>(0) else {
        return false;
    };
    let [a, b, c, d, e, f] = handover::PROBE_MAC;
    let [g, h] = handover::PROBE_ETHER_TYPE.to_be_bytes();
    if !skb.write(0, &[a, b, c, d, e, f, a, b, c, d, e, f, g, h]) {
        return false;
    }
    // SAFETY: the pointer is the program's context.
    let result = unsafe { bpf_clone_redirect(skb.as_ptr(), ifindex, 0) };
    skb.write(0, &header) && result == 0
}

/// The slot of `GATE_RECORDS` and the flow that a record belongs to.
pub(super) struct Place {
    pub(super) slot: u32,
    pub(super) usage: *mut GateUsage,
    /// [`handover::flow_hash`] of the flow.
    pub(super) flow: u64,
}

/// State of the loop over the segments of a UDP GSO frame.
struct Recording {
    skb: *const Skb,
    to: Place,
    payload: Payload,
    segment_bytes: u16,
    /// Numbers of the first and the last frame; equal when the TAP takes the GSO frame whole.
    numbers: [u64; 2],
}

/// Records each segment of a GSO frame, because the destination holds segments. `number` is the
/// number of the last frame.
#[inline(never)]
pub(super) fn record_all(skb: &Skb, ifindex: u32, packet: &Multicast, number: u64) {
    let (Some(gate), Some(usage)) = (GATES.get_ptr(ifindex), GATE_USAGE.get_ptr_mut(ifindex))
    else {
        return;
    };
    // SAFETY: the pointer refers to a live map value, which the agent writes as a whole.
    let gate = unsafe { &*gate };
    let frames = gso::frames(skb, gate.splits);
    let mut state = Recording {
        skb,
        to: Place {
            slot: gate.slot,
            usage,
            flow: handover::flow_hash(packet.key.stream.words()),
        },
        payload: packet.payload,
        segment_bytes: skb.segment_bytes() as u16,
        numbers: [number - frames + 1, number],
    };
    let packets = skb.segments();
    let packets = if packets > MAX_PACKETS {
        MAX_PACKETS
    } else {
        packets
    };
    // SAFETY: the callback has the signature that the helper requires, and `state` outlives the call.
    unsafe {
        bpf_loop(
            packets,
            record_one as *mut c_void,
            (&raw mut state).cast(),
            0,
        );
    }
}

/// Records the segment `index`. Returns 1 after the last segment, which ends the loop.
#[inline(never)]
extern "C" fn record_one(index: u64, state: *mut c_void) -> i64 {
    // SAFETY: `record_all` passes its own state, and the frame outlives the loop.
    let (state, skb) = unsafe {
        let state = &*state.cast::<Recording>();
        (state, &*state.skb)
    };
    let at = index as u32 * u32::from(state.segment_bytes);
    let rest = u32::from(state.payload.length).saturating_sub(at);
    if rest == 0 {
        return 1;
    }
    let length = if rest > u32::from(state.segment_bytes) {
        state.segment_bytes
    } else {
        rest as u16
    };
    let payload = Payload {
        offset: state.payload.offset + at as usize,
        length,
    };
    let [first, last] = state.numbers;
    let number = first + index;
    record(
        skb,
        &state.to,
        payload,
        if number > last { last } else { number },
    );
    0
}

/// Records a packet over the oldest record of the slot.
#[inline(always)]
pub(super) fn record(skb: &Skb, to: &Place, payload: Payload, number: u64) {
    let Place { slot, usage, flow } = *to;
    // The payload is within the frame, so the read never fails.
    let Ok(fingerprint) = handover::fingerprint(skb, payload.offset, payload.length) else {
        return;
    };
    // SAFETY: the pointer refers to a live map value.
    let index = unsafe { instruction::fetch_add(&raw mut (*usage).recorded, 1) };
    let index = slot
        .wrapping_mul(RECORDS_PER_SLOT)
        .wrapping_add(index as u32 % RECORDS_PER_SLOT);
    let Some(record) = GATE_RECORDS.get_ptr_mut(index) else {
        return;
    };
    // SAFETY: the pointer refers to a live map value. The agent reads the record at the same time
    // and trusts a record only with a number other than 0, so the number is 0 during the update.
    unsafe {
        instruction::exchange(&raw mut (*record).number, 0);
        (&raw mut (*record).flow).write(flow);
        (&raw mut (*record).fingerprint).write(fingerprint);
        (&raw mut (*record).at_ns).write(now_ns());
        instruction::exchange(&raw mut (*record).number, number);
    }
}
