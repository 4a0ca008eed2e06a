use super::world::*;
use crate::node::core::*;

fn talking() -> World {
    let mut world = World::new(Setup::default());
    world.flows = vec![(0, 1), (1, 0)];
    world.run(ms(500));
    assert!(world.is_settled(0, 1));
    world
}

#[test]
fn move_switches_at_once_and_peers_follow_within_round_trips() {
    let mut world = talking();
    world.prepare(0, 5);
    world.run(ms(300));
    assert_eq!(world.nodes[0].kernel.active.unwrap().moa, moa(0, 1));
    let taken = &world.nodes[1].kernel.peers[&hoa(0)];
    assert_eq!(taken.0, moa(0, 1));
    assert!(
        taken.1.contains(&moa(0, 5)),
        "the standby is learnt before the move"
    );
    world.arrive(0, 5);
    assert_eq!(world.nodes[0].kernel.active.unwrap().moa, moa(0, 5));
    assert!(world.delivers(0, 1), "outbound needs nobody's answer");
    // Alert, echo, reply.
    world.run(ms(16));
    assert!(world.is_settled(0, 1));
    assert_eq!(
        world.nodes[0].kernel.left,
        [Place {
            ifindex: 1,
            moa: moa(0, 1)
        }]
    );
}

#[test]
fn old_address_is_kept_for_what_is_forwarded_and_then_goes() {
    let mut world = talking();
    world.go(0, 5);
    world.run(Duration::from_secs(29));
    let own = |world: &World| world.nodes[0].kernel.own.len();
    assert_eq!(own(&world), 2);
    world.run(Duration::from_secs(3));
    assert_eq!(own(&world), 1);
    assert!(world.nodes[0].kernel.addresses[&1].is_empty());
    world.run(ms(500));
    assert_eq!(world.nodes[1].kernel.peers[&hoa(0)].1, [moa(0, 5)]);
}

#[test]
fn node_may_come_back_at_once_and_often() {
    let mut world = talking();
    for turn in 0..10 {
        let site = if turn % 2 == 0 { 5 } else { 1 };
        world.go(0, site);
        world.run(ms(400));
        assert!(world.is_settled(0, 1), "turn {turn}");
    }
    world.run(Duration::from_secs(90));
    assert!(world.is_settled(0, 1));
    assert_eq!(world.nodes[0].kernel.own.len(), 1);
}

#[test]
fn both_sides_may_move_at_once() {
    for delay in [0, 3, 5, 8, 10, 20, 100] {
        let mut world = talking();
        world.prepare(0, 5);
        world.prepare(1, 6);
        world.run(ms(300));
        world.arrive(0, 5);
        world.run(ms(delay));
        world.arrive(1, 6);
        world.run(ms(1000));
        assert!(world.is_settled(0, 1), "{delay} ms");
    }
}

#[test]
fn both_sides_that_move_without_having_announced_it_find_each_other() {
    let mut world = talking();
    for node in [0, 1] {
        let from = 1 + node as u16;
        world.nodes[node].site = 7 + node as u16;
        world.set_address(node, 1, moa(node, from), false);
        world.set_address(node, 2, moa(node, 7 + node as u16), true);
    }
    world.nics(0);
    world.nics(1);
    world.run(ms(2000));
    assert!(world.is_settled(0, 1));
}

#[test]
fn aborted_move_leaves_nothing() {
    let mut world = talking();
    world.prepare(0, 5);
    world.run(ms(300));
    world.input(0, Core::abort);
    world.set_address(0, 2, moa(0, 5), false);
    world.nics(0);
    world.run(ms(300));
    assert!(world.is_settled(0, 1));
    assert_eq!(world.nodes[0].kernel.own.len(), 1);
    assert_eq!(world.nodes[1].kernel.peers[&hoa(0)].1, [moa(0, 1)]);
    // A late input changes nothing.
    world.input(0, Core::handle_announcement);
    world.input(0, Core::handle_hint);
    assert_eq!(world.nodes[0].kernel.active.unwrap().moa, moa(0, 1));
}

