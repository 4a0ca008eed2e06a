//! `snoop`: MLD snooping (RFC 9777) of the frames that a VM sends, at the VM's TAP.

#![allow(
    unsafe_code,
    reason = "map values and the loop's state are reached through raw pointers"
)]

use core::ffi::c_void;

use agent_ebpf::instruction;
use agent_ebpf::skb::{Skb, now_ns};
use agent_ebpf::verdict::Verdict;
use aya_ebpf::helpers::bpf_loop;
use common::counter::Counter;
use common::event::{Kind, UNFINISHED_FRAME_BYTES, UnfinishedEvent};
use common::packet::PacketRead;
use common::snoop::mld::MldRecords;
use common::snoop::{
    self, KERNEL_BYTES, KERNEL_OPTIONS, KERNEL_RECORDS, KERNEL_STEPS, Report, Step, Walk,
};
use common::trace::{Decision, Program, Reason};
use common::wire::mld::{self, Ipv6Frame, Message, NoMessage};
use common::wire::signalling::{self, Signalling};
use common::wire::{ethernet, udp};

use crate::forward;
use crate::maps::{self, EVENTS, PORTS, WALK};
use crate::store::MapStore;
use crate::trace::Traced as _;

#[inline(always)]
pub(crate) fn snoop(skb: &Skb) -> Verdict {
    let protocol = skb.protocol();
    if protocol != u32::from(ethernet::IPV6.to_be())
        && protocol != u32::from(ethernet::VLAN.to_be())
    {
        return Verdict::Pass;
    }
    if forward::is_on() {
        let verdict = forward::from_vm(skb);
        if !matches!(verdict, Verdict::Pass) {
            return verdict;
        }
    }
    from_listener(skb)
}

/// Not inlined: the stack of forwarded packets has no room for these headers.
#[inline(never)]
fn from_listener(skb: &Skb) -> Verdict {
    let Some(frame) = mld::ipv6_frame(skb) else {
        return Verdict::Pass;
    };
    if frame.header.next_header == udp::NEXT_HEADER {
        return signalling(skb, &frame);
    }
    if mld::is_hidden(skb, &frame) {
        malformed(skb, Counter::MalformedOptions);
        return Verdict::Drop;
    }
    match mld::parse::<_, KERNEL_OPTIONS, KERNEL_BYTES>(skb, &frame) {
        Ok(Message::Query(_)) => {
            // The bridge would take the port for a multicast router port and flood every stream to
            // it.
            maps::count(Counter::GuestQueries, 1);
            tell(skb, Decision::Dropped, Counter::GuestQueries);
            Verdict::Drop
        }
        Ok(message) => report(skb, &frame, &message),
        Err(NoMessage::Other) => signalling(skb, &frame),
        Err(reason) => no_message(skb, reason),
    }
}

#[inline(always)]
fn tell(skb: &Skb, decision: Decision, reason: impl Into<Reason>) {
    skb.tell(Program::Snoop, decision, reason, 0);
}

/// Handles a frame that is not MLD. Only agents send from the agents' signalling port: another VM
/// would take such a datagram for an answer of its agent.
#[inline(never)]
fn signalling(skb: &Skb, frame: &Ipv6Frame) -> Verdict {
    match signalling::classify(skb, frame) {
        Signalling::Other => Verdict::Pass,
        Signalling::Request => request(skb),
        Signalling::Answer | Signalling::Hidden => {
            maps::count(Counter::SignallingForged, 1);
            tell(skb, Decision::Dropped, Counter::SignallingForged);
            if let Some(usage) = maps::port_usage(skb.ifindex()) {
                // SAFETY: the pointer refers to a live map value.
                unsafe { instruction::add_u64(&raw mut (*usage).forged_datagrams, 1) }
            }
            Verdict::Drop
        }
    }
}

