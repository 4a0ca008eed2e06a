//! `uplink`: packets that arrive from the network, at the uplink's TC ingress or XDP hook.
//!
//! ```text
//!                   multicast --> MANAGED? --> STREAMS --> origin passes? first copy? --> bridge
//!  frame --> IPv6 <                  '--> Query --> QUERIER                       ^
//!                   unicast --> RELAY_FLOWS? --> whole? --> MANAGED? --> restored '
//!                        '--> FORWARDS? --> sent on (`forward`)
//! ```

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

use agent_ebpf::verdict::Verdict;
use aya_ebpf::bindings::BPF_ANY;
use common::counter::Counter;
use common::event::{Kind, QueryEvent};
use common::group;
use common::maps::{Managed, Origin, Querier, QuerierKey, RelayFlow, StreamUsage};
use common::relay;
use common::snoop::{KERNEL_BYTES, KERNEL_OPTIONS};
use common::trace::{Decision, Program, Reason, Uncounted};
use common::wire::datagram::CHECKSUM_OFFSET;
use common::wire::mld::{self, Ipv6Frame, Message, NoMessage, Query};
use common::wire::{ethernet, ipv6, udp};

use crate::context::{Arrival, Packet};
use crate::forward;
use crate::header_view::{self, HeaderView, ManagedWords, RelayFlowWords, RelayWords, StreamWords};
use crate::maps::{self, MANAGED, QUERIER, RELAY_FLOWS, RELAYS};
use crate::stream::{self, Payload};

#[inline(always)]
pub(crate) fn uplink<P: Packet>(packet: &P) -> Verdict {
    // Anything shorter than an empty UDP datagram is not ours.
    let Some(headers) = packet.headers() else {
        return Verdict::Pass;
    };
    let header = headers.header();
    // One function per kind of packet, not inlined: inlined they exceed the stack together, and a
    // single function runs out of registers.
    if !header.is_ipv6() {
        if header.ether_type == ethernet::VLAN.to_be() {
            with_more_headers(packet);
        }
        return Verdict::Pass;
    }
    if !group::is_multicast(&header.destination) {
        if forward::is_on() {
            let verdict = forward::unicast(packet, headers, Program::Uplink);
            if !matches!(verdict, Verdict::Pass) {
                return verdict;
            }
        }
        return relayed(packet, headers);
    }
    if relay::is_restored(header.destination_mac, header.source_mac) {
        return Verdict::Pass;
    }
    if header.next_header == ipv6::HOP_BY_HOP {
        with_more_headers(packet);
        return Verdict::Pass;
    }
    native(packet, headers)
}

/// Handles a multicast packet without VLAN tag and Hop-by-Hop Options.
#[inline(never)]
fn native<P: Packet>(packet: &P, headers: HeaderView) -> Verdict {
    let header = headers.header();
    let is_udp = header.next_header == udp::NEXT_HEADER;
    let key = StreamWords::new(
        headers.destination(),
        headers.source(),
        if is_udp { headers.ports() } else { 0 },
        packet.vlan_metadata() & ethernet::VLAN_IDENTIFIER,
    );
    let Some(managed) = MANAGED.get_ptr_mut(key.managed().key()) else {
        tell(packet, Decision::Passed, Uncounted::NotManaged);
        return Verdict::Pass;
    };
    let arrival = packet.arrival();
    let entry = observe_native(packet, &key, managed, &arrival);
    // A relay carries neither fragments nor protocols other than UDP, so such a packet has no
    // second copy.
    if !is_udp || !header.has_payload() {
        tell(packet, Decision::Passed, Reason::NONE);
        return Verdict::Pass;
    }
    // SAFETY: the pointer refers to a live map value.
    let origins = unsafe { (*managed).origins };
    let passes = if stream::by_fingerprint(origins) {
        stream::copy_passes(
            packet,
            key.words(),
            Origin::Native,
            origins,
            arrival.at_ns,
            &Payload::of(header),
        )
    } else {
        origins & Origin::Native.pass_bit() != 0
    };
    if passes {
        tell(packet, Decision::Passed, Reason::NONE);
        return Verdict::Pass;
    }
    let reason = stream::drop_copy(entry, Origin::Native, origins, &arrival);
    tell(packet, Decision::Dropped, reason);
    Verdict::Drop
}

