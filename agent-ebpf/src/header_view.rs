//! A view of the packet headers, and map keys that the view fills in few instructions.
//!
//! An address stays two 8-byte words from the packet to the key. The kernel's hash reads wide words;
//! reading a key that the program has just written in smaller pieces would cost more than the hash.

#![allow(unsafe_code, reason = "packets are reached through raw pointers")]

use core::mem::{offset_of, size_of};

use agent_ebpf::instruction::{self, copy, load_u32, load_u64, store_u32, store_u64};
use common::maps::{
    Address, BridgeNumber, ForwardKey, ManagedKey, RelayFlowKey, RelayKey, StreamKey,
    TranslationKey,
};
use common::wire::datagram::{Header, Rewrite};
use common::wire::{checksum, ipv6, udp};

use crate::maps;

/// An IPv6 address as two words in memory order.
pub(crate) type Words = [u64; 2];

/// A view of the first bytes of a frame as Ethernet, IPv6 and UDP header. The caller checks which
/// headers the frame has.
#[derive(Clone, Copy)]
pub(crate) struct HeaderView(*mut Header);

/// A copy of the headers on the stack, aligned for 8-byte stores.
#[repr(C, align(8))]
pub(crate) struct HeaderCopy(pub(crate) Header);

impl HeaderView {
    /// # Safety
    ///
    /// `start` points to `size_of::<Header>()` live packet bytes that nothing else refers to. The view
    /// is valid until a call of a helper that changes the packet.
    #[inline(always)]
    pub(crate) unsafe fn new(start: *mut u8) -> Self {
        Self(start.cast())
    }

    #[inline(always)]
    pub(crate) fn header(&self) -> &Header {
        // SAFETY: `new` requires live bytes; Ethernet frames start at even addresses, and every
        // byte pattern is a valid `Header`.
        unsafe { &*self.0 }
    }

