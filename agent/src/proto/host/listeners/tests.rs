//! Tests of the mirror.

use std::time::Duration;

use common::maps::{FilterMode, Managed, ManagedKey, Origins, Querier, QuerierKey, SourceKey};

use crate::proto::tests::fixture::{BRIDGE, Bench, TAP, key, listener, listener_key};
use crate::proto::{DatapathEvent, MdbEntry, Output};

const S: Duration = Duration::from_secs(1);

fn is_expiry(output: &Output) -> bool {
    matches!(output, Output::ExpireListener { .. })
}

fn is_read_again(output: &Output) -> bool {
    matches!(output, Output::ReadListeners { .. })
}

fn querier(interval_ms: u32, response_ms: u32, robustness: u8) -> (QuerierKey, Querier) {
    let key = QuerierKey {
        ifindex: 2,
        vlan: 0,
        bridge: BRIDGE,
    };
    let value = Querier {
        last_query_ns: 0,
        address: [0xfe; 16],
        query_interval_ms: interval_ms,
        query_response_interval_ms: response_ms,
        robustness,
        mld_version: 2,
        pad: [0; 3],
    };
    (key, value)
}

#[test]
fn listener_that_is_not_reported_again_is_read_and_then_expired() {
    let mut bench = Bench::housing();
    bench.report(TAP, key(1), FilterMode::Exclude);
    let reported = bench.now;
    bench.outputs();
    bench.pass(269 * S);
    assert!(!bench.outputs().iter().any(is_expiry));
    bench.pass(S);
    let listener_key = listener_key(TAP, key(1));
    assert!(bench.outputs().contains(&Output::ReadListeners {
        listeners: vec![listener_key],
        sources: vec![],
    }));
    // The kernel's entry is as old as the mirror's entry.
    bench.datapath(DatapathEvent::Listener {
        change: common::event::Change::Updated,
        key: listener_key,
        value: listener(reported, FilterMode::Exclude),
    });
    bench.pass(2 * S);
    assert!(bench.outputs().contains(&Output::ExpireListener {
        key: listener_key,
        last_report_ns: reported.0,
    }));
    bench.leave(TAP, key(1));
    assert_eq!(bench.agent.view().listeners().count(), 0);
    assert!(bench.outputs().contains(&Output::Unmanage(key(1))));
    bench.pass(1000 * S);
    assert!(!bench.outputs().iter().any(is_expiry));
}

#[test]
fn listener_reported_without_an_event_is_kept_when_it_is_read() {
    let mut bench = Bench::housing();
    bench.report(TAP, key(1), FilterMode::Exclude);
    bench.pass(270 * S);
    bench.outputs();
    bench.report(TAP, key(1), FilterMode::Exclude);
    bench.pass(269 * S);
    assert!(!bench.outputs().iter().any(is_expiry));
}

#[test]
fn forged_query_expires_nothing_that_was_reported_or_answers_it() {
    let mut bench = Bench::housing();
    let query = |bench: &mut Bench, interval_ms, robustness| {
        let (key, mut value) = querier(interval_ms, 0, robustness);
        value.last_query_ns = bench.now.0;
        bench.datapath(DatapathEvent::Query { key, value });
    };
    query(&mut bench, 600_000, 2);
    for address in [1, 2] {
        bench.report(TAP, key(address), FilterMode::Exclude);
    }
    query(&mut bench, 1000, 1);
    bench.report(TAP, key(1), FilterMode::Exclude);
    bench.outputs();
    bench.pass(1199 * S);
    assert!(!bench.outputs().iter().any(is_expiry));
}

#[test]
fn longer_interval_of_a_querier_holds_for_what_is_there() {
    let mut bench = Bench::housing();
    bench.report(TAP, key(1), FilterMode::Exclude);
    let (key, mut value) = querier(600_000, 10_000, 2);
    value.last_query_ns = bench.now.0;
    bench.datapath(DatapathEvent::Query { key, value });
    bench.outputs();
    bench.pass(1219 * S);
    assert!(!bench.outputs().iter().any(is_read_again));
    bench.pass(S);
    assert!(bench.outputs().iter().any(is_read_again));
}

#[test]
fn address_is_watched_from_its_first_listener_to_its_last() {
    let mut bench = Bench::housing();
    bench.port(TAP + 1, "vnet1");
    bench.report(TAP, key(1), FilterMode::Exclude);
    let managed = Output::Manage {
        key: key(1),
        since: bench.now,
        origins: Origins::Native,
    };
    assert!(bench.outputs().contains(&managed));
    bench.report(TAP + 1, key(1), FilterMode::Exclude);
    bench.leave(TAP, key(1));
    assert_eq!(bench.outputs(), []);
    bench.leave(TAP + 1, key(1));
    assert_eq!(bench.outputs(), [Output::Unmanage(key(1))]);
}

