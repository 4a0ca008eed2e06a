//! Life of a session.

use std::time::Duration;

use common::maps::{FilterMode, MAX_SUBSCRIBERS};
use common::signal::{PeerMessage, RelayRelease};

use super::fixture::*;
use crate::proto::PeerEvent;

#[test]
fn request_joins_and_is_answered_with_the_flows_that_the_agent_names() {
    let mut bench = Bench::new();
    let flow = stream(group(1), source(1), 4000);
    let mut asked = request(group(1), agent_address(1));
    asked.flows = vec![known(&flow)];
    let response = bench.serve("vms1", 7, &asked);
    assert_eq!(*response.relay_address, address("2001:db8:5::5").octets());
    assert_eq!(response.lease_ms, 30_000);
    assert_eq!(response.flows.len(), 1);
    assert_eq!(response.flows[0].source_port, 4000);
    assert_eq!(bench.kernel.streams[&flow].subscribers, 1);
    assert!(bench.kernel.joined.contains_key(&key(group(1))));
}

#[test]
fn new_port_is_announced_to_every_session_that_wants_its_source() {
    let mut bench = Bench::new();
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    let mut picky = request(group(1), agent_address(2));
    picky.filter_mode = FilterMode::Include as u8;
    picky.sources = vec![source(2).octets().into()];
    bench.serve("vms2", 2, &picky);
    bench.packet(&stream(group(1), source(1), 4000));
    assert_eq!(bench.response("vms1", 1).flows.len(), 1);
    bench.packet(&stream(group(1), source(2), 4000));
    assert_eq!(bench.frames.len(), 2);
    bench.frames.clear();
    // A repeated packet changes nothing.
    bench.packet(&stream(group(1), source(2), 4000));
    assert!(bench.frames.is_empty());
}

#[test]
fn flow_known_from_others_is_there_before_the_response() {
    let mut bench = Bench::new();
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    let flow = stream(group(1), source(1), 4000);
    bench.packet(&flow);
    let response = bench.serve("vms2", 2, &request(group(1), agent_address(2)));
    assert_eq!(response.flows.len(), 1);
    assert_eq!(bench.kernel.streams[&flow].subscribers, 2);
    // A flow that one agent only named is not sent to another agent.
    let mut naming = request(group(1), agent_address(1));
    naming.flows = vec![known(&stream(group(1), source(3), 1))];
    assert_eq!(bench.serve("vms1", 1, &naming).flows.len(), 2);
    let response = bench.serve("vms3", 3, &request(group(1), agent_address(3)));
    assert_eq!(response.flows.len(), 1);
}

#[test]
fn another_transaction_takes_the_session_over_with_its_ports() {
    let mut bench = Bench::new();
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    bench.packet(&stream(group(1), source(1), 4000));
    let before = bench.response("vms1", 1);
    let after = bench.serve("vms1", 2, &request(group(1), agent_address(1)));
    assert_eq!(before, after);
    assert_eq!(bench.relay.sessions().count(), 1);
    bench.release("vms1", 1);
    assert_eq!(bench.relay.sessions().count(), 1, "the old name is void");
    bench.release("vms1", 2);
    assert_eq!(bench.relay.sessions().count(), 0);
}

