//! Copies of one packet on two paths: their fingerprint, and which copy passes.

use crate::hash::Hash;
use crate::maps::{CopyCounts, Origin};
use crate::packet::{PacketRead, Truncated};

/// Longest time between two copies of one packet, nanoseconds. A later packet of the same content
/// is another packet.
pub const COPY_LIFETIME_NS: u64 = 2_000_000_000;

/// Returns a number that all copies of a datagram share. The number covers the flow, the UDP
/// length, the UDP checksum of the restored packet, and the first 64 and last 16 bytes of the
/// payload. The checksum represents the bytes between.
///
/// `flow` is the [`crate::maps::StreamKey`] of the flow as words of memory, `payload` the offset of
/// the payload, and `length` its length, bytes.
///
/// # Errors
///
/// [`Truncated`] when the packet is shorter than `payload + length`.
#[inline(always)]
pub fn fingerprint<P: PacketRead + ?Sized>(
    packet: &P,
    flow: [u64; 5],
    payload: usize,
    length: u16,
    checksum: u16,
) -> Result<u64, Truncated> {
    let length = usize::from(length);
    let mut hash = Hash::new(length as u64 | u64::from(checksum) << 16);
    for word in flow {
        hash.word(word);
    }
    hash.ends(packet, payload, length)?;
    Ok(hash.finish())
}

/// Counts one more copy of a packet, and returns whether the copy passes: its origin passes
/// ([`crate::maps::Origins`]), and more copies have arrived on this path than have passed. Two
/// packets of equal content on both paths therefore remain two packets.
#[inline(always)]
pub fn count_copy(mut counts: CopyCounts, origin: Origin, origins: u8) -> (CopyCounts, bool) {
    let count = match origin {
        Origin::Native => &mut counts.native,
        Origin::Relay => &mut counts.relayed,
    };
    *count = count.wrapping_add(1);
    let count = *count;
    // Compared as serial numbers: the counts of a flow that repeats one packet may wrap.
    let passes =
        origins & origin.pass_bit() != 0 && count.wrapping_sub(counts.passed).cast_signed() > 0;
    if passes {
        counts.passed = count;
    }
    (counts, passes)
}

impl CopyCounts {
    /// Decodes the counts from one word of memory.
    #[inline(always)]
    pub fn from_word(word: u64) -> Self {
        let [n0, n1, r0, r1, p0, p1, _, _] = word.to_ne_bytes();
        Self {
            native: u16::from_ne_bytes([n0, n1]),
            relayed: u16::from_ne_bytes([r0, r1]),
            passed: u16::from_ne_bytes([p0, p1]),
            pad: 0,
        }
    }

    /// Encodes the counts as one word of memory.
    #[inline(always)]
    pub fn word(self) -> u64 {
        let [n0, n1] = self.native.to_ne_bytes();
        let [r0, r1] = self.relayed.to_ne_bytes();
        let [p0, p1] = self.passed.to_ne_bytes();
        u64::from_ne_bytes([n0, n1, r0, r1, p0, p1, 0, 0])
    }
}
