//! The maps of the host programs. Names and layouts are the contract with the agent.
//!
//! Hash maps allocate on use (`BPF_F_NO_PREALLOC`), because most hosts use a fraction of the
//! capacity. Only the agent writes `BRIDGES`, `PORTS`, `MANAGED`, `RELAYS`, `FORWARDING` and `GATES`;
//! only the relay writes `RELAY_STREAMS` and `RELAY_SUBSCRIBERS`.

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

use agent_ebpf::instruction;
use aya_ebpf::Global;
use aya_ebpf::bindings::{
    BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST, BPF_RB_AVAIL_DATA, BPF_RB_RING_SIZE,
};
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::helpers::bpf_ringbuf_query;
use aya_ebpf::macros::btf_map;
use common::counter::{COUNT, Counter};
use common::maps::{
    Bridge, BridgeNumber, Copies, Delivered, DeliveredKey, Forward, ForwardKey, Gate, GateRecord,
    GateUsage, HELD_FRAME_BYTES, HeldFrame, Listener, ListenerKey, MAX_BRIDGES, Managed,
    ManagedKey, NO_BRIDGE, Port, PortKey, PortUsage, Querier, QuerierKey, RECORDS_PER_SLOT,
    RelayFlowEntry, RelayFlowKey, RelayKey, RelayStream, Source, SourceKey, StreamKey, StreamUsage,
    Subscriber, SubscriberKey, SubscriberUsage, Translation, TranslationKey,
};
use common::snoop::Walk;
use common::snoop::mld::MldRecords;

const ON_USE: usize = BPF_F_NO_PREALLOC as usize;
const MAPPED: usize = BPF_F_MMAPABLE as usize;
/// Slots of `GATE_RECORDS`: migrations that record at once.
const SLOTS: usize = 8;

/// The bridge of the programs of this object, [`NO_BRIDGE`] at a relay. The agent writes the number
/// before it loads the programs, so it is a constant to the verifier.
#[unsafe(no_mangle)]
static BRIDGE: Global<BridgeNumber> = Global::new(NO_BRIDGE);

/// The bridges by number. Only the agent uses the map.
#[btf_map]
pub(crate) static BRIDGES: HashMap<BridgeNumber, Bridge, { MAX_BRIDGES as usize }, ON_USE> =
    HashMap::new();
#[btf_map]
pub(crate) static LISTENERS: HashMap<ListenerKey, Listener, 131_072, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static LISTENER_SOURCES: HashMap<SourceKey, Source, 131_072, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static PORTS: HashMap<PortKey, Port, 1024, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static PORT_USAGE: HashMap<PortKey, PortUsage, 1024, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static MANAGED: HashMap<ManagedKey, Managed, 16_384, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static STREAMS: HashMap<StreamKey, StreamUsage, 65_536, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static QUERIER: HashMap<QuerierKey, Querier, 1024, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static RELAY_FLOWS: HashMap<RelayFlowKey, RelayFlowEntry, 65_536, ON_USE> =
    HashMap::new();
#[btf_map]
pub(crate) static RELAYS: HashMap<RelayKey, u32, 1024, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static FORWARDS: HashMap<ForwardKey, Forward, 1024, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static TRANSLATIONS: HashMap<TranslationKey, Translation, 1024, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static FORWARDING: Array<u32, 1> = Array::new();
/// LRU: the map holds the packets of the last seconds of a change of origin.
#[btf_map]
pub(crate) static FINGERPRINTS: LruHashMap<u64, Copies, 65_536> = LruHashMap::new();
#[btf_map]
pub(crate) static RELAY_STREAMS: HashMap<StreamKey, RelayStream, 16_384, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static RELAY_SUBSCRIBERS: HashMap<SubscriberKey, Subscriber, 65_536, ON_USE> =
    HashMap::new();
#[btf_map]
pub(crate) static RELAY_USAGE: HashMap<SubscriberKey, SubscriberUsage, 65_536, ON_USE> =
    HashMap::new();
