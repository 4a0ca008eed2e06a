//! The hash behind the fingerprints of packets.

use crate::packet::{PacketRead, Truncated};

/// Bytes at the start of a payload that [`Hash::ends`] covers.
const HEAD: usize = 64;
/// Bytes at the end of a payload that [`Hash::ends`] covers.
const TAIL: usize = 16;

/// A hash in 64-bit steps (multiply and rotate, with the finalizer of MurmurHash3). The hash has no
/// secret: a sender who chooses the packets of a flow harms that flow only.
pub(crate) struct Hash(u64);

impl Hash {
    #[inline(always)]
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    #[inline(always)]
    pub(crate) fn word(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    #[inline(always)]
    pub(crate) fn bytes<const N: usize>(&mut self, bytes: &[u8; N]) {
        for word in bytes.as_chunks::<8>().0 {
            self.word(u64::from_ne_bytes(*word));
        }
    }

    #[inline(always)]
    pub(crate) fn finish(self) -> u64 {
        let mut hash = self.0;
        hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        hash ^ (hash >> 33)
    }

    /// Hashes the first 64 and the last 16 of `length` bytes at `payload`; all bytes of a payload
    /// shorter than 64.
    ///
    /// # Errors
    ///
    /// [`Truncated`] when the packet is shorter than `payload + length`.
    #[inline(always)]
    pub(crate) fn ends<P: PacketRead + ?Sized>(
        &mut self,
        packet: &P,
        payload: usize,
        length: usize,
    ) -> Result<(), Truncated> {
        if length >= HEAD {
            self.bytes(&packet.read::<HEAD>(payload)?);
            self.bytes(&packet.read::<TAIL>(payload + length - TAIL)?);
            return Ok(());
        }
        // Reads a shorter payload by the binary digits of its length, because a read has a constant
        // length.
        let mut at = payload;
        if length & 32 != 0 {
            self.bytes(&packet.read::<32>(at)?);
            at += 32;
        }
        if length & 16 != 0 {
            self.bytes(&packet.read::<16>(at)?);
            at += 16;
        }
        if length & 8 != 0 {
            self.bytes(&packet.read::<8>(at)?);
            at += 8;
        }
        if length & 4 != 0 {
            self.word(u64::from(u32::from_ne_bytes(packet.read(at)?)));
            at += 4;
        }
        if length & 2 != 0 {
            self.word(u64::from(u16::from_ne_bytes(packet.read(at)?)));
            at += 2;
        }
        if length & 1 != 0 {
            let [byte] = packet.read(at)?;
            self.word(u64::from(byte));
        }
        Ok(())
    }
}
