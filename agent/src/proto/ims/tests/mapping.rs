//! Registrations of nodes, and the answers to lookups.

use super::*;

#[test]
fn lookup_finds_what_was_registered_with_the_key_of_the_pair() {
    let mut world = World::new();
    assert_eq!(world.update(1, 5, moas(&[10, 11])), Outcome::Accepted);
    let reply = world.lookup(2, 1);
    let mapping = reply.mapping.unwrap();
    assert_eq!((mapping.sequence, mapping.moas), (5, moas(&[10, 11])));
    assert_eq!(*reply.hoa, hoa(1).octets());
    assert_eq!(reply.lifetime_s, 60);
    let pair = pair_key((1, 1), (2, 1));
    assert_eq!(*reply.pair_key, pair.0);
    // The other node gets the same key, before the first node has looked.
    let other = world.lookup(1, 2);
    assert_eq!((other.pair_key, other.mapping), (reply.pair_key, None));
    assert_eq!(other.lifetime_s, 5);
}

#[test]
fn pair_has_another_key_when_either_is_enrolled_anew() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10]));
    world.update(2, 1, moas(&[20]));
    let key = |world: &mut World, one, other| {
        let keys = [(one, other), (other, one)].map(|(from, to)| world.lookup(from, to).pair_key);
        assert_eq!(keys[0], keys[1], "both are told the same");
        keys[0]
    };
    let first = key(&mut world, 1, 2);
    assert_eq!(*first, pair_key((1, 1), (2, 1)).0);
    let mut known = vec![first];
    for (number, expected) in [(1, ((1, 2), (2, 1))), (2, ((1, 2), (2, 2)))] {
        world.generations.insert(number, 2);
        let address = moas(&[number * 10]);
        assert_eq!(world.update(number, 1, address), Outcome::Accepted);
        let next = key(&mut world, 1, 2);
        assert_eq!(*next, pair_key(expected.0, expected.1).0);
        assert!(!known.contains(&next));
        known.push(next);
    }
}

#[test]
fn update_is_seen_and_acknowledged_only_when_it_is_stored() {
    let mut world = World::new();
    assert_eq!(world.update(1, 1, moas(&[10])), Outcome::Accepted);
    let request = world.request(2, moas(&[11]));
    world.send(1, &request.into());
    assert_eq!(world.answer(1), None);
    assert_eq!(world.found(2, 1), [10]);
    world.store();
    let Some(MatMessage::UpdateReply(reply)) = world.answer(1) else {
        panic!("no answer");
    };
    assert_eq!(
        (reply.outcome, reply.sequence, reply.lifetime_s),
        (0, 2, 100)
    );
    assert_eq!(world.found(2, 1), [11]);
}

#[test]
fn update_that_cannot_be_stored_changes_nothing_and_can_be_sent_again() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10]));
    let request = world.request(2, moas(&[11]));
    world.send(1, &request.into());
    let writes = world.ims.poll_writes();
    assert_eq!(writes.len(), 1);
    world
        .ims
        .handle_stored(world.now, &[hoa(1).octets()], false);
    let Some(MatMessage::UpdateReply(reply)) = world.answer(1) else {
        panic!("no answer");
    };
    assert_eq!(Outcome::from_number(reply.outcome), Some(Outcome::Failed));
    assert_eq!(reply.sequence, 1);
    assert_eq!(world.found(2, 1), [10]);
    // The refused address stays free.
    assert_eq!(world.update(3, 1, moas(&[11])), Outcome::Accepted);
    assert_eq!(world.update(2, 1, moas(&[10])), Outcome::BadAddresses);
    assert_eq!(world.update(1, 2, moas(&[12])), Outcome::Accepted);
    assert_eq!(world.ims.counters().updates_failed, 1);
}

#[test]
fn updates_of_one_batch_are_written_together() {
    let mut world = World::new();
    for number in 1..=5 {
        let request = world.request(1, moas(&[number]));
        world.send(number, &request.into());
    }
    assert_eq!(world.ims.poll_reply(), None);
    // The first datagram of a node also taught its generation, which is a separate write.
    let writes = world.ims.poll_writes();
    assert_eq!(writes.len(), 5);
    let hoas: Vec<Hoa> = writes.iter().map(|write| write.hoa).collect();
    world.ims.handle_stored(world.now, &hoas, true);
    assert_eq!(world.ims.poll_writes().len(), 5);
    world.ims.handle_stored(world.now, &hoas, true);
    assert_eq!(std::iter::from_fn(|| world.ims.poll_reply()).count(), 5);
}

