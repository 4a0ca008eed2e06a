//! Unicast packets for an address that its VM has left: sent on to the address that it has now.
//!
//! ```text
//!  frame --> FORWARDING? --> FORWARDS --> in time? --> hop limit --> route --> other destination,
//!                                            |                                 sent out again
//!                                            '--> do others wait? --> TAP, copied by `gate`
//! ```

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

use common::counter::Counter;
use common::forward;
use common::maps::{Forward, GateMode};
use common::trace::{Decision, Program, Reason};
use common::wire::{ethernet, ipv6};

use crate::context::Packet;
use crate::front::{self, ForwardWords, Front};
use crate::maps::{self, FORWARDING, FORWARDS, GATE_USAGE, GATES};
use crate::translate;
use agent_ebpf::instruction;
use agent_ebpf::route::{LOOPBACK, NoRoute, Route};
use agent_ebpf::skb::Skb;
use agent_ebpf::verdict::Verdict;

/// What a packet becomes.
pub(crate) struct Change<'a> {
    pub(crate) forward: &'a Forward,
    pub(crate) follow: Follow,
    pub(crate) route: &'a Route,
}

impl Change<'_> {
    /// Writes it to the headers.
    #[inline(always)]
    pub(crate) fn apply(&self, front: &mut Front) {
        let macs = self.route.macs();
        let hop_limit = self.follow.hop_limit;
        forward::send_on(front, &self.forward.destination, hop_limit, macs);
    }
}

/// What has to follow when one address of a packet becomes another, and its hop limit one less.
pub(crate) struct Follow {
    /// Before.
    pub(crate) hop_limit: u8,
    pub(crate) next_header: u8,
    /// What the other address adds to a checksum.
    pub(crate) difference: u32,
    /// Where that checksum stands; 0 for nowhere.
    pub(crate) checksum_offset: usize,
}

impl Follow {
    /// That of a packet as it came; the error is why it cannot be sent.
    #[inline(always)]
    pub(crate) fn new(front: Front, difference: u32) -> Result<Self, Counter> {
        let header = front.header();
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

/// The reason that is counted.
#[inline(always)]
pub(crate) fn reason(reason: NoRoute) -> Counter {
    match reason {
        NoRoute::Neighbour => Counter::ForwardNoNeighbour,
        NoRoute::TooBig => Counter::ForwardTooBig,
        NoRoute::Forwarding => Counter::ForwardNoForwarding,
        NoRoute::Route => Counter::ForwardNoRoute,
    }
}

/// Whether any address is forwarded or translated. On most hosts, most of the time, this is all that
/// is done.
#[inline(always)]
pub(crate) fn is_on() -> bool {
    // SAFETY: the pointer is to a live map value, which only the agent writes.
    FORWARDING
        .get_ptr(0)
        .is_some_and(|entries| unsafe { *entries } != 0)
}

/// A frame that comes from a VM of this host: as one from the network, if it is for such an address.
#[inline(always)]
pub(crate) fn from_vm(skb: &Skb) -> Verdict {
    let Some(front) = skb.front() else {
        return Verdict::Pass;
    };
    let header = front.header();
    if !header.is_ipv6() || ipv6::is_multicast(&header.destination) {
        return Verdict::Pass;
    }
    let verdict = translate::unicast(skb, front);
    if !matches!(verdict, Verdict::Pass) {
        return verdict;
    }
    unicast(skb, front, Program::Snoop)
}

/// A unicast packet, as one program sees it. Passes if it is none of ours.
#[inline(never)]
pub(crate) fn unicast<P: Packet>(packet: &P, front: Front, by: Program) -> Verdict {
    let Some(entry) = entry(packet, front) else {
        return Verdict::Pass;
    };
    let arrival = packet.arrival();
    // SAFETY: the pointer is to a live map value; what is written to it below is not read here.
    let forward = unsafe { &*entry };
    if forward.until_ns <= arrival.at_ns || forward::stays(front.header()) {
        return Verdict::Pass;
    }
    if arrival.at_ns < forward.unread_until_ns && others_wait(forward.ifindex) {
        return Verdict::Pass;
    }
    let amount = [arrival.segments.into(), packet.len() as u64];
    let sent = send(packet, front, forward, by);
    if let Err(reason) = sent {
        packet.tell(by, Decision::Dropped, reason, 0);
    }
    // SAFETY: the pointer is to a live map value.
    unsafe {
        let sums = Sums {
            packets: &raw mut (*entry).packets,
            bytes: &raw mut (*entry).bytes,
            dropped: &raw mut (*entry).dropped,
        };
        sums.count(sent, Counter::ForwardedPackets, amount)
    }
}

/// The entry of a packet's destination.
#[inline(always)]
pub(crate) fn entry<P: Packet>(packet: &P, front: Front) -> Option<*mut Forward> {
    let vlan = packet.vlan_metadata() & ethernet::VLAN_IDENTIFIER;
    let key = ForwardWords::new(front.destination(), vlan);
    FORWARDS.get_ptr_mut(key.key())
}

/// Whether the agent has yet to send on what came before into the TAP of a VM that has stopped. What
/// comes then passes too and waits behind, so that the order stays.
#[inline(always)]
fn others_wait(ifindex: u32) -> bool {
    let (Some(gate), Some(usage)) = (GATES.get_ptr(ifindex), GATE_USAGE.get_ptr(ifindex)) else {
        return false;
    };
    // SAFETY: the pointers are to live map values; another CPU may write the number at any time.
    unsafe {
        (*gate).mode == GateMode::Record as u32
            && (&raw const (*usage).held).read_volatile() != (*gate).replayed
    }
}

/// Where an entry counts what became of its packets.
pub(crate) struct Sums {
    pub(crate) packets: *mut u64,
    pub(crate) bytes: *mut u64,
    pub(crate) dropped: *mut u64,
}

impl Sums {
    /// Counts a packet, of so many segments and bytes, that was sent or cannot be; returns its
    /// verdict.
    ///
    /// # Safety
    ///
    /// The pointers are into a live map value.
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
                // SAFETY: as the caller says.
                unsafe {
                    instruction::add_u64(self.packets, segments);
                    instruction::add_u64(self.bytes, bytes);
                }
                verdict
            }
            Err(reason) => {
                maps::count(reason, segments);
                // SAFETY: as the caller says.
                unsafe { instruction::add_u64(self.dropped, segments) };
                Verdict::Drop
            }
        }
    }
}

#[inline(always)]
fn send<P: Packet>(
    packet: &P,
    front: Front,
    forward: &Forward,
    by: Program,
) -> Result<Verdict, Counter> {
    let follow = Follow::new(front, forward.difference)?;
    let mut route = Route::new(
        LOOPBACK,
        follow.next_header,
        packet.wire_bytes(),
        front::address(front.source()),
        forward.destination,
    );
    route.look_up(packet.context()).map_err(reason)?;
    // Now, as the packet still shows the address that it came for.
    packet.tell(by, Decision::SentOn, Reason::NONE, 0);
    Ok(packet.send_on(
        front,
        &Change {
            forward,
            follow,
            route: &route,
        },
    ))
}
