//! Source of random numbers; the caller supplies the kernel's.
//!
//! Two messages with one nonce under one key reveal both. No generator state in memory prevents a
//! repetition: a machine that resumes from a snapshot twice, or a copy of a machine, continues from
//! the same state. The source therefore asks the kernel for each nonce.

use alloc::boxed::Box;
use core::fmt;

use super::seal::NONCE_BYTES;

/// Fills the bytes; returns whether it could.
type Fill = dyn FnMut(&mut [u8]) -> bool + Send;

/// A source of random bytes.
pub struct Entropy(Box<Fill>);

impl Entropy {
    /// A source over `fill`, which fills the bytes and returns whether it could.
    pub fn new(fill: impl FnMut(&mut [u8]) -> bool + Send + 'static) -> Self {
        Self(Box::new(fill))
    }

    /// A random nonce; `None` without random bytes, when the caller must not seal.
    pub fn nonce(&mut self) -> Option<[u8; NONCE_BYTES]> {
        self.bytes()
    }

    /// A random transaction; 0 without random bytes, when the caller cannot seal anyway.
    pub fn number(&mut self) -> u64 {
        self.bytes().map_or(0, u64::from_ne_bytes)
    }

    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        (self.0)(&mut bytes).then_some(bytes)
    }
}

impl fmt::Debug for Entropy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Entropy(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_that_fails_gives_no_nonce() {
        let mut left = 1;
        let mut entropy = Entropy::new(move |bytes| {
            bytes.fill(7);
            left -= 1;
            left >= 0
        });
        assert_eq!(entropy.nonce(), Some([7; NONCE_BYTES]));
        assert_eq!(entropy.nonce(), None);
        assert_eq!(entropy.number(), 0);
    }
}
