//! Tests of sessions with relays: failover, lies, restarts, filters.

use std::time::Duration;

use common::event::Change;
use common::maps::{FilterMode, Listener};

use super::{MS, Mode, NOTICED, S, native, relayed};
use crate::proto::DatapathEvent;
use crate::proto::tests::fixture::{TAP, key, listener, listener_key};

#[test]
fn host_that_dies_with_its_relay_is_replaced_by_the_next() {
    let mut world = relayed(3, 5, 5);
    let serving = world
        .relays
        .iter()
        .position(|r| !r.requests.is_empty())
        .unwrap();
    world.relays[serving].sends = false;
    world.stop_relay(serving);
    world.run(2 * S);
    assert_eq!(world.mode(), Mode::Relay);
    let (lost, doubled) = world.losses();
    assert!(lost <= NOTICED && doubled == 0, "{lost}, {doubled}");
    assert_eq!(world.kernel.flows.len(), 1);
    assert_eq!(world.agent.view().counters().relay_failovers, 1);
}

#[test]
fn relay_whose_packets_stop_is_left_for_the_next_and_one_that_only_pauses_is_kept() {
    let mut world = relayed(2, 5, 5);
    let serving = world
        .relays
        .iter()
        .position(|r| !r.requests.is_empty())
        .unwrap();
    world.relays[serving].receives = false;
    world.run(2 * S);
    let (lost, doubled) = world.losses();
    assert!(lost <= NOTICED && doubled == 0, "{lost}, {doubled}");
    assert_eq!(world.relays[serving].released.len(), 1);
    world.forget();
    for _ in 0..10 {
        world.sends = false;
        world.run(230 * MS);
        world.sends = true;
        world.run(730 * MS);
    }
    assert_eq!(world.losses(), (0, 0));
}

#[test]
fn killed_process_of_a_relay_loses_nothing_and_its_successor_goes_on() {
    let mut world = relayed(1, 5, 5);
    world.stop_relay(0);
    world.run(15 * S);
    world.relays[0].runs = true;
    world.run(60 * S);
    assert_eq!(world.losses(), (0, 0));
    assert_eq!(world.mode(), Mode::Relay);
    let requests = &world.relays[0].requests;
    assert!(requests.iter().all(|it| *it == requests[0]), "{requests:?}");
}

#[test]
fn killed_process_that_stays_away_is_replaced_when_its_lease_ends() {
    let mut world = relayed(2, 5, 25);
    let serving = world
        .relays
        .iter()
        .position(|r| !r.requests.is_empty())
        .unwrap();
    world.stop_relay(serving);
    world.run(60 * S);
    let (lost, doubled) = world.losses();
    assert!(lost <= NOTICED && doubled == 0, "{lost}, {doubled}");
    assert_eq!(world.mode(), Mode::Relay);
}

#[test]
fn all_relays_down_is_survived_and_ended_by_the_first_that_is_back() {
    let mut world = relayed(2, 5, 5);
    for relay in 0..2 {
        world.relays[relay].sends = false;
        world.stop_relay(relay);
    }
    world.run(100 * S);
    assert!(world.kernel.flows.is_empty());
    world.relays[1].runs = true;
    world.relays[1].sends = true;
    world.run(35 * S);
    world.forget();
    world.run(10 * S);
    assert_eq!(world.losses(), (0, 0));
    assert_eq!(world.mode(), Mode::Relay);
    // Native reception alone serves as well.
    world.relays[1].sends = false;
    world.stop_relay(1);
    world.native = true;
    world.run(40 * S);
    world.forget();
    world.run(10 * S);
    assert_eq!(world.losses(), (0, 0));
}

#[test]
fn lying_relay_is_left_at_once_for_the_next() {
    let lies: [fn(&mut common::signal::RelayResponse); 5] = [
        |response| response.flows[0].source = [0x66; 16].into(),
        |response| response.flows[0].agent_port ^= 1,
        |response| response.flows[0].relay_port = 53,
        |response| response.lease_ms = 1,
        |response| response.relay_address = [0xff; 16].into(),
    ];
    for lie in lies {
        let mut world = native(2, 5, 5);
        for relay in &mut world.relays {
            relay.lie = Some(lie);
        }
        world.relays[1].lie = None;
        // The result must not depend on the round-robin position.
        for _ in 0..2 {
            world.native = false;
            world.run(2 * S);
            assert_eq!(world.mode(), Mode::Relay);
            assert_eq!(world.kernel.flows.len(), 1);
            assert!(
                world
                    .kernel
                    .flows
                    .values()
                    .all(|flow| flow.stream.source == [0x20; 16])
            );
            world.native = true;
            world.run(100 * S);
        }
        assert!(world.agent.view().counters().relay_lies >= 1);
        assert_eq!(
            world.relays[0].released.len(),
            world.relays[0].requests.len(),
            "every lie ends its session"
        );
    }
}