#[test]
fn announcement_before_the_agent_is_ready_is_of_something_else() {
    let mut world = talking();
    let standby = Place {
        ifindex: 2,
        moa: moa(0, 5),
    };
    world.input(0, |core, now| core.prepare(now, standby));
    world.input(0, Core::handle_announcement);
    assert_eq!(world.nodes[0].kernel.active.unwrap().moa, moa(0, 1));
}

#[test]
fn hint_counts_once_the_new_address_has_had_an_answer() {
    let mut world = talking();
    world.prepare(0, 5);
    world.run(ms(300));
    // A node on the source's link pretends to be DstAgent.
    world.input(0, Core::handle_hint);
    world.run(ms(5000));
    assert_eq!(world.nodes[0].kernel.active.unwrap().moa, moa(0, 1));
    assert!(world.is_settled(0, 1));
    world.nodes[0].site = 5;
    world.run(ms(100));
    assert_eq!(world.nodes[0].kernel.active.unwrap().moa, moa(0, 5));
    world.run(ms(50));
    assert!(world.is_settled(0, 1));
}

#[test]
fn hint_is_confirmed_by_a_peer_where_no_server_answers() {
    let mut world = talking();
    world.prepare(0, 5);
    world.run(ms(300));
    world.stop_servers(true);
    world.nodes[0].site = 5;
    world.input(0, Core::handle_hint);
    world.run(ms(100));
    assert_eq!(world.nodes[0].kernel.active.unwrap().moa, moa(0, 5));
}

#[test]
fn move_while_no_server_answers_keeps_the_sessions() {
    let mut world = talking();
    world.prepare(0, 5);
    world.run(ms(300));
    world.stop_servers(true);
    world.arrive(0, 5);
    world.run(ms(100));
    assert!(world.is_settled(0, 1));
    // Longer than any lifetime.
    world.run(Duration::from_secs(200));
    assert!(world.is_settled(0, 1));
    world.stop_servers(false);
    world.run(Duration::from_secs(60));
    assert!(world.is_settled(0, 1));
    assert!(
        world
            .servers
            .iter()
            .all(|it| it.mappings[&hoa(0)].1[0].address == moa(0, 5).octets().into())
    );
}

#[test]
fn node_that_dies_during_a_move_is_found_where_it_is() {
    for at in 0..40 {
        let mut world = talking();
        world.prepare(0, 5);
        for _ in 0..at {
            let end = world.now + ms(300);
            world.step(end);
        }
        world.crash(0);
        world.nodes[0].site = 5;
        world.run(ms(100));
        // The restarted node finds only the address of its new network.
        world.set_address(0, 1, moa(0, 1), false);
        world.start(0);
        world.run(Duration::from_secs(40));
        assert!(world.is_settled(0, 1), "died after {at} steps");
    }
}

#[test]
fn peer_that_cannot_know_the_new_address_gets_nothing_from_there() {
    let mut world = talking();
    world.stop_servers(true);
    world.go(0, 5);
    // The node still receives data, because the old address is forwarded.
    assert!(
        world.nodes[0]
            .kernel
            .own
            .iter()
            .any(|it| it.moa == moa(0, 1))
    );
    world.run(Duration::from_secs(20));
    assert!(!world.delivers(0, 1));
    world.stop_servers(false);
    world.run(Duration::from_secs(40));
    assert!(world.is_settled(0, 1));
    assert_eq!(world.resets, 0);
}

