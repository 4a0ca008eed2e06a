//! Observation of flows by origin, and the decision which copy of a packet passes. A GSO frame
//! counts as one copy: the other origin aggregates the same packets, or its copies pass too.

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

use agent_ebpf::instruction;
use aya_ebpf::bindings::BPF_NOEXIST;
use common::counter::Counter;
use common::event::{FirstPacketEvent, Kind};
use common::maps::{Copies, CopyCounts, Managed, Origin, Origins, StreamKey, StreamUsage};
use common::relay;
use common::wire::datagram::{HEADER_BYTES, Header, UDP_HEADER_BYTES};

use crate::context::{Arrival, Packet};
use crate::maps::{self, FINGERPRINTS, STREAMS};

/// Attempts while several CPUs count copies of one packet at once.
const TRIES: u32 = 4;

/// Position of a datagram's payload.
pub(crate) struct Payload {
    /// Offset in the frame, bytes.
    pub(crate) offset: usize,
    /// Payload length, bytes.
    pub(crate) length: u16,
    /// UDP checksum of the multicast packet, network order.
    pub(crate) checksum: u16,
}

impl Payload {
    /// Payload after a header for which [`Header::has_payload`] holds.
    #[inline(always)]
    pub(crate) fn of(header: &Header) -> Self {
        Self {
            offset: HEADER_BYTES,
            length: u16::from_be(header.length).wrapping_sub(UDP_HEADER_BYTES),
            checksum: header.checksum,
        }
    }
}

/// Returns the entry of a natively received flow; the first packet creates the entry. `None` when
/// the map has no room: the packet is counted, and raises the event of a first packet from time to
/// time.
///
/// # Safety
///
/// `managed` points to the live map value of the flow's address.
#[inline(always)]
pub(crate) unsafe fn native(
    key: &StreamKey,
    managed: *mut Managed,
    arrival: &Arrival,
) -> Option<*mut StreamUsage> {
    if let Some(usage) = STREAMS.get_ptr_mut(key) {
        return Some(usage);
    }
    // SAFETY: the caller guarantees the pointer.
    let (has_room, told) = unsafe {
        (
            (*managed).flows < u32::from((*managed).max_flows),
            (*managed).told,
        )
    };
    let mut reason = Counter::AddressFlowsFull;
    if has_room {
        if make(key) {
            // SAFETY: as above.
            unsafe { instruction::add_u32(&raw mut (*managed).flows, 1) }
        }
        if let Some(usage) = STREAMS.get_ptr_mut(key) {
            return Some(usage);
        }
        reason = Counter::StreamsFull;
    }
    maps::count(reason, arrival.segments.into());
    // A sender that keeps changing its port must not fill `EVENTS`.
    let slot = Managed::slot(arrival.at_ns);
    if slot != told {
        // SAFETY: as above. When two CPUs write at once, the last write wins.
        unsafe { (*managed).told = slot }
        first_packet(key, Origin::Native, arrival);
    }
    None
}

/// Counts a packet of a managed flow; the first packet of an origin raises an event.
///
/// # Safety
///
/// `usage` and `managed` point to the live map values of that flow and origin and of its address.
#[inline(always)]
pub(crate) unsafe fn observe(
    usage: *mut StreamUsage,
    key: &StreamKey,
    origin: Origin,
    managed: *const Managed,
    arrival: &Arrival,
    bytes: u64,
) {
    let segments = u64::from(arrival.segments);
    // SAFETY: the caller guarantees the pointers. Two CPUs may write times and average at once, and
    // the last write wins; the counters are atomic.
    let last_ns = unsafe {
        let last_ns = (*usage).last_ns;
        if last_ns == 0 {
            (*usage).first_ns = arrival.at_ns;
        } else {
            let mut gap = arrival.at_ns.saturating_sub(last_ns);
            if segments > 1 {
                gap /= segments;
            }
            let average = (*usage).interarrival_ns;
            (*usage).interarrival_ns = if average == 0 {
                gap
            } else {
                average - average / 8 + gap / 8
            };
        }
        (*usage).last_ns = arrival.at_ns;
        instruction::add_u64(&raw mut (*usage).packets, segments);
        instruction::add_u64(&raw mut (*usage).bytes, bytes);
        last_ns
    };
    // SAFETY: the caller guarantees the pointers.
    if last_ns == 0 || last_ns < unsafe { (*managed).watch_since_ns } {
        first_packet(key, origin, arrival);
    }
}

