//! What the two ends of a migration compare: flows and packets of one guest, told apart by numbers.
//!
//! Both ends make them of the same bytes, whichever way the packets came and whoever has finished
//! their checksums: neither Ethernet header, hop limit nor checksum is part of them.

use crate::hash::Hash;
use crate::maps::StreamKey;
use crate::packet::{PacketRead, Truncated};

/// Payloads from this length on are looked at in between too, bytes.
const LONG: usize = 512;
/// Into how many parts; seven transport stream packets fill a datagram, and each has its counter at
/// its beginning.
const PARTS: usize = 7;
/// Bytes looked at where a part begins.
const PART: usize = 16;

/// A flow, whose key is given as words of memory.
#[inline(always)]
pub fn flow_hash(flow: [u64; 5]) -> u64 {
    let mut hash = Hash::new(0);
    for word in flow {
        hash.word(word);
    }
    hash.finish()
}

/// The same of a key.
pub fn flow_hash_of(stream: &StreamKey) -> u64 {
    let word = |bytes: &[u8], at: usize| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_ne_bytes(word)
    };
    let mut last = [0; 8];
    last[..2].copy_from_slice(&stream.source_port.to_ne_bytes());
    last[2..4].copy_from_slice(&stream.destination_port.to_ne_bytes());
    last[4..6].copy_from_slice(&stream.vlan.to_ne_bytes());
    flow_hash([
        word(&stream.multicast_address, 0),
        word(&stream.multicast_address, 8),
        word(&stream.source, 0),
        word(&stream.source, 8),
        u64::from_ne_bytes(last),
    ])
}

/// A packet within its flow: `length` bytes at `payload`, of which the first 64, the last 16 and,
/// if there are 512 or more, 16 at each seventh count.
///
/// # Errors
///
/// [`Truncated`] when the packet is shorter than that.
#[inline(always)]
pub fn fingerprint<P: PacketRead + ?Sized>(
    packet: &P,
    payload: usize,
    length: u16,
) -> Result<u64, Truncated> {
    let length = usize::from(length);
    let mut hash = Hash::new(length as u64);
    hash.ends(packet, payload, length)?;
    if length >= LONG {
        for part in 1..PARTS {
            hash.bytes(&packet.read::<PART>(payload + length * part / PARTS)?);
        }
    }
    Ok(hash.finish())
}
