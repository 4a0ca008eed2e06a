//! `replicate`: copies stream packets that a relay receives to the subscribers.
//!
//! ```text
//!  frame --> MANAGED? --> STREAMS --> UDP, whole? --> RELAY_STREAMS? --> passes on unchanged
//!                                                       |
//!                     for each subscriber:              v
//!         RELAY_SUBSCRIBERS --> lease --> route --> header of the copy --> clone to the interface
//! ```

#![allow(
    unsafe_code,
    reason = "map values and the loop's state are reached through raw pointers"
)]

use core::ffi::c_void;

use agent_ebpf::instruction;
use agent_ebpf::route::{LOOPBACK, NoRoute, Route};
use agent_ebpf::skb::Skb;
use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::{bpf_clone_redirect, bpf_loop};
use common::counter::Counter;
use common::group;
use common::maps::{
    MAX_SUBSCRIBERS, Origin, RelayStream, Subscriber, SubscriberKey, SubscriberUsage,
};
use common::packet::PacketRead as _;
use common::relay::{self, RELAYED_HOP_LIMIT};
use common::trace::{Decision, Program, Reason, Uncounted};
use common::wire::datagram::HEADER_BYTES;
use common::wire::{ethernet, ipv6, udp};

use crate::context::{Packet as _, may_be_partial};
use crate::header_view::{HeaderCopy, StreamWords};
use crate::maps::{self, MANAGED, RELAY_STREAMS, RELAY_SUBSCRIBERS, RELAY_USAGE};
use crate::stream;
use crate::trace::{self, Traced as _};

/// Ethernet header as `u16`, the type of packet lengths; bytes.
const ETHERNET_BYTES: u16 = ethernet::HEADER_BYTES as u16;

/// State of the loop over the subscribers.
struct Copying {
    skb: *const Skb,
    /// Headers of the received packet.
    original: HeaderCopy,
    at_ns: u64,
    bytes: u64,
    segments: u64,
    flow: u32,
    /// Length of each segment from the IPv6 header on, bytes.
    packet_bytes: u16,
    /// Whether the UDP checksum is certainly not partial, so that the rewrite keeps it valid.
    full_checksum: bool,
}

/// The stream of a packet, and when the packet arrived.
struct Served {
    stream: RelayStream,
    at_ns: u64,
}

#[inline(always)]
pub(crate) fn replicate(skb: &Skb) {
    // Two functions: the stack frame of `served` is free before the copies are made.
    if let Some(served) = served(skb) {
        copy_to_all(skb, &served);
    }
}

/// Observes a packet of a managed address. Returns the stream when it has subscribers and the
/// packet can be copied.
#[inline(never)]
fn served(skb: &Skb) -> Option<Served> {
    let headers = skb.headers()?;
    let header = headers.header();
    if !header.is_ipv6()
        || !group::is_multicast(&header.destination)
        || skb.vlan_metadata() != 0
        || relay::is_restored(header.destination_mac, header.source_mac)
    {
        return None;
    }
    let is_udp = header.next_header == udp::NEXT_HEADER;
    let ports = if is_udp { headers.ports() } else { 0 };
    let key = StreamWords::new(headers.destination(), headers.source(), ports, 0);
    let managed = MANAGED.get_ptr_mut(key.managed().key()).or_else(|| {
        tell(skb, Decision::NotCopied, Uncounted::NotManaged);
        None
    })?;
    let arrival = skb.arrival();
    let segments = u64::from(arrival.segments);
    let bytes = skb.len() as u64;
    maps::count(Counter::NativePackets, segments);
    // SAFETY: the pointers refer to the live map values of the flow and its address.
    unsafe {
        if let Some(usage) = stream::native(key.key(), managed, &arrival) {
            stream::observe(usage, key.key(), Origin::Native, managed, &arrival, bytes);
        }
    }
    if !is_udp || !header.is_whole(bytes as usize) {
        let reason = match header.next_header {
            udp::NEXT_HEADER => Counter::ReplicateMalformed,
            ipv6::FRAGMENT => Counter::ReplicateFragment,
            _ => Counter::ReplicateNotUdp,
        };
        maps::count(reason, segments);
        tell(skb, Decision::NotCopied, reason);
        return None;
    }
    // SAFETY: as above.
    let stream = RELAY_STREAMS.get_ptr(key.key()).map(|it| unsafe { *it });
    let Some(stream) = stream.filter(|stream| stream.subscribers != 0) else {
        tell(skb, Decision::NotCopied, Uncounted::NoSubscriber);
        return None;
    };
    // The copies no longer show the flow.
    trace::keep(&key);
    Some(Served {
        stream,
        at_ns: arrival.at_ns,
    })
}

#[inline(always)]
fn tell(skb: &Skb, decision: Decision, reason: impl Into<Reason>) {
    skb.tell(Program::Replicate, decision, reason, 0);
}

/// Traces the copy for one subscriber.
#[inline(always)]
fn tell_copy(skb: &Skb, index: u64, sent: Result<(), Counter>) {
    let (decision, reason) = match sent {
        Ok(()) => (Decision::Copied, Reason::NONE),
        Err(reason) => (Decision::NotCopied, reason.into()),
    };
    skb.tell_of_kept(Program::Replicate, decision, reason, index);
}

