//! An MLD Query from this node to its own kernel, which answers by reporting the memberships of
//! `mat0`.
//!
//! The kernel reports the memberships of a NIC again when the NIC announces the VM (NOTIFY_PEERS,
//! and RESEND_IGMP with it). `mat0` is no such NIC, and no other way to make the kernel report a
//! device again is complete: a change of the link state does not repeat source-specific
//! memberships. The kernel answers a Query to one of its unicast addresses (RFC 9777 §5.1.15) with
//! all memberships. It leaves none in the meantime, so no packet is lost.

use std::net::Ipv6Addr;

use common::wire::{checksum, mld};

/// A Query must have a link-local source (RFC 9777 §5.1.14); no node needs to have this address.
const QUERIER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Hop-by-Hop Options with the Router Alert of MLD (RFC 2711), padded to 8 bytes; ICMPv6 follows.
const HOP_BY_HOP: [u8; 8] = [mld::ICMPV6, 0, 5, 2, 0, 0, 1, 0];
/// Maximum Response Delay in milliseconds, the least possible: nobody else answers.
const MAX_RESPONSE: u16 = 1;
/// Offset of the Query in the frame.
const QUERY: usize = 62;
const QUERY_BYTES: u16 = 28;
const CHECKSUM: usize = QUERY + 2;

/// Builds a General Query to `hoa`, as a frame for `mac`.
pub(super) fn to_self(hoa: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(QUERY + usize::from(QUERY_BYTES));
    frame.extend(mac);
    frame.extend(mac);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend((8 + QUERY_BYTES).to_be_bytes());
    // Next header Hop-by-Hop Options, hop limit 1.
    frame.extend([0, 1]);
    frame.extend(QUERIER.octets());
    frame.extend(hoa.octets());
    frame.extend(HOP_BY_HOP);
    frame.extend([mld::LISTENER_QUERY, 0, 0, 0]);
    frame.extend(MAX_RESPONSE.to_be_bytes());
    frame.extend([0; 2]);
    frame.extend(Ipv6Addr::UNSPECIFIED.octets());
    // The values that the kernel assumes without a Query, because it adopts those of a Query.
    let interval = u8::try_from(mld::QUERY_INTERVAL_SECONDS).unwrap_or(u8::MAX);
    frame.extend([mld::ROBUSTNESS_VARIABLE, interval, 0, 0]);
    finish(&mut frame, hoa);
    frame
}

fn finish(frame: &mut [u8], hoa: Ipv6Addr) {
    let Ok(sum) = checksum::sum(&*frame, QUERY, QUERY_BYTES.into()) else {
        return;
    };
    let (from, to) = (QUERIER.octets(), hoa.octets());
    let pseudo = checksum::pseudo_header(&from, &to, QUERY_BYTES.into(), mld::ICMPV6);
    if let Some(field) = frame.get_mut(CHECKSUM..CHECKSUM + 2) {
        field.copy_from_slice(&(!checksum::fold(sum + pseudo)).to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_query_for_all_addresses_as_a_listener_wants_it() {
        let frame = to_self("fd5e::b".parse().unwrap(), [2, 0, 0, 0, 0, 1]);
        let found = mld::ipv6_frame(frame.as_slice()).unwrap();
        let message = mld::parse::<_, 8, 64>(frame.as_slice(), &found).unwrap();
        let mld::Message::Query(query) = message else {
            panic!("no Query: {message:?}");
        };
        assert_eq!(query.version, 2);
        assert_eq!(query.multicast_address, [0; 16]);
    }
}
