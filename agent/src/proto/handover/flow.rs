//! Which flow a frame is of, and where its payload is, as `gate` sees it.

use common::handover;
use common::maps::StreamKey;
use common::packet::{PacketRead, Truncated};
use common::wire::{ethernet, ipv6};

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

/// Reads the headers of a frame by the rules of `gate` ([`common::handover::packet`]); `vlan` is the
/// VLAN identifier that stands in metadata instead of the frame, 0 for none. `None` for what `gate`
/// leaves alone, and for what ends before its headers say.
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
