//! Tests of an address's reception: changes of the path.

mod session;

use std::time::Duration;

use common::maps::Origins;
use common::signal::{PeerMessage, ReceptionMode};
use proptest::prelude::*;

use super::Mode;
use crate::proto::tests::fixture::key;
use crate::proto::tests::relay_world::World;

const S: Duration = Duration::from_secs(1);
const MS: Duration = Duration::from_millis(1);

/// Packets sent until a silence is handled: half a threshold, a threshold, one reading, and the relay's
/// answer.
const NOTICED: usize = 165;

/// Returns a host that receives natively, with a listening VM.
fn native(relays: usize, native_ms: u64, relay_ms: u64) -> World {
    let mut world = World::new(relays, native_ms, relay_ms);
    world.listen();
    world.run(S);
    assert_eq!(world.mode(), Mode::Native);
    world.forget();
    world
}

/// Returns the same host after its network stopped carrying the stream.
fn relayed(relays: usize, native_ms: u64, relay_ms: u64) -> World {
    let mut world = native(relays, native_ms, relay_ms);
    world.native = false;
    world.run(2 * S);
    assert_eq!(world.mode(), Mode::Relay);
    world.forget();
    world
}

/// Delivers all packets in flight and stops the source.
fn settle(world: &mut World) {
    world.sends = false;
    world.run(100 * MS);
}

#[test]
fn native_relay_and_native_again_double_nothing_and_lose_only_until_silence_is_noticed() {
    for (native_ms, relay_ms) in [(1, 1), (1, 30), (30, 1), (12, 17), (30, 30)] {
        let mut world = native(1, native_ms, relay_ms);
        for _ in 0..2 {
            world.native = false;
            world.run(2 * S);
            assert_eq!(world.mode(), Mode::Relay);
            let (lost, doubled) = world.losses();
            assert!(lost <= NOTICED, "{native_ms}, {relay_ms}: {lost} lost");
            assert_eq!(doubled, 0, "{native_ms}, {relay_ms}");
            world.forget();
            world.native = true;
            world.run_until("native", |world| world.mode() == Mode::Native);
            world.run(S);
            assert_eq!(world.losses(), (0, 0), "{native_ms}, {relay_ms}");
            assert!(world.kernel.flows.is_empty());
            world.forget();
        }
        assert_eq!(world.relays[0].released.len(), 2);
    }
}

#[test]
fn native_holds_for_three_seconds_before_its_relay_is_let_go_and_longer_after_each_relapse() {
    let mut world = relayed(1, 5, 10);
    let mut holds = Vec::new();
    for _ in 0..3 {
        world.native = true;
        let from = world.now;
        world.run_until("native", |world| world.kernel.flows.is_empty());
        holds.push(world.now.since(from));
        world.native = false;
        world.run(2 * S);
    }
    assert!((3 * S..5 * S).contains(&holds[0]), "{holds:?}");
    assert!(holds[1] > 6 * S && holds[2] > 12 * S, "{holds:?}");
    world.native = true;
    world.run(120 * S);
    world.forget();
    world.run(60 * S);
    world.native = false;
    world.run(2 * S);
    let (lost, doubled) = world.losses();
    assert!(lost <= NOTICED && doubled == 0, "{lost}, {doubled}");
}

#[test]
fn native_that_flaps_loses_nothing_once_the_relay_sends_and_changes_little() {
    for (native_ms, relay_ms) in [(1, 30), (30, 1)] {
        let mut world = relayed(1, native_ms, relay_ms);
        let changes = world.origins_seen.len();
        for _ in 0..60 {
            world.native = !world.native;
            world.run(500 * MS);
        }
        settle(&mut world);
        assert_eq!(world.losses(), (0, 0));
        assert!(
            world.origins_seen.len() - changes < 60,
            "{}",
            world.origins_seen.len()
        );
    }
}

