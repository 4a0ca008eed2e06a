//! Which addresses can be MoAs, and who has them.

use std::collections::HashMap;
use std::net::Ipv6Addr;

use common::mat::MAX_MOAS;
use common::mat::message::Moa;

use super::Hoa;
use crate::proto::Timestamp;
use crate::value::Prefix;

/// Whether peers can reach an address from anywhere.
fn is_moa(address: Ipv6Addr, home: Prefix) -> bool {
    !(address.is_multicast()
        || address.is_unspecified()
        || address.is_loopback()
        || address.is_unicast_link_local()
        // Never on a wire (RFC 4291 §2.5.5, RFC 5156).
        || address.to_ipv4().is_some()
        || home.contains(address))
}

/// Whether a list of MoAs is one: none, or up to [`MAX_MOAS`] different ones of which exactly one
/// is where data goes.
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

/// Who has an address, or had it until a while ago.
#[derive(Debug, Default)]
pub(super) struct Holders(HashMap<[u8; 16], (Hoa, Timestamp)>);

impl Holders {
    /// Another node that has it.
    pub(super) fn other(&self, address: &[u8; 16], hoa: &Hoa, now: Timestamp) -> Option<Hoa> {
        self.0
            .get(address)
            .filter(|(holder, until)| holder != hoa && *until > now)
            .map(|(holder, _)| *holder)
    }

    /// Gives it to a node for at least so long, unless another has it for longer.
    pub(super) fn hold(&mut self, address: [u8; 16], hoa: Hoa, until: Timestamp) {
        let entry = self.0.entry(address).or_insert((hoa, until));
        if entry.1 <= until {
            *entry = (hoa, until);
        }
    }

    /// Takes it from the node, if it has it.
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
