//! `uplink`: packets that come from the network.
//!
//! ```text
//!                   multicast --> MANAGED? --> STREAMS --> origin passes? first copy? --> bridge
//!  frame --> IPv6 <                  '--> Query --> QUERIER                       ^
//!                   unicast --> RELAY_FLOWS? --> whole? --> STREAMS --> restored -'
//! ```

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

use aya_ebpf::bindings::BPF_ANY;
use common::counter::Counter;
use common::event::{Kind, QueryEvent};
use common::maps::{Origin, Querier, QuerierKey, RelayFlowKey, RelayKey, StreamKey};
use common::relay;
use common::snoop::KERNEL_OPTIONS;
use common::wire::datagram::{CHECKSUM_OFFSET, HEADER_BYTES, Header, UDP_HEADER_BYTES};
use common::wire::mld::{self, Ipv6Frame, Message, NoMessage, Query};
use common::wire::{ethernet, ipv6, udp};

use crate::Verdict;
use crate::context::{Arrival, Packet};
use crate::maps::{self, MANAGED, QUERIER, RELAY_FLOWS, RELAYS};
use crate::stream::{self, Payload};

#[inline(always)]
pub(crate) fn uplink<P: Packet>(packet: &P) -> Verdict {
    // A datagram without payload has as many bytes; there is nothing of ours that is shorter.
    let Some(header) = packet.header() else {
        return Verdict::Pass;
    };
    if !header.is_ipv6() {
        return if header.ether_type == ethernet::VLAN.to_be() {
            tagged(packet)
        } else {
            Verdict::Pass
        };
    }
    if !ipv6::is_multicast(&header.destination) {
        return relayed(packet, header);
    }
    if relay::is_restored(header.destination_mac, header.source_mac) {
        return Verdict::Pass;
    }
    let mut native = Native {
        key: StreamKey {
            multicast_address: header.destination,
            source: header.source,
            source_port: 0,
            destination_port: 0,
            vlan: packet.vlan_metadata() & ethernet::VLAN_IDENTIFIER,
            pad: 0,
        },
        next_header: header.next_header,
        payload: None,
    };
    if header.next_header == udp::NEXT_HEADER {
        native.key.source_port = u16::from_be(header.source_port);
        native.key.destination_port = u16::from_be(header.destination_port);
        native.payload = payload(HEADER_BYTES, header.length, header.checksum);
    }
    multicast(packet, &native)
}

/// A multicast packet.
struct Native {
    key: StreamKey,
    next_header: u8,
    /// `None` for what no relay carries: other protocols, fragments, and what is behind extension
    /// headers.
    payload: Option<Payload>,
}

/// The payload behind a UDP header; length and checksum in network order.
#[inline(always)]
fn payload(offset: usize, length: u16, checksum: u16) -> Option<Payload> {
    let length = u16::from_be(length);
    if length < UDP_HEADER_BYTES {
        return None;
    }
    Some(Payload {
        offset,
        length: length - UDP_HEADER_BYTES,
        checksum,
    })
}

/// A frame with a tag, which is no relay's.
#[inline(always)]
fn tagged<P: Packet>(packet: &P) -> Verdict {
    let Some(frame) = mld::ipv6_frame(packet) else {
        return Verdict::Pass;
    };
    if !ipv6::is_multicast(&frame.header.destination) {
        return Verdict::Pass;
    }
    let mut native = Native {
        key: StreamKey {
            multicast_address: frame.header.destination,
            source: frame.header.source,
            source_port: 0,
            destination_port: 0,
            vlan: frame.vlan,
            pad: 0,
        },
        next_header: frame.header.next_header,
        payload: None,
    };
    if frame.header.next_header == udp::NEXT_HEADER
        && let Ok(ports) = udp::parse(packet, frame.payload)
    {
        native.key.source_port = ports.source;
        native.key.destination_port = ports.destination;
    }
    // Relays carry nothing that has a tag, so there are no copies to tell apart.
    multicast(packet, &native)
}

#[inline(always)]
fn multicast<P: Packet>(packet: &P, native: &Native) -> Verdict {
    let Some(managed) = MANAGED.get_ptr(native.key.managed()) else {
        if native.next_header == ipv6::HOP_BY_HOP {
            query(packet);
        }
        return Verdict::Pass;
    };
    // SAFETY: the pointer is to a live map value, which only the agent writes.
    let managed = unsafe { &*managed };
    let arrival = packet.arrival();
    maps::count(Counter::NativePackets, arrival.segments.into());
    let bytes = packet.len() as u64;
    let entry = stream::observe(&native.key, Origin::Native, managed, &arrival, bytes);
    let Some(payload) = &native.payload else {
        return Verdict::Pass;
    };
    let origins = managed.origins;
    let passes = if stream::by_fingerprint(origins) {
        stream::copy_passes(
            packet,
            &native.key,
            Origin::Native,
            origins,
            arrival.at_ns,
            payload,
        )
    } else {
        origins & Origin::Native.pass_bit() != 0
    };
    if passes {
        return Verdict::Pass;
    }
    stream::drop_copy(entry, Origin::Native, origins, &arrival);
    Verdict::Drop
}