/// Marks a signalling request with the TAP. A VM chooses every byte that it sends, but not the
/// mark; the agent reads marked datagrams only.
#[inline(always)]
fn request(skb: &Skb) -> Verdict {
    let ifindex = skb.ifindex();
    let (Some(port), Some(usage)) = (PORTS.get_ptr(ifindex), maps::port_usage(ifindex)) else {
        maps::count(Counter::IgnoredPort, 1);
        tell(skb, Decision::Ignored, Counter::IgnoredPort);
        return Verdict::Pass;
    };
    // SAFETY: both pointers refer to live map values.
    let is_allowed = unsafe {
        let allowance = &mut (*usage).datagram_allowance;
        allowance.take((*port).datagrams_per_second, now_ns())
    };
    if !is_allowed {
        maps::count(Counter::SignallingRefused, 1);
        tell(skb, Decision::Dropped, Counter::SignallingRefused);
        // SAFETY: as above.
        unsafe { instruction::add_u64(&raw mut (*usage).refused_datagrams, 1) }
        return Verdict::Drop;
    }
    skb.set_mark(ifindex);
    maps::count(Counter::SignallingDatagrams, 1);
    tell(skb, Decision::Passed, Counter::SignallingDatagrams);
    // SAFETY: as above.
    unsafe { instruction::add_u64(&raw mut (*usage).datagrams, 1) }
    Verdict::Pass
}

#[inline(always)]
fn report(skb: &Skb, frame: &Ipv6Frame, message: &Message) -> Verdict {
    let ifindex = skb.ifindex();
    let at_ns = now_ns();
    if let Err(verdict) = admit(skb, ifindex, at_ns) {
        return verdict;
    }
    let report = Report {
        at_ns,
        ifindex,
        vlan: frame.vlan,
        bridge: maps::bridge(),
        guest_mac: frame.mac,
        by_agent: false,
    };
    let mut store = MapStore::new(ifindex);
    let Some(walk) = WALK.get_ptr_mut(0) else {
        return Verdict::Pass;
    };
    // SAFETY: the slot belongs to this CPU, and no other program uses the map.
    let walk = unsafe { &mut *walk };
    match snoop::mld::begin::<_, _, KERNEL_RECORDS>(skb, message, &report, walk, &mut store) {
        Ok(steps) if steps <= KERNEL_STEPS => apply(skb, walk, store),
        Ok(_) | Err(NoMessage::Unfinished) => hand_over(skb, at_ns),
        Err(reason) => no_message(skb, reason),
    }
}

#[inline(always)]
fn no_message(skb: &Skb, reason: NoMessage) -> Verdict {
    match reason {
        NoMessage::Other => Verdict::Pass,
        NoMessage::Malformed(counter) => {
            malformed(skb, counter);
            Verdict::Drop
        }
        NoMessage::Unfinished => {
            let at_ns = now_ns();
            if let Err(verdict) = admit(skb, skb.ifindex(), at_ns) {
                return verdict;
            }
            hand_over(skb, at_ns)
        }
    }
}

/// Counts a malformed message, which the caller drops. The bridge accepts messages that RFC 9777
/// forbids; a listener of the bridge without an entry in `LISTENERS` must not exist.
#[inline(never)]
fn malformed(skb: &Skb, counter: Counter) {
    maps::count(counter, 1);
    tell(skb, Decision::Dropped, counter);
    if let Some(usage) = maps::port_usage(skb.ifindex()) {
        // SAFETY: the pointer refers to a live map value.
        unsafe { instruction::add_u64(&raw mut (*usage).malformed, 1) }
    }
}

/// State of the loop over the steps of a walk.
struct Steps {
    skb: *const Skb,
    walk: *mut Walk<MldRecords>,
    store: MapStore,
}

#[inline(always)]
fn apply(skb: &Skb, walk: &mut Walk<MldRecords>, store: MapStore) -> Verdict {
    let mut state = Steps { skb, walk, store };
    // Verifier: an exact number of iterations would keep the verifier from merging the paths that
    // lead here. The walk itself ends the loop.
    // SAFETY: the callback has the signature that the helper requires, and `state` outlives the call.
    unsafe {
        bpf_loop(
            KERNEL_STEPS as u32 + 1,
            step as *mut c_void,
            (&raw mut state).cast(),
            0,
        );
    }
    let reason = state.store.last();
    // SAFETY: as in `report`.
    if unsafe { (*state.walk).refused() } {
        // The bridge would learn the addresses that `snoop` has just refused.
        tell(skb, Decision::Dropped, reason);
        Verdict::Drop
    } else {
        tell(skb, Decision::Admitted, reason);
        Verdict::Pass
    }
}

