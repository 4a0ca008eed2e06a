//! Which flow a frame is of, and where its payload is, as `gate` sees it.

use common::maps::StreamKey;
use common::packet::{PacketRead, Truncated};
use common::wire::{ethernet, ipv6, udp};

/// Length of a UDP header, bytes.
pub(super) const UDP_HEADER_BYTES: usize = 8;

/// What is known of a frame's packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Its flow.
    pub stream: StreamKey,
    /// Whether UDP follows the IPv6 header at once. Any other packet has no ports, and its payload
    /// is all that follows.
    pub is_udp: bool,
    /// Where the IPv6 header starts, bytes.
    pub network: usize,
    /// Where the payload starts, bytes.
    pub payload: usize,
    /// Length of the payload, bytes.
    pub length: u16,
}

/// Reads the headers of a frame; `vlan` is the VLAN identifier that stands in metadata instead of
/// the frame, 0 for none. `None` for what is not IPv6, or ends before its headers say.
pub fn flow_of(frame: &[u8], vlan: u16) -> Option<Flow> {
    let packet = Tagged { frame, vlan };
    let ethernet = ethernet::parse(&packet).ok()?;
    if ethernet.ether_type != ethernet::IPV6 {
        return None;
    }
    let header = ipv6::parse(&packet, ethernet.payload).ok()?;
    let transport = ethernet.payload + ipv6::HEADER_BYTES;
    let end = transport + usize::from(header.payload_length);
    if end > frame.len() {
        return None;
    }
    let ports = (header.next_header == udp::NEXT_HEADER)
        .then(|| udp::parse(&packet, transport).ok())
        .flatten()
        .filter(|_| usize::from(header.payload_length) >= UDP_HEADER_BYTES);
    let is_udp = ports.is_some();
    let payload = transport + if is_udp { UDP_HEADER_BYTES } else { 0 };
    Some(Flow {
        stream: StreamKey {
            multicast_address: header.destination,
            source: header.source,
            source_port: ports.map_or(0, |ports| ports.source),
            destination_port: ports.map_or(0, |ports| ports.destination),
            vlan: ethernet.vlan,
            pad: 0,
        },
        is_udp,
        network: ethernet.payload,
        payload,
        length: u16::try_from(end.saturating_sub(payload)).ok()?,
    })
}

/// A frame whose tag the network card has taken out.
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
