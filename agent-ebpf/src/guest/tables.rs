//! The maps behind [`Tables`], the trait that the translation rules read.

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

use core::cell::Cell;
use core::ptr;

use agent_ebpf::instruction;
use agent_ebpf::route::Route;
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use common::maps::Address;
use common::mat::maps::{FIRST_TABLE, NEXT_HOP_LIFETIME_NS, Node, Peer};
use common::mat::translate::{Tables, Translated, Words, address, words};
use common::packet::PacketRead as _;

use crate::frame::Frame;
use crate::maps::{NODE, NODE_SLOT, OWN_MOAS, PEER_MOAS, PEERS};

/// The maps, and the size of the packet that they count.
pub(crate) struct Maps {
    bytes: u64,
    segments: u64,
    /// Entry that counted the packet; null for none.
    peer: Cell<*mut Peer>,
    /// Time of that count, coarse clock.
    at_ns: Cell<u64>,
}

impl Maps {
    #[inline(always)]
    pub(crate) fn for_packet(frame: &Frame) -> Self {
        Self {
            bytes: frame.len() as u64,
            segments: frame.skb().segments().into(),
            peer: Cell::new(ptr::null_mut()),
            at_ns: Cell::new(0),
        }
    }

    /// Returns the cached next hop of the packet on the NIC `ifindex`.
    #[inline(always)]
    pub(crate) fn next_hop(&self, frame: &Frame, ifindex: u32) -> Option<Words> {
        let peer = self.peer.get();
        if peer.is_null() {
            return None;
        }
        // SAFETY: the pointer refers to a live map value.
        let (of, until_ns) = unsafe { ((*peer).next_hop_ifindex, (*peer).next_hop_until_ns) };
        if until_ns < self.at_ns.get() {
            self.look_up(frame, peer, ifindex);
            return None;
        }
        // SAFETY: as above.
        (of == ifindex).then(|| unsafe { (*peer).next_hop })
    }

    /// Looks up the next hop in the NIC's table, for the packets that fixup. Caches no next hop
    /// while the kernel knows no link address for it.
    #[inline(always)]
    fn look_up(&self, frame: &Frame, peer: *mut Peer, ifindex: u32) {
        let Some(node) = self.node() else {
            return;
        };
        // SAFETY: the pointer refers to a live map value.
        let moa = unsafe { (*peer).moa };
        let mut route = Route::new(node.mat0_ifindex, 0, 0, address(node.moa), address(moa));
        let context = frame.skb().as_ptr().cast();
        let found = route.look_up_in(context, FIRST_TABLE + ifindex).is_ok();
        let found = found && route.ifindex == ifindex;
        // SAFETY: as above. `next_hop_ifindex` is 0 during the update, so no CPU uses half a next
        // hop.
        unsafe {
            (&raw mut (*peer).next_hop_ifindex).write_volatile(0);
            (&raw mut (*peer).next_hop_until_ns)
                .write_volatile(self.at_ns.get() + NEXT_HOP_LIFETIME_NS);
            if found {
                (&raw mut (*peer).next_hop).write_volatile(words(route.destination));
                (&raw mut (*peer).next_hop_ifindex).write_volatile(ifindex);
            }
        }
    }
}

impl Tables for Maps {
    #[inline(always)]
    fn node(&self) -> Option<&Node> {
        let slot = NODE_SLOT.get_ptr(0)?;
        // SAFETY: the pointer refers to a live map value. The daemon writes the value in one
        // instruction.
        let slot = unsafe { slot.read_volatile() };
        // SAFETY: as above; the daemon never writes the slot in use.
        NODE.get_ptr(slot).map(|node| unsafe { &*node })
    }

    #[inline(always)]
    fn peer(&self, hoa: &Words) -> Option<Translated> {
        let peer = PEERS.get_ptr_mut(key(hoa))?;
        // SAFETY: the pointer refers to a live map value; the programs write only its counters.
        unsafe {
            instruction::add_u64(&raw mut (*peer).packets, self.segments);
            instruction::add_u64(&raw mut (*peer).bytes, self.bytes);
            self.at_ns.set(used(&raw mut (*peer).last_used_ns));
            self.peer.set(peer);
            Some(Translated {
                address: (*peer).moa,
                difference: (*peer).difference,
            })
        }
    }

    #[inline(always)]
    fn peer_moa(&self, moa: &Words) -> Option<Translated> {
        let peer = PEER_MOAS.get_ptr_mut(key(moa))?;
        // SAFETY: as above.
        unsafe {
            used(&raw mut (*peer).last_used_ns);
            Some(Translated {
                address: (*peer).hoa,
                difference: (*peer).difference,
            })
        }
    }

    #[inline(always)]
    fn own_moa(&self, moa: &Words) -> Option<u32> {
        // SAFETY: as above.
        OWN_MOAS
            .get_ptr(key(moa))
            .map(|own| unsafe { (*own).difference })
    }
}

#[inline(always)]
fn key(address: &Words) -> &Address {
    // SAFETY: an address has the layout of two words.
    unsafe { &*(&raw const *address).cast() }
}

/// Stores the time of use in an entry, and returns that time. The coarse clock advances once per
/// tick, so most packets skip the store.
///
/// # Safety
///
/// `last_used_ns` points into a live map value.
#[inline(always)]
unsafe fn used(last_used_ns: *mut u64) -> u64 {
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_coarse_ns() };
    // SAFETY: the caller guarantees the pointer.
    unsafe {
        if last_used_ns.read_volatile() != now {
            last_used_ns.write_volatile(now);
        }
    }
    now
}
