use std::vec::Vec;

use etherparse::{SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::*;
use crate::group;
use crate::testing::frame::address;

const HOST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const VM: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];
const ROUTER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];

fn target() -> Address {
    address("2001:db8:2::1234:5678")
}

/// Whether etherparse accepts the checksum.
fn checksum_is_right(frame: &[u8]) -> bool {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(etherparse::NetSlice::Ipv6(ip)) = &packet.net else {
        return false;
    };
    let Some(TransportSlice::Icmpv6(icmp)) = packet.transport else {
        return false;
    };
    let header = ip.header();
    icmp.is_checksum_valid(header.source(), header.destination())
}

fn answer(audience: Audience) -> [u8; FRAME_BYTES] {
    advertisement(&target(), VM, true, &address("fe80::1"), HOST, audience)
}

/// Recomputes the checksum of a modified frame.
fn mended(mut frame: Vec<u8>) -> Vec<u8> {
    frame[56..58].fill(0);
    let length = frame.len() - MESSAGE;
    let source = frame[22..38].try_into().unwrap();
    let destination = frame[38..54].try_into().unwrap();
    let sum = checksum::sum(&frame[..], MESSAGE, length).unwrap()
        + checksum::pseudo_header(&source, &destination, length as u32, ICMPV6);
    frame[56..58].copy_from_slice(&(!checksum::fold(sum)).to_ne_bytes());
    frame
}

#[test]
fn probe_is_what_another_library_reads_and_is_read_back() {
    let frame = probe(&target(), HOST, [1, 2, 3, 4, 5, 6]);
    assert!(checksum_is_right(&frame));
    assert_eq!(&frame[..6], &[0x33, 0x33, 0xff, 0x34, 0x56, 0x78]);
    let message = parse(&frame[..]).unwrap();
    assert!(message.is_probe());
    assert_eq!(message.target, target());
    assert_eq!(message.destination, address("ff02::1:ff34:5678"));
    assert_eq!(message.nonce, Some([1, 2, 3, 4, 5, 6]));
    assert_eq!(message.claimant(), HOST);
}

#[test]
fn answer_names_the_owner_and_goes_to_who_asked() {
    let asker = address("fe80::fe");
    let frame = answer(Audience::Asker(asker, ROUTER_MAC));
    assert!(checksum_is_right(&frame));
    assert_eq!((frame[MESSAGE], frame[MESSAGE + 4]), (136, 0x60));
    let message = parse(&frame[..]).unwrap();
    assert_eq!(message.claimant(), VM);
    assert_eq!(message.destination, asker);
    assert_eq!(
        message.kind,
        Kind::Advertisement {
            solicited: true,
            overrides: true
        }
    );
}

#[test]
fn answer_to_a_probe_is_for_everybody_and_not_solicited() {
    let frame = answer(Audience::Everybody);
    assert!(checksum_is_right(&frame));
    assert_eq!(&frame[..6], &[0x33, 0x33, 0, 0, 0, 1]);
    let message = parse(&frame[..]).unwrap();
    assert_eq!(message.destination, ALL_NODES);
    assert!(matches!(
        message.kind,
        Kind::Advertisement {
            solicited: false,
            ..
        }
    ));
}

#[test]
fn message_that_a_host_must_discard_is_none() {
    let good = answer(Audience::Asker(address("fe80::fe"), ROUTER_MAC)).to_vec();
    assert!(parse(&good[..]).is_some());
    let change = |at: usize, byte: u8| {
        let mut frame = good.clone();
        frame[at] = byte;
        mended(frame)
    };
    for (what, frame) in [
        ("from off the link", change(21, 254)),
        ("code", change(MESSAGE + 1, 1)),
        ("multicast target", change(MESSAGE + 8, 0xff)),
        ("option of no length", change(79, 0)),
        ("option beyond the end", change(79, 2)),
        ("solicited, to a group", change(38, 0xff)),
        ("another type", change(MESSAGE, 134)),
        ("another protocol", change(20, 17)),
        ("not IPv6", change(12, 0x08)),
    ] {
        assert_eq!(parse(&frame[..]), None, "{what}");
    }
    let mut wrong = good.clone();
    wrong[85] ^= 1;
    assert_eq!(parse(&wrong[..]), None, "checksum");
}

#[test]
fn probe_with_a_link_address_or_to_a_single_node_is_none() {
    let good = probe(&target(), HOST, [0; 6]).to_vec();
    let mut with_link_address = good.clone();
    with_link_address[78] = SOURCE_LINK_ADDRESS;
    assert_eq!(parse(&mended(with_link_address)[..]), None);
    let mut to_one = good;
    to_one[38..54].copy_from_slice(&target());
    assert_eq!(parse(&mended(to_one)[..]), None);
}

#[test]
fn message_is_refused_at_every_shorter_length() {
    let frame = probe(&target(), HOST, [9; 6]);
    for length in 0..FRAME_BYTES {
        assert_eq!(parse(&frame[..length]), None, "accepted {length} bytes");
    }
}

proptest! {
    #[test]
    fn any_frame_is_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = parse(&bytes[..]);
    }

    #[test]
    fn any_change_of_a_message_is_read_without_panic(
        at in 0..FRAME_BYTES, byte: u8, cut in 0..=FRAME_BYTES, mend: bool,
    ) {
        let mut frame = answer(Audience::Everybody).to_vec();
        frame[at] = byte;
        frame.truncate(cut);
        if mend && cut == FRAME_BYTES {
            frame = mended(frame);
        }
        if let Some(message) = parse(&frame[..]) {
            prop_assert!(!group::is_multicast(&message.target));
            prop_assert!(checksum_is_right(&frame));
        }
    }

    #[test]
    fn written_messages_are_read_back(target: [u8; 16], owner: [u8; 6], overrides: bool) {
        prop_assume!(!group::is_multicast(&target));
        let source = address("fe80::1");
        let frame = advertisement(&target, owner, overrides, &source, HOST, Audience::Everybody);
        prop_assert!(checksum_is_right(&frame));
        let message = parse(&frame[..]).unwrap();
        prop_assert_eq!((message.target, message.claimant()), (target, owner));
        let frame = probe(&target, HOST, owner);
        prop_assert_eq!(parse(&frame[..]).unwrap().nonce, Some(owner));
    }
}
