//! MLD messages captured with AF_PACKET and parsed by etherparse instead of Roamcast's own parser.

use std::io::Read;
use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use etherparse::{NetSlice, SlicedPacket};
use socket2::{Domain, Protocol, Socket, Type};

use super::netns::{DEADLINE, Namespace};

/// An address record of an MLDv2 Report (RFC 9777 §5.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Record type, from 1 MODE_IS_INCLUDE to 6 BLOCK_OLD_SOURCES.
    pub kind: u8,
    /// Address that the record is about.
    pub multicast_address: Ipv6Addr,
    /// Listed source addresses.
    pub sources: Vec<Ipv6Addr>,
}

/// An MLD message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mld {
    /// MLDv2 Report with its records.
    Report(Vec<Record>),
    /// Query of any version, for an address or for `::` (General Query).
    Query(Ipv6Addr),
}

/// A capture on all interfaces of a namespace.
pub struct Capture(Socket);

impl Capture {
    /// Captures in a namespace from now on.
    pub fn start(namespace: &Namespace) -> Self {
        namespace.run(|| {
            let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(protocol)))
                .expect("AF_PACKET socket");
            socket
                .set_read_timeout(Some(Duration::from_millis(100)))
                .expect("timeout");
            Self(socket)
        })
    }

    /// Waits for a Report that satisfies a condition.
    pub fn report(&mut self, what: &str, wanted: impl Fn(&[Record]) -> bool) -> Vec<Record> {
        let deadline = lab::wait::end_after(DEADLINE);
        let mut seen = Vec::new();
        while Instant::now() < deadline {
            if let Some(Mld::Report(records)) = self.message() {
                if wanted(&records) {
                    return records;
                }
                seen.push(records);
            }
        }
        panic!("no such Report: {what}; seen {seen:?}");
    }

    /// Returns the next MLD message, or `None` after the read timeout.
    pub fn message(&mut self) -> Option<Mld> {
        let mut frame = [0; 2048];
        let length = self.0.read(&mut frame).ok()?;
        parse(&frame[..length])
    }

    /// Returns all MLD messages that have arrived.
    pub fn drain(&mut self) -> Vec<Mld> {
        let mut messages = Vec::new();
        let mut frame = [0; 2048];
        while let Ok(length) = self.0.read(&mut frame) {
            messages.extend(parse(&frame[..length]));
        }
        messages
    }
}

fn parse(frame: &[u8]) -> Option<Mld> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let Some(NetSlice::Ipv6(ip)) = packet.net else {
        return None;
    };
    let body = ip.payload().payload;
    let address = |offset: usize| -> Ipv6Addr {
        let bytes: [u8; 16] = body[offset..offset + 16].try_into().unwrap();
        Ipv6Addr::from(bytes)
    };
    match body.first()? {
        130 => {
            assert_eq!(ip.header().hop_limit(), 1, "hop limit of a Query");
            Some(Mld::Query(address(8)))
        }
        143 => {
            assert_eq!(ip.header().hop_limit(), 1, "hop limit of a Report");
            let count = u16::from_be_bytes([body[6], body[7]]);
            let mut offset = 8;
            let mut records = Vec::new();
            for _ in 0..count {
                let sources = usize::from(u16::from_be_bytes([body[offset + 2], body[offset + 3]]));
                records.push(Record {
                    kind: body[offset],
                    multicast_address: address(offset + 4),
                    sources: (0..sources)
                        .map(|i| address(offset + 20 + 16 * i))
                        .collect(),
                });
                offset += 20 + 16 * sources + 4 * usize::from(body[offset + 1]);
            }
            Some(Mld::Report(records))
        }
        _ => None,
    }
}
