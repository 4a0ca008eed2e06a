//! `uplink`: packets that come from the network.

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

use aya_ebpf::bindings::BPF_ANY;
use common::counter::Counter;
use common::event::{FirstPacketEvent, Kind, QueryEvent};
use common::maps::{ManagedKey, Origin, Querier, QuerierKey, Stream, StreamKey};
use common::packet::PacketRead;
use common::snoop::KERNEL_OPTIONS;
use common::wire::mld::{self, Ipv6Frame, Message, NoMessage, Query};
use common::wire::{ipv6, udp};

use crate::atomic;
use crate::context::Arrival;
use crate::maps::{self, MANAGED, QUERIER, STREAMS};

#[inline(always)]
pub(crate) fn uplink<P: PacketRead>(packet: &P, arrival: &Arrival) {
    let Some(frame) = mld::ipv6_frame(packet) else {
        return;
    };
    if !ipv6::is_multicast(&frame.header.destination) {
        return;
    }
    let key = ManagedKey {
        vlan: frame.vlan,
        pad: 0,
        multicast_address: frame.header.destination,
    };
    if let Some(managed) = MANAGED.get_ptr(&key) {
        // SAFETY: the pointer is to a live map value.
        let watch_since_ns = unsafe { (*managed).watch_since_ns };
        stream(packet, &frame, arrival, watch_since_ns);
    } else if frame.header.next_header == ipv6::HOP_BY_HOP {
        query(packet, &frame, arrival);
    }
}

#[inline(always)]
fn stream<P: PacketRead>(packet: &P, frame: &Ipv6Frame, arrival: &Arrival, watch_since_ns: u64) {
    let segments = u64::from(arrival.segments);
    let bytes = packet.len() as u64;
    maps::count(Counter::NativePackets, segments);
    let mut key = StreamKey {
        multicast_address: frame.header.destination,
        source: frame.header.source,
        source_port: 0,
        destination_port: 0,
        vlan: frame.vlan,
        pad: 0,
    };
    if frame.header.next_header == udp::NEXT_HEADER
        && let Ok(ports) = udp::parse(packet, frame.payload)
    {
        key.source_port = ports.source;
        key.destination_port = ports.destination;
    }
    let last_ns;
    if let Some(stream) = STREAMS.get_ptr_mut(&key) {
        // SAFETY: the pointer is to a live map value. Times and the average may be written by
        // two CPUs at once, of which the last wins; the sums are atomic.
        unsafe {
            last_ns = (*stream).native_last_ns;
            let gap = arrival.at_ns.saturating_sub(last_ns) / segments;
            let average = (*stream).native_interarrival_ns;
            (*stream).native_interarrival_ns = if average == 0 {
                gap
            } else {
                average - average / 8 + gap / 8
            };
            (*stream).native_last_ns = arrival.at_ns;
            atomic::add_u64(&raw mut (*stream).native_packets, segments);
            atomic::add_u64(&raw mut (*stream).native_bytes, bytes);
        }
    } else {
        last_ns = 0;
        let stream = Stream {
            native_packets: segments,
            native_bytes: bytes,
            native_first_ns: arrival.at_ns,
            native_last_ns: arrival.at_ns,
            ..Stream::default()
        };
        if STREAMS.insert(&key, &stream, BPF_ANY.into()).is_err() {
            maps::count(Counter::StreamsFull, segments);
        }
    }
    if last_ns == 0 || last_ns < watch_since_ns {
        maps::raise(|event: *mut FirstPacketEvent| {
            let value = FirstPacketEvent {
                kind: Kind::FirstPacket as u32,
                ifindex: arrival.ifindex,
                at_ns: arrival.at_ns,
                key,
                origin: Origin::Native as u32,
                pad: 0,
            };
            // SAFETY: `raise` passes memory for one record.
            unsafe { event.write(value) }
        });
    }
}

#[inline(always)]
fn query<P: PacketRead>(packet: &P, frame: &Ipv6Frame, arrival: &Arrival) {
    match mld::parse::<_, KERNEL_OPTIONS, 0>(packet, frame) {
        Ok(Message::Query(query)) => {
            maps::count(Counter::Queries, 1);
            if ipv6::is_unspecified(&query.multicast_address) {
                general_query(frame, &query, arrival);
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
