//! The headers of a packet where they lie, and map keys made of them, in few instructions.
//!
//! An address is two words of 8 bytes from the packet to the key. Keys that were written in smaller
//! pieces than the kernel's hash reads would cost more than the hash.

#![allow(unsafe_code, reason = "packets are reached through raw pointers")]

use core::mem::{offset_of, size_of};

use agent_ebpf::instruction::{self, copy, load_u32, load_u64, store_u32, store_u64};
use common::maps::{
    Address, ForwardKey, ManagedKey, RelayFlowKey, RelayKey, StreamKey, TranslationKey,
};
use common::wire::datagram::{Header, Rewrite};
use common::wire::{checksum, ipv6, udp};

/// An address as it lies in memory.
pub(crate) type Words = [u64; 2];

/// Ethernet, IPv6 and UDP header of a packet, or what is there in their place.
#[derive(Clone, Copy)]
pub(crate) struct Front(*mut Header);

/// A header on the stack, where words have to be aligned.
#[repr(C, align(8))]
pub(crate) struct Kept(pub(crate) Header);

impl Front {
    /// # Safety
    ///
    /// `start` points to so many live bytes of the packet, until a helper is called that changes
    /// packets, and nothing else refers to them.
    #[inline(always)]
    pub(crate) unsafe fn new(start: *mut u8) -> Self {
        Self(start.cast())
    }

    /// All fields.
    #[inline(always)]
    pub(crate) fn header(&self) -> &Header {
        // SAFETY: as `new` demands; Ethernet frames start at even addresses, and any bytes make a
        // header.
        unsafe { &*self.0 }
    }

    /// Overwrites all of it.
    #[inline(always)]
    pub(crate) fn set(self, kept: &Kept) {
        // SAFETY: as in `header`; the copy is aligned.
        unsafe {
            copy::<{ size_of::<Header>() }>((&raw const *kept).cast(), self.0.cast());
        }
    }

    #[inline(always)]
    pub(crate) fn source(self) -> Words {
        // SAFETY: as in `header`.
        unsafe { words(&raw const (*self.0).source) }
    }

    #[inline(always)]
    pub(crate) fn destination(self) -> Words {
        // SAFETY: as in `header`.
        unsafe { words(&raw const (*self.0).destination) }
    }

    /// Source port and destination port, each in host order, as they lie in a key.
    #[inline(always)]
    pub(crate) fn ports(self) -> u32 {
        // SAFETY: as in `header`; both ports are there.
        swap_ports(unsafe { load_u32((&raw const (*self.0).source_port).cast()) })
    }

    /// Whether the UDP checksum may be unfinished ([`checksum::may_be_unfinished`]).
    #[inline(always)]
    pub(crate) fn may_be_unfinished(self) -> bool {
        let header = self.header();
        let addresses = [self.source(), self.destination()];
        let checksum = header.checksum.into();
        checksum::may_be_unfinished(checksum, addresses, header.length, udp::NEXT_HEADER)
    }
}

impl Rewrite for Front {
    #[inline(always)]
    fn set_macs(&mut self, destination: [u8; 6], source: [u8; 6]) {
        let [d0, d1, d2, d3, d4, d5] = destination;
        let [s0, s1, s2, s3, s4, s5] = source;
        // SAFETY: as in `header`; the two addresses are next to each other.
        unsafe {
            let macs = self.0.cast::<u8>();
            store_u64(macs, u64::from_ne_bytes([d0, d1, d2, d3, d4, d5, s0, s1]));
            store_u32(macs.add(8), u32::from_ne_bytes([s2, s3, s4, s5]));
        }
    }

    #[inline(always)]
    fn set_hop_limit(&mut self, hop_limit: u8) {
        // SAFETY: as in `header`.
        unsafe { (*self.0).hop_limit = hop_limit }
    }

    #[inline(always)]
    fn set_addresses(&mut self, source: &Address, destination: &Address) {
        // SAFETY: as in `header`; the addresses that rules give are those of map values.
        unsafe {
            store(&raw mut (*self.0).source, source);
            store(&raw mut (*self.0).destination, destination);
        }
    }

    #[inline(always)]
    fn set_source(&mut self, source: &Address) {
        // SAFETY: as in `set_addresses`.
        unsafe { store(&raw mut (*self.0).source, source) }
    }

    #[inline(always)]
    fn set_destination(&mut self, destination: &Address) {
        // SAFETY: as in `set_addresses`.
        unsafe { store(&raw mut (*self.0).destination, destination) }
    }

    #[inline(always)]
    fn set_ports(&mut self, source: u16, destination: u16) {
        let [s0, s1] = source.to_be_bytes();
        let [d0, d1] = destination.to_be_bytes();
        // SAFETY: as in `header`; both ports are there.
        unsafe {
            store_u32(
                (&raw mut (*self.0).source_port).cast(),
                u32::from_ne_bytes([s0, s1, d0, d1]),
            );
        }
    }
}

