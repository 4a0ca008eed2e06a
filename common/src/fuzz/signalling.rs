//! Arbitrary bytes through the decoders of every message family.

use crate::mat::message::MatMessage;
use crate::signal::{DirectoryMessage, PeerMessage, VmMessage, kind};

/// Asserts that a decoded message encodes, and decodes to the same message.
macro_rules! survives {
    ($message:ty, $bytes:expr) => {
        if let Ok((transaction, message)) = <$message>::decode($bytes) {
            let encoded = message.encode(transaction);
            assert_eq!(
                <$message>::decode(&encoded),
                Ok((transaction, message)),
                "{encoded:02x?}"
            );
            let number = kind($bytes);
            assert_eq!(kind(&encoded), number);
            let is_known = |(known, _): &(u16, _)| Some(*known) == number;
            assert!(<$message>::KINDS.iter().any(is_known));
        }
    };
}

pub(super) fn run(bytes: &[u8]) {
    survives!(VmMessage, bytes);
    survives!(PeerMessage, bytes);
    survives!(DirectoryMessage, bytes);
    survives!(MatMessage, bytes);
}
