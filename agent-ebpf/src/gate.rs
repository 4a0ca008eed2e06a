//! `gate`: frames on their way into a TAP, at the TAP's TC egress.
//!
//! ```text
//!                 no entry --------------------------------------> DELIVERED --> TAP
//!  frame --> GATES <- Record --> number --> GATE_RECORDS ------------'
//!                 '-- Hold ----> open? held == replayed? ------------'
//!                                        '--> number --> HELD
//! ```
//!
//! The gate first drops signalling that this host's agent did not send. A frame that is not a
//! multicast packet of routable scope then always passes, without an entry in `DELIVERED`. While the
//! gate records, `HELD` receives copies of frames for an address that the VM leaves.
//!
//! | module | end | task |
//! |---|---|---|
//! | [`record`](mod@record) | source | sends probes, records packets, and copies frames that the VM may not read |
//! | [`hold`] | destination | holds frames |

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

mod hold;
mod record;

use core::mem::offset_of;

use agent_ebpf::instruction;
use agent_ebpf::skb::{Skb, now_ns};
use agent_ebpf::verdict::Verdict;
use aya_ebpf::bindings::BPF_NOEXIST;
use common::counter::Counter;
use common::group;
use common::handover::{self, Payload};
use common::maps::{Delivered, DeliveredKey, Gate, GateMode};
use common::packet::PacketRead as _;
use common::trace::{Decision, Program, Reason};
use common::wire::signalling::{self, AGENT_MARK, Signalling};
use common::wire::{ethernet, ipv6, mld, udp};

use crate::context::Packet as _;
use crate::forward;
use crate::gso;
use crate::header_view::{self, HeaderView, StreamWords};
use crate::maps::{self, DELIVERED, GATE_USAGE, GATES, PORTS};
use crate::trace::Traced as _;
use hold::held;
use record::{Place, is_left, keep, probe, record, record_all};

/// The frame continues, and its gate has no more work.
const PASSES: u64 = 0;
/// The gate holds the frame, or the frame is lost.
const ENDS: u64 = u64::MAX;
/// Ethernet and IPv6 header without a tag, bytes.
const HEADERS_BYTES: usize = 14 + ipv6::HEADER_BYTES;

/// [`DeliveredKey`] as words, after 4 bytes of padding that the key does not have.
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
        // SAFETY: the assertions above prove equal layouts.
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
    let headers = skb.headers();
    let packet = multicast(skb, ifindex, headers);
    if may_be_signalling(headers, packet.as_ref()) && is_withheld(skb, ifindex) {
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

/// Returns whether only a full parse can tell that a frame is not signalling.
#[inline(always)]
fn may_be_signalling(headers: Option<HeaderView>, packet: Option<&Multicast>) -> bool {
    if let Some(headers) = headers {
        let header = headers.header();
        if header.is_ipv6() {
            let ports = [header.source_port, header.destination_port].map(u16::from_be);
            return signalling::may_be(&header.source, header.next_header, ports);
        }
        if header.ether_type != ethernet::VLAN.to_be() {
            return false;
        }
    }
    // `multicast` has parsed the headers of a counted packet behind a tag.
    packet.is_none_or(|packet| packet.key.stream.is_from_link_local())
}

/// Returns whether a frame is signalling that this VM must not receive. The VM would take the
/// answer of a foreign agent for its own agent's answer, and a request of another VM shows the
/// number that identifies the answer.
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
        // SAFETY: the pointer refers to a live map value.
        unsafe { instruction::add_u64(&raw mut (*usage).withheld_datagrams, 1) }
    }
    true
}

/// Parses a multicast packet by the rules of [`handover::packet`]; reads the usual headers in
/// place.
#[inline(always)]
fn multicast(skb: &Skb, ifindex: u32, headers: Option<HeaderView>) -> Option<Multicast> {
    let Some(headers) = headers else {
        return multicast_by_reading(skb, ifindex);
    };
    let header = headers.header();
    if !header.is_ipv6() {
        if header.ether_type == ethernet::VLAN.to_be() {
            return multicast_by_reading(skb, ifindex);
        }
        return None;
    }
    if !group::is_routable(&header.destination) {
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
                headers.destination(),
                headers.source(),
                if is_udp { headers.ports() } else { 0 },
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
                header_view::words_of(stream.multicast_address),
                header_view::words_of(stream.source),
                header_view::ports_word(stream.source_port, stream.destination_port),
                stream.vlan,
            ),
        },
        payload: packet.payload,
    })
}

/// Counts a packet that continues to the TAP.
#[inline(always)]
fn deliver(skb: &Skb, key: &DeliveredKey) {
    let segments = u64::from(skb.segments());
    let Some(delivered) = delivered(key, segments) else {
        return;
    };
    // SAFETY: the pointer refers to a live map value.
    unsafe {
        instruction::add_u64(&raw mut (*delivered).packets, segments);
        instruction::add_u64(&raw mut (*delivered).bytes, skb.len() as u64);
    }
}

/// Returns the entry of a flow; the first packet creates the entry. Counts packets of flows without
/// an entry.
#[inline(always)]
fn delivered(key: &DeliveredKey, segments: u64) -> Option<*mut Delivered> {
    if let Some(delivered) = DELIVERED.get_ptr_mut(key) {
        return Some(delivered);
    }
    make(key, segments);
    DELIVERED.get_ptr_mut(key)
}

/// Creates the entry of a flow, unless the TAP has reached its limit of flows.
#[inline(never)]
fn make(key: &DeliveredKey, segments: u64) {
    let usage = maps::port_usage(key.ifindex);
    if let (Some(usage), Some(port)) = (usage, PORTS.get_ptr(key.ifindex)) {
        // SAFETY: the pointers refer to live map values.
        let has_room =
            unsafe { (*usage).flows.wrapping_sub((*port).forgotten_flows) < (*port).max_flows };
        if !has_room {
            maps::count(Counter::PortFlowsFull, segments);
            return;
        }
    }
    // SAFETY: the type consists of integers.
    let made = unsafe {
        instruction::with_zeroed(|unused: &Delivered| {
            DELIVERED.insert(key, unused, BPF_NOEXIST.into())
        })
    };
    match (made, usage) {
        // SAFETY: the pointer refers to a live map value.
        (Ok(()), Some(usage)) => unsafe {
            instruction::add_u32(&raw mut (*usage).flows, 1);
        },
        (Ok(()), None) => {}
        // Another CPU may have inserted first.
        (Err(_), _) if DELIVERED.get_ptr(key).is_some() => {}
        (Err(_), _) => maps::count(Counter::DeliveredFull, segments),
    }
}

/// Applies the gate to a frame. `packet` is `None` for a frame that is not a multicast packet of
/// routable scope; the gate only counts such a frame. Returns [`PASSES`], [`ENDS`], or the last
/// sequence number of a GSO frame whose segments the caller records: this function has too little
/// stack for that.
#[inline(never)]
fn through(skb: &Skb, ifindex: u32, gate: *const Gate, packet: Option<&Multicast>) -> u64 {
    let Some(usage) = GATE_USAGE.get_ptr_mut(ifindex) else {
        maps::count(Counter::GateUnready, 1);
        if packet.is_some() {
            tell(skb, Decision::Passed, Counter::GateUnready, 0);
        }
        return PASSES;
    };
    // SAFETY: the pointer refers to a live map value; only the agent writes it, and always as a whole.
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
        let frames = gso::frames(skb, gate.splits);
        // SAFETY: the pointer refers to a live map value.
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
