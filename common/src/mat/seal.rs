//! Wire format of MAT messages: sealed with XChaCha20-Poly1305.
//!
//! ```text
//!  0       2   3   4                20           44                     n-16       n
//!  | 'M' 'A' | v | k | HoA (16 bytes) | nonce (24) | encrypted message ... | tag (16) |
//!  |---------- authenticated ---------|
//! ```
//!
//! `v` is the version, 1. `k` is the kind of key: 0 for the key between a node and the IMS, with
//! the HoA of the node; 1 for the key of a pair of nodes, with the HoA of the sender, so that a
//! reflected message is invalid for its sender.

use alloc::vec::Vec;
use core::fmt;

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};

use super::key::Key;
use crate::signal::MAX_DATAGRAM_BYTES;

/// Length of a nonce, bytes: 192 random bits do not repeat.
pub const NONCE_BYTES: usize = 24;
/// Offset of the nonce, bytes.
const HEADER_BYTES: usize = 20;
const TAG_BYTES: usize = 16;
const MAGIC: [u8; 2] = *b"MA";
const VERSION: u8 = 1;

/// Kind of the key that seals a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Keying {
    /// Key between a node and the IMS.
    Node = 0,
    /// Key between two nodes.
    Pair = 1,
}

/// Why a datagram is not a valid message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SealError {
    /// The datagram is too short, too long, or of another protocol or version.
    Malformed,
    /// The datagram was sealed with another key, or modified.
    Forged,
}

impl fmt::Display for SealError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "Not a MAT message of version 1",
            Self::Forged => "Sealed with another key, or changed on its way",
        })
    }
}

impl core::error::Error for SealError {}

/// A sealed message with a readable header.
#[derive(Clone, Copy, Debug)]
pub struct Sealed<'a> {
    /// Kind of the key that opens the message.
    pub keying: Keying,
    /// HoA of the node (key with the IMS) or of the sending node (pair key).
    pub hoa: [u8; 16],
    header: &'a [u8],
    nonce: [u8; NONCE_BYTES],
    content: &'a [u8],
}

impl<'a> Sealed<'a> {
    /// Reads the header of a datagram.
    ///
    /// # Errors
    ///
    /// [`SealError::Malformed`].
    pub fn parse(datagram: &'a [u8]) -> Result<Self, SealError> {
        let parse = || {
            if datagram.len() > MAX_DATAGRAM_BYTES {
                return None;
            }
            let (header, rest) = datagram.split_at_checked(HEADER_BYTES)?;
            let (nonce, content) = rest.split_first_chunk::<NONCE_BYTES>()?;
            let ([magic @ .., VERSION, keying], hoa) = header.split_first_chunk::<4>()? else {
                return None;
            };
            let keying = match keying {
                0 => Keying::Node,
                1 => Keying::Pair,
                _ => return None,
            };
            (*magic == MAGIC && content.len() >= TAG_BYTES).then_some(Sealed {
                keying,
                hoa: hoa.try_into().ok()?,
                header,
                nonce: *nonce,
                content,
            })
        };
        parse().ok_or(SealError::Malformed)
    }

    /// Decrypts the message.
    ///
    /// # Errors
    ///
    /// [`SealError::Forged`].
    pub fn open(&self, key: &Key) -> Result<Vec<u8>, SealError> {
        let payload = Payload {
            msg: self.content,
            aad: self.header,
        };
        XChaCha20Poly1305::new(&key.0.into())
            .decrypt(&XNonce::from(self.nonce), payload)
            .map_err(|_| SealError::Forged)
    }
}

/// Seals a message. Every call needs a new nonce ([`super::entropy`]).
pub fn seal(
    keying: Keying,
    hoa: [u8; 16],
    key: &Key,
    nonce: [u8; NONCE_BYTES],
    message: &[u8],
) -> Vec<u8> {
    let mut datagram = Vec::with_capacity(HEADER_BYTES + NONCE_BYTES + message.len() + TAG_BYTES);
    datagram.extend(MAGIC);
    datagram.extend([VERSION, keying as u8]);
    datagram.extend(hoa);
    let payload = Payload {
        msg: message,
        aad: &datagram,
    };
    // Encryption fails only beyond 256 GiB.
    let content = XChaCha20Poly1305::new(&key.0.into())
        .encrypt(&XNonce::from(nonce), payload)
        .unwrap_or_default();
    datagram.extend(nonce);
    datagram.extend(content);
    datagram
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: Key = Key([3; 32]);

    #[test]
    fn message_opens_with_its_key_and_header_only() {
        let hoa = [9; 16];
        let datagram = seal(Keying::Pair, hoa, &KEY, [5; NONCE_BYTES], b"message");
        let sealed = Sealed::parse(&datagram).unwrap();
        assert_eq!((sealed.keying, sealed.hoa), (Keying::Pair, hoa));
        assert_eq!(sealed.open(&KEY).unwrap(), b"message");
        assert_eq!(sealed.open(&Key([4; 32])), Err(SealError::Forged));
        for at in 0..datagram.len() {
            let mut changed = datagram.clone();
            changed[at] ^= 1;
            let opened = Sealed::parse(&changed).and_then(|it| it.open(&KEY));
            assert!(opened.is_err(), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_parsed(bytes in proptest::collection::vec(any::<u8>(), 0..1400)) {
            if let Ok(sealed) = Sealed::parse(&bytes) {
                prop_assert_eq!(sealed.open(&KEY), Err(SealError::Forged));
            }
        }
    }
}
