//! `gate`: frames on their way into a TAP.
//!
//! ```text
//!                 no entry --------------------------------------> DELIVERED --> TAP
//!  frame --> GATES <- Record --> number --> GATE_RECORDS ------------'
//!                 '-- Hold ----> is it open? held == replayed? ------'
//!                                        '--> number --> HELD
//! ```
//!
//! What is not a multicast packet of routable scope passes always, and is counted nowhere, but for
//! signalling that this host's agent has not sent: it ends here, before all this. Of those
//! for an address that its VM leaves, `HELD` gets copies while the gate records.

#![allow(
    unsafe_code,
    reason = "map values are reached through raw pointers, and the memory of a record as bytes"
)]

use core::ffi::c_void;
use core::mem::offset_of;
use core::slice;

use agent_ebpf::instruction;
use agent_ebpf::skb::{Skb, now_ns};
use agent_ebpf::verdict::Verdict;
use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::{bpf_clone_redirect, bpf_get_smp_processor_id, bpf_loop};
use common::counter::Counter;
use common::forward::stays;
use common::handover::{self, Payload};
use common::maps::{
    Delivered, DeliveredKey, Gate, GateMode, GateUsage, HELD_FRAME_BYTES, HeldFrame,
    RECORDS_PER_SLOT,
};
use common::packet::PacketRead as _;
use common::trace::{Decision, Program, Reason, Uncounted};
use common::wire::signalling::{self, AGENT_MARK, Signalling};
use common::wire::{ethernet, ipv6, mld, udp};

use crate::aggregate;
use crate::context::Packet as _;
use crate::forward;
use crate::front::{self, Front, StreamWords};
use crate::maps::{
    self, DELIVERED, GATE_RECORDS, GATE_USAGE, GATES, HELD, HELD_SCRATCH, HeldRecord, PORTS,
};
use crate::trace::Traced as _;

/// A frame goes on, and there is nothing more to do for its gate.
const PASSES: u64 = 0;
/// A frame is held or lost.
const ENDS: u64 = u64::MAX;
/// Ethernet header without a tag, bytes.
const ETHERNET_BYTES: usize = 14;
/// Most packets of an aggregate that are recorded (`UDP_MAX_SEGMENTS`).
const MAX_PACKETS: u32 = 128;
/// Ethernet and IPv6 header without a tag, bytes.
const HEADERS_BYTES: usize = 14 + ipv6::HEADER_BYTES;

/// [`DeliveredKey`] in words, behind 4 bytes that are not part of it.
#[repr(C)]
struct DeliveredWords {
    pad: u32,
    ifindex: u32,
    stream: StreamWords,
}

const _: () = {
    let start = offset_of!(DeliveredWords, ifindex);
    assert!(offset_of!(DeliveredKey, ifindex) == 0);
    assert!(offset_of!(DeliveredKey, stream) == offset_of!(DeliveredWords, stream) - start);
    assert!(size_of::<DeliveredKey>() == size_of::<DeliveredWords>() - start);
};

impl DeliveredWords {
    #[inline(always)]
    fn key(&self) -> &DeliveredKey {
        let bytes = (&raw const *self).cast::<u8>();
        // SAFETY: the layouts agree, as is asserted above.
        unsafe { &*bytes.add(offset_of!(Self, ifindex)).cast() }
    }
}

/// A multicast packet of routable scope.
struct Multicast {
    key: DeliveredWords,
    payload: Payload,
}

#[inline(always)]
pub(crate) fn gate(skb: &Skb) -> Verdict {
    let ifindex = skb.ifindex();
    let front = skb.front();
    if may_be_signalling(front) && is_withheld(skb, ifindex) {
        return Verdict::Drop;
    }
    let packet = multicast(skb, ifindex, front);
    if let Some(gate) = GATES.get_ptr(ifindex) {
        let number = through(skb, ifindex, gate, packet.as_ref());
        if number == ENDS {
            return Verdict::Drop;
        }
        if number != PASSES
            && let Some(packet) = &packet
        {
            record_all(skb, ifindex, packet, number);
        }
    } else if packet.is_some() {
        tell(skb, Decision::Passed, Reason::NONE, 0);
    }
    if let Some(packet) = &packet {
        deliver(skb, packet.key.key());
    }
    Verdict::Pass
}

/// Whether it takes more than a glance to know that a frame is no signalling.
#[inline(always)]
fn may_be_signalling(front: Option<Front>) -> bool {
    let Some(front) = front else {
        return true;
    };
    let header = front.header();
    if header.is_ipv6() {
        ipv6::is_link_local(&header.source)
    } else {
        header.ether_type == ethernet::VLAN.to_be()
    }
}

