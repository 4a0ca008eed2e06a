//! State of a server after a restart, and after changes of the clock.

use super::*;

#[test]
fn mappings_live_on_with_the_lifetime_that_is_left() {
    let mut world = World::new();
    world.update(1, 7, moas(&[10, 11]));
    world.update(1, 8, moas(&[11]));
    world.pass(Duration::from_secs(70));
    world.restart();
    let reply = world.lookup(2, 1);
    assert_eq!(reply.mapping.unwrap().sequence, 8);
    assert_eq!(reply.lifetime_s, 30);
    assert_eq!(world.update(1, 8, moas(&[12])), Outcome::OldSequence);
    // Both current and former addresses are still closed to other nodes.
    assert_eq!(world.update(3, 1, moas(&[10])), Outcome::BadAddresses);
    assert_eq!(world.update(3, 1, moas(&[11])), Outcome::BadAddresses);
    world.pass(Duration::from_secs(31));
    assert_eq!(world.lookup(2, 1).mapping, None);
    assert_eq!(world.update(3, 1, moas(&[10, 11])), Outcome::Accepted);
}

#[test]
fn mapping_that_ended_during_the_stop_is_gone_and_its_address_free() {
    let mut world = World::new();
    world.update(1, 7, moas(&[10]));
    world.now.monotonic = Timestamp(5);
    world.now.wall_ms += 100_000;
    world.restart();
    assert_eq!(world.lookup(2, 1).mapping, None);
    assert_eq!(world.update(2, 1, moas(&[10])), Outcome::Accepted);
    // The order of the records at the next start is arbitrary.
    world.restart();
    assert_eq!(world.found(1, 2), [10]);
    assert_eq!(world.update(1, 8, moas(&[10])), Outcome::BadAddresses);
}

#[test]
fn clock_that_is_set_changes_no_lifetime() {
    for jump_s in [-86_400_i64, 86_400] {
        let mut world = World::new();
        world.update(1, 1, moas(&[10]));
        world.pass(Duration::ZERO);
        world.now.wall_ms = world.now.wall_ms.saturating_add_signed(jump_s * 1000);
        world.pass(Duration::from_secs(50));
        assert_eq!(world.ims.counters().clock_jumps, 1);
        assert_eq!(world.lookup(2, 1).lifetime_s, 50);
        // A node whose clock was not set gets the time, and asks again.
        let mut request = world.request(2, moas(&[11]));
        request.time_ms = request.time_ms.saturating_add_signed(-jump_s * 1000);
        let reply = world.update_with(1, request.clone());
        assert_eq!(reply.outcome, Outcome::WrongTime as u8);
        request.time_ms = reply.time_ms;
        assert_eq!(world.update_with(1, request).outcome, 0);
        world.pass(Duration::from_secs(99));
        assert_eq!(world.found(2, 1), [11]);
        world.pass(Duration::from_secs(1));
        assert_eq!(world.found(2, 1), [0_u16; 0]);
    }
}

#[test]
fn clock_that_went_back_before_a_restart_prolongs_no_lifetime() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10]));
    world.update(1, 2, moas(&[11]));
    world.now.wall_ms -= 86_400_000;
    world.restart();
    world.pass(Duration::from_secs(100));
    assert_eq!(world.lookup(2, 1).mapping, None);
    world.pass(Duration::from_secs(500));
    assert_eq!(world.ims.poll_timeout(), None);
}

#[test]
fn clock_that_went_back_before_a_restart_gives_no_address_to_two() {
    let mut world = World::new();
    world.update(1, 1, moas(&[10]));
    world.pass(Duration::from_secs(100));
    world.update(2, 1, moas(&[10]));
    world.now.wall_ms -= 90_000;
    world.restart();
    assert_eq!(world.found(3, 2), [10]);
    assert_eq!(world.found(3, 1), [0_u16; 0]);
}