#[test]
fn what_comes_before_the_switch_is_translated_once_all_peers_know() {
    let mut world = talking();
    world.prepare(0, 5);
    let knows = |world: &World| world.nodes[0].core.as_ref().unwrap().is_known(world.now);
    assert!(!knows(&world) && !world.ready(0));
    world.run(ms(300));
    assert!(knows(&world) && world.ready(0));
    // The node does not know yet that it has moved.
    world.nodes[0].site = 5;
    assert!(world.delivers(0, 1));
    world.run(ms(300));
    assert_eq!(world.resets, 0);
    world.arrive(0, 5);
    world.run(ms(100));
    assert!(world.is_settled(0, 1));
}

#[test]
fn nothing_is_translated_while_a_peer_cannot_know() {
    let mut world = talking();
    world.stop_servers(true);
    world.prepare(0, 5);
    for _ in 0..20 {
        world.run(ms(100));
        assert!(!world.ready(0));
    }
    assert!(world.delivers(0, 1), "nothing is held before the move");
    world.nodes[0].site = 5;
    world.run(ms(500));
    world.arrive(0, 5);
    world.run(Duration::from_secs(2));
    assert_eq!(world.resets, 0);
}

#[test]
fn peer_that_is_not_in_use_delays_nothing_and_is_not_sent_to_before_it_knows() {
    let mut world = World::new(Setup {
        nodes: 3,
        ..Setup::default()
    });
    world.flows = vec![(0, 1), (1, 0), (0, 2)];
    world.run(ms(500));
    world.flows.pop();
    world.crash(2);
    world.run(Duration::from_secs(70));
    world.prepare(0, 5);
    world.run(ms(300));
    assert!(world.ready(0));
    assert!(world.nodes[0].kernel.holding.contains(&hoa(2)));
    assert!(!world.nodes[0].kernel.holding.contains(&hoa(1)));
    world.input(0, Core::abort);
    assert!(
        world.nodes[0].kernel.holding.is_empty(),
        "the old address stays, and it knows that one"
    );
}

#[test]
fn peer_that_is_new_during_a_move_is_sent_to_once_it_knows() {
    let mut world = World::new(Setup {
        nodes: 3,
        ..Setup::default()
    });
    world.flows = vec![(0, 1), (1, 0)];
    world.run(ms(500));
    world.prepare(0, 5);
    world.run(ms(300));
    assert!(world.ready(0));
    world.flows.extend([(0, 2), (2, 0)]);
    for _ in 0..300 {
        world.run(ms(1));
        let kernel = &world.nodes[0].kernel;
        let sends = kernel.peers.contains_key(&hoa(2)) && !kernel.holding.contains(&hoa(2));
        let taken = world.nodes[2].kernel.peers.get(&hoa(0));
        assert!(!sends || taken.is_some_and(|it| it.1.contains(&moa(0, 5))));
    }
    world.nodes[0].site = 5;
    world.run(ms(300));
    world.arrive(0, 5);
    world.run(ms(300));
    assert!(world.is_settled(0, 2));
    assert_eq!(world.resets, 0);
}

#[test]
fn peer_that_has_answered_to_the_old_address_gets_nothing_from_the_new_one_before_it_knows() {
    let mut world = World::new(Setup::default());
    world.run(ms(100));
    world.send_frame(0, 1, vec![7]);
    // Lookup, echo, and the other side's lookup, which it answers.
    world.run(ms(27));
    world.prepare(0, 5);
    world.arrive(0, 5);
    let old = moa(0, 1);
    let to_old = world.record.iter().filter(|it| *it.to.ip() == old);
    let answers: Vec<_> = to_old.cloned().collect();
    // Packets to the old address are forwarded.
    for Datagram { from, bytes, .. } in answers {
        let received = Received {
            local: old,
            from,
            bytes,
        };
        world.input(0, |core, now| core.handle_datagram(now, received));
    }
    for _ in 0..200 {
        assert!(!world.is_mistaken(0, 1), "at {:?}", world.now);
        world.run(ms(1));
    }
    assert_eq!(world.nodes[0].kernel.released, [vec![7]]);
    assert!(world.is_settled(0, 1));
}