#[test]
fn source_that_pauses_is_idle_and_goes_on_without_loss() {
    for relayed_at_first in [false, true] {
        let mut world = if relayed_at_first {
            relayed(2, 3, 7)
        } else {
            native(2, 3, 7)
        };
        settle(&mut world);
        world.run(20 * S);
        assert_eq!(world.mode(), Mode::Idle);
        let requests: usize = world.relays.iter().map(|r| r.requests.len()).sum();
        assert!(requests <= 6, "{requests} requests");
        world.run(100 * S);
        let before = (world.origins_seen.len(), world.reads);
        world.run(100 * S);
        assert_eq!((world.origins_seen.len(), world.reads), before);
        world.sends = true;
        world.run(S);
        assert_eq!(world.losses(), (0, 0), "{relayed_at_first}");
        world.run(20 * S);
        let mode = if relayed_at_first {
            Mode::Relay
        } else {
            Mode::Native
        };
        assert_eq!(world.mode(), mode);
        assert_eq!(world.losses(), (0, 0), "{relayed_at_first}");
    }
}

#[test]
fn host_that_is_late_notices_that_a_source_is_silent_and_that_it_goes_on() {
    for late in [20 * MS, 60 * MS] {
        let paused = |pause: Duration| {
            let mut world = relayed(1, 3, 7);
            world.late = late;
            world.sends = false;
            world.run_until("silence", |world| world.mode() == Mode::Idle);
            // These packets raise the requested events.
            world.sends = true;
            world.run(30 * MS);
            world.sends = false;
            world.run(pause);
            world
        };
        let mut pauses = (1..1000).map(|step| 10 * MS * step);
        let idle = pauses.find(|pause| paused(*pause).mode() == Mode::Idle);
        let idle = idle.expect("a source that is silent for long is found so");
        for step in 0..60 {
            let pause = idle + 5 * MS * step - 100 * MS;
            let mut world = paused(pause);
            world.sends = true;
            world.run(12 * S);
            assert_ne!(world.mode(), Mode::Idle, "after {pause:?}, {late:?} late");
        }
    }
}

/// Sends a few native packets after a pause, so few that the kernel's moving average still reflects the
/// pause, to an agent too young for a mean. The path then does not count as silent for ten seconds.
fn burst_after_a_pause(world: &mut World) {
    world.sends = false;
    world.run(4 * S);
    world.restart(300 * MS);
    world.run(10 * S);
    world.sends = true;
    world.run(8 * MS);
    world.native = false;
}

#[test]
fn native_that_ends_soon_after_a_pause_is_not_stable_because_its_source_falls_silent() {
    let mut world = native(1, 1, 1);
    burst_after_a_pause(&mut world);
    world.run(5 * S);
    for pause in [S, 4 * S] {
        world.sends = false;
        world.run(pause);
        world.sends = true;
        world.run(S);
    }
    assert!(world.relays[0].released.is_empty());
    assert_eq!(world.losses(), (0, 0));
    world.run(20 * S);
    assert_eq!(world.mode(), Mode::Relay);
    assert_eq!(world.losses(), (0, 0));
}

#[test]
fn restarted_agent_does_not_take_what_came_natively_before_it_for_native_reception() {
    let mut world = native(1, 1, 1);
    world.stop_relay(0);
    burst_after_a_pause(&mut world);
    settle(&mut world);
    world.relays[0].runs = true;
    world.restart(300 * MS);
    world.run(2 * S);
    assert_eq!(world.mode(), Mode::Idle);
    world.run(10 * S);
    world.sends = true;
    world.run(2 * S);
    assert_eq!(world.mode(), Mode::Relay);
    assert_eq!(world.losses(), (0, 0));
}

#[test]
fn burst_that_stays_away_shorter_than_the_threshold_asks_no_relay() {
    let mut world = native(1, 3, 7);
    for _ in 0..20 {
        world.native = false;
        world.run(150 * MS);
        world.native = true;
        world.run(150 * MS);
    }
    assert!(world.relays[0].requests.is_empty());
    assert_eq!(world.losses().1, 0);
}

#[test]
fn last_listener_that_leaves_ends_session_and_watch() {
    let mut world = relayed(1, 5, 5);
    world.datapath(crate::proto::DatapathEvent::Listener {
        change: common::event::Change::Removed,
        key: crate::proto::tests::fixture::listener_key(crate::proto::tests::fixture::TAP, key(1)),
        value: crate::proto::tests::fixture::listener(world.now, common::maps::FilterMode::Include),
    });
    assert!(world.kernel.flows.is_empty() && world.kernel.managed.is_empty());
    world.run(S);
    assert_eq!(world.relays[0].released.len(), 1);
}

