use std::vec;
use std::vec::Vec;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;

use super::mld::{self, Message, NoMessage};
use super::{checksum, ethernet, ipv6, udp};
use crate::counter::Counter;
use crate::testing::frame::{Frame, MAC, address, record};

const GROUP: &str = "ff3e:1::1234";

/// Reports and a Done, captured from a Linux kernel.
const CAPTURED: [&[u8]; 5] = [
    include_bytes!("../../../tests/corpus/v1_join_0.bin"),
    include_bytes!("../../../tests/corpus/v1_leave_0.bin"),
    include_bytes!("../../../tests/corpus/v2_join_0.bin"),
    include_bytes!("../../../tests/corpus/v2_source_block_0.bin"),
    include_bytes!("../../../tests/corpus/v2_exclude_block_0.bin"),
];

fn parse(bytes: &[u8]) -> Result<Message, NoMessage> {
    let frame = mld::ipv6_frame(bytes).ok_or(NoMessage::Other)?;
    mld::parse::<_, 8, 2048>(bytes, &frame)
}

fn parse_all(bytes: &[u8]) -> Result<Message, NoMessage> {
    let frame = mld::ipv6_frame(bytes).ok_or(NoMessage::Other)?;
    mld::parse::<_, 2048, { mld::MAX_BYTES }>(bytes, &frame)
}

#[test]
fn messages_of_the_linux_kernel_are_understood() {
    let [join_v1, leave_v1, join, block, exclude] = CAPTURED;
    let watched = address("ff3e:1::77");
    assert_eq!(parse(join_v1), Ok(Message::ReportV1(watched)));
    assert_eq!(parse(leave_v1), Ok(Message::Done(watched)));
    for (bytes, count, steps) in [(join, 1, 1), (block, 2, 4), (exclude, 1, 2)] {
        let Ok(Message::ReportV2(records)) = parse(bytes) else {
            panic!("not a Report: {bytes:02x?}");
        };
        assert_eq!(records.count, count);
        assert_eq!(mld::check_records::<_, 64>(bytes, &records), Ok(steps));
    }
}

#[test]
fn captured_message_is_refused_at_every_shorter_length() {
    for bytes in CAPTURED {
        for length in 0..bytes.len() {
            assert!(parse(&bytes[..length]).is_err(), "accepted {length} bytes");
        }
    }
}

#[test]
fn headers_agree_with_another_library() {
    let tagged = Frame::v1(131, GROUP)
        .with(|frame| frame.vlan = Some(0x2123))
        .bytes();
    for bytes in CAPTURED.into_iter().chain([&tagged[..]]) {
        let theirs = SlicedPacket::from_ethernet(bytes).unwrap();
        let Some(NetSlice::Ipv6(ip)) = &theirs.net else {
            panic!("not IPv6 for etherparse");
        };
        let ours = mld::ipv6_frame(bytes).unwrap();
        assert_eq!(ours.header.source, ip.header().source());
        assert_eq!(ours.header.destination, ip.header().destination());
        assert_eq!(ours.header.hop_limit, ip.header().hop_limit());
        let their_vlan = theirs.vlan_ids().first().map_or(0, |id| id.value());
        assert_eq!(ours.vlan, their_vlan);
        let Some(TransportSlice::Icmpv6(icmp)) = &theirs.transport else {
            panic!("not ICMPv6 for etherparse");
        };
        assert!(icmp.is_checksum_valid(ours.header.source, ours.header.destination));
        let extensions =
            ipv6::walk::<_, 8>(bytes, ours.header.next_header, ours.payload, bytes.len()).unwrap();
        assert!(extensions.router_alert);
        assert_eq!(extensions.offset, bytes.len() - icmp.slice().len());
    }
}

#[test]
fn ethernet_tag_is_read_from_frame_or_metadata() {
    let tagged = Frame::v1(131, GROUP)
        .with(|frame| frame.vlan = Some(0x6005))
        .bytes();
    let header = ethernet::parse(&tagged[..]).unwrap();
    assert_eq!((header.vlan, header.payload, header.source), (5, 18, MAC));
    let untagged = Frame::v1(131, GROUP).bytes();
    let frame = crate::snoop::Frame {
        bytes: &untagged,
        vlan_metadata: 0x1009,
    };
    let header = ethernet::parse(&frame).unwrap();
    assert_eq!((header.vlan, header.payload), (9, 14));
    let twice = crate::snoop::Frame {
        bytes: &tagged,
        vlan_metadata: 9,
    };
    assert_eq!(mld::ipv6_frame(&twice), None);
}

#[test]
fn version_of_a_query_is_told_by_its_length() {
    let query = |length: usize| {
        let frame = Frame::query("::", 10_000, Some((0x0a, 20)));
        match parse(&frame.with(|frame| frame.body.truncate(length)).bytes()) {
            Ok(Message::Query(query)) => Ok(query.version),
            Ok(other) => panic!("{other:?} is not a Query"),
            Err(reason) => Err(reason),
        }
    };
    assert_eq!(query(24), Ok(1));
    assert_eq!(query(28), Ok(2));
    for length in [23, 25, 26, 27] {
        assert_eq!(
            query(length),
            Err(NoMessage::Malformed(Counter::MalformedLength))
        );
    }
}

