//! Builds MLD frames byte by byte, valid and broken ones. The builder shares no code with the
//! parsers under test.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "what fails here is the test that asked for it"
)]

use std::net::Ipv6Addr;
use std::{vec, vec::Vec};

/// Ethernet source of every frame.
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x2a];

/// Hop-by-Hop Options with Router Alert of value 0 (MLD, RFC 2711), then PadN.
const ROUTER_ALERT: [u8; 6] = [5, 2, 0, 0, 1, 0];

/// Parses an IPv6 address.
pub fn address(text: &str) -> [u8; 16] {
    text.parse::<Ipv6Addr>()
        .unwrap_or_else(|_| panic!("{text} is not an address"))
        .octets()
}

/// Builds one address record.
pub fn record(kind: u8, multicast_address: &str, sources: &[&str]) -> Vec<u8> {
    let mut bytes = vec![kind, 0];
    bytes.extend((sources.len() as u16).to_be_bytes());
    bytes.extend(address(multicast_address));
    for source in sources {
        bytes.extend(address(source));
    }
    bytes
}

/// Description of a frame; the defaults make a valid one.
#[derive(Clone, Debug)]
pub struct Frame {
    /// VLAN identifier of a tag in the frame; `None` for an untagged frame.
    pub vlan: Option<u16>,
    /// IPv6 source address.
    pub source: [u8; 16],
    /// IPv6 destination address.
    pub destination: [u8; 16],
    /// Hop limit of the IPv6 header.
    pub hop_limit: u8,
    /// Options of the Hop-by-Hop header; together with its first two bytes a multiple of 8. `None`
    /// omits the header.
    pub options: Option<Vec<u8>>,
    /// Further extension headers: next header value, and all bytes after the first one.
    pub headers: Vec<(u8, Vec<u8>)>,
    /// Next header value of the body.
    pub protocol: u8,
    /// Body of the packet, an ICMPv6 message unless `protocol` differs.
    pub body: Vec<u8>,
    /// Whether the builder fills in the checksum.
    pub checksum: bool,
}

impl Frame {
    /// Returns a frame with an ICMPv6 message.
    pub fn icmpv6(body: Vec<u8>, destination: &str) -> Self {
        Self {
            vlan: None,
            source: address("fe80::2a"),
            destination: address(destination),
            hop_limit: 1,
            options: Some(ROUTER_ALERT.to_vec()),
            headers: Vec::new(),
            protocol: 58,
            body,
            checksum: true,
        }
    }

    /// Returns an MLDv2 Report with these records.
    pub fn report(records: &[Vec<u8>]) -> Self {
        let mut body = vec![143, 0, 0, 0, 0, 0];
        body.extend((records.len() as u16).to_be_bytes());
        for record in records {
            body.extend(record);
        }
        Self::icmpv6(body, "ff02::16")
    }

    /// Returns an MLDv1 Report (131) or Done (132).
    pub fn v1(kind: u8, multicast_address: &str) -> Self {
        let mut body = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        body.extend(address(multicast_address));
        let destination = if kind == 132 {
            "ff02::2"
        } else {
            multicast_address
        };
        Self::icmpv6(body, destination)
    }

    /// Returns a Query; `v2` holds the byte with S and QRV, and QQIC.
    pub fn query(multicast_address: &str, max_resp_code: u16, v2: Option<(u8, u8)>) -> Self {
        let mut body = vec![130, 0, 0, 0];
        body.extend(max_resp_code.to_be_bytes());
        body.extend([0, 0]);
        body.extend(address(multicast_address));
        if let Some((flags, qqic)) = v2 {
            body.extend([flags, qqic, 0, 0]);
        }
        Self::icmpv6(body, "ff02::1")
    }

    /// Returns a UDP datagram without checksum, because only a receiver verifies the checksum.
    pub fn udp(source: &str, destination: &str, ports: (u16, u16), payload: &[u8]) -> Self {
        let mut body = Vec::new();
        body.extend(ports.0.to_be_bytes());
        body.extend(ports.1.to_be_bytes());
        body.extend((8 + payload.len() as u16).to_be_bytes());
        body.extend([0, 0]);
        body.extend(payload);
        Self {
            source: address(source),
            options: None,
            protocol: 17,
            checksum: false,
            hop_limit: 64,
            ..Self::icmpv6(body, destination)
        }
    }

    /// Changes the description in place, for a variant of the frame.
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Returns the frame's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut body = self.body.clone();
        if self.checksum {
            let sum = self.sum(&body);
            let at = if self.protocol == 17 { 6 } else { 2 };
            body.splice(at..at + 2, (!sum).to_be_bytes());
        }
        let mut first = self.protocol;
        let mut extensions = Vec::new();
        for (value, bytes) in self.headers.iter().rev() {
            let mut header = vec![first];
            header.extend(bytes);
            header.extend(&extensions);
            extensions = header;
            first = *value;
        }
        if let Some(options) = &self.options {
            let mut header = vec![first, ((options.len() + 2) / 8).saturating_sub(1) as u8];
            header.extend(options);
            header.extend(&extensions);
            extensions = header;
            first = 0;
        }
        let mut frame = vec![0x33, 0x33];
        frame.extend(&self.destination[12..]);
        frame.extend(MAC);
        if let Some(vlan) = self.vlan {
            frame.extend([0x81, 0]);
            frame.extend(vlan.to_be_bytes());
        }
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend(((extensions.len() + body.len()) as u16).to_be_bytes());
        frame.extend([first, self.hop_limit]);
        frame.extend(self.source);
        frame.extend(self.destination);
        frame.extend(extensions);
        frame.extend(body);
        frame
    }

    fn sum(&self, body: &[u8]) -> u16 {
        let mut bytes = Vec::new();
        bytes.extend(self.source);
        bytes.extend(self.destination);
        bytes.extend((body.len() as u32).to_be_bytes());
        bytes.extend([0, 0, 0, self.protocol]);
        bytes.extend(body);
        let mut sum = 0_u64;
        for pair in bytes.chunks(2) {
            sum += u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }
}