#[test]
fn of_updates_that_come_during_a_write_the_newest_is_taken() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10]));
    for sequence in 2..=4 {
        let request = world.request(sequence, moas(&[10 + sequence as u16]));
        world.send(1, &request.into());
    }
    world.store();
    let mut sequences = Vec::new();
    while let Some(MatMessage::UpdateReply(reply)) = world.answer(1) {
        assert_eq!(reply.outcome, 0);
        sequences.push(reply.sequence);
    }
    assert_eq!(sequences, [2, 4]);
    assert_eq!(world.found(2, 1), [14]);
}

#[test]
fn repeated_update_is_acknowledged_again_and_prolongs_nothing() {
    let mut world = World::new();
    let request = world.request(1, moas(&[10]));
    world.update_with(1, request.clone());
    world.pass(Duration::from_secs(30));
    world.send(1, &request.into());
    assert_eq!(world.ims.poll_writes(), []);
    let Some(MatMessage::UpdateReply(reply)) = world.answer(1) else {
        panic!("no answer");
    };
    assert_eq!((reply.outcome, reply.lifetime_s), (0, 70));
    assert_eq!(world.ims.counters().updates_repeated, 1);
}

#[test]
fn old_sequence_is_refused_and_the_known_one_told() {
    let mut world = World::new();
    world.update(1, 7, moas(&[10]));
    for sequence in [0, 6, 7] {
        let request = world.request(sequence, moas(&[11]));
        let reply = world.update_with(1, request);
        assert_eq!(reply.outcome, Outcome::OldSequence as u8);
        assert_eq!((reply.sequence, reply.lifetime_s), (7, 0));
    }
    assert_eq!(world.found(2, 1), [10]);
    assert_eq!(world.ims.counters().updates_old_sequence, 3);
}

#[test]
fn sequence_outlives_the_mapping() {
    let mut world = World::new();
    world.update(1, 7, moas(&[10]));
    world.pass(Duration::from_secs(101));
    assert_eq!(world.found(2, 1), [0_u16; 0]);
    assert_eq!(world.ims.counters().mappings_ended, 1);
    assert_eq!(world.update(1, 7, moas(&[10])), Outcome::OldSequence);
    assert_eq!(world.update(1, 8, moas(&[10])), Outcome::Accepted);
}

#[test]
fn time_beyond_the_window_is_refused_and_the_server_s_told() {
    let mut world = World::new();
    for (offset, outcome) in [
        (-121_000, Outcome::WrongTime),
        (121_000, Outcome::WrongTime),
        (-119_000, Outcome::Accepted),
        (119_000, Outcome::Accepted),
    ] {
        world.pass(Duration::from_secs(1));
        let sequence = world.now.wall_ms;
        let mut request = world.request(sequence, moas(&[10]));
        request.time_ms = request.time_ms.saturating_add_signed(offset);
        let reply = world.update_with(1, request);
        assert_eq!(reply.outcome, outcome as u8, "{offset}");
        assert_eq!(reply.time_ms, world.now.wall_ms);
    }
    let mut request = world.request(u64::MAX, moas(&[10]));
    request.time_ms = u64::MAX;
    assert_eq!(world.update_with(1, request).outcome, 2);
}

#[test]
fn lifetime_is_that_of_the_node_within_bounds() {
    let mut world = World::new();
    for (sequence, asked, given) in [(1, 0, 10), (2, 300, 300), (3, u32::MAX, 600)] {
        let mut request = world.request(sequence, moas(&[10]));
        request.lifetime_s = asked;
        assert_eq!(world.update_with(1, request).lifetime_s, given);
    }
}

#[test]
fn answer_is_used_no_longer_than_the_mapping_lives() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10]));
    world.pass(Duration::from_millis(70_500));
    assert_eq!(world.lookup(2, 1).lifetime_s, 29);
    world.pass(Duration::from_secs(29));
    assert_eq!(world.lookup(2, 1).lifetime_s, 1);
    world.pass(Duration::from_millis(500));
    assert_eq!(world.lookup(2, 1).mapping, None);
}

#[test]
fn node_that_says_it_is_nowhere_is_found_nowhere() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10]));
    let request = world.request(2, Vec::new());
    let reply = world.update_with(1, request);
    assert_eq!((reply.outcome, reply.lifetime_s), (0, 0));
    assert_eq!(world.lookup(2, 1).mapping, None);
    assert_eq!(world.ims.counts(world.now.monotonic).1, 0);
}

