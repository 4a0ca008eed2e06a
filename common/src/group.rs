//! Multicast addresses: what follows from the address alone.
//!
//! | of | source |
//! |---|---|
//! | multicast, scope | RFC 4291 §2.7 |
//! | source-specific | RFC 4607 §1 |
//! | Ethernet destination | RFC 2464 §7 |
//!
//! The packet rules of [`crate::mat`] hold addresses as two words, and look at the first byte themselves.

use crate::maps::Address;

/// Largest scope whose packets stay on their link: link-local. Smaller scopes are interface-local or
/// reserved.
const LINK_LOCAL: u8 = 2;

/// Whether the address is in ff00::/8.
#[inline(always)]
pub fn is_multicast(address: &Address) -> bool {
    let [first, ..] = *address;
    first == 0xff
}

/// Scope of a multicast address: 1 interface-local, 2 link-local, and so on.
#[inline(always)]
pub fn scope(address: &Address) -> u8 {
    let [_, second, ..] = *address;
    second & 0x0f
}

/// Whether routers forward the multicast address: its scope is larger than link-local.
#[inline(always)]
pub fn is_routable(address: &Address) -> bool {
    is_multicast(address) && scope(address) > LINK_LOCAL
}

/// Whether the multicast address is source-specific, in ff3x::/32.
#[inline(always)]
pub fn is_source_specific(address: &Address) -> bool {
    let [first, second, third, fourth, ..] = *address;
    first == 0xff && second >> 4 == 3 && third == 0 && fourth == 0
}

/// Ethernet destination of packets to a multicast address.
#[inline(always)]
pub fn mac(address: &Address) -> [u8; 6] {
    let [.., a, b, c, d] = *address;
    [0x33, 0x33, a, b, c, d]
}

#[cfg(test)]
mod tests {
    use core::net::Ipv6Addr;

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<Ipv6Addr>().unwrap().octets()
    }

    #[test]
    fn link_scopes_are_not_routable() {
        for excluded in [
            "ff02::fb",
            "ff02::1:ff00:1",
            "ff01::1",
            "ff12::5",
            "2001:db8::1",
            "ff00::1",
        ] {
            assert!(!is_routable(&address(excluded)), "{excluded}");
        }
        for included in ["ff05::1", "ff0e::1", "ff3e::8000:1", "ff38::1", "ff03::1"] {
            assert!(is_routable(&address(included)), "{included}");
        }
    }

    #[test]
    fn source_specific_range_is_ff3x_32() {
        for inside in ["ff3e::8000:1", "ff35::1", "ff3e:0:1::"] {
            assert!(is_source_specific(&address(inside)), "{inside}");
        }
        for outside in ["ff1e::1", "ff3e:1::1", "fe3e::1"] {
            assert!(!is_source_specific(&address(outside)), "{outside}");
        }
    }

    #[test]
    fn ethernet_destination_has_the_last_four_bytes() {
        assert_eq!(mac(&address("ff3e::8000:1")), [0x33, 0x33, 0x80, 0, 0, 1]);
    }
}
