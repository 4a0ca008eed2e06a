//! Parser for the flow of a traced frame, from the bytes in a record.

use super::{Decision, FRAME_BYTES, Flow, Program, Record};
use crate::maps::{NO_BRIDGE, StreamKey};
use crate::packet::{PacketRead, Truncated};
use crate::wire::{mld, udp};

/// IPv6 next header value of TCP, whose ports have the same offsets as UDP's.
const TCP: u8 = 6;

/// The start of a frame in a record.
struct Head<'a>(&'a Record);

impl PacketRead for Head<'_> {
    fn len(&self) -> usize {
        self.0.length as usize
    }

    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], Truncated> {
        let copied = self.0.frame.get(..self.0.copied.into());
        copied.ok_or(Truncated)?.read(offset)
    }

    fn vlan_metadata(&self) -> u16 {
        self.0.vlan
    }
}

impl Record {
    /// A record of the agent's decision about a frame.
    pub fn by_agent(
        at_ns: u64,
        ifindex: u32,
        decision: Decision,
        number: u64,
        frame: &[u8],
    ) -> Self {
        let mut start = [0; FRAME_BYTES];
        let copied = frame.len().min(FRAME_BYTES);
        for (to, from) in start.iter_mut().zip(frame) {
            *to = *from;
        }
        Self {
            at_ns,
            number,
            ifindex,
            length: u32::try_from(frame.len()).unwrap_or(u32::MAX),
            program: Program::Agent as u8,
            decision: decision as u8,
            reason: 0,
            vlan: 0,
            copied: copied as u16,
            stream: StreamKey {
                multicast_address: [0; 16],
                source: [0; 16],
                source_port: 0,
                destination_port: 0,
                vlan: 0,
                bridge: NO_BRIDGE,
            },
            frame: start,
        }
    }

    /// Returns addresses and ports of the flow; `None` for a frame that is not IPv6.
    pub fn flow(&self) -> Option<Flow> {
        if self.stream.multicast_address != [0; 16] {
            let stream = &self.stream;
            return Some(Flow {
                source: stream.source,
                destination: stream.multicast_address,
                source_port: stream.source_port,
                destination_port: stream.destination_port,
                vlan: stream.vlan,
            });
        }
        let head = Head(self);
        let frame = mld::ipv6_frame(&head)?;
        let ports = match frame.header.next_header {
            udp::NEXT_HEADER | TCP => udp::parse(&head, frame.payload).ok(),
            _ => None,
        };
        Some(Flow {
            source: frame.header.source,
            destination: frame.header.destination,
            source_port: ports.map_or(0, |ports| ports.source),
            destination_port: ports.map_or(0, |ports| ports.destination),
            vlan: frame.vlan,
        })
    }
}