#[test]
fn renewal_moves_the_lease_and_its_absence_ends_the_session() {
    let mut bench = Bench::new();
    let asked = request(group(1), agent_address(1));
    bench.serve("vms1", 1, &asked);
    bench.packet(&stream(group(1), source(1), 4000));
    bench.wait(HELD - Duration::from_secs(1));
    bench.serve("vms1", 1, &asked);
    bench.relay.handle_peer(
        bench.now,
        "vms1",
        PeerEvent::Down {
            reason: "gone".to_owned(),
        },
    );
    bench.wait(HELD - Duration::from_secs(1));
    assert_eq!(
        bench.kernel.subscribers.len(),
        1,
        "a lost connection is no release"
    );
    bench
        .relay
        .handle_peer(bench.now, "vms1", PeerEvent::Up { from: None });
    bench.wait(Duration::from_secs(1));
    assert!(bench.kernel.subscribers.is_empty());
    assert!(bench.kernel.joined.is_empty());
    match bench.frames.as_slice() {
        [(_, 1, PeerMessage::RelayRelease(RelayRelease(reason)))] => {
            assert_eq!(reason.text, "The session was not renewed for 30 s");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(bench.relay.counters().expired_sessions, 1);
    assert_eq!(bench.relay.poll_timeout(), None);
}

#[test]
fn merged_filter_is_joined_and_narrowed_again() {
    let mut bench = Bench::new();
    let mut include = request(group(1), agent_address(1));
    include.filter_mode = FilterMode::Include as u8;
    include.sources = vec![source(1).octets().into()];
    bench.serve("vms1", 1, &include);
    assert_eq!(bench.kernel.joined[&key(group(1))].sources, [source(1)]);
    bench.serve("vms2", 2, &request(group(1), agent_address(2)));
    let joined = &bench.kernel.joined[&key(group(1))];
    assert_eq!(joined.filter_mode, FilterMode::Exclude);
    bench.release("vms2", 2);
    assert_eq!(bench.kernel.joined[&key(group(1))].sources, [source(1)]);
}

#[test]
fn changed_filter_changes_the_flows() {
    let mut bench = Bench::new();
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    bench.packet(&stream(group(1), source(1), 4000));
    bench.packet(&stream(group(1), source(2), 4000));
    let mut include = request(group(1), agent_address(1));
    include.filter_mode = FilterMode::Include as u8;
    include.sources = vec![source(2).octets().into()];
    let response = bench.serve("vms1", 1, &include);
    assert_eq!(response.flows.len(), 1);
    assert_eq!(*response.flows[0].source, source(2).octets());
    let response = bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    assert_eq!(response.flows.len(), 2);
}

#[test]
fn agent_that_has_moved_gets_its_copies_there() {
    let mut bench = Bench::new();
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    bench.packet(&stream(group(1), source(1), 4000));
    bench.frames.clear();
    let response = bench.serve("vms1", 1, &request(group(1), agent_address(7)));
    assert_eq!(response.flows.len(), 1);
    assert!(
        bench
            .kernel
            .subscribers
            .values()
            .all(|it| it.agent_address == agent_address(7).octets())
    );
}

#[test]
fn silent_flow_is_given_up_and_not_taken_up_for_being_named_again() {
    let mut bench = Bench::new();
    let flow = stream(group(1), source(1), 4000);
    let mut asked = request(group(1), agent_address(1));
    asked.flows = vec![known(&flow)];
    bench.serve("vms1", 1, &asked);
    for _ in 0..60 {
        bench.wait(Duration::from_secs(11));
        bench.read(&[]);
        bench.frames.clear();
        bench.ask("vms1", 1, &asked);
    }
    assert!(bench.response("vms1", 1).flows.is_empty());
    assert!(bench.kernel.streams.is_empty());
    bench.packet(&flow);
    assert_eq!(bench.response("vms1", 1).flows.len(), 1);
}

#[test]
fn flow_whose_event_was_lost_is_found_by_reading() {
    let mut bench = Bench::new();
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    let flow = stream(group(1), source(1), 4000);
    bench.wait(Duration::from_secs(5));
    bench.read(&[(flow, bench.flowing(10))]);
    assert_eq!(bench.response("vms1", 1).flows.len(), 1);
}

#[test]
fn index_of_a_subscriber_that_left_is_used_again_and_the_others_stay() {
    let mut bench = Bench::new();
    let flow = stream(group(1), source(1), 4000);
    for number in 1..=3 {
        bench.ask(
            &format!("vms{number}"),
            number.into(),
            &request(group(1), agent_address(number)),
        );
    }
    bench.packet(&flow);
    bench.release("vms2", 2);
    assert_eq!(bench.kernel.streams[&flow].subscribers, 3);
    bench.ask("vms4", 4, &request(group(1), agent_address(4)));
    assert_eq!(bench.kernel.streams[&flow].subscribers, 3);
    bench.release("vms4", 4);
    bench.release("vms3", 3);
    assert_eq!(bench.kernel.streams[&flow].subscribers, 1);
}

#[test]
fn flow_has_no_more_subscribers_than_the_kernel_looks_at() {
    let mut config = config();
    config.limits.sessions = 5000;
    let mut bench = Bench::with(config);
    let flow = stream(group(1), source(1), 4000);
    for number in 0..=u16::try_from(MAX_SUBSCRIBERS).unwrap() {
        // The checks after every step would take minutes.
        let request = request(group(1), agent_address(number + 1));
        let frame = PeerMessage::from(request).encode(number.into());
        let agent = format!("vms{number}");
        bench
            .relay
            .handle_peer(bench.now, &agent, PeerEvent::Frame(frame.into()));
    }
    bench.packet(&flow);
    assert_eq!(bench.kernel.streams[&flow].subscribers, MAX_SUBSCRIBERS);
    assert_eq!(bench.relay.counters().refused_flows, 1);
}

#[test]
fn unreachable_agent_and_failed_join_are_refused_and_undone() {
    let mut bench = Bench::new();
    bench.reachable = Err("no route".to_owned());
    let reason = bench.refused("vms1", &request(group(1), agent_address(1)));
    assert_eq!(reason, "Relay relay1 cannot reach 2001:db8:2::1: no route");
    bench.reachable = Ok(());
    bench.join_failure = Some("no interface".to_owned());
    let reason = bench.refused("vms1", &request(group(1), agent_address(1)));
    assert_eq!(reason, "Relay relay1 cannot serve ff0e::77:1: no interface");
    assert_eq!(bench.relay.sessions().count(), 0);
    bench.join_failure = None;
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
}

#[test]
fn frames_that_are_not_for_a_relay_are_answered_or_counted() {
    let mut bench = Bench::new();
    bench
        .relay
        .handle_peer(bench.now, "vms1", PeerEvent::Frame(vec![1, 2, 3].into()));
    bench.settle();
    assert_eq!(bench.relay.counters().malformed_frames, 1);
    assert!(bench.frames.is_empty());
}
