//! Packets between two MAT nodes, translated and translated back.

use arbitrary::Unstructured;

use crate::mat::neutral::neutral;
use crate::mat::translate::end::{End, under};
use crate::mat::translate::{Action, Bytes, PAYLOAD, inbound, outbound};
use crate::wire::{checksum, ipv6};

/// Input: addresses of both nodes, whether the addresses are neutral, then a packet without its
/// addresses, or a raw frame.
pub(super) fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let Ok((hoas, moas)) = input.arbitrary::<([[u8; 14]; 2], [[u8; 14]; 2])>() else {
        return;
    };
    let Ok((are_neutral, is_whole)) = input.arbitrary::<(bool, bool)>() else {
        return;
    };
    let hoas = hoas.map(|it| under([0xfd, 0x5e], it));
    let mut moas = moas.map(|it| under([0x20, 0x01], it));
    if are_neutral {
        moas = [neutral(moas[0], hoas[0]), neutral(moas[1], hoas[1])];
    }
    if hoas[0] == hoas[1] || moas[0] == moas[1] {
        return;
    }
    let one = End::new((hoas[0], moas[0]), (hoas[1], moas[1]));
    let other = End::new((hoas[1], moas[1]), (hoas[0], moas[0]));
    let mut frame;
    if is_whole {
        frame = input.take_rest().to_vec();
    } else {
        let Ok((next_header, hop_limit)) = input.arbitrary::<(u8, u8)>() else {
            return;
        };
        let payload = input.take_rest();
        frame = std::vec![2; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((payload.len() as u16).to_be_bytes());
        frame.extend([next_header, hop_limit]);
        frame.extend(hoas[0]);
        frame.extend(hoas[1]);
        frame.extend(payload);
    }
    let length = frame.len();
    there_and_back(&frame, &one, &other);
    // Any frame from a NIC.
    inbound(&mut Bytes(&mut frame), &one, 1);
    assert_eq!(frame.len(), length);
}

fn there_and_back(sent: &[u8], one: &End, other: &End) {
    let mut packet = sent.to_vec();
    let decision = outbound(&mut Bytes(&mut packet), one);
    assert_eq!(packet.len(), sent.len());
    if decision.action != Action::Send {
        return;
    }
    assert_ne!(&packet[22..54], &sent[22..54]);
    if inbound(&mut Bytes(&mut packet), other, 1).action != Action::Deliver {
        return;
    }
    let head = |frame: &[u8]| frame[12..PAYLOAD].to_vec();
    assert_eq!(head(&packet), head(sent));
    assert_eq!(sum_of(&packet), sum_of(sent));
}

/// Returns the sum of the packet, or `None` for a packet that is too long. A sum of zero has two
/// forms.
fn sum_of(frame: &[u8]) -> Option<u16> {
    let header = ipv6::parse(frame, 14).ok()?;
    let length = frame.len() - PAYLOAD;
    let sum = checksum::sum(frame, PAYLOAD, length).ok()?;
    let pseudo = checksum::pseudo_header(
        &header.source,
        &header.destination,
        length as u32,
        header.next_header,
    );
    Some(checksum::fold(sum + pseudo) % 0xffff)
}
