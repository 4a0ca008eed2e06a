//! Copies of one packet: what they look like alike, and which of them passes.

use crate::hash::Hash;
use crate::maps::{CopyCounts, Origin};
use crate::packet::{PacketRead, Truncated};

/// Longest time between two copies of one packet, nanoseconds. What comes later is another packet
/// of the same content.
pub const COPY_LIFETIME_NS: u64 = 2_000_000_000;

/// What of a datagram is the same in every copy: the flow, the UDP length and checksum (as the
/// restored packet has them), and the first 64 and last 16 bytes of the payload, as far as they
/// exist. The checksum stands for what is between.
///
/// `flow` is the flow's [`crate::maps::StreamKey`] as words of memory, `payload` where the payload starts, and
/// `length` its length, bytes.
///
/// # Errors
///
/// [`Truncated`] when the packet is shorter than it says.
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

/// Counts one more copy of a packet, and says whether it passes: if its origin is one that passes
/// ([`crate::maps::Origins`]), and more copies have come that way than have passed. Two packets of equal content
/// that come twice each way so are still two.
#[inline(always)]
pub fn count_copy(mut counts: CopyCounts, origin: Origin, origins: u8) -> (CopyCounts, bool) {
    let count = match origin {
        Origin::Native => &mut counts.native,
        Origin::Relay => &mut counts.relayed,
    };
    *count = count.wrapping_add(1);
    let count = *count;
    // As serial numbers: the counts of a flow that repeats one packet may wrap.
    let passes =
        origins & origin.pass_bit() != 0 && count.wrapping_sub(counts.passed).cast_signed() > 0;
    if passes {
        counts.passed = count;
    }
    (counts, passes)
}

impl CopyCounts {
    /// The counts of one word of memory.
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

    /// The counts as one word of memory.
    #[inline(always)]
    pub fn word(self) -> u64 {
        let [n0, n1] = self.native.to_ne_bytes();
        let [r0, r1] = self.relayed.to_ne_bytes();
        let [p0, p1] = self.passed.to_ne_bytes();
        u64::from_ne_bytes([n0, n1, r0, r1, p0, p1, 0, 0])
    }
}
