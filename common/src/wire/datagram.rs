//! Ethernet, IPv6 and UDP header of a datagram without VLAN tag and extension headers, as one
//! structure.
//!
//! The kernel programs access the structure in the packet, so its layout is the wire format.

use crate::maps::Address;
use crate::packet::{PacketRead, Truncated};

use super::ethernet;

/// Length of the three headers, bytes.
pub const HEADER_BYTES: usize = 62;
/// Offset of the UDP checksum in the frame, bytes.
pub const CHECKSUM_OFFSET: usize = 60;
/// Length of the Ethernet and IPv6 header, bytes.
const UDP_OFFSET: usize = 54;
/// Length of the UDP header, bytes.
pub const UDP_HEADER_BYTES: u16 = 8;

/// The three headers: 62 bytes, align 2. All numbers are in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Ethernet destination.
    pub destination_mac: [u8; 6],
    /// Ethernet source.
    pub source_mac: [u8; 6],
    /// EtherType.
    pub ether_type: u16,
    /// IPv6 version, traffic class and flow label.
    pub version: [u16; 2],
    /// Length of the packet after the IPv6 header, bytes.
    pub payload_length: u16,
    /// Type of the header after the IPv6 header.
    pub next_header: u8,
    /// IPv6 hop limit; routers decrement it.
    pub hop_limit: u8,
    /// IPv6 source.
    pub source: Address,
    /// IPv6 destination.
    pub destination: Address,
    /// UDP source port.
    pub source_port: u16,
    /// UDP destination port.
    pub destination_port: u16,
    /// Length of UDP header and payload, bytes.
    pub length: u16,
    /// UDP checksum.
    pub checksum: u16,
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES && align_of::<Header>() == 2);

impl Header {
    /// Whether the frame is untagged Ethernet with an IPv6 header.
    #[inline(always)]
    pub fn is_ipv6(&self) -> bool {
        let [first, _] = self.version;
        self.ether_type == ethernet::IPV6.to_be() && u16::from_be(first) >> 12 == 6
    }

    /// Whether the frame is untagged Ethernet with an IPv6 packet that ends within the first `bytes`
    /// bytes. A jumbogram (RFC 2675 §3), whose length is not in the header, is not.
    #[inline(always)]
    pub fn is_ipv6_within(&self, bytes: usize) -> bool {
        self.is_ipv6() && self.payload_length != 0 && self.ends_within(bytes)
    }

    /// Whether the datagram is whole in a frame of `frame_bytes` bytes: the lengths of IPv6 and UDP
    /// agree, and the datagram has a checksum, which IPv6 requires (RFC 8200 §8.1).
    #[inline(always)]
    pub fn is_whole(&self, frame_bytes: usize) -> bool {
        let length = u16::from_be(self.length);
        self.payload_length == self.length
            && length >= UDP_HEADER_BYTES
            && self.ends_within(frame_bytes)
            && self.checksum != 0
    }

    /// Whether the packet ends within the first `bytes` bytes of the frame by its IPv6 header.
    #[inline(always)]
    fn ends_within(&self, bytes: usize) -> bool {
        UDP_OFFSET + usize::from(u16::from_be(self.payload_length)) <= bytes
    }

    /// Whether the UDP length is valid: 8 bytes or more.
    #[inline(always)]
    pub fn has_payload(&self) -> bool {
        u16::from_be(self.length) >= UDP_HEADER_BYTES
    }

    /// Reads the first 62 bytes of a packet as headers, without a check of the types.
    ///
    /// # Errors
    ///
    /// [`Truncated`] when the packet has fewer than 62 bytes.
    pub fn read<P: PacketRead + ?Sized>(packet: &P) -> Result<Self, Truncated> {
        let word = |offset| packet.read::<2>(offset).map(u16::from_ne_bytes);
        let [next_header, hop_limit] = packet.read(20)?;
        Ok(Self {
            destination_mac: packet.read(0)?,
            source_mac: packet.read(6)?,
            ether_type: word(12)?,
            version: [word(14)?, word(16)?],
            payload_length: word(18)?,
            next_header,
            hop_limit,
            source: packet.read(14 + 8)?,
            destination: packet.read(14 + 24)?,
            source_port: word(UDP_OFFSET)?,
            destination_port: word(UDP_OFFSET + 2)?,
            length: word(UDP_OFFSET + 4)?,
            checksum: word(CHECKSUM_OFFSET)?,
        })
    }

    /// Encodes the headers for the wire.
    pub fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let [version, label] = self.version;
        let mut rest = &mut bytes[..];
        for field in [
            &self.destination_mac[..],
            &self.source_mac,
            &self.ether_type.to_ne_bytes(),
            &version.to_ne_bytes(),
            &label.to_ne_bytes(),
            &self.payload_length.to_ne_bytes(),
            &[self.next_header, self.hop_limit],
            &self.source,
            &self.destination,
            &self.source_port.to_ne_bytes(),
            &self.destination_port.to_ne_bytes(),
            &self.length.to_ne_bytes(),
            &self.checksum.to_ne_bytes(),
        ] {
            let Some((place, after)) = rest.split_at_mut_checked(field.len()) else {
                break;
            };
            place.copy_from_slice(field);
            rest = after;
        }
        bytes
    }
}

/// Write access of a rewrite to the headers. The rules use this trait, so the tests run the same
/// rule over bytes that the kernel programs run over a few stores.
pub trait Rewrite {
    /// Sets both Ethernet addresses.
    fn set_macs(&mut self, destination: [u8; 6], source: [u8; 6]);
    /// Overwrites the hop limit, without a checksum update.
    fn set_hop_limit(&mut self, hop_limit: u8);
    /// Sets both IPv6 addresses.
    fn set_addresses(&mut self, source: &Address, destination: &Address);
    /// Sets the IPv6 source.
    fn set_source(&mut self, source: &Address);
    /// Sets the IPv6 destination.
    fn set_destination(&mut self, destination: &Address);
    /// Sets both UDP ports, in host order.
    fn set_ports(&mut self, source: u16, destination: u16);
}

impl Rewrite for Header {
    fn set_macs(&mut self, destination: [u8; 6], source: [u8; 6]) {
        self.destination_mac = destination;
        self.source_mac = source;
    }

    fn set_hop_limit(&mut self, hop_limit: u8) {
        self.hop_limit = hop_limit;
    }

    fn set_addresses(&mut self, source: &Address, destination: &Address) {
        self.source = *source;
        self.destination = *destination;
    }

    fn set_source(&mut self, source: &Address) {
        self.source = *source;
    }

    fn set_destination(&mut self, destination: &Address) {
        self.destination = *destination;
    }

    fn set_ports(&mut self, source: u16, destination: u16) {
        self.source_port = source.to_be();
        self.destination_port = destination.to_be();
    }
}
