//! An attacker on the links: reads everything, sends anything from anywhere, and has no key.

use std::collections::BTreeSet;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use common::mat::NODE_PORT;
use common::mat::entropy::Entropy;
use common::mat::key::Key;
use common::mat::message::*;
use common::mat::seal::{Keying, seal};
use proptest::prelude::*;

use super::world::*;
use crate::node::core::*;

fn talking(setup: Setup) -> World {
    let mut world = World::new(setup);
    world.flows = vec![(0, 1), (1, 0)];
    world.run(ms(2000));
    assert!(world.is_settled(0, 1));
    world
}

/// Every message, sealed with a key that the attacker invented, or with its own key as a peer.
fn messages(sequence: u64) -> Vec<MatMessage> {
    let address = moa(9, 9).octets().into();
    let moas = vec![Moa {
        address,
        priority: 1,
    }];
    let hoa = hoa(1).octets().into();
    vec![
        Alert { sequence }.into(),
        AlertAck { sequence }.into(),
        Echo {}.into(),
        EchoReply {}.into(),
        UpdateRequest {
            sequence,
            time_ms: EPOCH_MS,
            lifetime_s: 60,
            moas: moas.clone(),
        }
        .into(),
        UpdateReply {
            outcome: 1,
            sequence,
            time_ms: 0,
            lifetime_s: 0,
        }
        .into(),
        LookupRequest { hoa }.into(),
        LookupReply {
            hoa,
            mapping: Some(Mapping { sequence, moas }),
            pair_key: [1; 32].into(),
            lifetime_s: 600,
        }
        .into(),
    ]
}

/// Replays recorded datagrams to their receiver: from the original sender, from every other known
/// address, and from elsewhere.
fn replay(world: &mut World, every: usize) {
    let nodes = 0..world.nodes.len();
    let mut sources: Vec<Ipv6Addr> = nodes
        .flat_map(|node| [moa(node, 1 + node as u16), moa(node, 5), moa(node, 6)])
        .collect();
    sources.push("2001:db8:66::6".parse().unwrap());
    let record: Vec<Datagram> = world.record.iter().step_by(every).cloned().collect();
    for datagram in record {
        world.send(datagram.clone());
        for from in &sources {
            let from = SocketAddrV6::new(*from, datagram.from.port(), 0, 0);
            world.send(Datagram {
                from,
                ..datagram.clone()
            });
        }
    }
    // The record contains some of the replayed datagrams too.
    world.record.truncate(300);
}

#[test]
fn recorded_messages_move_nothing() {
    let mut world = talking(Setup::default());
    world.prepare(0, 5);
    world.run(ms(300));
    for _ in 0..20 {
        replay(&mut world, 1);
        world.run(ms(100));
        assert!(
            world.is_settled(0, 1),
            "data goes to {:?}",
            world.nodes[1].kernel.peers
        );
    }
    world.arrive(0, 5);
    for _ in 0..20 {
        world.run(ms(50));
        assert!(world.is_settled(0, 1));
        replay(&mut world, 3);
    }
    let status = |node: usize| world.nodes[node].core.as_ref().unwrap().status(world.now);
    assert!(status(1).counters.lookups < 20, "{:?}", status(1).counters);
    assert!(status(1).counters.unexpected > 1000);
}

#[test]
fn alert_that_comes_first_from_the_address_to_come_does_not_move_data_early() {
    let mut world = talking(Setup::default());
    let before = world.record.len();
    world.prepare(0, 5);
    // The attacker is faster than the network: the genuine alerts, from a place where the node is
    // not yet.
    let alerts: Vec<Datagram> = world.record[before..].to_vec();
    for alert in alerts {
        let from = SocketAddrV6::new(moa(0, 5), NODE_PORT, 0, 0);
        let received = Received {
            local: *alert.to.ip(),
            from,
            bytes: alert.bytes,
        };
        world.input(1, |core, now| core.handle_datagram(now, received));
    }
    for _ in 0..100 {
        world.run(ms(20));
        assert!(world.is_settled(0, 1));
    }
}

