//! Generations of keys.

use super::*;

fn enroll(world: &mut World, number: u16, generation: Option<u32>) -> Result<u32, EnrollError> {
    world
        .ims
        .enroll(world.now, hoa(number), generation, 42)
        .map(|()| {
            world.store();
            let enrolled = world.ims.poll_enrolled().unwrap();
            assert_eq!(enrolled.request, 42);
            enrolled.generation.unwrap()
        })
}

#[test]
fn each_enrollment_has_the_next_generation_and_voids_the_key_before() {
    let mut world = World::new();
    assert_eq!(enroll(&mut world, 1, None), Ok(1));
    world.update(1, 900, moas(&[10]));
    assert_eq!(enroll(&mut world, 1, None), Ok(2));
    // The holder of the former key can say nothing more, and the former registrations are void.
    let request = world.request(901, moas(&[10]));
    world.send(1, &request.into());
    world.assert_silent();
    assert_eq!(world.ims.counters().old_keys, 1);
    assert_eq!(world.found(2, 1), [0_u16; 0]);
    // The new key starts afresh, and may register the former addresses.
    world.generations.insert(1, 2);
    assert_eq!(world.update(2, 1, moas(&[10])), Outcome::BadAddresses);
    assert_eq!(world.update(1, 1, moas(&[10])), Outcome::Accepted);
}

#[test]
fn enrollment_waits_for_the_store() {
    let mut world = World::new();
    world.ims.enroll(world.now, hoa(1), None, 1).unwrap();
    assert_eq!(world.ims.poll_enrolled(), None);
    let writes = world.ims.poll_writes();
    assert_eq!(writes[0].record.generation, 1);
    world
        .ims
        .handle_stored(world.now, &[hoa(1).octets()], false);
    let enrolled = world.ims.poll_enrolled().unwrap();
    assert_eq!((enrolled.request, enrolled.generation), (1, None));
}

#[test]
fn key_that_is_replaced_during_an_update_takes_the_update_with_it() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10]));
    let request = world.request(2, moas(&[11]));
    world.send(1, &request.into());
    world.ims.enroll(world.now, hoa(1), None, 9).unwrap();
    world.store();
    assert_eq!(world.ims.poll_enrolled().unwrap().generation, Some(2));
    assert_eq!(world.ims.poll_reply(), None);
    let record = &world.store[&hoa(1).octets()];
    assert_eq!((record.generation, record.moas.len()), (2, 0));
    assert_eq!(world.update(3, 1, moas(&[11])), Outcome::Accepted);
    world.restart();
    assert_eq!(world.found(2, 1), [0_u16; 0]);
}

#[test]
fn replica_learns_a_newer_generation_from_the_node_and_refuses_the_old() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10]));
    world.generations.insert(1, 3);
    assert_eq!(world.update(1, 1, moas(&[11])), Outcome::Accepted);
    assert_eq!(world.ims.counters().generations_learnt, 2);
    assert_eq!(world.store[&hoa(1).octets()].generation, 3);
    for generation in [1, 2] {
        world.generations.insert(1, generation);
        let request = world.request(5, moas(&[10]));
        world.send(1, &request.into());
        world.assert_silent();
    }
    world.restart();
    assert_eq!(world.found(2, 1), [11]);
}

#[test]
fn generation_that_is_too_far_ahead_is_told_to_the_replica() {
    let mut world = World::new();
    world.generations.insert(1, AHEAD + 1);
    let request: MatMessage = world.request(1, moas(&[10])).into();
    world.send(1, &request);
    world.assert_silent();
    assert_eq!(world.ims.counters().forged, 1);
    assert_eq!(enroll(&mut world, 1, Some(AHEAD + 1)), Ok(AHEAD + 1));
    assert_eq!(world.update(1, 1, moas(&[10])), Outcome::Accepted);
    // A repetition is harmless and keeps the registrations.
    assert_eq!(enroll(&mut world, 1, Some(AHEAD + 1)), Ok(AHEAD + 1));
    assert_eq!(world.found(2, 1), [10]);
    assert!(matches!(
        enroll(&mut world, 1, Some(AHEAD)),
        Err(EnrollError::Replaced { known: 5, .. })
    ));
}

#[test]
fn address_outside_the_home_prefix_is_not_enrolled() {
    let mut world = World::new();
    let error = world
        .ims
        .enroll(world.now, moa(1), None, 1)
        .expect_err("enrolled");
    assert_eq!(
        error.to_string(),
        "2001:db8:1::1 cannot be a HoA: it is not in the home prefix fd5e:6d61:74::/48"
    );
    assert!(matches!(
        enroll(&mut world, 0, None),
        Err(EnrollError::Anycast { .. })
    ));
    assert!(matches!(
        enroll(&mut world, 1, Some(0)),
        Err(EnrollError::Replaced { .. })
    ));
    world.assert_silent();
}
