//! An MLD Query from this node to its own kernel, which then reports what is joined on `mat0`.
//!
//! The kernel reports the memberships of a NIC anew when the NIC announces the VM (NOTIFY_PEERS, and
//! RESEND_IGMP with it). `mat0` is no such NIC, and of the kernel's ways to let a device report anew
//! none is complete: a change of the link's state repeats no source-specific membership. To a Query,
//! sent to one of its unicast addresses (RFC 9777 §5.1.15), it answers with all of them. Nothing is
//! left meanwhile, so no packet is lost.

use std::net::Ipv6Addr;

use common::wire::{checksum, mld};

/// Routers have to be of the link (RFC 9777 §5.1.14); that one of this address is there is never asked.
const QUERIER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Router Alert of MLD (RFC 2711), filled up to 8 bytes, before ICMPv6.
const HOP_BY_HOP: [u8; 8] = [mld::ICMPV6, 0, 5, 2, 0, 0, 1, 0];
/// Milliseconds until the answer at most, as short as can be said: nobody else answers.
const MAX_RESPONSE: u16 = 1;
/// The Query begins here.
const QUERY: usize = 62;
const QUERY_BYTES: u16 = 28;
const CHECKSUM: usize = QUERY + 2;

/// A General Query to `hoa`, as a frame for `mac`.
pub(super) fn to_self(hoa: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(QUERY + usize::from(QUERY_BYTES));
    frame.extend(mac);
    frame.extend(mac);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend((8 + QUERY_BYTES).to_be_bytes());
    // Hop-by-Hop Options, and a hop limit of 1.
    frame.extend([0, 1]);
    frame.extend(QUERIER.octets());
    frame.extend(hoa.octets());
    frame.extend(HOP_BY_HOP);
    frame.extend([mld::LISTENER_QUERY, 0, 0, 0]);
    frame.extend(MAX_RESPONSE.to_be_bytes());
    frame.extend([0; 2]);
    frame.extend(Ipv6Addr::UNSPECIFIED.octets());
    // What the kernel assumes without a Query: it takes these over.
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
