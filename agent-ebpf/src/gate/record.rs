//! `gate` at the source: what enters the TAP of a VM that leaves is numbered, and recorded, so that it is
//! known later what the VM has had.

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
use crate::aggregate;
use crate::context::Packet as _;
use crate::forward;
use crate::maps::{self, GATE_RECORDS, GATE_USAGE, GATES};

/// Most packets of an aggregate that are recorded (`UDP_MAX_SEGMENTS`).
const MAX_PACKETS: u32 = 128;

/// Whether a frame is for an address that the VM of this TAP leaves.
#[inline(never)]
pub(super) fn is_left(skb: &Skb, ifindex: u32) -> bool {
    let Some(front) = skb.front() else {
        return false;
    };
    if !front.header().is_ipv6() || stays(front.header()) {
        return false;
    }
    // SAFETY: the pointer is to a live map value.
    forward::entry(skb, front).is_some_and(|forward| unsafe { (*forward).ifindex } == ifindex)
}

/// Keeps a copy of a frame for an address that its VM leaves, for the case that the VM stops before
/// it has read the frame.
#[inline(never)]
pub(super) fn keep(skb: &Skb, ifindex: u32, usage: *mut GateUsage, number: u64) {
    // SAFETY: the pointer is to a live map value.
    unsafe { instruction::add_u64(&raw mut (*usage).held, 1) }
    // A VM that is sent much must not take the room of those that arrive here.
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

/// Sends a probe into the TAP, which passes this program too: a copy of the frame with another
/// Ethernet header. The frame itself is as before.
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

/// Where packets of a flow are recorded.
pub(super) struct Place {
    pub(super) slot: u32,
    pub(super) usage: *mut GateUsage,
    /// [`handover::flow_hash`].
    pub(super) flow: u64,
}

/// An aggregate of UDP whose packets are recorded.
struct Recording {
    skb: *const Skb,
    to: Place,
    payload: Payload,
    segment_bytes: u16,
    /// Numbers of its first and last frame, which are the same where the TAP takes it whole.
    numbers: [u64; 2],
}

/// Records each packet of an aggregate, as the destination holds them. `number` is that of its last frame.
#[inline(never)]
pub(super) fn record_all(skb: &Skb, ifindex: u32, packet: &Multicast, number: u64) {
    let (Some(gate), Some(usage)) = (GATES.get_ptr(ifindex), GATE_USAGE.get_ptr_mut(ifindex))
    else {
        return;
    };
    // SAFETY: the pointer is to a live map value, which only the agent writes, as a whole.
    let gate = unsafe { &*gate };
    let frames = aggregate::frames(skb, gate.splits);
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
    // SAFETY: the callback has the form that the helper wants, and `state` outlives the call.
    unsafe {
        bpf_loop(
            packets,
            record_one as *mut c_void,
            (&raw mut state).cast(),
            0,
        );
    }
}

/// Records the packet of an index. Ends the loop behind the last one.
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

/// Records a packet over the oldest one of the slot.
#[inline(always)]
pub(super) fn record(skb: &Skb, to: &Place, payload: Payload, number: u64) {
    let Place { slot, usage, flow } = *to;
    // The payload is within the frame, so this does not fail.
    let Ok(fingerprint) = handover::fingerprint(skb, payload.offset, payload.length) else {
        return;
    };
    // SAFETY: the pointer is to a live map value.
    let index = unsafe { instruction::fetch_add(&raw mut (*usage).recorded, 1) };
    let index = slot
        .wrapping_mul(RECORDS_PER_SLOT)
        .wrapping_add(index as u32 % RECORDS_PER_SLOT);
    let Some(record) = GATE_RECORDS.get_ptr_mut(index) else {
        return;
    };
    // SAFETY: the pointer is to a live map value, which the agent reads meanwhile: the number
    // tells it whether the rest is that of one packet, so it is 0 until all of it is there.
    unsafe {
        instruction::exchange(&raw mut (*record).number, 0);
        (&raw mut (*record).flow).write(flow);
        (&raw mut (*record).fingerprint).write(fingerprint);
        (&raw mut (*record).at_ns).write(now_ns());
        instruction::exchange(&raw mut (*record).number, number);
    }
}
