//! Keys of nodes and pairs of nodes, derived from one secret of the mapping servers.
//!
//! The derivation is HKDF-SHA-256 (RFC 5869). Servers with the same secret derive the same keys, so
//! a replica needs only the secret, and all servers know a node after one enrolment.

use core::fmt;

use hkdf::Hkdf;
use sha2::Sha256;

/// Length of every key and of the secret, bytes.
pub const KEY_BYTES: usize = 32;

/// A key for [`super::seal`], 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Key(pub [u8; KEY_BYTES]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// One of the two nodes of a pair key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Party {
    /// HoA of the node, 16 bytes, network order.
    pub hoa: [u8; 16],
    /// Generation of the node's key with the servers; 0 for unknown.
    pub generation: u32,
}

/// The secret of the mapping servers.
pub struct Secret(Hkdf<Sha256>);

impl Secret {
    /// Takes a random secret.
    pub fn new(secret: &[u8; KEY_BYTES]) -> Self {
        Self(Hkdf::new(Some(b"roamcast mat 1"), secret))
    }

    /// Derives the key between a node and the servers. A new generation replaces a key that is no
    /// longer trusted.
    pub fn node(&self, hoa: [u8; 16], generation: u32) -> Key {
        self.expand(&[b"node", &hoa, &generation.to_be_bytes()])
    }

    /// Derives the key between two nodes, in either order, from HoA and key generation of both. A
    /// new generation of either node's key also replaces the keys of its pairs.
    pub fn pair(&self, one: Party, other: Party) -> Key {
        let (first, second) = (one.min(other), one.max(other));
        self.expand(&[
            b"pair",
            &first.hoa,
            &first.generation.to_be_bytes(),
            &second.hoa,
            &second.generation.to_be_bytes(),
        ])
    }

    fn expand(&self, info: &[&[u8]]) -> Key {
        let mut key = [0; KEY_BYTES];
        // The expansion fails only for more than 255 blocks; a key is one block.
        let _ = self.0.expand_multi_info(info, &mut key);
        Key(key)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn party(hoa: [u8; 16], generation: u32) -> Party {
        Party { hoa, generation }
    }

    fn any_party() -> impl Strategy<Value = Party> {
        // Small ranges, so that parties repeat.
        (0..3_u8, 0..3_u32).prop_map(|(hoa, generation)| party([hoa; 16], generation))
    }

    proptest! {
        #[test]
        fn pairs_have_one_key_if_both_are_the_same(pairs in prop::array::uniform4(any_party())) {
            let secret = Secret::new(&[7; KEY_BYTES]);
            let [a, b, c, d] = pairs;
            let same = (a.min(b), a.max(b)) == (c.min(d), c.max(d));
            prop_assert_eq!(secret.pair(a, b) == secret.pair(c, d), same);
        }
    }

    #[test]
    fn pairs_and_nodes_and_generations_have_their_own_keys() {
        let secret = Secret::new(&[7; KEY_BYTES]);
        let (a, b) = ([1; 16], [2; 16]);
        let keys = [
            secret.pair(party(a, 1), party(b, 1)),
            secret.pair(party(a, 2), party(b, 1)),
            secret.pair(party(a, 1), party(b, 2)),
            secret.node(a, 1),
            secret.node(a, 2),
            secret.node(b, 1),
        ];
        for (index, key) in keys.iter().enumerate() {
            assert!(!keys[..index].contains(key));
            assert_ne!(key.0, [0; KEY_BYTES]);
        }
        assert_ne!(Secret::new(&[8; KEY_BYTES]).node(a, 1), secret.node(a, 1));
    }

    #[test]
    fn keys_are_not_shown() {
        let secret = Secret::new(&[7; KEY_BYTES]);
        assert_eq!(
            std::format!("{secret:?} {:?}", secret.node([0; 16], 1)),
            "Secret(..) Key(..)"
        );
    }
}
