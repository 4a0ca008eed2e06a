//! Tests of the handover.

mod clock;
mod cuts;
mod exactly_once;
mod frames;
mod hold;
mod paths;
mod placement;
mod random;
mod records;
mod tap;
mod unread;

use std::time::Duration;

use common::maps::{Delivered, StreamKey};

use super::{Cut, HoldLimits, Reading};
use crate::proto::Timestamp;

const MS: Duration = Duration::from_millis(1);
const LIMITS: HoldLimits = HoldLimits {
    bytes: 1_000_000,
    age: Duration::from_secs(5),
};

/// What was counted of flows, read in no time.
fn read(flows: &[(StreamKey, Delivered)], at: Timestamp) -> Vec<(StreamKey, Vec<Reading>)> {
    let reading = |delivered: &Delivered| Reading {
        from: at,
        packets: delivered.packets,
        until: at,
    };
    let flows = flows.iter();
    flows
        .map(|(stream, delivered)| (*stream, vec![reading(delivered)]))
        .collect()
}

fn count(number: u64) -> Cut {
    Cut::Number {
        number,
        overflow: false,
    }
}

/// One's complement sum by 16-bit words, as RFC 1071 §1 has it.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// A flow by its number.
fn stream(number: u16) -> StreamKey {
    let mut multicast_address = [0; 16];
    multicast_address[..2].copy_from_slice(&[0xff, 0x15]);
    multicast_address[14..].copy_from_slice(&number.to_be_bytes());
    StreamKey {
        multicast_address,
        source: [0x20; 16],
        source_port: 5000,
        destination_port: 6000 + number,
        vlan: 0,
        pad: 0,
    }
}

/// A datagram of a flow, without a tag in the frame, with `checksum` as it is.
fn datagram(stream: &StreamKey, checksum: u16, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u16 + 8).to_be_bytes();
    let mut frame = vec![0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0x86, 0xdd];
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(length);
    frame.extend([17, 64]);
    frame.extend(stream.source);
    frame.extend(stream.multicast_address);
    frame.extend(stream.source_port.to_be_bytes());
    frame.extend(stream.destination_port.to_be_bytes());
    frame.extend(length);
    frame.extend(checksum.to_be_bytes());
    frame.extend(payload);
    frame
}
