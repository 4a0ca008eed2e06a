//! Relayed flows and their frames, built by etherparse, which shares no code with the programs.

use std::net::Ipv6Addr;

use common::maps::{
    BridgeNumber, RelayFlow, RelayFlowEntry, RelayFlowKey, RelayKey, StreamKey, StreamUsage,
    Subscriber,
};
use common::relay::{self, Endpoints};
use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};

/// Ethernet source of incoming frames.
pub const ROUTER_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
/// Ethernet destination of incoming frames for one interface.
pub const HOST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];

/// A flow with its relayed form.
#[derive(Clone, Copy, Debug)]
pub struct Relayed {
    /// Addresses and ports of the multicast flow.
    pub stream: StreamKey,
    /// Addresses and ports of the relayed flow.
    pub endpoints: Endpoints,
}

impl Relayed {
    /// Makes a flow from its addresses and ports. Of the possible relayed port pairs, the first
    /// that fits the checksum is used.
    pub fn new(
        (source, source_port): (Ipv6Addr, u16),
        (multicast_address, destination_port): (Ipv6Addr, u16),
        relay_address: Ipv6Addr,
        agent_address: Ipv6Addr,
    ) -> Self {
        let stream = StreamKey {
            multicast_address: multicast_address.octets(),
            source: source.octets(),
            source_port,
            destination_port,
            vlan: 0,
            bridge: BridgeNumber::FIRST,
        };
        let (relay_address, agent_address) = (relay_address.octets(), agent_address.octets());
        let (relay_port, agent_port) = relay::port_pairs(&stream, &relay_address, &agent_address)
            .next()
            .unwrap();
        Self {
            stream,
            endpoints: Endpoints {
                relay_address,
                relay_port,
                agent_address,
                agent_port,
            },
        }
    }

    /// Returns the flow that most tests use.
    pub fn usual() -> Self {
        let address = |text: &str| text.parse().unwrap();
        Self::new(
            (address("2001:db8:5::1"), 5000),
            (address("ff3e::1234"), 5004),
            address("2001:db8:7::1"),
            address("2001:db8:9::1"),
        )
    }

    /// Returns the key in `RELAY_FLOWS`.
    pub fn flow_key(&self) -> RelayFlowKey {
        RelayFlowKey {
            relay_address: self.endpoints.relay_address,
            relay_port: self.endpoints.relay_port,
            agent_port: self.endpoints.agent_port,
        }
    }

    /// Returns the value in `RELAY_FLOWS` of a flow without packets.
    pub fn entry(&self) -> RelayFlowEntry {
        RelayFlowEntry {
            flow: self.flow(),
            usage: StreamUsage::default(),
        }
    }

    /// Returns the flow as the agent enters it.
    pub fn flow(&self) -> RelayFlow {
        let address_difference = relay::to_multicast(&self.stream, &self.endpoints);
        RelayFlow {
            session: 7,
            stream: self.stream,
            agent_address: self.endpoints.agent_address,
            address_difference,
            pad: 0,
        }
    }

    /// Returns the key of the relay's pair of hosts.
    pub fn relay_key(&self) -> RelayKey {
        RelayKey {
            relay_address: self.endpoints.relay_address,
            agent_address: self.endpoints.agent_address,
        }
    }

    /// Returns the subscriber as the relay enters it.
    pub fn subscriber(&self, lease_end_ns: u64) -> Subscriber {
        let address_difference = relay::to_agent(&self.stream, &self.endpoints);
        Subscriber {
            lease_end_ns,
            relay_address: self.endpoints.relay_address,
            agent_address: self.endpoints.agent_address,
            relay_port: self.endpoints.relay_port,
            agent_port: self.endpoints.agent_port,
            address_difference,
        }
    }

    /// Returns a packet of the stream as multicast.
    pub fn native(&self, payload: &[u8]) -> Vec<u8> {
        self.multicast(ROUTER_MAC, 9, payload)
    }

    /// Returns the packet that the agent must restore from the datagram.
    pub fn restored(&self, payload: &[u8]) -> Vec<u8> {
        self.multicast(*b"\x02rcast", 1, payload)
    }

    fn multicast(&self, source_mac: [u8; 6], hop_limit: u8, payload: &[u8]) -> Vec<u8> {
        let stream = &self.stream;
        let mut mac = [0x33; 6];
        mac[2..].copy_from_slice(&stream.multicast_address[12..]);
        frame(
            (source_mac, stream.source, stream.source_port),
            (mac, stream.multicast_address, stream.destination_port),
            hop_limit,
            payload,
        )
    }

    /// Returns the packet as the relay sends it.
    pub fn datagram(&self, payload: &[u8]) -> Vec<u8> {
        let endpoints = &self.endpoints;
        frame(
            (ROUTER_MAC, endpoints.relay_address, endpoints.relay_port),
            (HOST_MAC, endpoints.agent_address, endpoints.agent_port),
            61,
            payload,
        )
    }
}

fn frame(
    (source_mac, source, source_port): ([u8; 6], [u8; 16], u16),
    (destination_mac, destination, destination_port): ([u8; 6], [u8; 16], u16),
    hop_limit: u8,
    payload: &[u8],
) -> Vec<u8> {
    let builder = PacketBuilder::ethernet2(source_mac, destination_mac)
        .ipv6(source, destination, hop_limit)
        .udp(source_port, destination_port);
    let mut frame = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut frame, payload).unwrap();
    frame
}

/// Returns true if etherparse finds the UDP checksum of a frame correct.
pub fn checksum_is_right(frame: &[u8]) -> bool {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let (Some(NetSlice::Ipv6(ip)), Some(TransportSlice::Udp(udp))) = (packet.net, packet.transport)
    else {
        panic!("not UDP over IPv6: {frame:02x?}");
    };
    let header = udp.to_header();
    let right = header.calc_checksum_ipv6(&ip.header().to_header(), udp.payload());
    right.unwrap() == header.checksum
}
