//! One traced decision: filter, rate limit, and the record in `TRACE`.

use agent_ebpf::instruction::{load_u64, opaque, store_u64};
use agent_ebpf::skb::{Skb, now_ns};
use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::btf_maps::{Array, PerCpuArray, RingBuf};
use aya_ebpf::helpers::bpf_xdp_load_bytes;
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::{TcContext, XdpContext};
use common::maps::StreamKey;
use common::packet::PacketRead;
use common::trace::{Cpu, FRAME_BYTES, Filter, Record};
use common::wire::ethernet;

use crate::context::{Packet as _, Xdp};
use crate::header_view::StreamWords;

#[btf_map]
static TRACE_FILTER: Array<Filter, 1> = Array::new();
#[btf_map]
static TRACE_CPU: PerCpuArray<Cpu, 1> = PerCpuArray::new();
#[btf_map]
static TRACE: RingBuf<Record, { 1 << 20 }> = RingBuf::new();

/// Offset of the EtherType, bytes.
const ETHER_TYPE: usize = 12;
/// Offset of the IPv6 source in an untagged frame, bytes; the destination follows.
const SOURCE: usize = 22;
/// An 802.1Q tag, bytes.
const TAG: usize = 4;
/// An IPv6 address, bytes.
const ADDRESS: usize = 16;
/// End of both addresses in a tagged frame, bytes.
const ADDRESSES_END: usize = SOURCE + TAG + 2 * ADDRESS;

/// Flag of the `told` word: the flow is in `TRACE_CPU`.
pub(super) const KEPT: u64 = 1 << 32;

/// Copies a flow to `TRACE_CPU`.
#[inline(always)]
pub(super) fn keep(stream: &StreamWords) {
    if let Some(cpu) = TRACE_CPU.get_ptr_mut(0) {
        // SAFETY: the slot belongs to this CPU, and the program does not interrupt itself.
        unsafe { copy_stream(&raw mut (*cpu).stream, stream.key()) }
    }
}

/// The part of a frame that a record needs.
trait Frame: PacketRead {
    fn ifindex(&self) -> u32;

    fn start(&self) -> Option<*mut u8>;

    /// Copies the first `length` bytes to `to`.
    ///
    /// # Safety
    ///
    /// `to` is valid for writes of `length` bytes, and `length` is not 0.
    unsafe fn copy_to(&self, to: *mut u8, length: u64) -> bool;
}

impl Frame for Skb {
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        Self::ifindex(self)
    }

    #[inline(always)]
    fn start(&self) -> Option<*mut u8> {
        Self::start::<ADDRESSES_END>(self)
    }

    #[inline(always)]
    unsafe fn copy_to(&self, to: *mut u8, length: u64) -> bool {
        // SAFETY: the caller guarantees the destination.
        unsafe { Self::copy_to(self, to, length).is_ok() }
    }
}

impl Frame for Xdp {
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the pointer is the program's context, which is valid while it runs.
        unsafe { (*self.context().cast::<xdp_md>()).ingress_ifindex }
    }

    #[inline(always)]
    fn start(&self) -> Option<*mut u8> {
        Self::start::<ADDRESSES_END>(self)
    }

    #[inline(always)]
    unsafe fn copy_to(&self, to: *mut u8, length: u64) -> bool {
        // SAFETY: the caller guarantees the destination; the helper checks the frame.
        unsafe { bpf_xdp_load_bytes(self.context().cast(), 0, to.cast(), length as u32) == 0 }
    }
}

/// Traces a decision about an skb. `told` packs program, decision and reason.
#[inline(never)]
pub(super) fn skb(skb: *mut __sk_buff, told: u64, number: u64, stream: *const StreamKey) {
    tell(&Skb::new(&TcContext::new(skb)), told, number, stream);
}

/// Traces a decision about an XDP frame.
#[inline(never)]
pub(super) fn xdp(xdp: *mut xdp_md, told: u64, number: u64, stream: *const StreamKey) {
    tell(&Xdp::new(&XdpContext::new(xdp)), told, number, stream);
}