#[test]
fn lists_that_are_none_are_refused() {
    let mut world = World::new();
    let with = |address: &str, priority| Moa {
        address: address.parse::<Ipv6Addr>().unwrap().octets().into(),
        priority,
    };
    let mut lists: Vec<Vec<Moa>> = [
        "::",
        "::1",
        "fe80::1",
        "ff0e::1",
        "ff02::1",
        "::ffff:192.0.2.1",
        "fd5e:6d61:74::9",
    ]
    .into_iter()
    .map(|address| vec![with(address, 1)])
    .collect();
    lists.push(vec![with("2001:db8::1", 0)]);
    lists.push(vec![with("2001:db8::1", 2)]);
    lists.push(vec![with("2001:db8::1", 1), with("2001:db8::2", 1)]);
    lists.push(vec![with("2001:db8::1", 1), with("2001:db8::1", 2)]);
    lists.push(vec![with("2001:db8::1", 1), with("fe80::2", 2)]);
    lists.push(moas(&[1, 2, 3, 4, 5, 6, 7, 8, 9]));
    let count = lists.len() as u64;
    for (list, sequence) in lists.into_iter().zip(1..) {
        assert_eq!(
            world.update(1, sequence, list.clone()),
            Outcome::BadAddresses,
            "{list:?}"
        );
    }
    assert_eq!(world.ims.counters().updates_bad_addresses, count);
    assert_eq!(
        world.update(1, 99, moas(&[1, 2, 3, 4, 5, 6, 7, 8])),
        Outcome::Accepted
    );
}

#[test]
fn address_that_another_has_is_refused() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10, 11]));
    assert_eq!(world.update(2, 1, moas(&[20, 11])), Outcome::BadAddresses);
    assert_eq!(world.ims.counters().updates_taken_addresses, 1);
    assert_eq!(world.found(3, 1), [10, 11]);
    assert_eq!(world.found(3, 2), [0_u16; 0]);
    // No address of the refused update is held.
    assert_eq!(world.update(3, 1, moas(&[20])), Outcome::Accepted);
}

#[test]
fn of_two_that_ask_at_once_for_an_address_one_gets_it() {
    let mut world = World::new();
    let request = world.request(1, moas(&[10]));
    world.send(1, &request.clone().into());
    world.store();
    assert!(world.answer(1).is_some());
    let later = world.request(2, moas(&[11]));
    world.send(1, &later.into());
    let other = world.request(1, moas(&[11]));
    world.send(2, &other.into());
    world.store();
    let (Some(MatMessage::UpdateReply(first)), Some(MatMessage::UpdateReply(second))) =
        (world.answer(1), world.answer(2))
    else {
        panic!("no answers");
    };
    assert_eq!((first.outcome, second.outcome), (0, 3));
}

#[test]
fn address_that_was_left_is_closed_until_the_old_mapping_would_have_ended() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10, 11]));
    world.pass(Duration::from_secs(20));
    assert_eq!(world.update(1, 2, moas(&[11])), Outcome::Accepted);
    world.pass(Duration::from_secs(79));
    assert_eq!(world.update(2, 1, moas(&[10])), Outcome::BadAddresses);
    // The node itself may return to the address.
    assert_eq!(world.update(1, 3, moas(&[11, 10])), Outcome::Accepted);
    assert_eq!(world.update(1, 4, moas(&[11])), Outcome::Accepted);
    world.pass(Duration::from_secs(99));
    assert_eq!(world.update(2, 2, moas(&[10])), Outcome::BadAddresses);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.update(2, 3, moas(&[10])), Outcome::Accepted);
}

#[test]
fn shorter_lifetime_does_not_open_an_address_while_answers_name_it() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10]));
    assert_eq!(world.lookup(2, 1).lifetime_s, 60);
    let mut request = world.request(2, moas(&[10]));
    request.lifetime_s = 10;
    world.update_with(1, request);
    world.update(1, 3, moas(&[11]));
    world.pass(Duration::from_secs(59));
    assert_eq!(world.update(3, 1, moas(&[10])), Outcome::BadAddresses);
    world.pass(Duration::from_secs(1));
    assert_eq!(world.update(3, 2, moas(&[10])), Outcome::Accepted);
}

#[test]
fn node_that_flits_about_fills_no_memory() {
    let mut world = World::new();
    for sequence in 1..=500 {
        world.update(1, sequence, moas(&[sequence as u16]));
    }
    assert!(world.ims.holders.len() <= 65, "{}", world.ims.holders.len());
    assert_eq!(world.ims.ends.len(), 1);
    world.pass(Duration::from_secs(600));
    assert_eq!(world.ims.holders.len(), 0);
    assert_eq!(world.ims.poll_timeout(), None);
}

#[test]
fn address_of_an_update_on_its_way_stays_the_node_s_when_its_old_mapping_ends() {
    let mut world = World::new();
    assert_eq!(world.update(1, 1, moas(&[1])), Outcome::Accepted);
    let mut renewal = world.request(2, moas(&[1]));
    renewal.lifetime_s = 500;
    world.send(1, &renewal.into());
    // The write is slow; the mapping of 100 s ends before the write completes.
    world.pass(Duration::from_secs(200));
    let request = world.request(1, moas(&[1]));
    world.send(2, &request.into());
    world.store();
    while world.ims.poll_reply().is_some() {}
    assert_eq!(world.found(3, 1), [1]);
    assert_eq!(world.found(3, 2), [0_u16; 0]);
}
