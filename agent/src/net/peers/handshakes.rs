//! Places: limits on the connections that have not authenticated yet.
//!
//! | connecting address | places in total | share of one group |
//! |---|---|---|
//! | known: configured for a peer, or authenticated before | [`KEPT`] | [`KEPT_OF_ADDRESS`] per address |
//! | any, also a known one whose own places are taken | [`OPEN`] | [`OPEN_OF_PREFIX`] per prefix (IPv6 /64, IPv4 /24) |

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Places open to any address.
const OPEN: usize = 64;
const OPEN_OF_PREFIX: usize = 16;
/// Places reserved for known addresses.
const KEPT: usize = 32;
const KEPT_OF_ADDRESS: usize = 4;
/// First bytes of a TLS handshake record: content type, and major version (RFC 8446 §5.1).
const TLS_HANDSHAKE: [u8; 2] = [22, 3];

/// Why a connection gets no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoPlace {
    /// All places of this kind are taken.
    All,
    /// The share of its prefix is used up.
    Prefix,
}

impl NoPlace {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::All => "too many are in their handshake; try again later",
            Self::Prefix => "too many of its prefix are in their handshake; try again later",
        }
    }
}

/// Connections that share one limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Group {
    Address(IpAddr),
    Prefix(IpAddr),
}

impl Group {
    /// The prefix of an address: a stranger can use every address of its own prefix.
    fn prefix(address: IpAddr) -> Self {
        Self::Prefix(match address {
            IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() & !0xff).into(),
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        })
    }

    fn most(self) -> usize {
        match self {
            Self::Address(_) => KEPT_OF_ADDRESS,
            Self::Prefix(_) => OPEN_OF_PREFIX,
        }
    }
}

#[derive(Debug, Default)]
struct Taken {
    kept: usize,
    open: usize,
    groups: HashMap<Group, usize>,
}

impl Taken {
    /// Returns the places taken among those that the group uses, and their total.
    fn all(&mut self, group: Group) -> (&mut usize, usize) {
        match group {
            Group::Address(_) => (&mut self.kept, KEPT),
            Group::Prefix(_) => (&mut self.open, OPEN),
        }
    }

    fn take(&mut self, group: Group) -> Result<(), NoPlace> {
        if self.groups.get(&group).copied().unwrap_or_default() >= group.most() {
            return Err(NoPlace::Prefix);
        }
        let (taken, most) = self.all(group);
        if *taken >= most {
            return Err(NoPlace::All);
        }
        *taken += 1;
        *self.groups.entry(group).or_default() += 1;
        Ok(())
    }

    fn give_back(&mut self, group: Group) {
        *self.all(group).0 -= 1;
        if let Some(taken) = self.groups.get_mut(&group) {
            *taken -= 1;
            if *taken == 0 {
                self.groups.remove(&group);
            }
        }
    }
}

/// All places. Clones share the same counts.
#[derive(Clone, Debug, Default)]
pub(super) struct Handshakes(Arc<Mutex<Taken>>);

impl Handshakes {
    /// Takes a place for a connection; a known address uses its reserved places first.
    pub(super) fn take(&self, source: IpAddr, is_known: bool) -> Result<Place, NoPlace> {
        let mut taken = self.taken();
        let kept = is_known.then_some(Group::Address(source));
        let group = match kept.filter(|group| taken.take(*group).is_ok()) {
            Some(group) => group,
            None => {
                let group = Group::prefix(source);
                taken.take(group)?;
                group
            }
        };
        drop(taken);
        Ok(Place {
            handshakes: self.clone(),
            group,
        })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place; dropping the value frees it.
#[derive(Debug)]
pub(super) struct Place {
    handshakes: Handshakes,
    group: Group,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.handshakes.taken().give_back(self.group);
    }
}

/// Whether a stream with these first bytes can be TLS.
pub(super) fn may_be_tls(first: &[u8]) -> bool {
    let bytes = first.len().min(TLS_HANDSHAKE.len());
    first.get(..bytes) == TLS_HANDSHAKE.get(..bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(prefix: u16, host: u16) -> IpAddr {
        Ipv6Addr::new(0x2001, 0xdb8, 0, prefix, 0, 0, 0, host).into()
    }

    /// Takes all places that are open to any address.
    fn crowd(handshakes: &Handshakes) -> Vec<Place> {
        (0..100)
            .flat_map(|prefix| (0..100).map(move |host| address(prefix, host)))
            .map_while(|source| match handshakes.take(source, false) {
                Err(NoPlace::All) => None,
                place => Some(place.ok()),
            })
            .flatten()
            .collect()
    }

    #[test]
    fn one_prefix_takes_a_part_of_the_places_and_a_stranger_elsewhere_has_one() {
        let handshakes = Handshakes::default();
        let take = |host| handshakes.take(address(1, host), false);
        let places: Vec<Place> = (0..1000).map_while(|host| take(host).ok()).collect();
        assert_eq!(places.len(), OPEN_OF_PREFIX);
        assert_eq!(take(0).unwrap_err(), NoPlace::Prefix);
        assert!(handshakes.take(address(2, 0), false).is_ok());
        drop(places);
        assert!(take(0).is_ok());
    }

    #[test]
    fn ipv4_addresses_of_one_24_are_one_prefix() {
        let handshakes = Handshakes::default();
        let take = |net, host| handshakes.take([192, 0, net, host].into(), false);
        let places: Vec<Place> = (0..=255).map_while(|host| take(2, host).ok()).collect();
        assert_eq!(places.len(), OPEN_OF_PREFIX);
        assert!(take(3, 1).is_ok());
    }

    #[test]
    fn known_address_has_a_place_however_many_strangers_there_are() {
        let handshakes = Handshakes::default();
        let crowd = crowd(&handshakes);
        assert_eq!(crowd.len(), OPEN);
        assert_eq!(
            handshakes.take(address(200, 1), false).unwrap_err(),
            NoPlace::All
        );
        assert!(handshakes.take(address(200, 1), true).is_ok());
    }

    #[test]
    fn known_address_has_few_places_of_its_own_and_then_those_of_anybody() {
        let handshakes = Handshakes::default();
        let take = || handshakes.take(address(1, 1), true);
        let places: Vec<Place> = (0..100).map_while(|_| take().ok()).collect();
        assert_eq!(places.len(), KEPT_OF_ADDRESS + OPEN_OF_PREFIX);
        assert!(handshakes.take(address(1, 2), true).is_ok());
    }

    #[test]
    fn places_that_are_given_back_leave_nothing() {
        let handshakes = Handshakes::default();
        drop(crowd(&handshakes));
        let taken = handshakes.taken();
        assert!(taken.groups.is_empty() && taken.open == 0 && taken.kept == 0);
    }

    #[test]
    fn stream_is_tls_by_its_first_bytes_as_far_as_they_are_there() {
        assert!(may_be_tls(&[22, 3, 1]) && may_be_tls(&[22]) && may_be_tls(&[]));
        assert!(!may_be_tls(b"GET") && !may_be_tls(&[22, 2]) && !may_be_tls(&[0]));
    }
}
