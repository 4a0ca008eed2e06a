use super::world::*;
use crate::node::core::*;

#[test]
fn first_packet_waits_until_both_sides_know_each_other() {
    let mut world = World::new(Setup::default());
    world.run(ms(100));
    world.send_frame(0, 1, vec![7]);
    assert!(world.nodes[0].kernel.released.is_empty());
    world.run(ms(100));
    assert_eq!(world.nodes[0].kernel.released, [vec![7]]);
    assert!(world.is_settled(0, 1));
}

#[test]
fn frames_of_both_sides_at_once_are_released() {
    let mut world = World::new(Setup::default());
    world.run(ms(100));
    world.send_frame(0, 1, vec![7]);
    world.send_frame(1, 0, vec![8]);
    world.run(ms(200));
    assert_eq!(world.nodes[0].kernel.released, [vec![7]]);
    assert_eq!(world.nodes[1].kernel.released, [vec![8]]);
}

#[test]
fn peer_that_has_only_asked_gets_nothing_before_it_has_answered() {
    let mut world = World::new(Setup::default());
    world.run(ms(100));
    world.send_frame(0, 1, vec![7]);
    // Lookup, echo, and the other side's lookup.
    world.run(ms(24));
    // The network loses the answer to the echo and all requests of the other side.
    world.setup.loss = 100;
    world.run(ms(3));
    world.setup.loss = 0;
    let kernel = &world.nodes[1].kernel;
    assert!(kernel.peers[&hoa(0)].1.contains(&moa(0, 1)), "it is taken");
    assert!(!world.nodes[0].kernel.peers.contains_key(&hoa(1)));
    assert!(!world.is_mistaken(1, 0), "where nobody takes it");
    world.send_frame(1, 0, vec![8]);
    world.run(ms(200));
    assert_eq!(world.nodes[0].kernel.released, [vec![7]]);
    assert_eq!(world.nodes[1].kernel.released, [vec![8]]);
    assert!(world.is_settled(0, 1));
}

#[test]
fn peer_that_was_answered_is_taken_though_it_answers_nothing() {
    let mut world = World::new(Setup::default());
    world.run(ms(100));
    world.send_frame(1, 0, vec![8]);
    // Lookup, echo, and the other side's lookup; it answers and sends an echo.
    world.run(ms(27));
    world.setup.loss = 100;
    world.run(ms(4));
    world.setup.loss = 0;
    assert_eq!(world.nodes[1].kernel.released, [vec![8]]);
    // The data path of the node keeps working, but nobody answers echoes.
    world.crash(1);
    world.flows = vec![(1, 0)];
    for _ in 0..20 {
        world.run(ms(1000));
        assert!(world.delivers(1, 0), "at {:?}", world.now);
    }
    assert_eq!(world.resets, 0);
    world.send_frame(0, 1, vec![7]);
    world.start(1);
    world.run(ms(500));
    assert_eq!(world.nodes[0].kernel.released, [vec![7]]);
    assert!(world.is_settled(0, 1));
}

#[test]
fn node_that_nobody_knows_is_refused_at_once_the_second_time() {
    let mut world = World::new(Setup::default());
    world.run(ms(100));
    world.send_frame(0, 7, vec![7]);
    world.run(ms(100));
    assert_eq!(world.nodes[0].kernel.refused, [vec![7]]);
    let asked: usize = world.servers.iter().map(|it| it.lookups).sum();
    assert_eq!(asked, 2, "both servers have a say");
    world.send_frame(0, 7, vec![8]);
    assert_eq!(world.nodes[0].kernel.refused.len(), 2);
    world.run(ms(100));
    assert_eq!(world.servers.iter().map(|it| it.lookups).sum::<usize>(), 2);
}

#[test]
fn node_that_comes_later_is_found_though_it_was_refused() {
    let mut world = World::new(Setup::default());
    world.crash(1);
    for server in &mut world.servers {
        server.mappings.clear();
    }
    world.run(ms(100));
    for server in &mut world.servers {
        server.mappings.remove(&hoa(1));
    }
    world.send_frame(0, 1, vec![7]);
    world.run(ms(100));
    assert_eq!(world.nodes[0].kernel.refused.len(), 1);
    world.start(1);
    world.run(ms(50));
    // The first packet of the node makes the other side look it up again.
    world.send_frame(1, 0, vec![8]);
    world.run(ms(300));
    assert_eq!(world.nodes[1].kernel.released, [vec![8]]);
    assert!(world.is_settled(0, 1));
}

#[test]
fn what_is_no_peer_is_not_looked_up() {
    let mut world = World::new(Setup::default());
    world.run(ms(100));
    for address in ["2001:db8::1", "ff02::1", "fd5e:6d61:75::1"] {
        let address = address.parse().unwrap();
        world.input(0, |core, now| core.handle_held(now, address, vec![1]));
    }
    let own = hoa(0);
    world.input(0, |core, now| core.handle_held(now, own, vec![1]));
    world.run(ms(100));
    assert_eq!(world.servers.iter().map(|it| it.lookups).sum::<usize>(), 0);
    let counters = world.nodes[0]
        .core
        .as_ref()
        .unwrap()
        .status(world.now)
        .counters;
    assert_eq!(counters.not_peers, 4);
}

