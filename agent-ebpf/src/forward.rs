//! Forwards unicast packets for an address that a VM has left to the VM's current address. `uplink`
//! and `snoop` call this module.
//!
//! ```text
//!  frame --> FORWARDING? --> FORWARDS --> in time? --> hop limit --> route --> other destination,
//!                                            |                                 sent out again
//!                                            '--> earlier frames wait? --> TAP, copied by `gate`
//! ```

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

use common::counter::Counter;
use common::forward;
use common::group;
use common::maps::{Forward, GateMode};
use common::trace::{Decision, Program, Reason};
use common::wire::ethernet;

use crate::context::Packet;
use crate::header_view::{self, ForwardWords, HeaderView};
use crate::maps::{self, FORWARDING, FORWARDS, GATE_USAGE, GATES};
use crate::translate;
use agent_ebpf::instruction;
use agent_ebpf::route::{LOOPBACK, NoRoute, Route};
use agent_ebpf::skb::Skb;
use agent_ebpf::verdict::Verdict;

/// The rewrite of a forwarded packet.
pub(crate) struct Change<'a> {
    pub(crate) forward: &'a Forward,
    pub(crate) fixup: ChecksumFixup,
    pub(crate) route: &'a Route,
}

impl Change<'_> {
    /// Writes the rewrite to the headers.
    #[inline(always)]
    pub(crate) fn apply(&self, headers: &mut HeaderView) {
        let macs = self.route.macs();
        let hop_limit = self.fixup.hop_limit;
        forward::send_on(headers, &self.forward.destination, hop_limit, macs);
    }
}

/// Checksum fix-up for an address rewrite with hop-limit decrement.
pub(crate) struct ChecksumFixup {
    /// Hop limit before the rewrite.
    pub(crate) hop_limit: u8,
    pub(crate) next_header: u8,
    /// One's complement difference that the new address adds to a checksum.
    pub(crate) difference: u32,
    /// Offset of the L4 checksum in the frame, bytes; 0 when no checksum changes.
    pub(crate) checksum_offset: usize,
}

impl ChecksumFixup {
    /// Computes the fix-up for a received packet. `Err` is why the packet cannot be forwarded.
    #[inline(always)]
    pub(crate) fn new(headers: HeaderView, difference: u32) -> Result<Self, Counter> {
        let header = headers.header();
        let (hop_limit, next_header) = (header.hop_limit, header.next_header);
        if hop_limit <= 1 {
            return Err(Counter::ForwardHopLimit);
        }
        let checksum_offset = match difference {
            0 => 0,
            _ => forward::checksum_offset(next_header).ok_or(Counter::ForwardHeaders)?,
        };
        Ok(Self {
            hop_limit,
            next_header,
            difference,
            checksum_offset,
        })
    }
}

/// Maps the failed route look-up to its counter.
#[inline(always)]
pub(crate) fn reason(reason: NoRoute) -> Counter {
    match reason {
        NoRoute::Neighbour => Counter::ForwardNoNeighbour,
        NoRoute::TooBig => Counter::ForwardTooBig,
        NoRoute::Forwarding => Counter::ForwardNoForwarding,
        NoRoute::Route => Counter::ForwardNoRoute,
    }
}

/// Returns whether any address is forwarded or translated. On most hosts this check is the whole
/// cost.
#[inline(always)]
pub(crate) fn is_on() -> bool {
    // SAFETY: the pointer refers to a live map value, which only the agent writes.
    FORWARDING
        .get_ptr(0)
        .is_some_and(|entries| unsafe { *entries } != 0)
}

/// Handles a frame from a VM of this host: translates its source, or forwards the frame as `uplink`
/// does.
#[inline(always)]
pub(crate) fn from_vm(skb: &Skb) -> Verdict {
    let Some(headers) = skb.headers() else {
        return Verdict::Pass;
    };
    let header = headers.header();
    if !header.is_ipv6() || group::is_multicast(&header.destination) {
        return Verdict::Pass;
    }
    let verdict = translate::unicast(skb, headers);
    if !matches!(verdict, Verdict::Pass) {
        return verdict;
    }
    unicast(skb, headers, Program::Snoop)
}

