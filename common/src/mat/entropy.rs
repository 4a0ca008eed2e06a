//! Random numbers, from whoever has a kernel to ask.
//!
//! Two messages with one nonce under one key give both away. No state in memory can see to it that none
//! comes twice: a machine that is resumed from a snapshot again, or copied, goes on from the same state
//! as before. So each nonce is asked for when it is needed.

use alloc::boxed::Box;
use core::fmt;

use super::seal::NONCE_BYTES;

/// Fills bytes, or says that it cannot.
type Fill = dyn FnMut(&mut [u8]) -> bool + Send;

/// A source of random bytes.
pub struct Entropy(Box<Fill>);

impl Entropy {
    /// A source that fills what it is given, or says that it cannot.
    pub fn new(fill: impl FnMut(&mut [u8]) -> bool + Send + 'static) -> Self {
        Self(Box::new(fill))
    }

    /// A nonce; `None` if there are no random bytes: then nothing may be sealed.
    pub fn nonce(&mut self) -> Option<[u8; NONCE_BYTES]> {
        self.bytes()
    }

    /// The number of a transaction; 0 if there are no random bytes, when nothing can be sealed, either.
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