#[inline(always)]
fn tell<F: Frame>(frame: &F, told: u64, number: u64, stream: *const StreamKey) {
    let Some(filter) = TRACE_FILTER.get_ptr(0) else {
        return;
    };
    // SAFETY: the pointer refers to a live map value. The agent may overwrite the filter meanwhile; it
    // filters each record again, so a record that passed half of a filter does no harm.
    let filter = unsafe { &*filter };
    // The lowest byte of `told` is the program.
    let wanted = filter.programs >> (told & 31) & 1 != 0;
    if !wanted || (filter.ifindex != 0 && filter.ifindex != frame.ifindex()) {
        return;
    }
    // SAFETY: the slot belongs to this CPU. A program that interrupts this one spoils a trace line,
    // which does no harm.
    let Some(cpu) = TRACE_CPU.get_ptr_mut(0).map(|cpu| unsafe { &mut *cpu }) else {
        return;
    };
    cpu.number = number;
    cpu.told = told;
    let stream = match told & KEPT {
        0 => stream,
        _ => &raw const cpu.stream,
    };
    if !concerns(filter, frame, stream) {
        return;
    }
    let at_ns = now_ns();
    if !cpu.budget.take(at_ns, filter) {
        return;
    }
    let Some(mut entry) = TRACE.reserve_untyped::<Record>(0) else {
        cpu.budget.left_out += 1;
        return;
    };
    let record: *mut Record = entry.as_mut_ptr();
    // Verifier: the number that the helper receives needs known bounds.
    let below = opaque(opaque(frame.len() as u64).wrapping_sub(1));
    let below = if below < FRAME_BYTES as u64 {
        below
    } else {
        FRAME_BYTES as u64 - 1
    };
    let length = opaque(below) + 1;
    // SAFETY: the record belongs to this program until `submit`, and `length` is at most the size
    // of `frame`.
    unsafe {
        (&raw mut (*record).at_ns).write(at_ns);
        (&raw mut (*record).number).write(cpu.number);
        (&raw mut (*record).ifindex).write(frame.ifindex());
        (&raw mut (*record).length).write(frame.len() as u32);
        // One store for program, decision and reason.
        (&raw mut (*record).program)
            .cast::<u32>()
            .write(cpu.told as u32);
        (&raw mut (*record).vlan).write(frame.vlan_metadata() & ethernet::VLAN_IDENTIFIER);
        copy_stream(&raw mut (*record).stream, stream);
        let copied = frame.copy_to((&raw mut (*record).frame).cast(), length);
        let copied = if copied { length as u16 } else { 0 };
        (&raw mut (*record).copied).write(copied);
    }
    entry.submit(0);
}

/// Returns whether the filter's address is one of the flow's addresses. Returns `true` for a frame
/// that does not show its addresses.
#[inline(always)]
fn concerns<F: Frame>(filter: &Filter, frame: &F, stream: *const StreamKey) -> bool {
    // SAFETY: the filter is a map value.
    let wanted = unsafe { words((&raw const filter.address).cast()) };
    if wanted == [0, 0] {
        return true;
    }
    let (one, other) = if stream.is_null() {
        let Some(start) = frame.start() else {
            return true;
        };
        // SAFETY: `start` checked the bounds.
        unsafe {
            let tag = u32::from(ethernet::VLAN.to_be());
            let is_tagged = u32::from(start.add(ETHER_TYPE).cast::<u16>().read()) == tag;
            let source = start.add(if is_tagged { SOURCE + TAG } else { SOURCE });
            (words(source), words(source.add(ADDRESS)))
        }
    } else {
        // SAFETY: the caller of `tell_of` guarantees the pointer.
        unsafe {
            (
                words((&raw const (*stream).multicast_address).cast()),
                words((&raw const (*stream).source).cast()),
            )
        }
    };
    wanted == one || wanted == other
}

/// # Safety
///
/// `address` points to 16 live bytes of a packet or a map value.
#[inline(always)]
unsafe fn words(address: *const u8) -> [u64; 2] {
    // SAFETY: the caller guarantees the pointer.
    unsafe { [load_u64(address), load_u64(address.add(8))] }
}

/// # Safety
///
/// `to` points into a record or a map value; `stream` is null or as `tell_of` requires.
#[inline(always)]
unsafe fn copy_stream(to: *mut StreamKey, stream: *const StreamKey) {
    let (to, stream) = (to.cast::<u8>(), stream.cast::<u8>());
    // SAFETY: a key has five words. Single stores keep the compiler from calling `memset`.
    unsafe {
        for word in 0..size_of::<StreamKey>() / 8 {
            let value = if stream.is_null() {
                0
            } else {
                load_u64(stream.add(8 * word))
            };
            store_u64(to.add(8 * word), value);
        }
    }
}
