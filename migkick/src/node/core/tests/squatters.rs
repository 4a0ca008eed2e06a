//! An enrolled node registers addresses at which others are going to be.

use common::mat::message::Outcome;

use super::world::*;
use crate::node::core::*;

fn place(ifindex: u32, moa: Ipv6Addr) -> Place {
    Place { ifindex, moa }
}

fn squat(world: &mut World, address: Ipv6Addr) {
    for server in &mut world.servers {
        server.squatted.insert(address);
    }
}

/// The shell takes another address in place of one, on the same NIC.
fn replace(world: &mut World, index: usize, old: Place, new: Ipv6Addr) {
    world.set_address(index, old.ifindex, new, true);
    world.set_address(index, old.ifindex, old.moa, false);
    world.nics(index);
}

/// An address of a node in a site, other than the one that everybody expects.
fn next(index: usize, site: u16) -> Ipv6Addr {
    Ipv6Addr::from_bits(moa(index, site).to_bits() ^ 0xff00)
}

#[test]
fn node_whose_address_somebody_has_registered_first_takes_another_and_is_found() {
    let mut world = World::new(Setup::default());
    world.flows = vec![(0, 1), (1, 0)];
    squat(&mut world, moa(0, 1));
    world.run(ms(500));
    let squatted = place(1, moa(0, 1));
    // Said once, though both servers refuse on and on.
    world.run(Duration::from_secs(30));
    assert_eq!(world.nodes[0].kernel.replaced, [squatted]);
    assert!(!world.delivers(1, 0));
    replace(&mut world, 0, squatted, next(0, 1));
    // Until then its correspondent believes that there is no such node.
    world.run(Timing::default().negative);
    assert!(world.is_settled(0, 1));
    assert!(world.delivers(0, 1) && world.delivers(1, 0));
}

#[test]
fn address_of_a_move_is_replaced_before_the_agents_are_told_of_it() {
    let mut world = World::new(Setup::default());
    world.flows = vec![(0, 1), (1, 0)];
    world.run(ms(500));
    squat(&mut world, moa(0, 5));
    let prepare = |world: &mut World, standby: Place| {
        world.set_address(0, standby.ifindex, standby.moa, true);
        world.nics(0);
        world.input(0, |core, now| core.prepare(now, standby));
        world.run(ms(500));
    };
    let standby = place(2, moa(0, 5));
    prepare(&mut world, standby);
    assert_eq!(world.nodes[0].kernel.replaced, [standby]);
    world.input(0, Core::abort);
    world.set_address(0, 2, standby.moa, false);
    prepare(&mut world, place(2, next(0, 5)));
    assert_eq!(world.nodes[0].kernel.replaced.len(), 1);
    assert!(world.ready(0), "all peers know the address to come");
    world.arrive(0, 5);
    world.run(ms(500));
    assert!(world.is_settled(0, 1));
    assert!(world.delivers(0, 1) && world.delivers(1, 0));
}

#[test]
fn address_that_is_found_taken_during_a_move_is_replaced_after_it() {
    let mut world = World::new(Setup::default());
    world.flows = vec![(0, 1), (1, 0)];
    world.run(ms(500));
    squat(&mut world, moa(0, 5));
    world.prepare(0, 5);
    world.run(ms(500));
    assert!(world.nodes[0].kernel.replaced.is_empty());
    world.arrive(0, 5);
    world.run(ms(500));
    let active = world.nodes[0].kernel.active.unwrap();
    assert_eq!(world.nodes[0].kernel.replaced, [active]);
    replace(&mut world, 0, active, next(0, 5));
    world.run(Duration::from_secs(1));
    assert!(world.is_settled(0, 1));
    assert!(world.delivers(0, 1) && world.delivers(1, 0));
}

#[test]
fn server_that_refuses_every_address_does_not_have_them_replaced_for_ever() {
    let mut world = World::new(Setup::default());
    world.servers[1].refuse = Some(Outcome::BadAddresses);
    world.run(ms(500));
    for number in 0..50 {
        if let Some(last) = world.nodes[0].kernel.replaced.get(number).copied() {
            let other = Ipv6Addr::from_bits(last.moa.to_bits() + 1);
            replace(&mut world, 0, last, other);
        }
        world.run(Duration::from_secs(60));
    }
    assert_eq!(world.nodes[0].kernel.replaced.len(), MAX_REPLACED);
    assert!(
        world.servers[0].mappings.contains_key(&hoa(0)),
        "the other server knows it"
    );
}
