//! Allowances of sources.

use super::*;

fn ask(world: &mut World, from: u16) -> bool {
    let message = LookupRequest {
        hoa: hoa(2).octets().into(),
    };
    let datagram = world.sealed(1, &message.into());
    world.ims.handle_datagram(world.now, path(from), &datagram);
    world.ims.poll_reply().is_some()
}

#[test]
fn source_over_its_allowance_waits_and_others_do_not() {
    let mut world = World::with(Config {
        requests_per_second: 10,
        burst: 5,
        ..config()
    });
    assert_eq!((0..20).filter(|_| ask(&mut world, 1)).count(), 5);
    assert!(ask(&mut world, 2));
    world.pass(Duration::from_millis(200));
    assert_eq!((0..20).filter(|_| ask(&mut world, 1)).count(), 2);
    assert_eq!(world.ims.counters().rate_limited, 15 + 18);
    world.pass(Duration::from_secs(60));
    assert_eq!((0..20).filter(|_| ask(&mut world, 1)).count(), 5);
}

#[test]
fn table_of_sources_is_bounded_and_forgets_those_who_rest() {
    let mut world = World::with(Config {
        requests_per_second: 10,
        burst: 5,
        sources: 8,
        ..config()
    });
    assert_eq!((1..=20).filter(|&from| ask(&mut world, from)).count(), 8);
    assert_eq!(world.ims.counters().sources_full, 12);
    // A tenth of a second restores one token for each.
    world.pass(Duration::from_millis(100));
    assert!(ask(&mut world, 100));
    assert_eq!(world.ims.sources.len(), 1);
}

#[test]
fn unknown_generations_are_not_tried_without_end() {
    let mut world = World::new();
    for number in 0..AHEAD_PER_SECOND + 10 {
        let datagram = sealed(
            1000 + (number % 50) as u16,
            99,
            number.into(),
            &LookupRequest {
                hoa: hoa(1).octets().into(),
            }
            .into(),
        );
        world.ims.handle_datagram(world.now, path(1), &datagram);
    }
    // A known node does not need them.
    world.pass(Duration::from_secs(1));
    world.update(1, 1, moas(&[10]));
    for number in 0..AHEAD_PER_SECOND + 10 {
        let datagram = sealed(
            2,
            99,
            number.into(),
            &MatMessage::from(common::mat::message::Echo {}),
        );
        world.ims.handle_datagram(world.now, path(1), &datagram);
    }
    assert_eq!(world.update(1, 2, moas(&[11])), Outcome::Accepted);
    world.send(
        3,
        &LookupRequest {
            hoa: hoa(1).octets().into(),
        }
        .into(),
    );
    world.assert_silent();
    world.pass(Duration::from_secs(1));
    assert_eq!(world.found(3, 1), [11]);
}
