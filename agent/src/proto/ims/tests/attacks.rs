//! Forged, replayed, altered and meaningless datagrams.

use std::collections::BTreeSet;

use common::mat::message::{Alert, Echo};

use super::*;

fn lookup(wanted: u16) -> MatMessage {
    LookupRequest {
        hoa: hoa(wanted).octets().into(),
    }
    .into()
}

#[test]
fn datagram_that_was_changed_is_counted_and_nothing_else() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10]));
    let request = world.request(2, moas(&[11]));
    let datagram = world.sealed(1, &request.into());
    for at in 0..datagram.len() {
        let mut changed = datagram.clone();
        changed[at] ^= 0x40;
        world.ims.handle_datagram(world.now, path(1), &changed);
        world.assert_silent();
    }
    for length in 0..datagram.len() {
        let cut = &datagram[..length];
        world.ims.handle_datagram(world.now, path(1), cut);
        world.assert_silent();
    }
    let counters = world.ims.counters();
    let refused = counters.forged + counters.malformed + counters.foreign + counters.unexpected;
    assert_eq!(refused, 2 * datagram.len() as u64);
    assert!(counters.forged > 0 && counters.malformed > 0 && counters.foreign > 0);
    assert_eq!(world.found(2, 1), [10]);
}

#[test]
fn key_of_one_node_moves_no_other() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10]));
    world.update(2, 1, moas(&[20]));
    let request = world.request(9, moas(&[21])).into();
    let own = hoa(1).octets();
    let datagram = seal(
        Keying::Node,
        own,
        &key(2, 1),
        [3; NONCE_BYTES],
        &MatMessage::encode(&request, 77),
    );
    world.ims.handle_datagram(world.now, path(2), &datagram);
    world.assert_silent();
    assert_eq!(world.ims.counters().forged, 1);
    assert_eq!(world.found(2, 1), [10]);
}

#[test]
fn key_of_a_pair_is_none_for_the_server() {
    let mut world = World::new();
    let pair = pair_key((1, 1), (2, 1));
    let message = Alert { sequence: 1 };
    let message = MatMessage::from(message).encode(1);
    for keying in [Keying::Pair, Keying::Node] {
        let datagram = seal(keying, hoa(1).octets(), &pair, [3; NONCE_BYTES], &message);
        world.ims.handle_datagram(world.now, path(1), &datagram);
        world.assert_silent();
    }
    assert_eq!(world.ims.counters().unexpected, 1);
    assert_eq!(world.ims.counters().forged, 1);
}

#[test]
fn server_that_is_resumed_twice_from_a_snapshot_uses_no_nonce_twice() {
    let mut nonces = BTreeSet::new();
    // The same states and the same inputs.
    for _ in 0..2 {
        let mut world = World::new();
        for number in 1..20 {
            let request = world.request(1, moas(&[number]));
            world.send(number, &request.into());
        }
        world.store();
        while let Some(reply) = world.ims.poll_reply() {
            assert!(nonces.insert(reply.bytes[20..44].to_vec()));
        }
    }
    assert_eq!(nonces.len(), 38);
}

#[test]
fn server_without_random_numbers_says_nothing() {
    let mut world = World::new();
    world.ims = Ims::new(config(), Secret::new(&SECRET), Entropy::new(|_| false));
    let wanted = hoa(2).octets().into();
    world.send(1, &LookupRequest { hoa: wanted }.into());
    assert_eq!(world.ims.poll_reply(), None);
    assert_eq!(world.ims.counters().no_random_numbers, 1);
}

#[test]
fn messages_that_are_for_nodes_are_counted() {
    let mut world = World::new();
    world.lookup(1, 2);
    world.store();
    world.send(1, &Echo {}.into());
    world.send(1, &Alert { sequence: 1 }.into());
    world.assert_silent();
    assert_eq!(world.ims.counters().unexpected, 2);
}

#[test]
fn sealed_bytes_that_are_no_message_are_counted() {
    let mut world = World::new();
    world.lookup(1, 2);
    world.store();
    for message in [&b""[..], b"nonsense", &[0x84, 2, 1, 22, 0x81], &[0xff; 900]] {
        let datagram = seal(
            Keying::Node,
            hoa(1).octets(),
            &key(1, 1),
            [4; NONCE_BYTES],
            message,
        );
        world.ims.handle_datagram(world.now, path(1), &datagram);
        world.assert_silent();
    }
    assert_eq!(world.ims.counters().malformed, 4);
}