#[test]
fn messages_under_a_made_up_key_are_counted_and_change_nothing() {
    let mut world = talking(Setup::default());
    let places = [moa(0, 1), moa(1, 2), moa(9, 9), *server(0).ip()];
    let before = world.servers.iter().map(|it| it.lookups).sum::<usize>();
    for sender in [hoa(0), hoa(1), hoa(2)] {
        for keying in [Keying::Node, Keying::Pair] {
            for message in messages(u64::MAX) {
                for from in places {
                    for port in [NODE_PORT, common::mat::IMS_PORT] {
                        let key = Key([6; 32]);
                        let bytes =
                            seal(keying, sender.octets(), &key, [3; 24], &message.encode(1));
                        let from = SocketAddrV6::new(from, port, 0, 0);
                        let local = moa(0, 1);
                        let received = Received { local, from, bytes };
                        world.input(0, |core, now| core.handle_datagram(now, received));
                    }
                }
            }
        }
    }
    world.run(ms(500));
    assert!(world.is_settled(0, 1));
    let counters = world.nodes[0]
        .core
        .as_ref()
        .unwrap()
        .status(world.now)
        .counters;
    assert!(counters.forged >= 64, "{counters:?}");
    assert!(counters.unexpected >= 64, "{counters:?}");
    let after = world.servers.iter().map(|it| it.lookups).sum::<usize>();
    assert!(after - before < 8, "{}", after - before);
}

#[test]
fn node_that_is_resumed_twice_from_a_snapshot_uses_no_nonce_twice() {
    // The same states and the same inputs.
    let worlds = [(); 2].map(|()| talking(Setup::default()));
    let mut nonces = BTreeSet::new();
    for world in &worlds {
        let sent = world.record.iter().filter(|it| it.from.port() == NODE_PORT);
        for datagram in sent {
            assert!(nonces.insert(datagram.bytes[20..44].to_vec()));
        }
    }
    assert!(nonces.len() > 20, "{}", nonces.len());
}

#[test]
fn node_without_random_numbers_says_nothing() {
    let identity = Identity {
        hoa: hoa(0),
        home: ("fd5e:6d61:74::".parse().unwrap(), 48),
        key: Key([5; 32]),
        servers: vec![server(0)],
    };
    let nics = vec![NicState {
        ifindex: 1,
        addresses: vec![moa(0, 1)],
    }];
    let entropy = Entropy::new(|_| false);
    let mut core = Core::new(identity, Timing::default(), Saved::default(), 0, entropy);
    core.handle_nics(ms(0), nics);
    core.handle_timeout(ms(1000));
    while let Some(output) = core.poll_output() {
        assert!(!matches!(output, Output::Transmit { .. }), "{output:?}");
    }
    assert!(core.status(ms(1000)).counters.no_random_numbers > 0);
}

#[test]
fn node_that_is_enrolled_anew_is_heard_by_its_peers() {
    let mut world = talking(Setup::default());
    let before = world.secret.pair(world.party(hoa(0)), world.party(hoa(1)));
    world.crash(1);
    world.nodes[1].generation += 1;
    world.start(1);
    world.run(ms(300));
    assert!(world.is_settled(0, 1));
    // The message has a key that the peer must request.
    world.go(1, 3);
    world.run(ms(1500));
    assert!(world.is_settled(0, 1), "{:?}", world.nodes[0].kernel.peers);
    // The owner of the old key can send nothing any more.
    let lookups = world.servers.iter().map(|it| it.lookups).sum::<usize>();
    for message in messages(u64::MAX) {
        let bytes = seal(
            Keying::Pair,
            hoa(1).octets(),
            &before,
            [3; 24],
            &message.encode(1),
        );
        let received = Received {
            local: moa(0, 1),
            from: SocketAddrV6::new(moa(1, 3), NODE_PORT, 0, 0),
            bytes,
        };
        world.input(0, |core, now| core.handle_datagram(now, received));
    }
    world.run(ms(3000));
    assert!(world.is_settled(0, 1));
    let after = world.servers.iter().map(|it| it.lookups).sum::<usize>();
    assert!(after - lookups < 8, "{}", after - lookups);
}