/// Takes one step; returns 1 to end the loop.
#[inline(never)]
extern "C" fn step(_index: u64, state: *mut c_void) -> i64 {
    // SAFETY: `apply` passes its own state, whose parts nothing else uses at the same time.
    let (state, skb, walk) = unsafe {
        let state = state.cast::<Steps>();
        (&mut (*state).store, &*(*state).skb, &mut *(*state).walk)
    };
    match walk.step(skb, state) {
        Step::More => 0,
        Step::Done => 1,
    }
}

/// Takes one Report from the token bucket of the port. `Err` is the verdict for a Report that
/// `snoop` does not process.
#[inline(never)]
fn admit(skb: &Skb, ifindex: u32, at_ns: u64) -> Result<(), Verdict> {
    let Some(port) = PORTS.get_ptr(ifindex) else {
        maps::count(Counter::IgnoredPort, 1);
        tell(skb, Decision::Ignored, Counter::IgnoredPort);
        return Err(Verdict::Pass);
    };
    let Some(usage) = maps::port_usage(ifindex) else {
        maps::count(Counter::PortUsageFull, 1);
        tell(skb, Decision::Ignored, Counter::PortUsageFull);
        return Err(Verdict::Pass);
    };
    // SAFETY: both pointers refer to live map values.
    unsafe {
        let allowance = &mut (*usage).report_allowance;
        if !allowance.take((*port).reports_per_second, at_ns) {
            instruction::add_u64(&raw mut (*usage).refused_reports, 1);
            maps::count(Counter::RefusedRate, 1);
            tell(skb, Decision::Dropped, Counter::RefusedRate);
            return Err(Verdict::Drop);
        }
        instruction::add_u64(&raw mut (*usage).reports, 1);
    }
    Ok(())
}

/// Hands the whole frame to the agent. Drops a frame that the agent cannot receive.
#[inline(never)]
fn hand_over(skb: &Skb, at_ns: u64) -> Verdict {
    let Some(length) = instruction::size::<UNFINISHED_FRAME_BYTES>(skb.len()) else {
        maps::count(Counter::Oversized, 1);
        tell(skb, Decision::Dropped, Counter::Oversized);
        return Verdict::Drop;
    };
    let Some(mut entry) = EVENTS.reserve_untyped::<UnfinishedEvent>(0) else {
        maps::count(Counter::EventsLost, 1);
        tell(skb, Decision::Dropped, Counter::EventsLost);
        return Verdict::Drop;
    };
    let event = entry.as_mut_ptr();
    // SAFETY: `event` points to the reserved record, written field by field because the record is
    // larger than the stack; `length` is at most the size of `frame`.
    let copied = unsafe {
        (&raw mut (*event).kind).write(Kind::Unfinished as u32);
        (&raw mut (*event).ifindex).write(skb.ifindex());
        (&raw mut (*event).at_ns).write(at_ns);
        (&raw mut (*event).vlan_metadata).write(skb.vlan_metadata() & 0x0fff);
        (&raw mut (*event).bridge).write(maps::bridge());
        (&raw mut (*event).length).write(length as u32);
        skb.copy_to((&raw mut (*event).frame).cast(), length)
    };
    if copied.is_ok() {
        entry.submit(0);
        maps::count(Counter::Unfinished, 1);
        tell(skb, Decision::HandedOver, Counter::Unfinished);
        Verdict::Pass
    } else {
        entry.discard(0);
        maps::count(Counter::Oversized, 1);
        tell(skb, Decision::Dropped, Counter::Oversized);
        Verdict::Drop
    }
}