/// Whether a frame is signalling that is not for this VM: an answer that is not of this host's agent
/// would be taken for one, and the request of another VM has the number that an answer is known by.
#[inline(never)]
fn is_withheld(skb: &Skb, ifindex: u32) -> bool {
    let Some(frame) = mld::ipv6_frame(skb) else {
        return false;
    };
    match signalling::classify(skb, &frame) {
        Signalling::Other => return false,
        Signalling::Answer if skb.mark() == AGENT_MARK => return false,
        Signalling::Answer | Signalling::Request | Signalling::Hidden => {}
    }
    maps::count(Counter::SignallingWithheld, 1);
    tell(skb, Decision::Dropped, Counter::SignallingWithheld, 0);
    if let Some(usage) = maps::port_usage(ifindex) {
        // SAFETY: the pointer is to a live map value.
        unsafe { instruction::add_u64(&raw mut (*usage).withheld_datagrams, 1) }
    }
    true
}

/// By the same rules as [`handover::packet`], from the headers where they lie if they are the usual
/// ones.
#[inline(always)]
fn multicast(skb: &Skb, ifindex: u32, front: Option<Front>) -> Option<Multicast> {
    let Some(front) = front else {
        return multicast_by_reading(skb, ifindex);
    };
    let header = front.header();
    if !header.is_ipv6() {
        if header.ether_type == ethernet::VLAN.to_be() {
            return multicast_by_reading(skb, ifindex);
        }
        return None;
    }
    if !ipv6::is_routable_multicast(&header.destination) {
        return None;
    }
    if header.next_header == ipv6::HOP_BY_HOP {
        return multicast_by_reading(skb, ifindex);
    }
    let is_udp = header.next_header == udp::NEXT_HEADER;
    let payload_length = u16::from_be(header.payload_length);
    Some(Multicast {
        key: DeliveredWords {
            pad: 0,
            ifindex,
            stream: StreamWords::new(
                front.destination(),
                front.source(),
                if is_udp { front.ports() } else { 0 },
                skb.vlan_metadata() & ethernet::VLAN_IDENTIFIER,
            ),
        },
        payload: Payload::new(skb.len(), HEADERS_BYTES, payload_length, is_udp),
    })
}

#[inline(never)]
fn multicast_by_reading(skb: &Skb, ifindex: u32) -> Option<Multicast> {
    let packet = handover::packet(skb)?;
    let stream = packet.stream;
    Some(Multicast {
        key: DeliveredWords {
            pad: 0,
            ifindex,
            stream: StreamWords::new(
                front::words_of(stream.multicast_address),
                front::words_of(stream.source),
                front::ports_word(stream.source_port, stream.destination_port),
                stream.vlan,
            ),
        },
        payload: packet.payload,
    })
}

/// Counts a packet that goes on to the TAP.
#[inline(always)]
fn deliver(skb: &Skb, key: &DeliveredKey) {
    let segments = u64::from(skb.segments());
    let Some(delivered) = delivered(key, segments) else {
        return;
    };
    // SAFETY: the pointer is to a live map value.
    unsafe {
        instruction::add_u64(&raw mut (*delivered).packets, segments);
        instruction::add_u64(&raw mut (*delivered).bytes, skb.len() as u64);
    }
}

/// The flow's entry, made at its first packet; the packets of one that has none are counted.
#[inline(always)]
fn delivered(key: &DeliveredKey, segments: u64) -> Option<*mut Delivered> {
    if let Some(delivered) = DELIVERED.get_ptr_mut(key) {
        return Some(delivered);
    }
    make(key, segments);
    DELIVERED.get_ptr_mut(key)
}

/// Makes the entry of a flow, unless its TAP has as many as it may have.
#[inline(never)]
fn make(key: &DeliveredKey, segments: u64) {
    let usage = maps::port_usage(key.ifindex);
    if let (Some(usage), Some(port)) = (usage, PORTS.get_ptr(key.ifindex)) {
        // SAFETY: the pointers are to live map values.
        let has_room =
            unsafe { (*usage).flows.wrapping_sub((*port).forgotten_flows) < (*port).max_flows };
        if !has_room {
            maps::count(Counter::PortFlowsFull, segments);
            return;
        }
    }
    // SAFETY: it consists of integers.
    let made = unsafe {
        instruction::with_zeroed(|unused: &Delivered| {
            DELIVERED.insert(key, unused, BPF_NOEXIST.into())
        })
    };
    match (made, usage) {
        // SAFETY: the pointer is to a live map value.
        (Ok(()), Some(usage)) => unsafe {
            instruction::add_u32(&raw mut (*usage).flows, 1);
        },
        (Ok(()), None) => {}
        // Another CPU may have been faster.
        (Err(_), _) if DELIVERED.get_ptr(key).is_some() => {}
        (Err(_), _) => maps::count(Counter::DeliveredFull, segments),
    }
}

