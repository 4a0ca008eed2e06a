//! The maps of a MAT node. Names and layouts are the contract with `migkick`.
//!
//! Hash maps allocate on use (`BPF_F_NO_PREALLOC`). The daemon writes all entries; the programs
//! write only counters and times of use.

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{Array, HashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use common::maps::Address;
use common::mat::counter::{COUNT, Counter};
use common::mat::maps::{Held, NODE_SLOTS, Node, OwnMoa, Peer, PeerMoa};

const ON_USE: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map]
pub(crate) static NODE: Array<Node, { NODE_SLOTS as usize }> = Array::new();
/// The slot of `NODE` in use. The daemon writes the other slot, then switches by one store here.
#[btf_map]
pub(crate) static NODE_SLOT: Array<u32, 1> = Array::new();
#[btf_map]
pub(crate) static PEERS: HashMap<Address, Peer, 65_536, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static PEER_MOAS: HashMap<Address, PeerMoa, 131_072, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static OWN_MOAS: HashMap<Address, OwnMoa, 64, ON_USE> = HashMap::new();
#[btf_map]
pub(crate) static HELD: RingBuf<Held, { 1 << 20 }> = RingBuf::new();
#[btf_map]
pub(crate) static MAT_COUNTERS: PerCpuArray<u64, COUNT> = PerCpuArray::new();

/// Adds `amount` to a counter of this CPU.
#[inline(always)]
pub(crate) fn count(counter: Counter, amount: u64) {
    if let Some(value) = MAT_COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot belongs to this CPU, and the program does not interrupt itself.
        unsafe { *value += amount }
    }
}
