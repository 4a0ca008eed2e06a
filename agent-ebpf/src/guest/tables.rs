//! The maps, as the rules of translation ask for them.

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

use agent_ebpf::instruction;
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use common::maps::Address;
use common::mat::maps::Node;
use common::mat::translate::{Tables, Translated, Words};
use common::packet::PacketRead as _;

use crate::frame::Frame;
use crate::maps::{NODE, NODE_SLOT, OWN_MOAS, PEER_MOAS, PEERS};

/// The maps, and the packet that is counted there.
pub(crate) struct Maps {
    bytes: u64,
    segments: u64,
}

impl Maps {
    #[inline(always)]
    pub(crate) fn for_packet(frame: &Frame) -> Self {
        Self {
            bytes: frame.len() as u64,
            segments: frame.skb().segments().into(),
        }
    }
}

impl Tables for Maps {
    #[inline(always)]
    fn node(&self) -> Option<&Node> {
        let slot = NODE_SLOT.get_ptr(0)?;
        // SAFETY: the pointer is to a live map value. The daemon writes it in one instruction.
        let slot = unsafe { slot.read_volatile() };
        // SAFETY: as above; nobody writes the slot that is in use.
        NODE.get_ptr(slot).map(|node| unsafe { &*node })
    }

    #[inline(always)]
    fn peer(&self, hoa: &Words) -> Option<Translated> {
        let peer = PEERS.get_ptr_mut(key(hoa))?;
        // SAFETY: the pointer is to a live map value, of which only the numbers are written.
        unsafe {
            instruction::add_u64(&raw mut (*peer).packets, self.segments);
            instruction::add_u64(&raw mut (*peer).bytes, self.bytes);
            used(&raw mut (*peer).last_used_ns);
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
    // SAFETY: an address is two words.
    unsafe { &*(&raw const *address).cast() }
}

/// Notes that an entry is in use. The coarse clock stands still for some packets, which then need
/// not write.
///
/// # Safety
///
/// The pointer is to a live map value.
#[inline(always)]
unsafe fn used(last_used_ns: *mut u64) {
    // SAFETY: the helper has no preconditions, and the caller answers for the pointer.
    unsafe {
        let now = bpf_ktime_get_coarse_ns();
        if last_used_ns.read_volatile() != now {
            last_used_ns.write_volatile(now);
        }
    }
}
