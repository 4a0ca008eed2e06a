use super::world::*;
use crate::node::core::*;
use common::mat::message::Outcome;

#[test]
fn every_server_gets_every_update_and_is_refreshed() {
    let mut world = World::new(Setup::default());
    world.run(ms(100));
    let known = |world: &World, server: usize| world.servers[server].mappings[&hoa(0)].0;
    assert_eq!(known(&world, 0), known(&world, 1));
    assert!(
        world.nodes[0]
            .core
            .as_ref()
            .unwrap()
            .status(world.now)
            .registered
    );
    let first = known(&world, 0);
    world.run(Duration::from_secs(300));
    assert!(known(&world, 0) > first);
    assert!(world.servers[0].mappings[&hoa(0)].2 > world.now);
    assert!(
        world.servers[0].updates < 50,
        "{}",
        world.servers[0].updates
    );
}

#[test]
fn server_that_was_away_gets_what_it_missed() {
    let mut world = World::new(Setup::default());
    world.servers[1].down = true;
    world.run(Duration::from_secs(200));
    assert!(world.servers[1].mappings.is_empty());
    world.servers[1].down = false;
    world.run(Duration::from_secs(31));
    assert!(world.servers[1].mappings.contains_key(&hoa(0)));
}

#[test]
fn wrong_time_is_corrected_for_each_server() {
    let mut world = World::new(Setup::default());
    world.servers[0].skew_ms = 86_400_000;
    world.servers[1].skew_ms = 200_000;
    world.run(ms(100));
    for server in &world.servers {
        assert!(server.mappings.contains_key(&hoa(0)));
        assert_eq!(server.updates, 4, "two nodes, each corrected once");
    }
}

#[test]
fn old_sequence_is_corrected() {
    let mut world = World::new(Setup::default());
    let future = EPOCH_MS * 2;
    world.servers[0]
        .mappings
        .insert(hoa(0), (future, Vec::new(), ms(0)));
    world.run(ms(100));
    for server in &world.servers {
        assert!(server.mappings[&hoa(0)].0 > future);
    }
}

#[test]
fn server_that_refuses_is_not_asked_in_a_loop() {
    for outcome in [
        Outcome::Failed,
        Outcome::BadAddresses,
        Outcome::WrongTime,
        Outcome::OldSequence,
    ] {
        let mut world = World::new(Setup {
            nodes: 1,
            ..Setup::default()
        });
        world.servers[0].refuse = Some(outcome);
        world.run(Duration::from_secs(600));
        let asked = world.servers[0].updates;
        assert!((3..60).contains(&asked), "{outcome:?}: {asked}");
        assert!(world.servers[1].mappings.contains_key(&hoa(0)));
    }
}

#[test]
fn nearest_server_that_answers_is_asked() {
    let mut world = World::new(Setup {
        nodes: 3,
        ..Setup::default()
    });
    world.run(ms(100));
    world.servers[0].down = true;
    world.send_frame(0, 1, vec![1]);
    world.run(ms(400));
    assert_eq!(world.nodes[0].kernel.released.len(), 1);
    let before = world.now;
    world.send_frame(0, 2, vec![2]);
    world.run(ms(100));
    assert_eq!(
        world.nodes[0].kernel.released.len(),
        2,
        "at {before:?} it knew whom to ask"
    );
}

#[test]
fn without_any_server_a_new_peer_is_refused_and_a_known_one_stays() {
    let mut world = World::new(Setup {
        nodes: 3,
        ..Setup::default()
    });
    world.flows = vec![(0, 1), (1, 0)];
    world.run(ms(500));
    world.stop_servers(true);
    world.send_frame(0, 2, vec![2]);
    world.run(Duration::from_secs(4));
    assert_eq!(world.nodes[0].kernel.refused, [vec![2]]);
    world.run(Duration::from_secs(300));
    assert!(world.is_settled(0, 1));
}

#[test]
fn replica_that_knows_nothing_or_old_things_ends_no_session() {
    let mut world = World::new(Setup::default());
    world.flows = vec![(0, 1), (1, 0)];
    world.run(ms(500));
    let old = world.servers[1].mappings.clone();
    for turn in 0..20 {
        world.servers[1].mappings = if turn % 2 == 0 {
            old.clone()
        } else {
            Default::default()
        };
        if turn == 7 {
            world.go(0, 5);
        }
        world.run(Duration::from_secs(7));
        assert!(world.delivers(1, 0), "turn {turn}");
    }
    world.run(Duration::from_secs(60));
    assert!(world.is_settled(0, 1));
}
