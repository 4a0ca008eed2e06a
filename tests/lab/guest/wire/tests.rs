//! Tests of [`super`].

use proptest::prelude::*;

use super::{frame::*, *};

fn message() -> impl Strategy<Value = FromGuest> {
    let record =
        (any::<u16>(), any::<u32>()).prop_map(|(flow, sequence)| Record { flow, sequence });
    prop_oneof![
        "[0-9a-f-]{0,36}".prop_map(FromGuest::Hello),
        (any::<u64>(), any::<bool>(), any::<Vec<u8>>())
            .prop_map(|(id, is_stderr, bytes)| FromGuest::Output(id, is_stderr, bytes)),
        (any::<u64>(), any::<i32>()).prop_map(|(id, code)| FromGuest::Exit(id, code)),
        (any::<u16>(), prop::collection::vec(record, 0..64))
            .prop_map(|(receiver, records)| FromGuest::Records(receiver, records)),
        (any::<u16>(), any::<[u64; 5]>()).prop_map(|(receiver, totals)| {
            let [datagrams, packets, continuity_errors, duplicates, rtp_gaps] = totals;
            let totals = TransportTotals {
                datagrams,
                packets,
                continuity_errors,
                duplicates,
                rtp_gaps,
            };
            FromGuest::Transport(receiver, totals)
        }),
        (any::<u64>(), ".*").prop_map(|(id, error)| {
            FromGuest::Reply(Reply {
                id,
                result: Err(error),
            })
        }),
        (any::<u64>(), any::<u64>()).prop_map(|(from_ns, to_ns)| FromGuest::Stall(from_ns, to_ns)),
        Just(FromGuest::Alive),
    ]
}

fn bytes_of(number: u32, message: &FromGuest) -> Vec<u8> {
    let (kind, payload) = message.encode().unwrap();
    frame(kind, number, u64::MAX - u64::from(number), &payload)
}

fn drain(decoder: &mut Decoder) -> Vec<Frame> {
    std::iter::from_fn(|| decoder.poll_frame()).collect()
}

#[test]
fn crc_is_that_of_ieee_802_3() {
    assert_eq!(crc32(&[b"1234", b"56789"]), 0xcbf4_3926);
}

#[test]
fn consecutive_addresses_count_in_the_low_bits() {
    let join = Join {
        count: 3,
        ..Join::any_source("ff3e::ffff".parse().unwrap())
    };
    let addresses: Vec<_> = join
        .addresses()
        .map(|address| address.to_string())
        .collect();
    assert_eq!(addresses, ["ff3e::ffff", "ff3e::1:0", "ff3e::1:1"]);
}

#[test]
fn request_survives_the_wire() {
    let config = ReceiverConfig {
        interface: "eth0".into(),
        port: 5004,
        joins: vec![Join {
            filter: Filter::Include(vec!["2001:db8::1".parse().unwrap()]),
            ..Join::any_source("ff3e::1".parse().unwrap())
        }],
        content: Content::Stamped,
    };
    let request = Request {
        id: 7,
        command: Command::StartReceiver {
            receiver: 1,
            config,
        },
    };
    let mut decoder = Decoder::default();
    decoder.push(&request.to_frame().unwrap());
    assert_eq!(
        Request::decode(&decoder.poll_frame().unwrap()),
        Some(request)
    );
}

proptest! {
    #[test]
    fn message_survives_any_cut_of_the_stream(
        messages in prop::collection::vec(message(), 1..8), piece in 1usize..64
    ) {
        let stream: Vec<u8> =
            messages.iter().zip(0..).flat_map(|(it, number)| bytes_of(number, it)).collect();
        let mut decoder = Decoder::default();
        let mut decoded = Vec::new();
        for bytes in stream.chunks(piece) {
            decoder.push(bytes);
            decoded.extend(drain(&mut decoder).iter().filter_map(FromGuest::decode));
        }
        prop_assert_eq!(decoded, messages);
        prop_assert_eq!(decoder.skipped, 0);
    }

    #[test]
    fn decoder_finds_back_after_a_frame_that_lacks_its_start(
        cut in message(), whole in message(), lost in 1usize..32
    ) {
        let cut = bytes_of(0, &cut);
        let lost = lost.min(cut.len());
        let mut decoder = Decoder::default();
        decoder.push(&cut[lost..]);
        decoder.push(&bytes_of(1, &whole));
        let frames = drain(&mut decoder);
        let last = frames.last().unwrap();
        prop_assert_eq!((last.number, last.guest_ns), (1, u64::MAX - 1));
        prop_assert_eq!(FromGuest::decode(last), Some(whole));
    }

    #[test]
    fn any_bytes_are_decoded_without_panic(bytes: Vec<u8>, kind: u8, payload: Vec<u8>) {
        let mut decoder = Decoder::default();
        decoder.push(&bytes);
        drain(&mut decoder);
        let frame = Frame { kind, number: 0, guest_ns: 0, payload };
        let _ = (FromGuest::decode(&frame), Request::decode(&frame));
    }
}
