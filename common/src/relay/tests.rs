use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::maps::{BridgeNumber, CopyCounts, Origin, Origins};
use crate::wire::datagram::{HEADER_BYTES, Header};

/// MACs of the route to the agent.
const MACS: [[u8; 6]; 2] = [[4; 6], [6; 6]];
const STREAM: StreamKey = StreamKey {
    multicast_address: [0xff; 16],
    source: [1; 16],
    source_port: 1,
    destination_port: 2,
    vlan: 0,
    bridge: BridgeNumber::FIRST,
};

prop_compose! {
    fn any_stream()(
        multicast_address: Address,
        source: Address,
        source_port: u16,
        destination_port: u16,
    ) -> StreamKey {
        let mut multicast_address = multicast_address;
        multicast_address[0] = 0xff;
        StreamKey { multicast_address, source, source_port, destination_port, ..STREAM }
    }
}

/// Endpoints of a relayed flow for a stream.
fn endpoints(stream: &StreamKey, relay: Address, agent: Address, relay_port: u16) -> Endpoints {
    Endpoints {
        relay_address: relay,
        relay_port,
        agent_address: agent,
        agent_port: agent_port(stream, &relay, &agent, relay_port),
    }
}

fn subscriber(stream: &StreamKey, endpoints: &Endpoints) -> Subscriber {
    let address_difference = to_agent(stream, endpoints);
    Subscriber {
        lease_end_ns: u64::MAX,
        relay_address: endpoints.relay_address,
        agent_address: endpoints.agent_address,
        relay_port: endpoints.relay_port,
        agent_port: endpoints.agent_port,
        address_difference,
    }
}

fn flow(stream: &StreamKey, endpoints: &Endpoints) -> RelayFlow {
    let address_difference = to_multicast(stream, endpoints);
    RelayFlow {
        session: 1,
        stream: *stream,
        agent_address: endpoints.agent_address,
        address_difference,
        pad: 0,
    }
}