#[test]
fn adopted_address_whose_listener_left_before_the_rest_was_known_is_given_up_once() {
    let mut bench = Bench::housing();
    let value = Managed::new(bench.now.0, Origins::Native, u16::MAX);
    let managed = vec![(key(1), value)];
    bench.agent.handle_pinned(bench.now, managed, Vec::new());
    bench.report(TAP, key(1), FilterMode::Exclude);
    bench.outputs();
    bench.leave(TAP, key(1));
    assert_eq!(bench.outputs(), [Output::Unmanage(key(1))]);
    bench.agent.handle_adopted(bench.now);
    assert_eq!(bench.outputs(), []);
}

#[test]
fn unplugged_tap_is_pruned_only_from_addresses_that_nobody_else_listens_to() {
    let mut bench = Bench::housing();
    bench.port(TAP + 1, "vnet1");
    bench.report(TAP, key(1), FilterMode::Exclude);
    bench.report(TAP, key(2), FilterMode::Exclude);
    bench.report(TAP + 1, key(2), FilterMode::Exclude);
    bench.outputs();
    bench.unplug(TAP);
    assert_eq!(
        bench.outputs(),
        [Output::Prune(key(1)), Output::Unmanage(key(1))]
    );
}

#[test]
fn link_local_addresses_are_shown_but_never_watched() {
    let mut bench = Bench::housing();
    let mdns = ManagedKey {
        vlan: 0,
        bridge: BRIDGE,
        multicast_address: "ff02::fb".parse::<std::net::Ipv6Addr>().unwrap().octets(),
    };
    bench.report(TAP, mdns, FilterMode::Exclude);
    bench.unplug(TAP);
    assert_eq!(bench.outputs(), []);
}

#[test]
fn sources_of_an_older_list_are_not_part_of_the_filter() {
    let mut bench = Bench::housing();
    let (old, new) = (
        "2001:db8::1".parse().unwrap(),
        "2001:db8::2".parse().unwrap(),
    );
    bench.source(TAP, key(1), old, 0);
    bench.source(TAP, key(1), new, 1);
    bench.report(TAP, key(1), FilterMode::Include);
    let view = bench.agent.view().listeners_of_port(TAP).next().unwrap();
    assert_eq!(view.sources, [new]);
}

#[test]
fn ports_listeners_are_only_its_own() {
    let mut bench = Bench::housing();
    bench.port(TAP + 1, "vnet1");
    for number in 0..5 {
        bench.report(TAP, key(number), FilterMode::Exclude);
    }
    bench.report(TAP + 1, key(9), FilterMode::Exclude);
    assert_eq!(bench.agent.view().listeners_of_port(TAP).count(), 5);
    assert_eq!(bench.agent.view().listeners_of_port(TAP + 1).count(), 1);
    assert_eq!(bench.agent.view().listeners_of_port(TAP + 2).count(), 0);
}

#[test]
fn snapshot_reads_again_what_it_lacks_before_it_is_forgotten() {
    let mut bench = Bench::housing();
    bench.report(TAP, key(1), FilterMode::Exclude);
    bench.outputs();
    bench.datapath(DatapathEvent::Snapshot {
        listeners: vec![(
            listener_key(TAP, key(2)),
            listener(bench.now, FilterMode::Exclude),
        )],
        sources: vec![],
        queriers: vec![],
    });
    assert_eq!(bench.agent.view().listeners().count(), 2);
    assert!(bench.outputs().contains(&Output::ReadListeners {
        listeners: vec![listener_key(TAP, key(1))],
        sources: vec![],
    }));
}

#[test]
fn bridge_forgets_what_a_vm_may_not_have_reported_and_nothing_else() {
    let mut bench = Bench::housing();
    bench.report(TAP, key(1), FilterMode::Exclude);
    bench.outputs();
    let source = SourceKey {
        listener: listener_key(TAP, key(1)),
        source: [0x20; 16],
    };
    let of_no_port = SourceKey {
        listener: listener_key(99, key(1)),
        ..source
    };
    bench.datapath(DatapathEvent::Refused {
        listeners: vec![
            listener_key(TAP, key(1)),
            listener_key(TAP, key(2)),
            listener_key(99, key(3)),
        ],
        sources: vec![source, of_no_port],
    });
    let deletion = |key, source| {
        Output::MdbDelete(MdbEntry {
            ifindex: TAP,
            key,
            source,
        })
    };
    assert_eq!(
        bench.outputs(),
        [
            deletion(key(2), None),
            deletion(key(1), Some(source.source))
        ]
    );
}
