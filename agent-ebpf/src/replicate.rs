//! `replicate`: stream packets that a relay receives, and their copies for the subscribers.
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
use agent_ebpf::skb::Skb;
use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_FWD_DISABLED, BPF_FIB_LKUP_RET_NO_NEIGH,
    BPF_FIB_LKUP_RET_SUCCESS, BPF_NOEXIST,
};
use aya_ebpf::helpers::{bpf_clone_redirect, bpf_fib_lookup, bpf_loop};
use common::counter::Counter;
use common::maps::{Address, MAX_SUBSCRIBERS, Origin, Subscriber, SubscriberKey, SubscriberUsage};
use common::packet::PacketRead as _;
use common::relay::{self, Differences, RELAYED_HOP_LIMIT};
use common::wire::datagram::{HEADER_BYTES, Header};
use common::wire::{ipv6, udp};

use crate::context::Packet as _;
use crate::front::{Front, StreamWords};
use crate::maps::{self, MANAGED, RELAY_STREAMS, RELAY_SUBSCRIBERS, RELAY_USAGE};
use crate::stream;

/// `AF_INET6`.
const INET6: u8 = 10;
/// The loopback of every network namespace. Routes are looked up as for packets that this host
/// sends itself, which come from there. The helper wants an interface that forwards, which the
/// loopback may be (`net.ipv6.conf.lo.forwarding`) without making a router of the host.
const LOOPBACK: u32 = 1;
/// Ethernet and IPv6 header up to the UDP header.
const ETHERNET_BYTES: u16 = 14;

/// What the loop over the subscribers works on.
struct Copying {
    skb: *const Skb,
    /// The header as it came.
    original: Header,
    at_ns: u64,
    bytes: u64,
    segments: u64,
    flow: u32,
    /// Of each packet on the wire, from the IPv6 header on.
    packet_bytes: u16,
    /// Whether the checksum is finished for sure, so that no rewrite changes it.
    finished: bool,
}

#[inline(always)]
pub(crate) fn replicate(skb: &Skb) {
    let Some(front) = skb.front() else {
        return;
    };
    let header = front.header();
    if !header.is_ipv6()
        || !ipv6::is_multicast(&header.destination)
        || skb.vlan_metadata() != 0
        || relay::is_restored(header.destination_mac, header.source_mac)
    {
        return;
    }
    let is_udp = header.next_header == udp::NEXT_HEADER;
    let ports = if is_udp { front.ports() } else { 0 };
    let key = StreamWords::new(front.destination(), front.source(), ports, 0);
    let Some(managed) = MANAGED.get_ptr(key.managed().key()) else {
        return;
    };
    // SAFETY: the pointer is to a live map value, which only the relay writes.
    let managed = unsafe { &*managed };
    let arrival = skb.arrival();
    let segments = u64::from(arrival.segments);
    let bytes = skb.len() as u64;
    maps::count(Counter::NativePackets, segments);
    stream::observe(key.key(), Origin::Native, managed, &arrival, bytes);
    if !is_udp || !header.is_whole(bytes as usize) {
        let reason = match header.next_header {
            udp::NEXT_HEADER => Counter::ReplicateMalformed,
            ipv6::FRAGMENT => Counter::ReplicateFragment,
            _ => Counter::ReplicateNotUdp,
        };
        maps::count(reason, segments);
        return;
    }
    let Some(served) = RELAY_STREAMS.get_ptr(key.key()) else {
        return;
    };
    // SAFETY: as above.
    let served = unsafe { *served };
    if served.subscribers == 0 {
        return;
    }
    copy_to_all(
        skb,
        front,
        served.flow,
        served.subscribers,
        arrival.at_ns,
        segments,
        bytes,
    );
}

#[inline(always)]
fn copy_to_all(
    skb: &Skb,
    front: Front,
    flow: u32,
    subscribers: u32,
    at_ns: u64,
    segments: u64,
    bytes: u64,
) {
    let hop_limit = front.header().hop_limit;
    let segment_bytes = skb.segment_bytes() as u16;
    let mut state = Copying {
        skb,
        original: *front.header(),
        at_ns,
        bytes,
        segments,
        flow,
        packet_bytes: if segment_bytes == 0 {
            bytes as u16 - ETHERNET_BYTES
        } else {
            segment_bytes + (HEADER_BYTES as u16 - ETHERNET_BYTES)
        },
        finished: skb.update_sum(relay::hop_limit_difference(hop_limit, RELAYED_HOP_LIMIT)),
    };
    let subscribers = if subscribers > MAX_SUBSCRIBERS {
        MAX_SUBSCRIBERS
    } else {
        subscribers
    };
    // SAFETY: the callback has the form that the helper wants, and `state` outlives the call.
    unsafe {
        bpf_loop(
            subscribers,
            copy_to as *mut c_void,
            (&raw mut state).cast(),
            0,
        );
    }
    // The header and its checksum are as before; only the sum over the packet has to follow.
    if let Some(front) = skb.front() {
        front.set(&state.original);
    }
    skb.update_sum(relay::hop_limit_difference(RELAYED_HOP_LIMIT, hop_limit));
}