#[test]
fn refusals_of_all_relays_leave_native_alone() {
    let mut world = native(2, 5, 5);
    for relay in &mut world.relays {
        relay.refuses = true;
    }
    world.native = false;
    world.run(60 * S);
    let requests: usize = world.relays.iter().map(|r| r.requests.len()).sum();
    assert!((4..20).contains(&requests), "{requests} requests");
    world.native = true;
    world.run(S);
    assert_eq!(world.mode(), Mode::Native);
    assert!(
        world
            .agent
            .view()
            .relays()
            .all(|relay| relay.reason.is_some_and(|r| r.contains("0 addresses")))
    );
}

#[test]
fn restarted_agent_goes_on_with_the_session_that_it_finds() {
    for away in [50, 2000, 15_000] {
        let mut world = relayed(2, 5, 5);
        let before: Vec<_> = world.kernel.flows.clone().into_iter().collect();
        let serving = world
            .relays
            .iter()
            .position(|r| !r.requests.is_empty())
            .unwrap();
        world.restart(MS * away);
        world.run(60 * S);
        assert_eq!(world.losses(), (0, 0), "away for {away} ms");
        let after: Vec<_> = world.kernel.flows.clone().into_iter().collect();
        assert_eq!(after, before);
        assert!(world.relays[1 - serving].requests.is_empty());
        assert_eq!(world.mode(), Mode::Relay);
        world.native = true;
        world.run(20 * S);
        assert_eq!(world.mode(), Mode::Native);
        assert_eq!(world.losses(), (0, 0), "away for {away} ms");
    }
}

#[test]
fn restarted_agent_that_finds_its_relay_gone_takes_the_next() {
    let mut world = relayed(2, 5, 5);
    let serving = world
        .relays
        .iter()
        .position(|r| !r.requests.is_empty())
        .unwrap();
    world.relays[serving].runs = false;
    world.restart(100 * MS);
    world.run(60 * S);
    let (lost, doubled) = world.losses();
    assert!(lost <= NOTICED && doubled == 0, "{lost}, {doubled}");
    assert_eq!(world.mode(), Mode::Relay);
}

#[test]
fn flows_that_nobody_needs_after_a_restart_are_removed() {
    let mut world = relayed(1, 5, 5);
    world.agent = crate::proto::Agent::new(world.config.clone(), 99);
    let flows = world.kernel.flows.clone().into_iter().collect();
    world.input(|agent, now| {
        agent.handle_pinned(now, Vec::new(), flows);
        agent.handle_adopted(now);
    });
    assert!(world.kernel.flows.is_empty());
}

#[test]
fn relay_hears_of_a_changed_filter_and_is_no_liar_for_what_it_said_before() {
    let mut world = relayed(1, 5, 5);
    let source = |number: u8| DatapathEvent::Source {
        change: Change::Updated,
        key: common::maps::SourceKey {
            listener: listener_key(TAP, key(1)),
            source: [number; 16],
        },
        value: common::maps::Source {
            last_report_ns: 1,
            generation: 2,
            filter_mode: FilterMode::Include as u8,
            pad: [0; 3],
        },
    };
    world.datapath(source(0x20));
    let value = Listener {
        generation: 2,
        source_count: 1,
        ..listener(world.now, FilterMode::Include)
    };
    world.datapath(DatapathEvent::Listener {
        change: Change::Updated,
        key: listener_key(TAP, key(1)),
        value,
    });
    world.run(Duration::from_millis(10));
    assert_eq!(world.relays[0].asked_for, [[0x20; 16]]);
    let transactions = &world.relays[0].requests;
    assert!(transactions.iter().all(|it| *it == transactions[0]));
    world.run(30 * S);
    assert_eq!(world.losses(), (0, 0));
    assert_eq!(world.agent.view().counters().relay_lies, 0);
}
