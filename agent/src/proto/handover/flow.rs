//! Flow of a frame and position of its payload, by the rules of `gate`.

use common::handover;
use common::maps::StreamKey;
use common::packet::{PacketRead, Truncated};
use common::wire::{ethernet, ipv6};

/// Length of a UDP header (RFC 768), bytes.
pub(super) const UDP_HEADER_BYTES: usize = 8;

/// Flow and payload of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Addresses, ports and VLAN of the packet.
    pub stream: StreamKey,
    /// Whether UDP directly follows the IPv6 header. Any other packet has no ports, and its payload is
    /// everything after the IPv6 header.
    pub is_udp: bool,
    /// Offset of the IPv6 header, bytes.
    pub network: usize,
    /// Offset of the payload, bytes.
    pub payload: usize,
    /// Length of the payload, bytes.
    pub length: u16,
}

/// Parses the headers of a frame by the rules of `gate` ([`common::handover::packet`]). `vlan` is the
/// VLAN identifier from the metadata instead of the frame, 0 for none. Returns `None` for frames that
/// `gate` ignores, and for frames shorter than their headers say.
pub fn flow_of(frame: &[u8], vlan: u16) -> Option<Flow> {
    let tagged = Tagged { frame, vlan };
    let packet = handover::packet(&tagged)?;
    let network = ethernet::parse(&tagged).ok()?.payload;
    let header = ipv6::parse(&tagged, network).ok()?;
    let transport = network + ipv6::HEADER_BYTES;
    if transport + usize::from(header.payload_length) > frame.len() {
        return None;
    }
    let payload = packet.payload;
    Some(Flow {
        stream: packet.stream,
        is_udp: payload.offset == transport + UDP_HEADER_BYTES,
        network,
        payload: payload.offset,
        length: payload.length,
    })
}

/// A frame whose VLAN tag is in the metadata.
struct Tagged<'a> {
    frame: &'a [u8],
    vlan: u16,
}

impl PacketRead for Tagged<'_> {
    fn len(&self) -> usize {
        self.frame.len()
    }

    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], Truncated> {
        self.frame.read(offset)
    }

    fn vlan_metadata(&self) -> u16 {
        self.vlan
    }
}