#[inline(always)]
fn observe_native<P: Packet>(
    packet: &P,
    key: &StreamWords,
    managed: *mut Managed,
    arrival: &Arrival,
) -> Option<*mut StreamUsage> {
    maps::count(Counter::NativePackets, arrival.segments.into());
    let bytes = packet.len() as u64;
    // SAFETY: the pointers refer to the live map values of the flow and its address.
    unsafe {
        let usage = stream::native(key.key(), managed, arrival)?;
        stream::observe(usage, key.key(), Origin::Native, managed, arrival, bytes);
        Some(usage)
    }
}

/// Handles a frame with a VLAN tag or Hop-by-Hop Options. No relay carries such frames, so they
/// always pass.
///
/// The parts are not inlined: inlining would sum up their stack frames.
#[inline(never)]
fn with_more_headers<P: Packet>(packet: &P) {
    let Some(multicast) = &multicast_by_reading(packet) else {
        return;
    };
    if let Some(managed) = MANAGED.get_ptr_mut(multicast.key.managed().key()) {
        observe_by_reading(packet, &multicast.key, managed);
        tell(packet, Decision::Passed, Reason::NONE);
    } else if multicast.next_header == ipv6::HOP_BY_HOP {
        query(packet);
    }
}

/// A multicast packet with a VLAN tag or Hop-by-Hop Options.
struct Multicast {
    key: StreamWords,
    next_header: u8,
}

#[inline(never)]
fn multicast_by_reading<P: Packet>(packet: &P) -> Option<Multicast> {
    let frame = mld::ipv6_frame(packet)?;
    if !group::is_multicast(&frame.header.destination) {
        return None;
    }
    let mut ports = 0;
    if frame.header.next_header == udp::NEXT_HEADER
        && let Ok(found) = udp::parse(packet, frame.payload)
    {
        ports = header_view::ports_word(found.source, found.destination);
    }
    Some(Multicast {
        key: StreamWords::new(
            header_view::words_of(frame.header.destination),
            header_view::words_of(frame.header.source),
            ports,
            frame.vlan,
        ),
        next_header: frame.header.next_header,
    })
}

#[inline(never)]
fn observe_by_reading<P: Packet>(packet: &P, key: &StreamWords, managed: *mut Managed) {
    observe_native(packet, key, managed, &packet.arrival());
}

/// Handles a unicast packet; restores a datagram of an established relay flow.
#[inline(never)]
fn relayed<P: Packet>(packet: &P, headers: HeaderView) -> Verdict {
    let header = headers.header();
    if header.next_header != udp::NEXT_HEADER {
        if header.next_header == ipv6::FRAGMENT && is_of_relay(headers) {
            maps::count(Counter::RelayFragment, 1);
            tell(packet, Decision::Dropped, Counter::RelayFragment);
            return Verdict::Drop;
        }
        return Verdict::Pass;
    }
    if u16::from_be(header.destination_port) < relay::FIRST_PORT || packet.vlan_metadata() != 0 {
        return Verdict::Pass;
    }
    let key = RelayFlowWords {
        relay_address: headers.source(),
        ports: headers.ports(),
    };
    let entry = RELAY_FLOWS.get_ptr_mut(key.key()).filter(|entry| {
        // SAFETY: the pointer refers to a live map value.
        let agent_address = unsafe { header_view::words(&raw const (**entry).flow.agent_address) };
        agent_address == headers.destination()
    });
    let Some(entry) = entry else {
        if is_of_relay(headers) {
            maps::count(Counter::RelayUnknownFlow, 1);
            tell(packet, Decision::Passed, Counter::RelayUnknownFlow);
        }
        return Verdict::Pass;
    };
    // SAFETY: the pointer refers to a live map value, of which only the agent writes this part.
    let (flow, usage) = unsafe { (&(*entry).flow, &raw mut (*entry).usage) };
    let bytes = packet.len();
    if !header.is_whole(bytes) {
        maps::count(Counter::RelayMalformed, 1);
        tell_of(packet, flow, Decision::Dropped, Counter::RelayMalformed);
        return Verdict::Drop;
    }
    // SAFETY: as above.
    let managed = unsafe { ManagedWords::of(&flow.stream) };
    let Some(managed) = MANAGED.get_ptr(managed.key()) else {
        // The last listener has left, and the relay has not processed the end of the subscription
        // yet.
        maps::count(Counter::OtherOrigin, 1);
        tell_of(packet, flow, Decision::Dropped, Counter::OtherOrigin);
        return Verdict::Drop;
    };
    let arrival = packet.arrival();
    let bytes = bytes as u64;
    // SAFETY: as above; the pointer refers to a live map value.
    let origins = unsafe {
        stream::observe(usage, &flow.stream, Origin::Relay, managed, &arrival, bytes);
        (*managed).origins
    };
    let mut passes = origins & Origin::Relay.pass_bit() != 0;
    if passes || stream::by_fingerprint(origins) {
        let mut payload = Payload::of(header);
        packet.restore(headers, flow);
        if stream::by_fingerprint(origins)
            && let Ok(checksum) = packet.read::<2>(CHECKSUM_OFFSET)
        {
            payload.checksum = u16::from_ne_bytes(checksum);
            passes = stream::copy_passes(
                packet,
                // SAFETY: as above.
                unsafe { header_view::stream_words(&flow.stream) },
                Origin::Relay,
                origins,
                arrival.at_ns,
                &payload,
            );
        }
    }
    if passes {
        maps::count(Counter::RelayedPackets, arrival.segments.into());
        tell(packet, Decision::Restored, Reason::NONE);
        return Verdict::Pass;
    }
    let reason = stream::drop_copy(Some(usage), Origin::Relay, origins, &arrival);
    tell_of(packet, flow, Decision::Dropped, reason);
    Verdict::Drop
}