#[test]
fn node_of_the_deployment_speaks_for_itself_only() {
    let mut world = talking(Setup {
        nodes: 3,
        ..Setup::default()
    });
    world.send_frame(2, 0, vec![1]);
    world.run(ms(300));
    // The third node has a key with the first node, and names the second.
    let key = world.secret.pair(world.party(hoa(2)), world.party(hoa(0)));
    for message in messages(u64::MAX) {
        for from in [moa(1, 2), moa(2, 3), moa(9, 9)] {
            let bytes = seal(
                Keying::Pair,
                hoa(1).octets(),
                &key,
                [3; 24],
                &message.encode(1),
            );
            let from = SocketAddrV6::new(from, NODE_PORT, 0, 0);
            let received = Received {
                local: moa(0, 1),
                from,
                bytes,
            };
            world.input(0, |core, now| core.handle_datagram(now, received));
        }
    }
    world.run(ms(500));
    assert!(world.is_settled(0, 1));
    // The third node may announce its own move; the servers then show that it has not moved.
    for sequence in [u64::MAX, u64::MAX - 1] {
        let message = MatMessage::from(Alert { sequence });
        let bytes = seal(
            Keying::Pair,
            hoa(2).octets(),
            &key,
            [3; 24],
            &message.encode(1),
        );
        let from = SocketAddrV6::new(moa(1, 2), NODE_PORT, 0, 0);
        let received = Received {
            local: moa(0, 1),
            from,
            bytes,
        };
        world.input(0, |core, now| core.handle_datagram(now, received));
    }
    let before = world.servers.iter().map(|it| it.lookups).sum::<usize>();
    world.run(Duration::from_secs(60));
    assert!(world.is_settled(0, 2) && world.is_settled(0, 1));
    let after = world.servers.iter().map(|it| it.lookups).sum::<usize>();
    assert!(after - before < 60, "{}", after - before);
}

#[test]
fn flood_of_strangers_asks_little_of_the_servers_and_stalls_nobody() {
    let mut world = talking(Setup::default());
    world.prepare(0, 5);
    world.run(ms(200));
    let before = world.servers.iter().map(|it| it.lookups).sum::<usize>();
    for round in 0..100_u128 {
        for number in 0..100_u128 {
            let hoa = Ipv6Addr::from_bits(hoa(0).to_bits() + 1000 + round * 100 + number);
            let bytes = seal(
                Keying::Pair,
                hoa.octets(),
                &Key([6; 32]),
                [3; 24],
                &[0; 1000],
            );
            let from = SocketAddrV6::new(moa(9, 9), NODE_PORT, 0, 0);
            let received = Received {
                local: moa(0, 1),
                from,
                bytes,
            };
            world.input(0, |core, now| core.handle_datagram(now, received.clone()));
            world.input(1, |core, now| core.handle_datagram(now, received));
        }
        if round == 50 {
            world.arrive(0, 5);
        }
        world.run(ms(20));
        if round > 52 {
            assert!(world.is_settled(0, 1), "round {round}");
        }
    }
    let after = world.servers.iter().map(|it| it.lookups).sum::<usize>();
    // Two nodes, two servers, 50 lookups a second each.
    assert!(after - before < 1000, "{}", after - before);
    let status = world.nodes[0].core.as_ref().unwrap().status(world.now);
    assert!(status.peers.len() <= MAX_PEERS / 2);
    assert!(status.counters.limited > 5000);
    world.run(Duration::from_secs(60));
    let status = world.nodes[0].core.as_ref().unwrap().status(world.now);
    assert_eq!(status.peers.len(), 1, "strangers are forgotten");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn replays_at_any_time_move_nothing(seed in 1_u64.., at in 0_usize..400, every in 1_usize..5) {
        let setup = Setup { dice: Dice(seed), reordering: 20, ..Setup::default() };
        let mut world = talking(setup);
        world.prepare(0, 5);
        for step in 0..400 {
            let end = world.now + ms(200);
            world.step(end);
            if step == at {
                world.arrive(0, 5);
            }
            if step % 50 == 0 {
                replay(&mut world, every);
            }
            let (to, _) = world.nodes[1].kernel.peers[&hoa(0)];
            prop_assert!(world.nodes[0].kernel.own.iter().any(|it| it.moa == to));
            // Before the move, only the place of the node is valid.
            prop_assert!(step >= at || to == moa(0, 1));
        }
        world.run(Duration::from_secs(2));
        prop_assert!(world.is_settled(0, 1));
    }
}
