//! Copies of one packet: what they look like alike, and which of them passes.

use crate::maps::{CopyCounts, Origin};
use crate::packet::{PacketRead, Truncated};

/// Longest time between two copies of one packet, nanoseconds. What comes later is another packet
/// of the same content.
pub const COPY_LIFETIME_NS: u64 = 2_000_000_000;

/// Payload bytes at the beginning that the fingerprint covers.
const HEAD: usize = 64;
/// And at the end.
const TAIL: usize = 16;

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
    let mut hash = Hash(length as u64 | u64::from(checksum) << 16);
    for word in flow {
        hash.word(word);
    }
    if length >= HEAD {
        hash.bytes(&packet.read::<HEAD>(payload)?);
        hash.bytes(&packet.read::<TAIL>(payload + length - TAIL)?);
        return Ok(hash.finish());
    }
    // A shorter one by its binary digits, because a read has a constant length.
    let mut at = payload;
    if length & 32 != 0 {
        hash.bytes(&packet.read::<32>(at)?);
        at += 32;
    }
    if length & 16 != 0 {
        hash.bytes(&packet.read::<16>(at)?);
        at += 16;
    }
    if length & 8 != 0 {
        hash.bytes(&packet.read::<8>(at)?);
        at += 8;
    }
    if length & 4 != 0 {
        hash.word(u64::from(u32::from_ne_bytes(packet.read(at)?)));
        at += 4;
    }
    if length & 2 != 0 {
        hash.word(u64::from(u16::from_ne_bytes(packet.read(at)?)));
        at += 2;
    }
    if length & 1 != 0 {
        let [byte] = packet.read(at)?;
        hash.word(u64::from(byte));
    }
    Ok(hash.finish())
}

/// A hash that is fast in 64-bit steps (multiply and rotate, with MurmurHash3's finish). It has no
/// secret: who can choose the packets of a flow harms that flow only.
struct Hash(u64);

impl Hash {
    #[inline(always)]
    fn word(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    #[inline(always)]
    fn bytes<const N: usize>(&mut self, bytes: &[u8; N]) {
        for word in bytes.as_chunks::<8>().0 {
            self.word(u64::from_ne_bytes(*word));
        }
    }

    #[inline(always)]
    fn finish(self) -> u64 {
        let mut hash = self.0;
        hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        hash ^ (hash >> 33)
    }
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
