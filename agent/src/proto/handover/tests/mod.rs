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

use super::sample::{datagram, stream};
use super::{Cut, HoldLimits, Reading};
use crate::proto::Timestamp;

const MS: Duration = Duration::from_millis(1);
const LIMITS: HoldLimits = HoldLimits {
    bytes: 1_000_000,
    age: Duration::from_secs(5),
};

/// Returns flow counts as instantaneous readings.
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

/// Returns the one's complement sum of 16-bit words (RFC 1071 §1).
fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
