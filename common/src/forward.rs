//! Rules for forwarding and translation. A packet for an address that a VM has left gets another
//! destination; a packet that the VM still sends from such an address gets another source. Either
//! way the hop limit decreases by one and nothing else changes.
//!
//! Two addresses that are neutral to one HoA ([`crate::mat::neutral`]) have the same sum, so no
//! checksum changes.

use crate::maps::Address;
use crate::mat::neutral;
use crate::wire::datagram::{Header, Rewrite};
use crate::wire::neighbour::{FIRST_TYPE, ICMPV6, LAST_TYPE};
use crate::wire::{ipv6, udp};

/// Next header value of TCP.
pub const TCP: u8 = 6;

/// Returns the difference that the address `to` in the place of `from` adds to a checksum, as
/// `bpf_csum_diff` returns it; 0 for equal sums.
pub fn difference(from: &Address, to: &Address) -> u32 {
    if neutral::is_neutral(*from, *to) {
        return 0;
    }
    // In one's complement, the sum of swapped words is the swapped sum.
    u32::from(neutral::sum(*to).to_be()) + u32::from(!neutral::sum(*from).to_be())
}

/// Whether a packet is valid on this link only: it has a link-local source, or is a Neighbor
/// Discovery message, which hosts ignore after forwarding (RFC 4861 §3.1).
#[inline(always)]
pub fn stays(header: &Header) -> bool {
    // The ICMPv6 type has the position of the first byte of a UDP source port.
    let [kind, _] = header.source_port.to_ne_bytes();
    ipv6::is_link_local(&header.source)
        || header.next_header == ICMPV6 && (FIRST_TYPE..=LAST_TYPE).contains(&kind)
}

/// Returns the offset of the L4 checksum in the frame, bytes; `None` for unknown protocols and
/// behind extension headers.
#[inline(always)]
pub fn checksum_offset(next_header: u8) -> Option<usize> {
    match next_header {
        TCP => Some(70),
        udp::NEXT_HEADER => Some(60),
        ICMPV6 => Some(56),
        _ => None,
    }
}

/// Rewrites a packet to its new destination. `macs` are destination and source MAC of the route.
#[inline(always)]
pub fn send_on<H: Rewrite>(
    header: &mut H,
    destination: &Address,
    hop_limit: u8,
    macs: [[u8; 6]; 2],
) {
    let [destination_mac, source_mac] = macs;
    header.set_macs(destination_mac, source_mac);
    header.set_hop_limit(hop_limit.wrapping_sub(1));
    header.set_destination(destination);
}

/// Rewrites a packet to its new source. The neighbour subsystem writes the MACs.
#[inline(always)]
pub fn send_from<H: Rewrite>(header: &mut H, source: &Address, hop_limit: u8) {
    header.set_hop_limit(hop_limit.wrapping_sub(1));
    header.set_source(source);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::frame::address;
    use crate::wire::checksum::fold;
    use proptest::prelude::*;

    #[test]
    fn addresses_of_one_sum_leave_checksums_as_they_are() {
        let hoa = address("fd5e:6d61:74::1");
        let old = neutral::neutral(address("2001:db8:1::7:8:0"), hoa);
        let new = neutral::neutral(address("2001:db8:2::9:a:0"), hoa);
        assert_eq!(difference(&old, &new), 0);
    }

    proptest! {
        #[test]
        fn difference_takes_one_sum_to_the_other(from: [u8; 16], to: [u8; 16]) {
            let (old, new) = (neutral::sum(from).to_be(), neutral::sum(to).to_be());
            let sum = fold(u64::from(old) + u64::from(difference(&from, &to)));
            // One's complement has two zeros.
            prop_assert_eq!(sum % 0xffff, new % 0xffff);
        }
    }
}
