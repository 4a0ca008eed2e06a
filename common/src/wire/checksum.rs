//! The Internet checksum (RFC 1071) over a range of a packet, and IPv6's pseudo-header
//! (RFC 8200 §8.1).

use crate::maps::Address;
use crate::packet::{PacketRead, Truncated};

/// Longest range that [`sum`] covers, bytes.
pub const MAX_BYTES: usize = 2048;

const CHUNK: usize = 64;

/// Returns the one's complement sum of `length` bytes from `offset` on, not folded, in host byte
/// order. An odd last byte counts as the high byte of a word.
///
/// # Errors
///
/// [`Truncated`] when the packet ends before `offset + length`, or `length` exceeds [`MAX_BYTES`].
#[inline(always)]
pub fn sum<P: PacketRead + ?Sized>(
    packet: &P,
    offset: usize,
    length: usize,
) -> Result<u64, Truncated> {
    sum_within::<P, MAX_BYTES>(packet, offset, length)
}

/// Variant of [`sum`] with the limit `BYTES`. Older verifiers walk every iteration of a kernel
/// program's loop, so the loop needs a small bound.
///
/// # Errors
///
/// As [`sum`].
#[inline(always)]
pub fn sum_within<P: PacketRead + ?Sized, const BYTES: usize>(
    packet: &P,
    offset: usize,
    length: usize,
) -> Result<u64, Truncated> {
    if length > BYTES {
        return Err(Truncated);
    }
    let mut sum = 0;
    let mut at = offset;
    let mut left = length;
    for _ in 0..BYTES / CHUNK {
        if left < CHUNK {
            break;
        }
        sum += words(&packet.read::<CHUNK>(at)?);
        at += CHUNK;
        left -= CHUNK;
    }
    // Reads the rest by the binary digits of its length, because a read has a constant length.
    if left & 32 != 0 {
        sum += words(&packet.read::<32>(at)?);
        at += 32;
    }
    if left & 16 != 0 {
        sum += words(&packet.read::<16>(at)?);
        at += 16;
    }
    if left & 8 != 0 {
        sum += words(&packet.read::<8>(at)?);
        at += 8;
    }
    if left & 4 != 0 {
        sum += words(&packet.read::<4>(at)?);
        at += 4;
    }
    if left & 2 != 0 {
        sum += u64::from(u16::from_ne_bytes(packet.read::<2>(at)?));
        at += 2;
    }
    if left & 1 != 0 {
        let [byte] = packet.read::<1>(at)?;
        sum += u64::from(u16::from_ne_bytes([byte, 0]));
    }
    Ok(sum)
}

/// Sum of the pseudo-header (RFC 8200 §8.1); the caller adds the sum of the upper layer.
#[inline(always)]
pub fn pseudo_header(source: &Address, destination: &Address, length: u32, next_header: u8) -> u64 {
    words(source)
        + words(destination)
        + u64::from(length.to_be())
        + u64::from(u32::from(next_header).to_be())
}

/// Whether a checksum may be partial (`CHECKSUM_PARTIAL`): until the device completes the checksum,
/// the field holds the sum of the pseudo-header. One in 65,535 full checksums has the same value.
///
/// `checksum` may be an unfolded sum below 2^33. `length` and the addresses are in memory order,
/// the addresses as words of 8 bytes.
#[inline(always)]
pub fn may_be_partial(
    checksum: u64,
    [source, destination]: [[u64; 2]; 2],
    length: u16,
    next_header: u8,
) -> bool {
    // A multiple of 0xffff, the other zero of one's complement.
    const ZERO: u64 = 0x1_ffff_fffe;
    let halves = |word: u64| (word & 0xffff_ffff) + (word >> 32);
    let [a, b] = source.map(halves);
    let [c, d] = destination.map(halves);
    let pseudo = a + b + c + d + u64::from(length) + u64::from(u16::from(next_header).to_be());
    fold(pseudo + ZERO - checksum) == 0xffff
}

/// Folds a sum to 16 bits. A message with a valid checksum folds to 0xffff.
#[inline(always)]
pub fn fold(sum: u64) -> u16 {
    // Four steps fold any 64-bit sum: the worst case has 64, 49, 34, 19, 17 bits.
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

#[inline(always)]
fn words<const N: usize>(bytes: &[u8; N]) -> u64 {
    let (words, _) = bytes.as_chunks::<4>();
    let mut sum = 0;
    for word in words {
        sum += u64::from(u32::from_ne_bytes(*word));
    }
    sum
}