/// What a gate does with a frame; of one that is not multicast of routable scope it sees only that
/// it is there. Returns [`PASSES`], [`ENDS`], or the number of an aggregate whose packets are yet to be
/// recorded: here they would take more stack than there is.
#[inline(never)]
fn through(skb: &Skb, ifindex: u32, gate: *const Gate, packet: Option<&Multicast>) -> u64 {
    let Some(usage) = GATE_USAGE.get_ptr_mut(ifindex) else {
        maps::count(Counter::GateUnready, 1);
        if packet.is_some() {
            tell(skb, Decision::Passed, Counter::GateUnready, 0);
        }
        return PASSES;
    };
    // SAFETY: the pointer is to a live map value, which only the agent writes, as a whole.
    let gate = unsafe { &*gate };
    if gate.mode == GateMode::Record as u32 {
        if now_ns() > gate.until_ns {
            maps::count(Counter::RecordExpired, 1);
            if packet.is_some() {
                tell(skb, Decision::Passed, Counter::RecordExpired, 0);
            }
            return PASSES;
        }
        let is_left = packet.is_none() && forward::is_on() && is_left(skb, ifindex);
        if (packet.is_some() || is_left) && gate.probes != 0 && !probe(skb, ifindex) {
            maps::count(Counter::ProbesFailed, 1);
        }
        let frames = aggregate::frames(skb, gate.splits);
        // SAFETY: the pointer is to a live map value.
        let before = unsafe { instruction::fetch_add(&raw mut (*usage).entered, frames) };
        let number = before + frames;
        if let Some(packet) = packet {
            tell(skb, Decision::Recorded, Reason::NONE, number);
            if skb.segment_bytes() != 0 {
                return number;
            }
            let flow = handover::flow_hash(packet.key.stream.words());
            record(
                skb,
                &Place {
                    slot: gate.slot,
                    usage,
                    flow,
                },
                packet.payload,
                number,
            );
        } else if is_left {
            keep(skb, ifindex, usage, number);
        }
    } else if gate.mode == GateMode::Hold as u32
        && packet.is_some()
        && held(skb, ifindex, gate, usage)
    {
        return ENDS;
    }
    PASSES
}

/// Whether a frame is for an address that the VM of this TAP leaves.
#[inline(never)]
fn is_left(skb: &Skb, ifindex: u32) -> bool {
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
fn keep(skb: &Skb, ifindex: u32, usage: *mut GateUsage, number: u64) {
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
fn probe(skb: &Skb, ifindex: u32) -> bool {
    let Ok(header) = skb.read::<ETHERNET_BYTES>(0) else {
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
struct Place {
    slot: u32,
    usage: *mut GateUsage,
    /// [`handover::flow_hash`].
    flow: u64,
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
fn record_all(skb: &Skb, ifindex: u32, packet: &Multicast, number: u64) {
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
fn record(skb: &Skb, to: &Place, payload: Payload, number: u64) {
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

#[inline(always)]
fn tell(skb: &Skb, decision: Decision, reason: impl Into<Reason>, number: u64) {
    skb.tell(Program::Gate, decision, reason, number);
}

/// Whether the frame is held: put into `HELD`, or lost, in either case numbered.
#[inline(always)]
fn held(skb: &Skb, ifindex: u32, gate: &Gate, usage: *mut GateUsage) -> bool {
    // SAFETY: the pointer is to a live map value.
    let word = unsafe { &raw mut (*usage).held };
    // SAFETY: as above; another CPU may write it at any time.
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
    // The one step decides: a frame on another CPU has its number before it, or finds it open.
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
        // SAFETY: the pointer is to a live map value.
        unsafe { instruction::add_u64(&raw mut (*usage).lost, 1) }
    }
    true
}

/// Puts a frame into `HELD`; `false` when there is no room, or it is too long.
#[inline(always)]
fn output(skb: &Skb, ifindex: u32, number: u64, at_ns: u64) -> bool {
    // SAFETY: the helper has no preconditions.
    let cpu = unsafe { bpf_get_smp_processor_id() } as u32;
    let Some(record) = HELD_SCRATCH.get_ptr_mut(cpu) else {
        return false;
    };
    let Some(length) = instruction::size::<HELD_FRAME_BYTES>(skb.len()) else {
        return false;
    };
    // SAFETY: the slot is this CPU's own and the program is not interrupted by itself; `length` is
    // at most that of `frame`, so head and frame are within the slot.
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
