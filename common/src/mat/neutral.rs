//! Checksum-neutral MoAs.
//!
//! The checksums of TCP, UDP and ICMPv6 cover the addresses (RFC 8200 §8.1). When HoA and MoA have
//! the same one's complement sum, either can replace the other, and every checksum stays valid,
//! also in fragments, offloaded packets and quoted packets. RFC 6296 §2.6 does the same within a
//! prefix.

/// Sum of an address, folded to 16 bits. 0 represents both zeros, 0 and 0xffff.
pub fn sum(address: [u8; 16]) -> u16 {
    let (words, _) = address.as_chunks::<2>();
    let mut sum: u32 = words
        .iter()
        .map(|it| u32::from(u16::from_be_bytes(*it)))
        .sum();
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    if sum == 0xffff { 0 } else { sum as u16 }
}

/// Whether either address can replace the other without a checksum update.
pub fn is_neutral(one: [u8; 16], other: [u8; 16]) -> bool {
    sum(one) == sum(other)
}

/// Change of a packet's one's complement sum when `to` replaces `from`: 16 bits in memory order, as
/// the kernel's checksum helpers require. 0 for neutral addresses.
pub fn difference(from: [u8; 16], to: [u8; 16]) -> u32 {
    // -x is 0xffff - x.
    let difference = u32::from(sum(to)) + (0xffff - u32::from(sum(from)));
    let difference = ((difference & 0xffff) + (difference >> 16)) as u16;
    if difference == 0xffff {
        0
    } else {
        u32::from(difference.to_be())
    }
}

/// Returns `moa` with its last 16 bits chosen to make it neutral to `hoa`.
pub fn neutral(moa: [u8; 16], hoa: [u8; 16]) -> [u8; 16] {
    let mut moa = moa;
    moa[14..].fill(0);
    let (have, want) = (u32::from(sum(moa)), u32::from(sum(hoa)));
    // want - have in one's complement, where -x is 0xffff - x.
    let difference = want + (0xffff - have);
    let word = ((difference & 0xffff) + (difference >> 16)) as u16;
    // Of the two zeros, 0 would give the Subnet-Router anycast address of a 112-bit prefix.
    let word = if word == 0 { 0xffff } else { word };
    moa[14..].copy_from_slice(&word.to_be_bytes());
    moa
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_address_has_a_neutral_one_that_differs_in_the_last_word(moa: [u8; 16], hoa: [u8; 16]) {
            let found = neutral(moa, hoa);
            prop_assert!(is_neutral(found, hoa));
            prop_assert_eq!(&found[..14], &moa[..14]);
        }

        #[test]
        fn there_is_a_difference_unless_addresses_are_neutral(one: [u8; 16], other: [u8; 16]) {
            prop_assert_eq!(difference(one, other) == 0, is_neutral(one, other));
            prop_assert_eq!(difference(one, neutral(other, one)), 0);
            let back = difference(one, other) + difference(other, one);
            prop_assert!(back == 0 || back == 0xffff);
        }

        #[test]
        fn both_zeros_are_one(words: [u8; 14]) {
            let mut address = [0; 16];
            address[..14].copy_from_slice(&words);
            let zero = address;
            address[14..].fill(0xff);
            prop_assert!(is_neutral(zero, address));
        }
    }

    #[test]
    fn sum_is_that_of_the_checksum() {
        let mut address = [0; 16];
        address[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
        assert_eq!(sum(address), 0x2db9);
    }
}