    /// Overwrites all three headers.
    #[inline(always)]
    pub(crate) fn set(self, headers: &HeaderCopy) {
        // SAFETY: as in `header`; `HeaderCopy` is aligned to 8 bytes.
        unsafe {
            copy::<{ size_of::<Header>() }>((&raw const *headers).cast(), self.0.cast());
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

    /// Source and destination port in host order, laid out as in a map key.
    #[inline(always)]
    pub(crate) fn ports(self) -> u32 {
        // SAFETY: as in `header`; both ports are there.
        swap_ports(unsafe { load_u32((&raw const (*self.0).source_port).cast()) })
    }

    /// Returns whether the UDP checksum may be partial ([`checksum::may_be_partial`]).
    #[inline(always)]
    pub(crate) fn may_be_partial(self) -> bool {
        let header = self.header();
        let addresses = [self.source(), self.destination()];
        let checksum = header.checksum.into();
        checksum::may_be_partial(checksum, addresses, header.length, udp::NEXT_HEADER)
    }
}

impl Rewrite for HeaderView {
    #[inline(always)]
    fn set_macs(&mut self, destination: [u8; 6], source: [u8; 6]) {
        let [d0, d1, d2, d3, d4, d5] = destination;
        let [s0, s1, s2, s3, s4, s5] = source;
        // SAFETY: as in `header`; the two MACs are adjacent.
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
        // SAFETY: as in `header`; callers pass addresses of map values.
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

/// Writes an address in two stores.
///
/// # Safety
///
/// `place` points into packet data, `address` into a map value.
#[inline(always)]
unsafe fn store(place: *mut Address, address: &Address) {
    // SAFETY: the caller guarantees both pointers.
    unsafe {
        let [first, second] = words(address);
        store_u64(place.cast(), first);
        store_u64(place.cast::<u8>().add(8), second);
    }
}

/// Reads an address in two loads.
///
/// # Safety
///
/// `address` points into packet data or a map value.
#[inline(always)]
pub(crate) unsafe fn words(address: *const Address) -> Words {
    let bytes = address.cast::<u8>();
    // SAFETY: the caller's pointer refers to 16 live bytes.
    unsafe { [load_u64(bytes), load_u64(bytes.add(8))] }
}

/// Converts an address on the stack to words.
#[inline(always)]
pub(crate) fn words_of(address: Address) -> Words {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = address;
    [
        u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
        u64::from_ne_bytes([i, j, k, l, m, n, o, p]),
    ]
}

/// Converts words to an address.
#[inline(always)]
pub(crate) fn address([first, second]: Words) -> Address {
    let [a, b, c, d, e, f, g, h] = first.to_ne_bytes();
    let [i, j, k, l, m, n, o, p] = second.to_ne_bytes();
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

/// Packs two ports of host order into the word that map keys use.
#[inline(always)]
pub(crate) fn ports_word(source: u16, destination: u16) -> u32 {
    let ([a, b], [c, d]) = (source.to_ne_bytes(), destination.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}

/// Converts both ports of a word between network and host order.
#[inline(always)]
fn swap_ports(ports: u32) -> u32 {
    if cfg!(target_endian = "little") {
        (ports & 0x00ff_00ff) << 8 | (ports >> 8) & 0x00ff_00ff
    } else {
        ports
    }
}

/// [`StreamKey`] as words: 40 bytes, align 8.
#[repr(C)]
pub(crate) struct StreamWords {
    pub(crate) multicast_address: Words,
    pub(crate) source: Words,
    /// See [`HeaderView::ports`].
    pub(crate) ports: u32,
    network: u32,
}

/// Reads a [`StreamKey`] of a map value as words.
///
/// # Safety
///
/// `stream` points into a map value.
#[inline(always)]
pub(crate) unsafe fn stream_words(stream: &StreamKey) -> [u64; 5] {
    // SAFETY: the caller guarantees the pointer; ports, VLAN and bridge are 8 bytes.
    unsafe {
        let [a, b] = words(&raw const stream.multicast_address);
        let [c, d] = words(&raw const stream.source);
        [a, b, c, d, load_u64((&raw const stream.source_port).cast())]
    }
}

/// [`ManagedKey`] as words: 20 bytes, align 4.
#[repr(C)]
pub(crate) struct ManagedWords {
    network: u32,
    multicast_address: [u32; 4],
}

/// [`RelayFlowKey`] as words, plus 4 bytes of padding that the key does not have.
#[repr(C)]
pub(crate) struct RelayFlowWords {
    pub(crate) relay_address: Words,
    /// See [`HeaderView::ports`].
    pub(crate) ports: u32,
}

/// [`RelayKey`] as words: 32 bytes, align 8.
#[repr(C)]
pub(crate) struct RelayWords {
    pub(crate) relay_address: Words,
    pub(crate) agent_address: Words,
}

/// [`ForwardKey`] as words, plus 4 bytes of padding that the key does not have.
#[repr(C)]
pub(crate) struct ForwardWords {
    address: Words,
    network: u32,
}

/// [`TranslationKey`] as words: 24 bytes, align 8.
#[repr(C)]
pub(crate) struct TranslationWords {
    address: Words,
    ifindex: u32,
    network: u32,
}

const _: () = {
    assert!(offset_of!(TranslationKey, address) == 0);
    assert!(offset_of!(TranslationKey, ifindex) == offset_of!(TranslationWords, ifindex));
    assert!(offset_of!(TranslationKey, vlan) == offset_of!(TranslationWords, network));
    assert!(offset_of!(TranslationKey, bridge) == offset_of!(TranslationWords, network) + 2);
    assert!(size_of::<TranslationKey>() == size_of::<TranslationWords>());
    assert!(offset_of!(ForwardKey, address) == 0);
    assert!(offset_of!(ForwardKey, vlan) == offset_of!(ForwardWords, network));
    assert!(offset_of!(ForwardKey, bridge) == offset_of!(ForwardWords, network) + 2);
    assert!(size_of::<ForwardKey>() <= size_of::<ForwardWords>());
    assert!(offset_of!(StreamKey, multicast_address) == 0);
    assert!(offset_of!(StreamKey, source) == offset_of!(StreamWords, source));
    assert!(offset_of!(StreamKey, source_port) == offset_of!(StreamWords, ports));
    assert!(offset_of!(StreamKey, destination_port) == offset_of!(StreamWords, ports) + 2);
    assert!(offset_of!(StreamKey, vlan) == offset_of!(StreamWords, network));
    assert!(offset_of!(StreamKey, bridge) == offset_of!(StreamWords, network) + 2);
    assert!(size_of::<StreamKey>() == size_of::<StreamWords>());
    assert!(offset_of!(ManagedKey, vlan) == 0);
    assert!(offset_of!(ManagedKey, bridge) == 2);
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
            network: network(vlan),
        }
    }

    #[inline(always)]
    pub(crate) fn key(&self) -> &StreamKey {
        // SAFETY: the assertions above prove equal layouts.
        unsafe { &*(&raw const *self).cast() }
    }

    #[inline(always)]
    pub(crate) fn managed(&self) -> ManagedWords {
        ManagedWords::new(self.multicast_address, self.network)
    }

    #[inline(always)]
    pub(crate) fn words(&self) -> [u64; 5] {
        let ([a, b], [c, d]) = (self.multicast_address, self.source);
        let [e, f, g, h] = self.ports.to_ne_bytes();
        let [i, j, k, l] = self.network.to_ne_bytes();
        [a, b, c, d, u64::from_ne_bytes([e, f, g, h, i, j, k, l])]
    }
}

impl ManagedWords {
    /// Builds the key of `MANAGED` for a flow.
    ///
    /// # Safety
    ///
    /// `stream` points into a map value.
    #[inline(always)]
    pub(crate) unsafe fn of(stream: &StreamKey) -> Self {
        // SAFETY: the caller guarantees the pointer; VLAN and bridge are 4 bytes.
        unsafe {
            Self::new(
                words(&raw const stream.multicast_address),
                load_u32((&raw const stream.vlan).cast()),
            )
        }
    }

    #[inline(always)]
    fn new(address: Words, network: u32) -> Self {
        let [first, second] = address.map(instruction::halves);
        let ([a, b], [c, d]) = (first, second);
        Self {
            network,
            multicast_address: [a, b, c, d],
        }
    }

    #[inline(always)]
    pub(crate) fn key(&self) -> &ManagedKey {
        // SAFETY: the assertions above prove equal layouts.
        unsafe { &*(&raw const *self).cast() }
    }
}

impl RelayFlowWords {
    #[inline(always)]
    pub(crate) fn key(&self) -> &RelayFlowKey {
        // SAFETY: the assertions above prove equal layouts.
        unsafe { &*(&raw const *self).cast() }
    }
}

impl RelayWords {
    #[inline(always)]
    pub(crate) fn key(&self) -> &RelayKey {
        // SAFETY: the assertions above prove equal layouts.
        unsafe { &*(&raw const *self).cast() }
    }
}

impl ForwardWords {
    #[inline(always)]
    pub(crate) fn new(address: Words, vlan: u16) -> Self {
        Self {
            address,
            network: network(vlan),
        }
    }

    #[inline(always)]
    pub(crate) fn key(&self) -> &ForwardKey {
        // SAFETY: the assertions above prove equal layouts.
        unsafe { &*(&raw const *self).cast() }
    }
}

impl TranslationWords {
    #[inline(always)]
    pub(crate) fn new(address: Words, ifindex: u32, vlan: u16) -> Self {
        Self {
            address,
            ifindex,
            network: network(vlan),
        }
    }

    #[inline(always)]
    pub(crate) fn key(&self) -> &TranslationKey {
        // SAFETY: the assertions above prove equal layouts.
        unsafe { &*(&raw const *self).cast() }
    }
}

/// Packs a VLAN identifier and the number of the program's bridge into the word that map keys use.
#[inline(always)]
fn network(vlan: u16) -> u32 {
    let BridgeNumber(bridge) = maps::bridge();
    let ([a, b], [c, d]) = (vlan.to_ne_bytes(), bridge.to_ne_bytes());
    u32::from_ne_bytes([a, b, c, d])
}