#[inline(never)]
fn copy_to_all(skb: &Skb, served: &Served) {
    let Some(headers) = skb.headers() else {
        return;
    };
    let RelayStream { flow, subscribers } = served.stream;
    let bytes = skb.len() as u64;
    let hop_limit = headers.header().hop_limit;
    let segment_bytes = skb.segment_bytes() as u16;
    let mut state = Copying {
        skb,
        original: HeaderCopy(*headers.header()),
        at_ns: served.at_ns,
        bytes,
        segments: u64::from(skb.segments()),
        flow,
        packet_bytes: if segment_bytes == 0 {
            bytes as u16 - ETHERNET_BYTES
        } else {
            segment_bytes + (HEADER_BYTES as u16 - ETHERNET_BYTES)
        },
        full_checksum: skb.update_csum(relay::hop_limit_difference(hop_limit, RELAYED_HOP_LIMIT))
            || !may_be_partial(skb, headers),
    };
    let subscribers = if subscribers > MAX_SUBSCRIBERS {
        MAX_SUBSCRIBERS
    } else {
        subscribers
    };
    // SAFETY: the callback has the signature that the helper requires, and `state` outlives the call.
    unsafe {
        bpf_loop(
            subscribers,
            copy_to as *mut c_void,
            (&raw mut state).cast(),
            0,
        );
    }
    // `original` restores headers and checksum; only `skb->csum` still needs an update.
    if let Some(headers) = skb.headers() {
        headers.set(&state.original);
    }
    skb.update_csum(relay::hop_limit_difference(RELAYED_HOP_LIMIT, hop_limit));
}

/// Sends the copy for one subscriber. Always returns 0, so the loop continues.
#[inline(never)]
extern "C" fn copy_to(index: u64, state: *mut c_void) -> i64 {
    // SAFETY: `copy_to_all` passes its own state, which nothing else uses at the same time.
    let state = unsafe { &*state.cast::<Copying>() };
    let key = SubscriberKey {
        flow: state.flow,
        index: index as u32,
    };
    let Some(subscriber) = RELAY_SUBSCRIBERS.get_ptr(&key) else {
        return 0;
    };
    // SAFETY: the pointer refers to a live map value, which only the relay writes.
    let subscriber = unsafe { &*subscriber };
    if subscriber.lease_end_ns <= state.at_ns {
        if subscriber.lease_end_ns != 0 {
            maps::count(Counter::ReplicateLeaseEnded, state.segments);
            // SAFETY: as in `send`.
            let skb = unsafe { &*state.skb };
            tell_copy(skb, index, Err(Counter::ReplicateLeaseEnded));
        }
        return 0;
    }
    let sent = send(state, subscriber);
    // SAFETY: as in `send`.
    tell_copy(unsafe { &*state.skb }, index, sent);
    let Some(usage) = usage(&key) else {
        return 0;
    };
    // SAFETY: the pointer refers to a live map value.
    unsafe {
        match sent {
            Ok(()) => {
                maps::count(Counter::ReplicatedPackets, state.segments);
                instruction::add_u64(&raw mut (*usage).packets, state.segments);
                instruction::add_u64(&raw mut (*usage).bytes, state.bytes);
            }
            Err(reason) => {
                maps::count(reason, state.segments);
                instruction::add_u64(&raw mut (*usage).dropped, state.segments);
            }
        }
    }
    0
}

/// Looks up the route, rewrites the packet for the subscriber, and sends a clone.
#[inline(always)]
fn send(state: &Copying, subscriber: &Subscriber) -> Result<(), Counter> {
    // SAFETY: as in `copy_to`.
    let skb = unsafe { &*state.skb };
    let mut route = Route::new(
        LOOPBACK,
        udp::NEXT_HEADER,
        state.packet_bytes,
        subscriber.relay_address,
        subscriber.agent_address,
    );
    route.source_port = subscriber.relay_port.to_be();
    route.destination_port = subscriber.agent_port.to_be();
    route
        .look_up(skb.as_ptr().cast())
        .map_err(|reason| match reason {
            NoRoute::Neighbour => Counter::ReplicateNoNeighbour,
            NoRoute::TooBig => Counter::ReplicateTooBig,
            NoRoute::Forwarding => Counter::ReplicateNoForwarding,
            NoRoute::Route => Counter::ReplicateNoRoute,
        })?;
    let Some(mut headers) = skb.headers() else {
        return Err(Counter::ReplicateRefused);
    };
    // The previous copy left its own header.
    headers.set(&state.original);
    relay::send_to(&mut headers, subscriber, route.macs());
    if !state.full_checksum {
        skb.update_checksum(state.original.0.checksum, subscriber.address_difference);
    }
    // SAFETY: the pointer is the program's context.
    match unsafe { bpf_clone_redirect(skb.as_ptr(), route.ifindex, 0) } {
        0 => Ok(()),
        _ => Err(Counter::ReplicateRefused),
    }
}

/// Returns the usage of a subscriber; the first packet creates the entry.
#[inline(always)]
fn usage(key: &SubscriberKey) -> Option<*mut SubscriberUsage> {
    if let Some(usage) = RELAY_USAGE.get_ptr_mut(key) {
        return Some(usage);
    }
    // Another CPU may insert first, so only the look-up below counts.
    // SAFETY: the type consists of integers.
    unsafe {
        instruction::with_zeroed(|unused: &SubscriberUsage| {
            let _ = RELAY_USAGE.insert(key, unused, BPF_NOEXIST.into());
        });
    }
    RELAY_USAGE.get_ptr_mut(key)
}