/// A frame of a stream with a valid checksum, built byte by byte.
fn frame(stream: &StreamKey, payload: &[u8]) -> Vec<u8> {
    let length = 8 + payload.len() as u16;
    let mut frame = std::vec![0x33, 0x33];
    frame.extend(&stream.multicast_address[12..]);
    frame.extend([2, 0, 0, 0, 0, 9, 0x86, 0xdd, 0x60, 1, 2, 3]);
    frame.extend(length.to_be_bytes());
    frame.extend([17, 9]);
    frame.extend(stream.source);
    frame.extend(stream.multicast_address);
    frame.extend(stream.source_port.to_be_bytes());
    frame.extend(stream.destination_port.to_be_bytes());
    frame.extend(length.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    let checksum = match 0xffff - udp_sum(&frame) {
        0 => 0xffff,
        checksum => checksum,
    };
    frame[60..62].copy_from_slice(&checksum.to_be_bytes());
    frame
}

/// UDP sum by RFC 8200 §8.1; 0xffff for a valid checksum.
fn udp_sum(frame: &[u8]) -> u16 {
    let mut bytes = frame[22..54].to_vec();
    bytes.extend([0, 0, frame[18], frame[19], 0, 0, 0, 17]);
    bytes.extend(&frame[54..]);
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        sum += u32::from(pair[0]) * 256 + u32::from(low);
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn rewritten(frame: &[u8], rewrite: impl FnOnce(&mut Header)) -> Vec<u8> {
    let mut header = Header::read(frame).unwrap();
    rewrite(&mut header);
    let mut frame = frame.to_vec();
    frame[..HEADER_BYTES].copy_from_slice(&header.bytes());
    frame
}

/// Applies a difference as the kernel's `csum_replace_by_diff`.
fn replaced(checksum: u16, difference: u32) -> u16 {
    let sum = u64::from(difference) + u64::from(!u32::from(checksum));
    !checksum::fold(sum)
}

proptest! {
    #[test]
    fn checksum_stays_right_there_and_back(
        stream in any_stream(),
        relay: Address,
        agent: Address,
        relay_port: u16,
        payload in prop::collection::vec(any::<u8>(), 0..200),
    ) {
        let endpoints = endpoints(&stream, relay, agent, relay_port);
        prop_assert!(is_neutral(&stream, &endpoints));
        let native = frame(&stream, &payload);
        prop_assert_eq!(udp_sum(&native), 0xffff);

        let copy = rewritten(&native, |header| send_to(header, &subscriber(&stream, &endpoints), MACS));
        prop_assert_eq!(udp_sum(&copy), 0xffff);
        prop_assert_eq!(copy.len(), native.len());
        prop_assert_eq!(&copy[22..38], &relay[..]);
        prop_assert_eq!(&copy[38..54], &agent[..]);
        prop_assert_eq!(copy[21], 64);
        prop_assert_eq!(&copy[..12], &MACS.concat()[..]);

        let restored = rewritten(&copy, |header| restore(header, &flow(&stream, &endpoints)));
        prop_assert_eq!(udp_sum(&restored), 0xffff);
        prop_assert_eq!(restored[21], 1);
        prop_assert_eq!(&restored[..6], &native[..6]);
        prop_assert_eq!(&restored[6..12], &RESTORED_MAC[..]);
        prop_assert_eq!(&restored[12..21], &native[12..21]);
        prop_assert_eq!(&restored[22..], &native[22..]);
    }

    #[test]
    fn every_flow_has_pairs_of_ports(stream in any_stream(), relay: Address, agent: Address) {
        let pairs: Vec<_> = port_pairs(&stream, &relay, &agent).collect();
        prop_assert!(pairs.len() >= 15_000);
        for (relay_port, agent_port) in pairs.into_iter().step_by(1000) {
            prop_assert!(relay_port >= FIRST_RELAY_PORT && agent_port >= FIRST_PORT);
            let endpoints = Endpoints {
                relay_address: relay,
                relay_port,
                agent_address: agent,
                agent_port,
            };
            prop_assert!(is_neutral(&stream, &endpoints));
        }
    }

    #[test]
    fn wrong_checksum_stays_wrong(
        stream in any_stream(),
        relay: Address,
        agent: Address,
        error in 1_u16..0xffff,
    ) {
        let endpoints = endpoints(&stream, relay, agent, 50_000);
        let mut native = frame(&stream, b"payload");
        native[60] ^= (error >> 8) as u8;
        native[61] ^= error as u8;
        let wrong = udp_sum(&native) != 0xffff;
        let copy = rewritten(&native, |header| send_to(header, &subscriber(&stream, &endpoints), MACS));
        prop_assert_eq!(udp_sum(&copy) != 0xffff, wrong);
    }

    #[test]
    fn differences_of_the_two_rewrites_cancel_out(
        stream in any_stream(),
        relay: Address,
        agent: Address,
        relay_port: u16,
        checksum in 1..=u16::MAX,
    ) {
        let endpoints = endpoints(&stream, relay, agent, relay_port);
        let same = |a: u16, b: u16| a % 0xffff == b % 0xffff;
        prop_assert!(is_neutral(&stream, &endpoints));
        let (there, back) = (to_agent(&stream, &endpoints), to_multicast(&stream, &endpoints));
        prop_assert!(same(replaced(replaced(checksum, there), back), checksum));
    }

    #[test]
    fn difference_of_the_addresses_is_what_changes_an_unfinished_checksum(
        stream in any_stream(),
        relay: Address,
        agent: Address,
    ) {
        let endpoints = endpoints(&stream, relay, agent, 50_000);
        let pseudo = |source: &Address, destination: &Address| {
            checksum::fold(checksum::pseudo_header(source, destination, 100, 17))
        };
        // A partial checksum is the sum itself, not its complement.
        let before = pseudo(&stream.source, &stream.multicast_address);
        let difference = to_agent(&stream, &endpoints);
        let after = checksum::fold(u64::from(before) + u64::from(difference));
        prop_assert_eq!(after, pseudo(&relay, &agent));
        let words = |address: Address| {
            let number = u128::from_ne_bytes(address);
            let (low, high) = (number as u64, (number >> 64) as u64);
            if cfg!(target_endian = "little") { [low, high] } else { [high, low] }
        };
        let addresses = [words(stream.source), words(stream.multicast_address)];
        let length = 100_u16.to_be();
        prop_assert!(checksum::may_be_partial(before.into(), addresses, length, 17));
        prop_assert!(!checksum::may_be_partial(u64::from(before) + 1, addresses, length, 17));
    }

    #[test]
    fn other_ports_are_not_neutral(stream in any_stream(), relay: Address, agent: Address) {
        let mut endpoints = endpoints(&stream, relay, agent, 50_000);
        endpoints.agent_port = match endpoints.agent_port {
            u16::MAX => 1,
            port => port + 1,
        };
        prop_assert!(!is_neutral(&stream, &endpoints));
    }

    #[test]
    fn hop_limit_difference_is_that_of_the_sum_over_the_header(from: u8, to: u8, before: u16) {
        let word = |hop_limit| u16::from_ne_bytes([17, hop_limit]);
        let sum = |hop_limit| checksum::fold(u64::from(before) + u64::from(word(hop_limit)));
        let changed = u64::from(sum(from)) + u64::from(hop_limit_difference(from, to));
        prop_assert_eq!(checksum::fold(changed) % 0xffff, sum(to) % 0xffff);
    }

    #[test]
    fn fingerprint_differs_by_what_it_covers_and_by_nothing_else(
        payload in prop::collection::vec(any::<u8>(), 1..400),
        index: prop::sample::Index,
        stream in any_stream(),
        flow: [u64; 5],
    ) {
        let of = |frame: &[u8]| {
            let header = Header::read(frame).unwrap();
            let length = u16::from_be(header.length) - 8;
            fingerprint(frame, flow, HEADER_BYTES, length, header.checksum).unwrap()
        };
        let native = frame(&stream, &payload);
        let mut other = native.clone();
        other[6] ^= 1;
        other[21] ^= 1;
        prop_assert_eq!(of(&native), of(&other), "MAC and hop limit are not covered");
        let at = index.index(payload.len());
        other[HEADER_BYTES + at] ^= 1;
        let covered = at < 64 || at >= payload.len() - 16.min(payload.len());
        prop_assert_eq!(of(&native) != of(&other), covered, "byte {} of {}", at, payload.len());
        let another = frame(&stream, &other[HEADER_BYTES..]);
        prop_assert_ne!(of(&native), of(&another), "its checksum is another one");
        let mut other_flow = flow;
        other_flow[index.index(5)] ^= 1;
        let length = u16::from_be(Header::read(&native[..]).unwrap().length) - 8;
        let checksum = Header::read(&native[..]).unwrap().checksum;
        let elsewhere = fingerprint(&native[..], other_flow, HEADER_BYTES, length, checksum);
        prop_assert_ne!(of(&native), elsewhere.unwrap());
    }

    #[test]
    fn header_is_read_and_written_alike(bytes in prop::collection::vec(any::<u8>(), HEADER_BYTES)) {
        let header = Header::read(&bytes[..]).unwrap();
        prop_assert_eq!(&header.bytes()[..], &bytes[..]);
        prop_assert!(Header::read(&bytes[1..]).is_err());
    }
}

#[test]
fn port_that_would_be_zero_is_the_other_zero() {
    let stream = StreamKey {
        source: [0; 16],
        ..STREAM
    };
    let port = agent_port(&stream, &[0xff; 16], &[0; 16], 3);
    assert_eq!(port, 0xffff);
}

#[test]
fn datagram_is_whole_only_if_its_lengths_agree_and_it_has_a_checksum() {
    let bytes = frame(&STREAM, b"payload");
    let header = Header::read(&bytes[..]).unwrap();
    assert!(header.is_ipv6());
    assert!(header.is_whole(bytes.len()));
    assert!(header.is_whole(bytes.len() + 5), "padding");
    assert!(!header.is_whole(bytes.len() - 1));
    for change in [
        |header: &mut Header| header.length = 14_u16.to_be(),
        |header: &mut Header| header.payload_length = 14_u16.to_be(),
        |header: &mut Header| header.checksum = 0,
        |header: &mut Header| {
            header.length = 7_u16.to_be();
            header.payload_length = 7_u16.to_be();
        },
    ] {
        let mut broken = header;
        change(&mut broken);
        assert!(!broken.is_whole(bytes.len()), "{broken:?}");
    }
}

#[test]
fn ipv6_packet_is_within_so_many_bytes_only_if_its_header_says_where_it_ends() {
    let bytes = frame(&STREAM, b"payload");
    let header = Header::read(&bytes[..]).unwrap();
    assert!(header.is_ipv6_within(bytes.len()));
    assert!(header.is_ipv6_within(bytes.len() + 5), "padding");
    assert!(!header.is_ipv6_within(bytes.len() - 1));
    for change in [
        |header: &mut Header| header.payload_length = 0,
        |header: &mut Header| header.ether_type = 0x8100_u16.to_be(),
    ] {
        let mut other = header;
        change(&mut other);
        assert!(!other.is_ipv6_within(bytes.len()), "{other:?}");
    }
}

const NATIVE: Origin = Origin::Native;
const RELAY: Origin = Origin::Relay;

/// Returns which of the copies pass.
fn passing(origins: Origins, copies: &[Origin]) -> Vec<bool> {
    let mut counts = CopyCounts::default();
    copies
        .iter()
        .map(|origin| {
            let (after, passes) = count_copy(counts, *origin, origins as u8);
            counts = CopyCounts::from_word(after.word());
            assert_eq!(counts, after);
            passes
        })
        .collect()
}

#[test]
fn first_copy_of_each_packet_passes_whichever_way_it_came() {
    let both = |copies: &[Origin]| passing(Origins::Both, copies);
    assert_eq!(both(&[NATIVE, RELAY]), [true, false]);
    assert_eq!(both(&[RELAY, NATIVE]), [true, false]);
    assert_eq!(both(&[NATIVE, NATIVE]), [true, true], "two of one content");
    assert_eq!(
        both(&[NATIVE, NATIVE, RELAY, RELAY, RELAY]),
        [true, true, false, false, true]
    );
    assert_eq!(
        both(&[RELAY, NATIVE, NATIVE, RELAY]),
        [true, false, true, false]
    );
}

#[test]
fn recorded_relay_passes_and_native_is_only_counted() {
    assert_eq!(
        passing(Origins::RelayRecorded, &[NATIVE, RELAY, RELAY, NATIVE]),
        [false, true, true, false]
    );
}

#[test]
fn native_after_relay_passes_unless_a_relayed_copy_has() {
    assert_eq!(
        passing(Origins::NativeAfterRelay, &[RELAY, NATIVE, NATIVE]),
        [false, true, true]
    );
    let mut counts = CopyCounts::default();
    for (origin, origins, expected) in [
        (RELAY, Origins::Both, true),
        (NATIVE, Origins::NativeAfterRelay, false),
        (NATIVE, Origins::NativeAfterRelay, true),
    ] {
        let (after, passes) = count_copy(counts, origin, origins as u8);
        counts = after;
        assert_eq!(passes, expected);
    }
}

#[test]
fn counts_that_wrap_lose_nothing() {
    let mut counts = CopyCounts::default();
    for _ in 0..70_000 {
        for (origin, expected) in [(NATIVE, true), (RELAY, false)] {
            let (after, passes) = count_copy(counts, origin, Origins::Both as u8);
            counts = after;
            assert_eq!(passes, expected);
        }
    }
}
