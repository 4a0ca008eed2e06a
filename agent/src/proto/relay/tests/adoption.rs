//! A relay that adopts the state of an earlier relay.

use std::time::Duration;

use common::maps::{FilterMode, SubscriberKey};

use super::fixture::*;

#[test]
fn restarted_relay_serves_on_with_the_same_ports_until_the_agent_asks_again() {
    let mut bench = Bench::new();
    let asked = request(group(1), agent_address(1));
    bench.serve("vms1", 1, &asked);
    bench.packet(&stream(group(1), source(1), 4000));
    let before = bench.response("vms1", 1);
    let entries = bench.kernel.subscribers.clone();
    bench.wait(Duration::from_secs(5));
    bench.restart();
    let mut longer = entries.clone();
    for entry in longer.values_mut() {
        entry.lease_end_ns = (bench.now + HELD).0;
    }
    assert_eq!(bench.kernel.subscribers, longer, "only leases are touched");
    assert_eq!(bench.relay.sessions().next().unwrap().agent, None);
    assert_eq!(bench.serve("vms1", 2, &asked), before);
    assert_eq!(bench.relay.sessions().count(), 1);
    bench.packet(&stream(group(1), source(1), 4001));
    let after = bench.response("vms1", 2);
    assert!(after.flows.contains(&before.flows[0]));
}

#[test]
fn what_nobody_renews_after_a_restart_ends_with_its_lease() {
    let mut bench = Bench::new();
    for number in 1..=2 {
        bench.ask(
            &format!("vms{number}"),
            1,
            &request(group(number), agent_address(number)),
        );
        bench.packet(&stream(group(number), source(1), 4000));
    }
    bench.wait(Duration::from_secs(10));
    bench.restart();
    bench.serve("vms2", 1, &request(group(2), agent_address(2)));
    bench.wait(HELD - Duration::from_secs(1));
    assert_eq!(bench.kernel.subscribers.len(), 2);
    bench.serve("vms2", 1, &request(group(2), agent_address(2)));
    bench.wait(Duration::from_secs(1));
    assert_eq!(bench.kernel.subscribers.len(), 1);
    assert!(!bench.kernel.joined.contains_key(&key(group(1))));
    assert!(bench.kernel.joined.contains_key(&key(group(2))));
}

#[test]
fn joins_and_entries_that_serve_nobody_are_removed_at_once() {
    let mut bench = Bench::new();
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    bench.packet(&stream(group(1), source(1), 4000));
    // A session without flows leaves only its join.
    bench.frames.clear();
    bench.serve("vms1", 2, &request(group(2), agent_address(1)));
    bench.now = bench.now + HELD * 2;
    bench.restart();
    assert!(bench.kernel.joined.is_empty());
    assert!(bench.kernel.managed.is_empty());
    assert!(bench.kernel.subscribers.is_empty());
    assert!(bench.kernel.streams.is_empty());
}

#[test]
fn join_with_sources_is_made_again_for_the_sources_of_the_flows() {
    let mut bench = Bench::new();
    let mut asked = request(group(1), agent_address(1));
    asked.filter_mode = FilterMode::Include as u8;
    asked.sources = vec![source(1).octets().into(), source(2).octets().into()];
    bench.serve("vms1", 1, &asked);
    bench.packet(&stream(group(1), source(2), 4000));
    bench.restart();
    let joined = &bench.kernel.joined[&key(group(1))];
    assert_eq!(joined.filter_mode, FilterMode::Include);
    assert_eq!(joined.sources, [source(2)]);
    bench.serve("vms1", 1, &asked);
    assert_eq!(bench.kernel.joined[&key(group(1))].sources.len(), 2);
}

#[test]
fn subscribers_that_no_relay_has_written_so_are_not_adopted() {
    let mut bench = Bench::new();
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    let flow = stream(group(1), source(1), 4000);
    bench.packet(&flow);
    let (key, value) = bench.kernel.subscribers.pop_first().unwrap();
    let mut wrong = value;
    wrong.agent_port ^= 1;
    bench.kernel.subscribers.insert(key, wrong);
    let stray = SubscriberKey { flow: 77, index: 0 };
    bench.kernel.subscribers.insert(stray, value);
    bench.restart();
    assert!(bench.kernel.subscribers.is_empty());
    assert!(bench.kernel.streams.is_empty());
}

#[test]
fn relay_with_another_address_begins_anew() {
    let mut bench = Bench::new();
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    bench.packet(&stream(group(1), source(1), 4000));
    let mut moved = config();
    moved.address = address("2001:db8:5::6");
    bench.restart_with(moved);
    assert!(bench.kernel.subscribers.is_empty());
    assert_eq!(bench.relay.sessions().count(), 0);
}