#[test]
fn oversized_datagram_is_counted() {
    let mut world = World::new();
    let message = [0; 2000];
    let datagram = seal(
        Keying::Node,
        hoa(1).octets(),
        &key(1, 1),
        [4; NONCE_BYTES],
        &message,
    );
    world.ims.handle_datagram(world.now, path(1), &datagram);
    world.assert_silent();
    assert_eq!(world.ims.counters().malformed, 1);
}

#[test]
fn replayed_update_moves_nobody_back() {
    let mut world = World::new();
    let first = world.request(1, moas(&[10]));
    let datagram = world.sealed(1, &first.into());
    world.ims.handle_datagram(world.now, path(1), &datagram);
    world.store();
    assert!(world.answer(1).is_some());
    world.update(1, 2, moas(&[11]));
    // The replaying sender gets an answer that the sender cannot read.
    world.ims.handle_datagram(world.now, path(66), &datagram);
    assert_eq!(world.ims.poll_writes(), []);
    assert_eq!(world.ims.poll_reply().unwrap().path, path(66));
    assert_eq!(world.found(2, 1), [11]);
    assert_eq!(world.ims.counters().updates_old_sequence, 1);
}

#[test]
fn update_that_was_held_back_is_too_old() {
    let mut world = World::new();
    let held = world.request(5, moas(&[10]));
    let datagram = world.sealed(1, &held.into());
    world.pass(Duration::from_secs(121));
    world.ims.handle_datagram(world.now, path(1), &datagram);
    world.store();
    let Some(MatMessage::UpdateReply(reply)) = world.answer(1) else {
        panic!("no answer");
    };
    assert_eq!(reply.outcome, Outcome::WrongTime as u8);
    assert_eq!(world.found(2, 1), [0_u16; 0]);
}

#[test]
fn flood_in_the_name_of_a_node_does_not_silence_it() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10]));
    let genuine = world.sealed(1, &lookup(1));
    let mut forged = genuine.clone();
    *forged.last_mut().unwrap() ^= 1;
    for _ in 0..20_000 {
        // From its own address: garbage, and a former datagram of the node.
        world.ims.handle_datagram(world.now, path(1), &forged);
        world.ims.handle_datagram(world.now, path(1), &genuine);
    }
    let answers = std::iter::from_fn(|| world.ims.poll_reply()).count();
    assert_eq!(answers, 1001, "more answers than those repeated may have");
    assert_eq!(world.found(1, 1), [10]);
    assert_eq!(world.update(1, 2, moas(&[11])), Outcome::Accepted);
}

#[test]
fn forged_datagrams_of_some_prefixes_keep_new_nodes_of_others_out_of_nothing() {
    let mut world = World::new();
    let of_prefix = |prefix: u16| Path {
        remote: SocketAddrV6::new(Ipv6Addr::new(0x2001, 0xdb8, 9, prefix, 0, 0, 0, 1), 1, 0, 0),
        ..path(1)
    };
    // In the names of nodes that this server has not seen, with keys that nobody has.
    for number in 0..20_000_u16 {
        let forged = sealed(1000 + number % 500, 99, number.into(), &lookup(1));
        let from = of_prefix(number % 3);
        world.ims.handle_datagram(world.now, from, &forged);
    }
    let answered = (100..116).filter(|&prefix| {
        let genuine = world.sealed(prefix, &lookup(1));
        world
            .ims
            .handle_datagram(world.now, of_prefix(prefix), &genuine);
        world.ims.poll_reply().is_some()
    });
    // Some nodes may share the attacker's hash.
    let answered = answered.count();
    assert!(answered >= 8, "{answered} of 16");
}

#[test]
fn answers_are_never_sealed_with_one_nonce_twice() {
    let mut world = World::new();
    let mut nonces = std::collections::BTreeSet::new();
    for restart in 0..2 {
        for _ in 0..100 {
            world.send(1, &lookup(2));
            let reply = world.ims.poll_reply().unwrap();
            assert!(nonces.insert(reply.bytes[20..44].to_vec()));
        }
        if restart == 0 {
            world.restart();
        }
    }
}