#[test]
fn peer_in_use_stays_and_an_unused_one_goes() {
    let mut world = World::new(Setup {
        nodes: 3,
        ..Setup::default()
    });
    world.run(ms(100));
    world.flows = vec![(0, 1)];
    world.send_frame(0, 2, vec![7]);
    world.run(Duration::from_secs(4000));
    assert!(world.is_settled(0, 1));
    assert!(!world.nodes[0].kernel.peers.contains_key(&hoa(2)));
    assert!(!world.nodes[2].kernel.peers.contains_key(&hoa(0)));
}

#[test]
fn stream_one_way_keeps_the_receiver_informed() {
    let mut world = World::new(Setup::default());
    world.run(ms(100));
    world.flows = vec![(0, 1)];
    world.run(Duration::from_secs(100));
    // The receiver restarts without state.
    world.crash(1);
    world.nodes[1].kernel.peers.clear();
    world.start(1);
    world.run(Duration::from_secs(45));
    assert!(world.delivers(0, 1));
}

#[test]
fn restarted_node_adopts_the_peers_of_its_data_path() {
    let mut world = World::new(Setup::default());
    world.run(ms(100));
    world.flows = vec![(0, 1), (1, 0)];
    world.run(ms(500));
    for node in [0, 1] {
        world.crash(node);
        world.run(ms(200));
        assert!(world.delivers(0, 1), "the data path works on");
        world.start(node);
        world.run(ms(500));
        assert!(world.is_settled(0, 1));
        let status = world.nodes[node].core.as_ref().unwrap().status(world.now);
        assert_eq!(status.peers.len(), 1);
        assert_eq!(status.peers[0].state, PeerState::Known);
    }
}

#[test]
fn unplugged_nic_is_replaced_by_the_other_one() {
    let mut world = World::new(Setup::default());
    world.set_address(0, 2, "2001:db8:1::77".parse().unwrap(), true);
    world.nics(0);
    world.flows = vec![(0, 1), (1, 0)];
    world.run(ms(500));
    let first = world.nodes[0].kernel.active.unwrap();
    assert_eq!(first.ifindex, 1);
    world.set_address(0, 1, first.moa, false);
    world.nics(0);
    world.run(ms(200));
    assert_eq!(world.nodes[0].kernel.active.unwrap().ifindex, 2);
    assert!(world.is_settled(0, 1));
}

#[test]
fn node_without_any_address_comes_back() {
    let mut world = World::new(Setup::default());
    world.flows = vec![(0, 1), (1, 0)];
    world.run(ms(500));
    let place = world.nodes[0].kernel.active.unwrap();
    world.set_address(0, 1, place.moa, false);
    world.nics(0);
    world.run(Duration::from_secs(20));
    world.set_address(0, 1, place.moa, true);
    world.nics(0);
    world.run(Duration::from_secs(40));
    assert!(world.is_settled(0, 1));
}

#[test]
fn neutral_address_is_preferred() {
    let mut world = World::new(Setup::default());
    world.run(ms(100));
    let given: Ipv6Addr = moa(0, 1);
    let neutral = common::mat::neutral::neutral(given.octets(), hoa(0).octets());
    world.set_address(0, 1, Ipv6Addr::from(neutral), true);
    world.nics(0);
    assert_eq!(world.nodes[0].kernel.active.unwrap().moa.octets(), neutral);
}

/// A node that communicates by a given address and gets a neutral one in addition.
fn offered_better() -> (World, Ipv6Addr, [u8; 16]) {
    let mut world = World::new(Setup::default());
    world.flows = vec![(0, 1), (1, 0)];
    world.run(ms(500));
    let given: Ipv6Addr = moa(0, 1);
    let neutral = common::mat::neutral::neutral(given.octets(), hoa(0).octets());
    world.set_address(0, 1, Ipv6Addr::from(neutral), true);
    world.nics(0);
    (world, given, neutral)
}

#[test]
fn better_address_is_used_once_peers_know_it_and_the_old_one_is_taken_for_a_while() {
    let (mut world, given, neutral) = offered_better();
    assert_eq!(world.nodes[0].kernel.active.unwrap().moa, given);
    assert!(world.delivers(0, 1) && world.delivers(1, 0));
    for _ in 0..100 {
        world.run(ms(1));
        assert!(!world.is_mistaken(0, 1) && !world.is_mistaken(1, 0));
    }
    assert_eq!(world.nodes[0].kernel.active.unwrap().moa.octets(), neutral);
    assert!(world.is_settled(0, 1));
    assert!(world.nodes[0].kernel.own.iter().any(|it| it.moa == given));
    world.run(Duration::from_secs(120));
    assert!(world.is_settled(0, 1));
    assert_eq!(world.nodes[0].kernel.own.len(), 1);
    assert!(
        world.nodes[0].kernel.addresses[&1].contains(&given),
        "it stays"
    );
    assert_eq!(world.resets, 0);
}

#[test]
fn better_address_waits_until_a_move_is_over() {
    let (mut world, given, neutral) = offered_better();
    world.prepare(0, 5);
    world.run(ms(500));
    let active = |world: &World| world.nodes[0].kernel.active.unwrap().moa;
    assert_eq!(active(&world), given, "what the agents were told is left");
    assert!(world.ready(0));
    world.input(0, Core::abort);
    world.run(ms(500));
    assert_eq!(active(&world).octets(), neutral);
    world.go(0, 5);
    world.run(ms(500));
    assert_eq!(active(&world), moa(0, 5));
    assert!(world.is_settled(0, 1));
    assert_eq!(world.resets, 0);
}