/// Forwards a unicast packet on behalf of the program `by`. Passes packets without an entry.
#[inline(never)]
pub(crate) fn unicast<P: Packet>(packet: &P, headers: HeaderView, by: Program) -> Verdict {
    let Some(entry) = entry(packet, headers) else {
        return Verdict::Pass;
    };
    let arrival = packet.arrival();
    // SAFETY: the pointer refers to a live map value; what is written to it below is not read here.
    let forward = unsafe { &*entry };
    if forward.until_ns <= arrival.at_ns || forward::stays(headers.header()) {
        return Verdict::Pass;
    }
    if arrival.at_ns < forward.unread_until_ns && others_wait(forward.ifindex) {
        return Verdict::Pass;
    }
    let amount = [arrival.segments.into(), packet.len() as u64];
    let sent = send(packet, headers, forward, by);
    if let Err(reason) = sent {
        packet.tell(by, Decision::Dropped, reason, 0);
    }
    // SAFETY: the pointer refers to a live map value.
    unsafe {
        let counters = EntryCounters {
            packets: &raw mut (*entry).packets,
            bytes: &raw mut (*entry).bytes,
            dropped: &raw mut (*entry).dropped,
        };
        counters.count(sent, Counter::ForwardedPackets, amount)
    }
}

/// Returns the entry of the packet's destination.
#[inline(always)]
pub(crate) fn entry<P: Packet>(packet: &P, headers: HeaderView) -> Option<*mut Forward> {
    let vlan = packet.vlan_metadata() & ethernet::VLAN_IDENTIFIER;
    let key = ForwardWords::new(headers.destination(), vlan);
    FORWARDS.get_ptr_mut(key.key())
}

/// Returns whether earlier frames still wait in the TAP of a stopped VM for the agent to forward
/// them. Later frames then enter the TAP too, so that the order stays.
#[inline(always)]
fn others_wait(ifindex: u32) -> bool {
    let (Some(gate), Some(usage)) = (GATES.get_ptr(ifindex), GATE_USAGE.get_ptr(ifindex)) else {
        return false;
    };
    // SAFETY: the pointers refer to live map values; another CPU may write `held` at any time.
    unsafe {
        (*gate).mode == GateMode::Record as u32
            && (&raw const (*usage).held).read_volatile() != (*gate).replayed
    }
}

/// Pointers to the counters of a map entry.
pub(crate) struct EntryCounters {
    pub(crate) packets: *mut u64,
    pub(crate) bytes: *mut u64,
    pub(crate) dropped: *mut u64,
}

impl EntryCounters {
    /// Counts a packet of `segments` segments and `bytes` bytes, sent or failed; returns the verdict.
    ///
    /// # Safety
    ///
    /// The pointers point into a live map value.
    #[inline(always)]
    pub(crate) unsafe fn count(
        &self,
        sent: Result<Verdict, Counter>,
        as_sent: Counter,
        [segments, bytes]: [u64; 2],
    ) -> Verdict {
        match sent {
            Ok(verdict) => {
                maps::count(as_sent, segments);
                // SAFETY: the caller guarantees the pointers.
                unsafe {
                    instruction::add_u64(self.packets, segments);
                    instruction::add_u64(self.bytes, bytes);
                }
                verdict
            }
            Err(reason) => {
                maps::count(reason, segments);
                // SAFETY: the caller guarantees the pointers.
                unsafe { instruction::add_u64(self.dropped, segments) };
                Verdict::Drop
            }
        }
    }
}

#[inline(always)]
fn send<P: Packet>(
    packet: &P,
    headers: HeaderView,
    forward: &Forward,
    by: Program,
) -> Result<Verdict, Counter> {
    let fixup = ChecksumFixup::new(headers, forward.difference)?;
    let mut route = Route::new(
        LOOPBACK,
        fixup.next_header,
        packet.wire_bytes(),
        header_view::address(headers.source()),
        forward.destination,
    );
    route.look_up(packet.context()).map_err(reason)?;
    // Before the rewrite: the packet still shows its original destination.
    packet.tell(by, Decision::SentOn, Reason::NONE, 0);
    Ok(packet.send_on(
        headers,
        &Change {
            forward,
            fixup,
            route: &route,
        },
    ))
}
