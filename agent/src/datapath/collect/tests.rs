use super::*;
use common::maps::NO_BRIDGE;

const S: u64 = 1_000_000_000;
const HOUR: Duration = Duration::from_secs(3600);
const NOW: Timestamp = Timestamp(10_000 * S);

fn key(source_port: u16) -> StreamKey {
    StreamKey {
        multicast_address: [0xff; 16],
        source: [0x20; 16],
        source_port,
        destination_port: 5004,
        vlan: 0,
        bridge: NO_BRIDGE,
    }
}

fn flow(source_port: u16, packets: u64, silent_s: u64) -> (StreamKey, StreamUsage) {
    let usage = StreamUsage {
        packets,
        last_ns: NOW.0 - silent_s * S,
        ..StreamUsage::default()
    };
    (key(source_port), usage)
}

fn gone_of(flows: &[(StreamKey, StreamUsage)], room: &Room<'_>) -> Vec<u16> {
    let gone = superfluous(NOW, flows, room, HOUR);
    gone.iter().map(|key| key.source_port).collect()
}

fn gone(flows: &[(StreamKey, StreamUsage)], share: usize, is_full: bool) -> Vec<u16> {
    let room = Room {
        share,
        is_crowded: is_full || is_half_full(flows.len(), share),
        included: None,
    };
    gone_of(flows, &room)
}

#[test]
fn flows_of_sources_that_no_listener_wants_make_room_first() {
    let mut flows = [flow(1, 9000, 1), flow(2, 9000, 0), flow(3, 9000, 0)];
    flows[1].0.source = [0x66; 16];
    let wanted = HashSet::from([key(1).source]);
    let room = |is_crowded| Room {
        share: 4,
        is_crowded,
        included: Some(&wanted),
    };
    assert_eq!(gone_of(&flows, &room(true)), [2]);
    assert_eq!(gone_of(&flows, &room(false)), [0; 0]);
}

#[test]
fn sources_are_wanted_of_lists_only_where_no_listener_wants_all() {
    let address = |ifindex, last| ListenerKey {
        ifindex,
        vlan: 0,
        bridge: NO_BRIDGE,
        multicast_address: [last; 16],
    };
    let listener = |filter_mode: FilterMode| Listener {
        filter_mode: filter_mode as u8,
        ..Listener::NONE
    };
    let listeners = [
        (address(1, 1), listener(FilterMode::Include)),
        (address(2, 1), listener(FilterMode::Include)),
        (address(1, 2), listener(FilterMode::Include)),
        (address(2, 2), listener(FilterMode::Exclude)),
    ];
    let source = |listener, last| {
        let key = SourceKey {
            listener,
            source: [last; 16],
        };
        let source = Source {
            last_report_ns: 0,
            generation: 0,
            filter_mode: FilterMode::Include as u8,
            pad: [0; 3],
        };
        (key, source)
    };
    let sources = [
        source(address(1, 1), 7),
        source(address(2, 1), 8),
        source(address(1, 2), 9),
    ];
    let of_one = HashSet::from([[7; 16], [8; 16]]);
    assert_eq!(
        included(&listeners, &sources),
        HashMap::from([(address(1, 1).managed(), of_one)])
    );
}

#[test]
fn flow_stays_for_an_hour_where_there_is_room() {
    let flows = [flow(1, 1, 3500), flow(2, 9000, 3700)];
    assert_eq!(gone(&flows, 100, false), [2]);
}

#[test]
fn flows_of_few_packets_make_room_in_a_share_or_a_map_that_is_half_full() {
    let flows = [flow(1, 2, 11), flow(2, 3, 11), flow(3, 1, 9)];
    assert_eq!(gone(&flows, 4, false), [1]);
    assert_eq!(gone(&flows, 100, true), [1]);
    assert_eq!(gone(&flows, 100, false), [0; 0]);
}

#[test]
fn a_stream_outlives_any_number_of_made_up_flows() {
    let mut flows: Vec<_> = (0..99).map(|port| flow(port, 50, 1)).collect();
    flows.push(flow(5004, 90_000, 0));
    let gone = gone(&flows, 100, false);
    assert_eq!(gone.len(), 25);
    assert!(!gone.contains(&5004));
}

#[test]
fn flows_of_an_address_that_is_not_managed_go() {
    assert_eq!(gone(&[flow(1, 90_000, 0)], 0, false), [1]);
}

fn delivered(ifindex: u32, port: u16, packets: u64) -> (DeliveredKey, Delivered) {
    let stream = key(port);
    let bytes = packets * 100;
    (
        DeliveredKey { ifindex, stream },
        Delivered { packets, bytes },
    )
}

#[test]
fn flow_into_a_crowded_tap_goes_once_it_passes_nothing_between_two_looks() {
    let shares = HashMap::from([(4, 4), (5, 100)]);
    let first = [
        delivered(4, 1, 10),
        delivered(4, 2, 1),
        delivered(4, 3, 1),
        delivered(5, 1, 1),
    ];
    let (silent, passed) = crowding(&first, &shares, &Passed::new());
    assert_eq!(silent, []);
    let mut second = first;
    second[0].1.packets = 11;
    let (silent, passed) = crowding(&second, &shares, &passed);
    assert_eq!(silent, [first[1].0, first[2].0]);
    assert_eq!(passed, Passed::from([(first[0].0, 11)]));
}