#[inline(always)]
fn tell<P: Packet>(packet: &P, decision: Decision, reason: impl Into<Reason>) {
    packet.tell(Program::Uplink, decision, reason, 0);
}

/// Traces a relayed datagram, which may not have been restored.
#[inline(always)]
fn tell_of<P: Packet>(packet: &P, flow: &RelayFlow, decision: Decision, reason: impl Into<Reason>) {
    // SAFETY: the flow is in a map value.
    unsafe { packet.tell_of(&flow.stream, Program::Uplink, decision, reason, 0) }
}

/// Returns whether a datagram comes from a relay that serves this host, to the address that the
/// relay sends to.
#[inline(always)]
fn is_of_relay(headers: HeaderView) -> bool {
    let key = RelayWords {
        relay_address: headers.source(),
        agent_address: headers.destination(),
    };
    RELAYS.get_ptr(key.key()).is_some()
}

#[inline(never)]
fn query<P: Packet>(packet: &P) {
    let Some(frame) = mld::ipv6_frame(packet) else {
        return;
    };
    match mld::parse::<_, KERNEL_OPTIONS, KERNEL_BYTES>(packet, &frame) {
        Ok(Message::Query(query)) => {
            maps::count(Counter::Queries, 1);
            tell(packet, Decision::Passed, Counter::Queries);
            if ipv6::is_unspecified(&query.multicast_address) {
                general_query(&frame, &query, &packet.arrival());
            }
        }
        Err(NoMessage::Malformed(counter)) => {
            maps::count(counter, 1);
            tell(packet, Decision::Ignored, counter);
        }
        Ok(_) | Err(_) => {}
    }
}

#[inline(always)]
fn general_query(frame: &Ipv6Frame, query: &Query, arrival: &Arrival) {
    let key = QuerierKey {
        ifindex: arrival.ifindex,
        vlan: frame.vlan,
        bridge: maps::bridge(),
    };
    let value = Querier {
        last_query_ns: arrival.at_ns,
        address: frame.header.source,
        query_interval_ms: query.query_interval_seconds * 1000,
        query_response_interval_ms: query.max_response_delay_ms,
        robustness: query.robustness,
        mld_version: query.version,
        // Separate zeros: the compiler would write a repeated constant by a call of `memset`.
        pad: [0, 0, 0],
    };
    if QUERIER.insert(&key, &value, BPF_ANY.into()).is_err() {
        maps::count(Counter::QuerierFull, 1);
    }
    maps::raise(|event: *mut QueryEvent| {
        let value = QueryEvent {
            kind: Kind::Query as u32,
            pad: 0,
            key,
            value,
        };
        // SAFETY: `raise` passes memory for one record.
        unsafe { event.write(value) }
    });
}