#[test]
fn query_without_values_has_the_defaults_of_the_rfc() {
    let Ok(Message::Query(query)) = parse(&Frame::query("::", 1000, Some((0, 0))).bytes()) else {
        panic!("not a Query");
    };
    assert_eq!((query.robustness, query.query_interval_seconds), (2, 125));
}

#[test]
fn query_from_the_unspecified_address_is_malformed_and_a_report_is_not() {
    let query = Frame::query("::", 1000, None).with(|frame| frame.source = [0; 16]);
    let malformed = Err(NoMessage::Malformed(Counter::MalformedSource));
    assert_eq!(parse(&query.bytes()), malformed);
    let report = Frame::v1(131, GROUP).with(|frame| frame.source = [0; 16]);
    assert_eq!(
        parse(&report.bytes()),
        Ok(Message::ReportV1(address(GROUP)))
    );
}

#[test]
fn codes_are_floating_point_above_their_limit() {
    assert_eq!(mld::max_response_delay_ms(0x7fff), 32767);
    assert_eq!(mld::max_response_delay_ms(0x8000), 32768);
    assert_eq!(mld::max_response_delay_ms(0xffff), 8_387_584);
    assert_eq!(mld::query_interval_seconds(127), 127);
    assert_eq!(mld::query_interval_seconds(128), 128);
    assert_eq!(mld::query_interval_seconds(0xff), 31744);
}

#[test]
fn options_beyond_the_bound_are_unfinished_here_and_read_there() {
    let options = vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 2, 0, 0];
    let bytes = Frame::v1(131, GROUP)
        .with(|frame| frame.options = Some(options))
        .bytes();
    assert_eq!(parse(&bytes), Err(NoMessage::Unfinished));
    assert_eq!(parse_all(&bytes), Ok(Message::ReportV1(address(GROUP))));
}

#[test]
fn mld_is_hidden_behind_extension_headers_that_a_bridge_passes() {
    let zeros = || vec![0, 0, 0, 0, 0, 0, 0];
    let is_hidden = |headers| {
        let bytes = Frame::v1(131, GROUP)
            .with(|frame| frame.headers = headers)
            .bytes();
        let frame = mld::ipv6_frame(&bytes[..]).unwrap();
        assert!(parse(&bytes).is_err() || !mld::is_hidden(&bytes[..], &frame));
        mld::is_hidden(&bytes[..], &frame)
    };
    for kind in [60, 43, 51] {
        assert!(is_hidden(vec![(kind, zeros())]), "{kind}");
        assert!(is_hidden(vec![(44, zeros()), (kind, zeros())]), "{kind}");
    }
    assert!(!is_hidden(vec![]));
    // `parse` finds this message.
    assert!(!is_hidden(vec![(44, zeros())]));
    // A later fragment, which a bridge does not inspect.
    assert!(!is_hidden(vec![
        (44, vec![0, 0, 8, 0, 0, 0, 0]),
        (60, zeros())
    ]));
}

#[test]
fn other_traffic_is_not_mld() {
    let echo = Frame::icmpv6(vec![128, 0, 0, 0, 0, 1, 0, 1], "ff02::1");
    let later_fragment =
        Frame::v1(131, GROUP).with(|frame| frame.headers = vec![(44, vec![0, 0, 8, 0, 0, 0, 1])]);
    let udp = Frame::udp("fe80::1", GROUP, (1, 2), b"payload");
    for frame in [echo, later_fragment, udp] {
        assert_eq!(parse(&frame.bytes()), Err(NoMessage::Other), "{frame:?}");
    }
}

#[test]
fn udp_ports_are_read_and_a_short_header_is_not() {
    let bytes = Frame::udp("fe80::1", GROUP, (5000, 47411), b"").bytes();
    let ports = udp::parse(&bytes[..], 54).unwrap();
    assert_eq!((ports.source, ports.destination), (5000, 47411));
    assert!(udp::parse(&bytes[..bytes.len() - 1], 54).is_err());
}

#[test]
fn longest_sum_folds_without_overflow() {
    let bytes = [0xff; checksum::MAX_BYTES];
    let sum = checksum::sum(&bytes[..], 0, bytes.len()).unwrap();
    assert_eq!(checksum::fold(sum), 0xffff);
    assert!(checksum::sum(&[0; 3000][..], 0, checksum::MAX_BYTES + 1).is_err());
}

proptest! {
    #[test]
    fn sum_is_that_of_rfc_1071(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        offset in 0..32_usize,
    ) {
        let offset = offset.min(bytes.len());
        let mut expected = 0_u64;
        for pair in bytes[offset..].chunks(2) {
            expected += u64::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u64::from(*low));
        }
        while expected > 0xffff {
            expected = (expected & 0xffff) + (expected >> 16);
        }
        let sum = checksum::sum(&bytes[..], offset, bytes.len() - offset).unwrap();
        prop_assert_eq!(u64::from(u16::from_be(checksum::fold(sum))), expected);
    }

    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse_all(&bytes);
        let _ = ipv6::walk::<_, 2048>(&bytes[..], 0, 0, bytes.len());
    }

    #[test]
    fn changed_report_never_panics(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let records: Vec<_> = (1..7).map(|kind| record(kind, GROUP, &["2001:db8::1"])).collect();
        let mut bytes = Frame::report(&records).bytes();
        for (index, byte) in changes {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(Message::ReportV2(records)) = parse_all(&bytes) {
            let _ = mld::check_records::<_, 102>(&bytes[..], &records);
        }
    }
}