/// A unicast packet: restored if it is of an established flow.
#[inline(always)]
fn relayed<P: Packet>(packet: &P, header: &mut Header) -> Verdict {
    if header.next_header != udp::NEXT_HEADER {
        if header.next_header == ipv6::FRAGMENT && is_of_relay(header) {
            maps::count(Counter::RelayFragment, 1);
            return Verdict::Drop;
        }
        return Verdict::Pass;
    }
    let agent_port = u16::from_be(header.destination_port);
    if agent_port < relay::FIRST_PORT || packet.vlan_metadata() != 0 {
        return Verdict::Pass;
    }
    let key = RelayFlowKey {
        relay_address: header.source,
        relay_port: u16::from_be(header.source_port),
        agent_port,
    };
    // SAFETY: the pointer is to a live map value, which only the agent writes.
    let flow = RELAY_FLOWS.get_ptr(&key).map(|flow| unsafe { &*flow });
    let Some(flow) = flow.filter(|flow| flow.agent_address == header.destination) else {
        if is_of_relay(header) {
            maps::count(Counter::RelayUnknownFlow, 1);
        }
        return Verdict::Pass;
    };
    let bytes = packet.len();
    if !header.is_whole(bytes) {
        maps::count(Counter::RelayMalformed, 1);
        return Verdict::Drop;
    }
    let Some(managed) = MANAGED.get_ptr(flow.stream.managed()) else {
        // Nobody listens any more, and the relay has yet to learn it.
        maps::count(Counter::OtherOrigin, 1);
        return Verdict::Drop;
    };
    // SAFETY: as above.
    let managed = unsafe { &*managed };
    let arrival = packet.arrival();
    let entry = stream::observe(&flow.stream, Origin::Relay, managed, &arrival, bytes as u64);
    let origins = managed.origins;
    let mut passes = origins & Origin::Relay.pass_bit() != 0;
    if passes || stream::by_fingerprint(origins) {
        let payload = payload(HEADER_BYTES, header.length, 0);
        packet.restore(header, flow);
        if stream::by_fingerprint(origins)
            && let Some(mut payload) = payload
            && let Ok(checksum) = packet.read::<2>(CHECKSUM_OFFSET)
        {
            payload.checksum = u16::from_ne_bytes(checksum);
            passes = stream::copy_passes(
                packet,
                &flow.stream,
                Origin::Relay,
                origins,
                arrival.at_ns,
                &payload,
            );
        }
    }
    if passes {
        maps::count(Counter::RelayedPackets, arrival.segments.into());
        return Verdict::Pass;
    }
    stream::drop_copy(entry, Origin::Relay, origins, &arrival);
    Verdict::Drop
}

/// Whether a datagram comes from a relay that this host has flows of, to the address that it sends
/// them to.
#[inline(always)]
fn is_of_relay(header: &Header) -> bool {
    let key = RelayKey {
        relay_address: header.source,
        agent_address: header.destination,
    };
    RELAYS.get_ptr(&key).is_some()
}

#[inline(always)]
fn query<P: Packet>(packet: &P) {
    let Some(frame) = mld::ipv6_frame(packet) else {
        return;
    };
    match mld::parse::<_, KERNEL_OPTIONS, 0>(packet, &frame) {
        Ok(Message::Query(query)) => {
            maps::count(Counter::Queries, 1);
            if ipv6::is_unspecified(&query.multicast_address) {
                general_query(&frame, &query, &packet.arrival());
            }
        }
        Err(NoMessage::Malformed(counter)) => maps::count(counter, 1),
        Ok(_) | Err(_) => {}
    }
}

#[inline(always)]
fn general_query(frame: &Ipv6Frame, query: &Query, arrival: &Arrival) {
    let key = QuerierKey {
        ifindex: arrival.ifindex,
        vlan: frame.vlan,
        pad: 0,
    };
    let value = Querier {
        last_query_ns: arrival.at_ns,
        address: frame.header.source,
        query_interval_ms: query.query_interval_seconds * 1000,
        query_response_interval_ms: query.max_response_delay_ms,
        robustness: query.robustness,
        mld_version: query.version,
        pad: [0; 6],
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
