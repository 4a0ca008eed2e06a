//! One end of a translation, for tests.

use super::{Node, Tables, Translated, Words, words};
use crate::maps::Address;
use crate::mat::neutral::difference;

/// One end: its own addresses and those of the peer.
pub(crate) struct End {
    node: Node,
    peer: (Words, Words),
    to_moa: u32,
    to_hoa: u32,
}

impl End {
    pub(crate) fn new(own: (Address, Address), peer: (Address, Address)) -> Self {
        Self {
            node: Node {
                hoa: words(own.0),
                moa: words(own.1),
                home: words(HOME),
                home_mask: words(MASK),
                difference: difference(own.0, own.1),
                difference_back: difference(own.1, own.0),
                ifindex: 1,
                mat0_ifindex: 2,
                ..Node::default()
            },
            peer: (words(peer.0), words(peer.1)),
            to_moa: difference(peer.0, peer.1),
            to_hoa: difference(peer.1, peer.0),
        }
    }
}

impl Tables for End {
    fn node(&self) -> Option<&Node> {
        Some(&self.node)
    }

    fn peer(&self, hoa: &Words) -> Option<Translated> {
        (*hoa == self.peer.0).then_some(Translated {
            address: self.peer.1,
            difference: self.to_moa,
        })
    }

    fn peer_moa(&self, moa: &Words) -> Option<Translated> {
        (*moa == self.peer.1).then_some(Translated {
            address: self.peer.0,
            difference: self.to_hoa,
        })
    }

    fn own_moa(&self, _: &Words) -> Option<u32> {
        None
    }
}

pub(crate) const HOME: Address = [0xfd, 0x5e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
pub(crate) const MASK: Address = [0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

pub(crate) fn under(prefix: [u8; 2], rest: [u8; 14]) -> Address {
    let mut address = [0; 16];
    address[..2].copy_from_slice(&prefix);
    address[2..].copy_from_slice(&rest);
    address
}