/// Writes an address.
///
/// # Safety
///
/// The place is one of a packet, and the address is in a map value.
#[inline(always)]
unsafe fn store(place: *mut Address, address: &Address) {
    // SAFETY: as the caller says.
    unsafe {
        let [first, second] = words(address);
        store_u64(place.cast(), first);
        store_u64(place.cast::<u8>().add(8), second);
    }
}

/// Reads an address.
///
/// # Safety
///
/// It is in a packet or a map value.
#[inline(always)]
pub(crate) unsafe fn words(address: *const Address) -> Words {
    let bytes = address.cast::<u8>();
    // SAFETY: the caller's pointer is to 16 live bytes.
    unsafe { [load_u64(bytes), load_u64(bytes.add(8))] }
}

/// The same of an address that was read already.
#[inline(always)]
pub(crate) fn words_of(address: Address) -> Words {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address;
    [
        u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
        u64::from_ne_bytes([i, j, k, l, m, n, o, p]),
    ]
}

/// An address of its words.
#[inline(always)]
pub(crate) fn address([first, second]: Words) -> Address {
    let [a, b, c, d, e, f, g, h] = first.to_ne_bytes();
    let [i, j, k, l, m, n, o, p] = second.to_ne_bytes();
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

/// Two ports in host order as they lie in a key.
#[inline(always)]
pub(crate) fn ports_word(source: u16, destination: u16) -> u32 {
    let ([a, b], [c, d]) = (source.to_ne_bytes(), destination.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// Two ports, each of which changes between network and host order.
#[inline(always)]
fn swap_ports(ports: u32) -> u32 {
    if cfg!(target_endian = "little") {
        (ports & 0x00ff_00ff) << 8 | (ports >> 8) & 0x00ff_00ff
    } else {
        ports
    }
}

/// [`StreamKey`] in words.
#[repr(C)]
pub(crate) struct StreamWords {
    pub(crate) multicast_address: Words,
    pub(crate) source: Words,
    /// See [`Front::ports`].
    pub(crate) ports: u32,
    vlan: u32,
}

/// Flow key of a map value as words.
///
/// # Safety
///
/// It is in a map value.
#[inline(always)]
pub(crate) unsafe fn stream_words(stream: &StreamKey) -> [u64; 5] {
    // SAFETY: as the caller says; ports, VLAN and padding are 8 bytes.
    unsafe {
        let [a, b] = words(&raw const stream.multicast_address);
        let [c, d] = words(&raw const stream.source);
        [a, b, c, d, load_u64((&raw const stream.source_port).cast())]
    }
}

/// [`ManagedKey`] in words.
#[repr(C)]
pub(crate) struct ManagedWords {
    vlan: u32,
    multicast_address: [u32; 4],
}

/// [`RelayFlowKey`] in words, and 4 bytes that are not part of it.
#[repr(C)]
pub(crate) struct RelayFlowWords {
    pub(crate) relay_address: Words,
    /// See [`Front::ports`].
    pub(crate) ports: u32,
}

/// [`RelayKey`] in words.
#[repr(C)]
pub(crate) struct RelayWords {
    pub(crate) relay_address: Words,
    pub(crate) agent_address: Words,
}

/// [`ForwardKey`] in words, and 4 bytes that are not part of it.
#[repr(C)]
pub(crate) struct ForwardWords {
    address: Words,
    vlan: u32,
}

/// [`TranslationKey`] in words.
#[repr(C)]
pub(crate) struct TranslationWords {
    address: Words,
    ifindex: u32,
    vlan: u32,
}

const _: () = {
    assert!(offset_of!(TranslationKey, address) == 0);
    assert!(offset_of!(TranslationKey, ifindex) == offset_of!(TranslationWords, ifindex));
    assert!(offset_of!(TranslationKey, vlan) == offset_of!(TranslationWords, vlan));
    assert!(size_of::<TranslationKey>() == size_of::<TranslationWords>());
    assert!(offset_of!(ForwardKey, address) == 0);
    assert!(offset_of!(ForwardKey, vlan) == offset_of!(ForwardWords, vlan));
    assert!(size_of::<ForwardKey>() <= size_of::<ForwardWords>());
    assert!(offset_of!(StreamKey, multicast_address) == 0);
    assert!(offset_of!(StreamKey, source) == offset_of!(StreamWords, source));
    assert!(offset_of!(StreamKey, source_port) == offset_of!(StreamWords, ports));
    assert!(offset_of!(StreamKey, destination_port) == offset_of!(StreamWords, ports) + 2);
    assert!(offset_of!(StreamKey, vlan) == offset_of!(StreamWords, vlan));
    assert!(size_of::<StreamKey>() == size_of::<StreamWords>());
    assert!(offset_of!(ManagedKey, vlan) == 0);
    let address = offset_of!(ManagedWords, multicast_address);
    assert!(offset_of!(ManagedKey, multicast_address) == address);
    assert!(size_of::<ManagedKey>() == size_of::<ManagedWords>());
    assert!(offset_of!(RelayFlowKey, relay_address) == 0);
    assert!(offset_of!(RelayFlowKey, relay_port) == offset_of!(RelayFlowWords, ports));
    assert!(offset_of!(RelayFlowKey, agent_port) == offset_of!(RelayFlowWords, ports) + 2);
    assert!(size_of::<RelayFlowKey>() <= size_of::<RelayFlowWords>());
    assert!(offset_of!(RelayKey, relay_address) == 0);
    assert!(offset_of!(RelayKey, agent_address) == offset_of!(RelayWords, agent_address));
    assert!(size_of::<RelayKey>() == size_of::<RelayWords>());
};

impl StreamWords {
    /// Whether the source is of fe80::/10.
    #[inline(always)]
    pub(crate) fn is_from_link_local(&self) -> bool {
        let mut source = [0; 16];
        let (first, last) = source.split_at_mut(8);
        first.copy_from_slice(&self.source[0].to_ne_bytes());
        last.copy_from_slice(&self.source[1].to_ne_bytes());
        ipv6::is_link_local(&source)
    }

    #[inline(always)]
    pub(crate) fn new(multicast_address: Words, source: Words, ports: u32, vlan: u16) -> Self {
        Self {
            multicast_address,
            source,
            ports,
            vlan: vlan_word(vlan),
        }
    }

    #[inline(always)]
    pub(crate) fn key(&self) -> &StreamKey {
        // SAFETY: the layouts agree, as is asserted above.
        unsafe { &*(&raw const *self).cast() }
    }

    #[inline(always)]
    pub(crate) fn managed(&self) -> ManagedWords {
        ManagedWords::new(self.multicast_address, self.vlan)
    }

    #[inline(always)]
    pub(crate) fn words(&self) -> [u64; 5] {
        let ([a, b], [c, d]) = (self.multicast_address, self.source);
        let [e, f, g, h] = self.ports.to_ne_bytes();
        let [i, j, k, l] = self.vlan.to_ne_bytes();
        [a, b, c, d, u64::from_ne_bytes([e, f, g, h, i, j, k, l])]
    }
}

impl ManagedWords {
    /// The key that a flow is watched under.
    ///
    /// # Safety
    ///
    /// The flow's key is in a map value.
    #[inline(always)]
    pub(crate) unsafe fn of(stream: &StreamKey) -> Self {
        // SAFETY: as the caller says.
        Self::new(unsafe { words(&raw const stream.multicast_address) }, 0)
    }

    #[inline(always)]
    fn new(address: Words, vlan: u32) -> Self {
        let [first, second] = address.map(instruction::halves);
        let ([a, b], [c, d]) = (first, second);
        Self {
            vlan,
            multicast_address: [a, b, c, d],
        }
    }

    #[inline(always)]
    pub(crate) fn key(&self) -> &ManagedKey {
        // SAFETY: the layouts agree, as is asserted above.
        unsafe { &*(&raw const *self).cast() }
    }
}

impl RelayFlowWords {
    #[inline(always)]
    pub(crate) fn key(&self) -> &RelayFlowKey {
        // SAFETY: the layouts agree, as is asserted above.
        unsafe { &*(&raw const *self).cast() }
    }
}

impl RelayWords {
    #[inline(always)]
    pub(crate) fn key(&self) -> &RelayKey {
        // SAFETY: the layouts agree, as is asserted above.
        unsafe { &*(&raw const *self).cast() }
    }
}

impl ForwardWords {
    #[inline(always)]
    pub(crate) fn new(address: Words, vlan: u16) -> Self {
        Self {
            address,
            vlan: vlan_word(vlan),
        }
    }

    #[inline(always)]
    pub(crate) fn key(&self) -> &ForwardKey {
        // SAFETY: the layouts agree, as is asserted above.
        unsafe { &*(&raw const *self).cast() }
    }
}

impl TranslationWords {
    #[inline(always)]
    pub(crate) fn new(address: Words, ifindex: u32, vlan: u16) -> Self {
        Self {
            address,
            ifindex,
            vlan: vlan_word(vlan),
        }
    }

    #[inline(always)]
    pub(crate) fn key(&self) -> &TranslationKey {
        // SAFETY: the layouts agree, as is asserted above.
        unsafe { &*(&raw const *self).cast() }
    }
}

/// A VLAN identifier and the zero behind it.
#[inline(always)]
fn vlan_word(vlan: u16) -> u32 {
    let [a, b] = vlan.to_ne_bytes();
    u32::from_ne_bytes([a, b, 0, 0])
}
