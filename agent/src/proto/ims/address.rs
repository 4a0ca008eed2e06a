//! Valid MoAs, and the holders of addresses.

use std::collections::HashMap;
use std::net::Ipv6Addr;

use common::mat::MAX_MOAS;
use common::mat::message::Moa;

use super::Hoa;
use crate::proto::Timestamp;
use crate::value::Prefix;

/// Returns true if peers can reach the address from anywhere.
fn is_moa(address: Ipv6Addr, home: Prefix) -> bool {
    !(address.is_multicast()
        || address.is_unspecified()
        || address.is_loopback()
        || address.is_unicast_link_local()
        // Such addresses never appear on a wire (RFC 4291 §2.5.5, RFC 5156).
        || address.to_ipv4().is_some()
        || home.contains(address))
}

/// Returns true for a valid list of MoAs: empty, or up to [`MAX_MOAS`] distinct addresses, of which
/// exactly one is the destination of data.
pub(super) fn are_moas(moas: &[Moa], home: Prefix) -> bool {
    let first = moas.iter().filter(|moa| moa.priority == 1).count();
    let different = moas
        .iter()
        .enumerate()
        .all(|(i, moa)| moas.iter().skip(i + 1).all(|it| it.address != moa.address));
    moas.is_empty()
        || moas.len() <= MAX_MOAS
            && first == 1
            && different
            && moas
                .iter()
                .all(|moa| moa.priority > 0 && is_moa((*moa.address).into(), home))
}

/// Current and recent holders of addresses.
#[derive(Debug, Default)]
pub(super) struct Holders(HashMap<[u8; 16], (Hoa, Timestamp)>);

impl Holders {
    /// Returns another node that holds the address.
    pub(super) fn other(&self, address: &[u8; 16], hoa: &Hoa, now: Timestamp) -> Option<Hoa> {
        self.0
            .get(address)
            .filter(|(holder, until)| holder != hoa && *until > now)
            .map(|(holder, _)| *holder)
    }

    /// Assigns the address to a node until `until`, unless another node holds the address for longer.
    pub(super) fn hold(&mut self, address: [u8; 16], hoa: Hoa, until: Timestamp) {
        let entry = self.0.entry(address).or_insert((hoa, until));
        if entry.1 <= until {
            *entry = (hoa, until);
        }
    }

    /// Removes the address from the node, if the node holds the address.
    pub(super) fn release(&mut self, address: &[u8; 16], hoa: &Hoa) {
        if self.0.get(address).is_some_and(|(holder, _)| holder == hoa) {
            self.0.remove(address);
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }
}
