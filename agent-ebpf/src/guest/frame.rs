//! [`Packet`] of the translation rules over an skb, in place.

#![allow(unsafe_code, reason = "packets are reached through raw pointers")]

use agent_ebpf::instruction::{load_u64, store_u64};
use agent_ebpf::skb::Skb;
use aya_ebpf::bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::bpf_l4_csum_replace;
use aya_ebpf::programs::TcContext;
use common::forward::TCP;
use common::mat::translate::{
    ADDRESSES, Head, Mac, PAYLOAD, Packet, QUOTED, QUOTED_ADDRESSES, QUOTED_PAYLOAD, Words,
};
use common::packet::{PacketRead, Truncated};
use common::wire::{checksum, ethernet, udp};

/// Ethernet and IPv6 header, and 8 bytes of payload.
const WITH_PAYLOAD: usize = PAYLOAD + 8;

/// A frame at a TC hook of a MAT node.
pub(crate) struct Frame(Skb);

impl Frame {
    #[inline(always)]
    pub(crate) fn new(ctx: &TcContext) -> Self {
        Self(Skb::new(ctx))
    }

    #[inline(always)]
    pub(crate) fn skb(&self) -> &Skb {
        &self.0
    }

    #[inline(always)]
    pub(crate) fn ifindex(&self) -> u32 {
        self.0.ifindex()
    }

    /// Writes two adjacent addresses at offset `AT`; `END` is the end of the second one.
    #[inline(always)]
    fn write_addresses<const AT: usize, const END: usize>(
        &self,
        source: Words,
        destination: Words,
    ) -> bool {
        let Some(start) = self.0.start::<END>() else {
            return false;
        };
        let ([a, b], [c, d]) = (source, destination);
        // SAFETY: the bounds were checked above.
        unsafe {
            store_u64(start.add(AT), a);
            store_u64(start.add(AT + 8), b);
            store_u64(start.add(AT + 16), c);
            store_u64(start.add(AT + 24), d);
        }
        true
    }

    /// Updates the checksum that ends at `END` unless the checksum may be partial. The checksum
    /// cancels the change of the addresses, so `skb->csum` stays. Returns whether the checksum is
    /// done.
    #[inline(always)]
    fn update_full<const END: usize>(&self, difference: u32, may_be_none: bool) -> bool {
        let Some(start) = self.0.start::<END>() else {
            return false;
        };
        // SAFETY: `start` checked the bounds, and checksums have even offsets.
        unsafe {
            let place = start.add(END - 2).cast::<u16>();
            let head = header(start.add(ethernet::HEADER_BYTES));
            let before = *place;
            if before == 0 && may_be_none {
                return true;
            }
            let [_, _, _, _, high, low, next_header, _] = head.start.to_ne_bytes();
            let length = u16::from_ne_bytes([high, low]);
            // The packet already has the new addresses.
            let sum = u64::from(before) + u64::from(difference);
            let addresses = [head.source, head.destination];
            if checksum::may_be_partial(sum, addresses, length, next_header) {
                return false;
            }
            let after = !checksum::fold(u64::from(!before) + u64::from(difference));
            *place = match after {
                0 if may_be_none => u16::MAX,
                _ => after,
            };
        }
        true
    }

    #[inline(always)]
    fn write_mac<const AT: usize>(&self, [first, second, third]: Mac) -> bool {
        let Some(start) = self.0.start::<{ ethernet::HEADER_BYTES }>() else {
            return false;
        };
        // SAFETY: `start` checked the bounds, and MACs have even addresses.
        unsafe {
            let mac = start.add(AT).cast::<u16>();
            mac.write(first);
            mac.add(1).write(second);
            mac.add(2).write(third);
        }
        true
    }
}

/// Reads an IPv6 header.
///
/// # Safety
///
/// `start` points to 40 live bytes of the packet.
#[inline(always)]
unsafe fn header(start: *const u8) -> Head {
    // SAFETY: the caller guarantees the bytes.
    unsafe {
        Head {
            start: load_u64(start),
            source: [load_u64(start.add(8)), load_u64(start.add(16))],
            destination: [load_u64(start.add(24)), load_u64(start.add(32))],
        }
    }
}

impl PacketRead for Frame {
    #[inline(always)]
    fn len(&self) -> usize {
        self.0.len()
    }

    #[inline(always)]
    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], Truncated> {
        self.0.read(offset)
    }

    #[inline(always)]
    fn vlan_metadata(&self) -> u16 {
        self.0.vlan_metadata()
    }
}

impl Packet for Frame {
    #[inline(always)]
    fn head(&self) -> Option<(u16, Head)> {
        let start = self.0.pulled::<PAYLOAD>()?;
        // SAFETY: `pulled` checked the bounds, and the EtherType has an even address.
        unsafe {
            let ether_type = start.add(12).cast::<u16>().read();
            Some((ether_type, header(start.add(ethernet::HEADER_BYTES))))
        }
    }

    #[inline(always)]
    fn payload(&self) -> Option<[u8; 8]> {
        let start = self.0.pulled::<WITH_PAYLOAD>()?;
        // SAFETY: `pulled` checked the bounds.
        Some(unsafe { load_u64(start.add(PAYLOAD)) }.to_ne_bytes())
    }

    #[inline(always)]
    fn quoted(&self) -> Option<Head> {
        let start = self.0.pulled::<QUOTED_PAYLOAD>()?;
        // SAFETY: `pulled` checked the bounds.
        Some(unsafe { header(start.add(QUOTED)) })
    }

    #[inline(always)]
    fn set_addresses(&mut self, source: Words, destination: Words) -> bool {
        self.write_addresses::<ADDRESSES, PAYLOAD>(source, destination)
    }

    #[inline(always)]
    fn set_quoted_addresses(&mut self, source: Words, destination: Words) -> bool {
        self.write_addresses::<QUOTED_ADDRESSES, QUOTED_PAYLOAD>(source, destination)
    }

    #[inline(always)]
    fn set_destination_mac(&mut self, mac: Mac) -> bool {
        self.write_mac::<0>(mac)
    }

    #[inline(always)]
    fn set_source_mac(&mut self, mac: Mac) -> bool {
        self.write_mac::<6>(mac)
    }

    #[inline(always)]
    fn update_full_checksum(&mut self, next_header: u8, difference: u32) -> bool {
        // The checksum of a GSO frame is always partial, and its length may differ.
        if self.0.segment_bytes() != 0 {
            return false;
        }
        match next_header {
            TCP => self.update_full::<{ PAYLOAD + 18 }>(difference, false),
            udp::NEXT_HEADER => self.update_full::<{ PAYLOAD + 8 }>(difference, true),
            _ => false,
        }
    }

    #[inline(always)]
    fn update_checksum(&mut self, offset: usize, difference: u32, may_be_none: bool) -> bool {
        let mut flags = 0;
        if may_be_none {
            flags |= u64::from(BPF_F_MARK_MANGLED_0);
        }
        // With `CHECKSUM_COMPLETE`, the change of the checksum cancels the change of the addresses,
        // and `skb->csum` must stay.
        if !self.0.update_csum(0) {
            flags |= u64::from(BPF_F_PSEUDO_HDR);
        }
        // SAFETY: the pointer is the program's context.
        let result = unsafe {
            bpf_l4_csum_replace(self.0.as_ptr(), offset as u32, 0, difference.into(), flags)
        };
        result == 0
    }
}