#[btf_map]
pub(crate) static GATES: HashMap<PortKey, Gate, 1024, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static GATE_USAGE: HashMap<PortKey, GateUsage, 1024, ON_USE> = HashMap::new();
/// The agent maps the array into its memory, and reads it while the VM is stopped.
#[btf_map]
pub(crate) static GATE_RECORDS: Array<GateRecord, { SLOTS * RECORDS_PER_SLOT as usize }, MAPPED> =
    Array::new();
#[btf_map]
pub(crate) static DELIVERED: HashMap<DeliveredKey, Delivered, 65_536, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static HELD: RingBuf<HeldFrame, { 8 << 20 }> = RingBuf::new();
/// Scratch memory where `gate` builds a record of `HELD`, one slot per CPU. `bpf_ringbuf_reserve`
/// takes a constant size only, and a per-CPU array value has at most 32 KiB. The agent sets the
/// number of slots to the number of CPUs.
#[btf_map]
pub(crate) static HELD_SCRATCH: Array<HeldRecord, 1> = Array::new();
#[btf_map]
pub(crate) static COUNTERS: PerCpuArray<u64, COUNT> = PerCpuArray::new();
/// Scratch memory of `snoop` for the walk over a Report, which exceeds the stack.
#[btf_map]
pub(crate) static WALK: PerCpuArray<Walk<MldRecords>, 1> = PerCpuArray::new();
#[btf_map]
pub(crate) static EVENTS: RingBuf<u8, { 1 << 20 }> = RingBuf::new();

/// The longest record of `HELD`: 65,600 bytes, align 8.
#[repr(C)]
pub(crate) struct HeldRecord {
    pub(crate) head: HeldFrame,
    pub(crate) frame: [u8; HELD_FRAME_BYTES],
}

/// Returns the number of the bridge that this set of programs serves.
#[inline(always)]
pub(crate) fn bridge() -> BridgeNumber {
    BRIDGE.load()
}

/// Returns whether half of `HELD` is free, which holds while the agent keeps up.
#[inline(always)]
pub(crate) fn held_has_half() -> bool {
    let ring = (&raw const HELD).cast_mut();
    let query = |flag: u32| {
        // SAFETY: the pointer is to the map, and the helper only reads positions of the ring
        // buffer.
        unsafe { bpf_ringbuf_query(ring.cast(), flag.into()) }
    };
    query(BPF_RB_AVAIL_DATA) <= query(BPF_RB_RING_SIZE) / 2
}

/// Adds `amount` to a counter of this CPU.
#[inline(always)]
pub(crate) fn count(counter: Counter, amount: u64) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot belongs to this CPU, and the program does not interrupt itself.
        unsafe { *value += amount }
    }
}

/// Returns the usage of a port; the first count creates the entry.
#[inline(always)]
pub(crate) fn port_usage(ifindex: PortKey) -> Option<*mut PortUsage> {
    if let Some(usage) = PORT_USAGE.get_ptr_mut(ifindex) {
        return Some(usage);
    }
    make_port_usage(ifindex);
    PORT_USAGE.get_ptr_mut(ifindex)
}

/// Not inlined: the callers cannot spare the stack.
#[inline(never)]
fn make_port_usage(ifindex: PortKey) {
    // Another CPU may insert first, so only the look-up of the caller counts.
    // SAFETY: the type consists of integers.
    unsafe {
        instruction::with_zeroed(|unused: &PortUsage| {
            let _ = PORT_USAGE.insert(ifindex, unused, BPF_NOEXIST.into());
        });
    }
}

/// Writes one record to `EVENTS` in place, because the stack is too small. Counts a record that a
/// full ring buffer refuses. `write` sets every field.
#[inline(always)]
pub(crate) fn raise<T: 'static>(write: impl FnOnce(*mut T)) {
    match EVENTS.reserve_untyped::<T>(0) {
        Some(mut entry) => {
            write(entry.as_mut_ptr());
            entry.submit(0);
        }
        None => count(Counter::EventsLost, 1),
    }
}
