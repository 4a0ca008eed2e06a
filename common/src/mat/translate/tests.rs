use super::end::{End, HOME, MASK, under};
use super::*;
use crate::mat::neutral::neutral;
use crate::wire::{checksum, ipv6};
use proptest::prelude::*;
use std::vec::Vec;

/// A frame with a valid checksum at `offset` of its payload.
fn frame(
    source: Address,
    destination: Address,
    next_header: u8,
    offset: usize,
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = std::vec![2; 12];
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend((payload.len() as u16).to_be_bytes());
    frame.extend([next_header, 64]);
    frame.extend(source);
    frame.extend(destination);
    frame.extend(payload);
    let at = PAYLOAD + offset;
    frame[at..at + 2].fill(0);
    let sum = match !whole_sum(&frame) {
        0 => 0xffff,
        sum => sum,
    };
    frame[at..at + 2].copy_from_slice(&sum.to_ne_bytes());
    frame
}

fn whole_sum(frame: &[u8]) -> u16 {
    let header = ipv6::parse(frame, 14).unwrap();
    let length = frame.len() - PAYLOAD;
    let sum = checksum::sum(frame, PAYLOAD, length).unwrap();
    let pseudo = checksum::pseudo_header(
        &header.source,
        &header.destination,
        length as u32,
        header.next_header,
    );
    checksum::fold(sum + pseudo)
}

proptest! {
    #[test]
    fn what_one_end_translates_the_other_translates_back(
        hoas: [[u8; 14]; 2],
        moas: [[u8; 14]; 2],
        are_neutral: bool,
        (next_header, offset) in prop_oneof![Just((6, 16)), Just((17, 6)), Just((58, 2)), Just((33, 6))],
        mut payload in prop::collection::vec(any::<u8>(), 60..200),
    ) {
        let hoas = hoas.map(|it| under([0xfd, 0x5e], it));
        let mut moas = moas.map(|it| under([0x20, 0x01], it));
        if are_neutral {
            moas = [neutral(moas[0], hoas[0]), neutral(moas[1], hoas[1])];
        }
        prop_assume!(hoas[0] != hoas[1] && moas[0] != moas[1]);
        // Bytes of an echo that are not a port of the daemons.
        payload[..4].copy_from_slice(&[128, 0, 0, 9]);
        let one = End::new((hoas[0], moas[0]), (hoas[1], moas[1]));
        let other = End::new((hoas[1], moas[1]), (hoas[0], moas[0]));
        let sent = frame(hoas[0], hoas[1], next_header, offset, &payload);
        prop_assert_eq!(whole_sum(&sent), 0xffff);

        let mut packet = sent.clone();
        let decision = outbound(&mut Bytes(&mut packet), &one);
        prop_assert_eq!(decision.action, Action::Send);
        prop_assert_eq!(&packet[22..38], &moas[0]);
        prop_assert_eq!(&packet[38..54], &moas[1]);
        prop_assert_eq!(whole_sum(&packet), 0xffff);

        let decision = inbound(&mut Bytes(&mut packet), &other, 1);
        prop_assert_eq!(decision.action, Action::Deliver);
        prop_assert_eq!(whole_sum(&packet), 0xffff);
        prop_assert_eq!(&packet[14..PAYLOAD], &sent[14..PAYLOAD]);
    }

    #[test]
    fn any_bytes_are_decided_about(mut bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let end = End::new((HOME, under([0x20, 1], [1; 14])), (MASK, [3; 16]));
        let before = bytes.len();
        outbound(&mut Bytes(&mut bytes), &end);
        inbound(&mut Bytes(&mut bytes), &end, 1);
        prop_assert_eq!(bytes.len(), before);
    }
}