/// Sends the copy for one subscriber. Never ends the loop.
#[inline(never)]
extern "C" fn copy_to(index: u64, state: *mut c_void) -> i64 {
    // SAFETY: `copy_to_all` passes its own state, which nothing else uses meanwhile.
    let state = unsafe { &*state.cast::<Copying>() };
    let key = SubscriberKey {
        flow: state.flow,
        index: index as u32,
    };
    let Some(subscriber) = RELAY_SUBSCRIBERS.get_ptr(&key) else {
        return 0;
    };
    // SAFETY: the pointer is to a live map value, which only the relay writes.
    let subscriber = unsafe { &*subscriber };
    if subscriber.lease_end_ns <= state.at_ns {
        if subscriber.lease_end_ns != 0 {
            maps::count(Counter::ReplicateLeaseEnded, state.segments);
        }
        return 0;
    }
    let sent = send(state, subscriber);
    let Some(usage) = usage(&key) else {
        return 0;
    };
    // SAFETY: the pointer is to a live map value.
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

/// `struct bpf_fib_lookup`: 64 bytes.
#[repr(C)]
struct Route {
    family: u8,
    protocol: u8,
    source_port: u16,
    destination_port: u16,
    /// In: bytes of the packet. Out: the path's MTU.
    bytes: u16,
    /// In: where the packet comes in. Out: where it goes out.
    ifindex: u32,
    flow: u32,
    source: Address,
    destination: Address,
    vlan: u32,
    source_mac: [u8; 6],
    destination_mac: [u8; 6],
}

const _: () = assert!(size_of::<Route>() == 64);

/// Looks the route up, makes the packet the subscriber's copy, and sends a clone of it.
#[inline(always)]
fn send(state: &Copying, subscriber: &Subscriber) -> Result<(), Counter> {
    // SAFETY: as in `copy_to`.
    let skb = unsafe { &*state.skb };
    let mut route = Route {
        family: INET6,
        protocol: udp::NEXT_HEADER,
        source_port: subscriber.relay_port.to_be(),
        destination_port: subscriber.agent_port.to_be(),
        bytes: state.packet_bytes,
        ifindex: LOOPBACK,
        flow: 0,
        source: subscriber.relay_address,
        destination: subscriber.agent_address,
        vlan: 0,
        source_mac: [0; 6],
        destination_mac: [0; 6],
    };
    // SAFETY: the context, and a structure of the kernel's form and size.
    let found = unsafe {
        bpf_fib_lookup(
            skb.as_ptr().cast(),
            (&raw mut route).cast(),
            size_of::<Route>() as i32,
            0,
        )
    };
    if found != i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
        return Err(match found as u32 {
            BPF_FIB_LKUP_RET_NO_NEIGH => Counter::ReplicateNoNeighbour,
            BPF_FIB_LKUP_RET_FRAG_NEEDED => Counter::ReplicateTooBig,
            BPF_FIB_LKUP_RET_FWD_DISABLED => Counter::ReplicateNoForwarding,
            _ => Counter::ReplicateNoRoute,
        });
    }
    let Some(mut front) = skb.front() else {
        return Err(Counter::ReplicateRefused);
    };
    // The copies before have left theirs.
    front.set(&state.original);
    let macs = [route.destination_mac, route.source_mac];
    relay::send_to(&mut front, subscriber, macs);
    if !state.finished {
        skb.update_checksum(&Differences {
            address: subscriber.address_difference,
            port: subscriber.port_difference,
        });
    }
    // SAFETY: the context.
    match unsafe { bpf_clone_redirect(skb.as_ptr(), route.ifindex, 0) } {
        0 => Ok(()),
        _ => Err(Counter::ReplicateRefused),
    }
}

/// The subscriber's usage, made at its first packet.
#[inline(always)]
fn usage(key: &SubscriberKey) -> Option<*mut SubscriberUsage> {
    if let Some(usage) = RELAY_USAGE.get_ptr_mut(key) {
        return Some(usage);
    }
    // Another CPU may have been faster; what counts is the look-up after it.
    let _ = RELAY_USAGE.insert(key, SubscriberUsage::default(), BPF_NOEXIST.into());
    RELAY_USAGE.get_ptr_mut(key)
}