#[test]
fn arriving_vm_at_a_site_without_multicast_has_its_verdict_within_150_ms() {
    let mut world = World::new(1, 5, 30);
    world.native = false;
    world.run(100 * MS);
    let from = world.now;
    world.request();
    world.run_until("answer", |world| !world.answers.is_empty());
    let (at, answer) = &world.answers[0];
    let PeerMessage::AgentResponse(response) = answer else {
        panic!("no answer but {answer:?}");
    };
    assert_eq!(response.receptions[0].mode, ReceptionMode::Relay);
    assert!(at.since(from) <= 150 * MS, "{:?}", at.since(from));
    world.run(2 * S);
    assert_eq!(world.mode(), Mode::Relay);
    world.forget();
    world.run(S);
    assert_eq!(world.losses(), (0, 0));
}

#[test]
fn arriving_vm_at_a_native_site_asks_a_relay_only_after_the_delay() {
    let mut world = World::new(1, 5, 5);
    world.request();
    world.run(S);
    assert_eq!(world.mode(), Mode::Native);
    assert!(world.relays[0].requests.is_empty());
    // The tree takes longer than the delay, so the relay serves until the tree has grown.
    let mut world = World::new(1, 5, 5);
    world.native = false;
    world.request();
    world.run(100 * MS);
    world.native = true;
    world.forget();
    world.run(10 * S);
    assert_eq!(world.losses(), (0, 0));
    assert_eq!(world.mode(), Mode::Native);
    let view = world.agent.view().receptions().next().unwrap();
    assert_eq!(view.reception, Some(ReceptionMode::Native));
}

#[test]
fn new_listener_at_a_site_without_multicast_is_served_by_a_relay() {
    let mut world = World::new(1, 5, 5);
    world.native = false;
    world.run(100 * MS);
    world.listen();
    world.run(2 * S);
    assert_eq!(world.mode(), Mode::Relay);
    let (lost, doubled) = world.losses();
    assert!(lost <= NOTICED && doubled == 0, "{lost}, {doubled}");
}

#[test]
fn address_in_a_vlan_and_a_host_without_relays_know_native_only() {
    let mut world = World::new(1, 5, 5);
    world.config.relay = None;
    world.agent = crate::proto::Agent::new(world.config.clone(), 3);
    world.listen();
    world.run(5 * S);
    assert_eq!(world.origins_seen, [Origins::Native]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn whatever_fails_nothing_is_doubled_and_all_is_well_in_the_end(
        native_ms in 1_u64..30,
        relay_ms in prop::collection::vec(1_u64..30, 2),
        events in prop::collection::vec((0_u8..9, 1_u64..3000), 1..25),
    ) {
        let mut world = native(2, native_ms, 5);
        for (relay, delay) in relay_ms.iter().enumerate() {
            world.relays[relay].delay = MS * u32::try_from(*delay).unwrap();
        }
        for (event, wait) in events {
            match event {
                0 | 1 => world.native = !world.native,
                2 | 3 => {
                    let relay = usize::from(event - 2);
                    world.relays[relay].receives = !world.relays[relay].receives;
                }
                4 | 5 => {
                    let relay = usize::from(event - 4);
                    if world.relays[relay].runs {
                        world.stop_relay(relay);
                    } else {
                        world.relays[relay].runs = true;
                    }
                }
                6 => world.disconnect(usize::from(wait % 2 == 0)),
                7 => world.sends = !world.sends,
                _ => world.restart(MS * 300),
            }
            world.run(MS * u32::try_from(wait).unwrap());
        }
        prop_assert_eq!(world.losses().1, 0);
        world.native = false;
        world.sends = true;
        for relay in &mut world.relays {
            relay.runs = true;
            relay.receives = true;
        }
        world.run(100 * S);
        world.forget();
        world.run(3 * S);
        prop_assert_eq!(world.losses(), (0, 0));
        prop_assert_eq!(world.mode(), Mode::Relay);
        world.native = true;
        world.run(130 * S);
        prop_assert_eq!(world.losses(), (0, 0));
        prop_assert_eq!(world.mode(), Mode::Native);
    }
}
