//! Rules for packets that come for an address which its VM has left: another destination, one hop
//! limit less, and nothing else changes. Likewise for those that the VM, where it is now, still sends
//! from there: another source.
//!
//! Where both addresses are neutral to one HoA ([`crate::mat::neutral`]) their sums are the same and
//! no checksum has to follow.

use crate::maps::Address;
use crate::mat::neutral;
use crate::wire::datagram::{Header, Rewrite};
use crate::wire::neighbour::{FIRST_TYPE, ICMPV6, LAST_TYPE};
use crate::wire::{ipv6, udp};

/// Next header value of TCP.
pub const TCP: u8 = 6;

/// What one address in the place of another adds to a checksum, as `bpf_csum_diff` gives it; 0 where
/// that is nothing.
pub fn difference(from: &Address, to: &Address) -> u32 {
    if neutral::is_neutral(*from, *to) {
        return 0;
    }
    // In one's complement a sum of swapped words is the sum, swapped.
    u32::from(neutral::sum(*to).to_be()) + u32::from(!neutral::sum(*from).to_be())
}

/// Whether a packet has a meaning on this link only: Neighbor Discovery, which hosts ignore once it
/// was forwarded, and link-local senders.
#[inline(always)]
pub fn stays(header: &Header) -> bool {
    // The type of an ICMPv6 message stands where UDP has the upper half of its source port.
    let [kind, _] = header.source_port.to_ne_bytes();
    ipv6::is_link_local(&header.source)
        || header.next_header == ICMPV6 && (FIRST_TYPE..=LAST_TYPE).contains(&kind)
}

/// Where the checksum over the addresses stands, bytes from the first of the frame; `None` for
/// protocols that are not known, and behind extension headers.
#[inline(always)]
pub fn checksum_offset(next_header: u8) -> Option<usize> {
    match next_header {
        TCP => Some(70),
        udp::NEXT_HEADER => Some(60),
        ICMPV6 => Some(56),
        _ => None,
    }
}

/// Makes a packet the one that is sent on. The MACs, destination first, are those of the route.
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

/// Makes a packet one from another address. Its MACs are those of the way that it takes.
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
            // Both zeros are one.
            prop_assert_eq!(sum % 0xffff, new % 0xffff);
        }
    }
}
