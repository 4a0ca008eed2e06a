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
//!
//! | module | what |
//! |---|---|
//! | [`record`] | at the source: probes, records, and copies of what may stay unread |
//! | [`hold`] | at the destination: frames that wait |

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

mod hold;
mod record;

use core::mem::offset_of;

use agent_ebpf::instruction;
use agent_ebpf::skb::{Skb, now_ns};
use agent_ebpf::verdict::Verdict;
use aya_ebpf::bindings::BPF_NOEXIST;
use common::counter::Counter;
use common::handover::{self, Payload};
use common::maps::{Delivered, DeliveredKey, Gate, GateMode};
use common::packet::PacketRead as _;
use common::trace::{Decision, Program, Reason};
use common::wire::signalling::{self, AGENT_MARK, Signalling};
use common::wire::{ethernet, ipv6, mld, udp};

use crate::aggregate;
use crate::context::Packet as _;
use crate::forward;
use crate::front::{self, Front, StreamWords};
use crate::maps::{self, DELIVERED, GATE_USAGE, GATES, PORTS};
use crate::trace::Traced as _;
use hold::held;
use record::{Place, is_left, keep, probe, record, record_all};

/// A frame goes on, and there is nothing more to do for its gate.
const PASSES: u64 = 0;
/// A frame is held or lost.
const ENDS: u64 = u64::MAX;
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
    let packet = multicast(skb, ifindex, front);
    if may_be_signalling(front, packet.as_ref()) && is_withheld(skb, ifindex) {
        return Verdict::Drop;
    }
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
fn may_be_signalling(front: Option<Front>, packet: Option<&Multicast>) -> bool {
    if let Some(front) = front {
        let header = front.header();
        if header.is_ipv6() {
            let ports = [header.source_port, header.destination_port].map(u16::from_be);
            return signalling::may_be(&header.source, header.next_header, ports);
        }
        if header.ether_type != ethernet::VLAN.to_be() {
            return false;
        }
    }
    // The headers of a packet behind a tag were read already, if it is one to be counted.
    packet.is_none_or(|packet| packet.key.stream.is_from_link_local())
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

#[inline(always)]
fn tell(skb: &Skb, decision: Decision, reason: impl Into<Reason>, number: u64) {
    skb.tell(Program::Gate, decision, reason, number);
}