/// Creates the entry of a flow. Returns `false` when the map has no room or another CPU was faster.
#[inline(always)]
fn make(key: &StreamKey) -> bool {
    // SAFETY: the type consists of integers.
    unsafe {
        instruction::with_zeroed(|unused: &StreamUsage| {
            STREAMS.insert(key, unused, BPF_NOEXIST.into()).is_ok()
        })
    }
}

#[inline(never)]
fn first_packet(key: &StreamKey, origin: Origin, arrival: &Arrival) {
    maps::raise(|event: *mut FirstPacketEvent| {
        let value = FirstPacketEvent {
            kind: Kind::FirstPacket as u32,
            ifindex: arrival.ifindex,
            at_ns: arrival.at_ns,
            key: *key,
            origin: origin as u32,
            pad: 0,
        };
        // SAFETY: `raise` passes memory for one record.
        unsafe { event.write(value) }
    });
}

/// Counts one more copy of a packet. Returns whether the copy passes; copies of an origin without
/// its pass bit never do.
#[inline(always)]
pub(crate) fn copy_passes<P: Packet>(
    packet: &P,
    flow: [u64; 5],
    origin: Origin,
    origins: u8,
    at_ns: u64,
    payload: &Payload,
) -> bool {
    let undecided = origins & origin.pass_bit() != 0;
    let Ok(fingerprint) = relay::fingerprint(
        packet,
        flow,
        payload.offset,
        payload.length,
        payload.checksum,
    ) else {
        return undecided;
    };
    let copies = match FINGERPRINTS.get_ptr_mut(fingerprint) {
        Some(copies) => copies,
        None => {
            // As in `native`: another CPU may insert first.
            let copies = Copies {
                last_ns: at_ns,
                ..Copies::default()
            };
            let _ = FINGERPRINTS.insert(fingerprint, copies, BPF_NOEXIST.into());
            match FINGERPRINTS.get_ptr_mut(fingerprint) {
                Some(copies) => copies,
                None => {
                    maps::count(Counter::FingerprintsFull, 1);
                    return undecided;
                }
            }
        }
    };
    // SAFETY: the pointer refers to a live map value, whose counts are one aligned word.
    unsafe {
        let word = (&raw mut (*copies).counts).cast::<u64>();
        if at_ns.saturating_sub((*copies).last_ns) > relay::COPY_LIFETIME_NS {
            word.write_volatile(CopyCounts::default().word());
        }
        (*copies).last_ns = at_ns;
        let mut found = word.read_volatile();
        for _ in 0..TRIES {
            let (counts, passes) = relay::count_copy(CopyCounts::from_word(found), origin, origins);
            let expected = found;
            found = instruction::compare_exchange(word, expected, counts.word());
            if found == expected {
                return passes;
            }
        }
    }
    // More CPUs at once than a packet has copies: a duplicate is better than a loss.
    undecided
}

/// Counts a packet that does not pass; returns the reason.
#[inline(always)]
pub(crate) fn drop_copy(
    usage: Option<*mut StreamUsage>,
    origin: Origin,
    origins: u8,
    arrival: &Arrival,
) -> Counter {
    let segments = u64::from(arrival.segments);
    let reason = if origins & origin.pass_bit() == 0 {
        Counter::OtherOrigin
    } else {
        Counter::SecondCopies
    };
    maps::count(reason, segments);
    if let Some(usage) = usage {
        // SAFETY: the pointer refers to a live map value.
        unsafe { instruction::add_u64(&raw mut (*usage).dropped, segments) }
    }
    reason
}

/// Whether fingerprints decide which copy passes.
#[inline(always)]
pub(crate) fn by_fingerprint(origins: u8) -> bool {
    origins & Origins::FINGERPRINT != 0
}
