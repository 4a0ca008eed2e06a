//! After any schedule followed by quiet, every pair of nodes sends to the place of the other.

use std::time::Duration;

use proptest::prelude::*;

use super::world::*;
use crate::node::core::*;

#[derive(Clone, Debug)]
enum Act {
    Move { node: usize, site: u16, hint: bool },
    Abort { node: usize },
    Crash { node: usize, steps: usize },
    ServerDown { server: usize, down: bool },
    Replug { node: usize, site: u16 },
    Steps(usize),
    Wait(u64),
}

fn any_act() -> impl Strategy<Value = Act> {
    let node = || 0_usize..3;
    let site = || 1_u16..8;
    prop_oneof![
        3 => (node(), site(), any::<bool>()).prop_map(|(node, site, hint)| Act::Move { node, site, hint }),
        1 => node().prop_map(|node| Act::Abort { node }),
        2 => (node(), 0_usize..30).prop_map(|(node, steps)| Act::Crash { node, steps }),
        1 => (0_usize..2, any::<bool>()).prop_map(|(server, down)| Act::ServerDown { server, down }),
        1 => (node(), site()).prop_map(|(node, site)| Act::Replug { node, site }),
        3 => (0_usize..40).prop_map(Act::Steps),
        2 => (0_u64..3000).prop_map(Act::Wait),
    ]
}

impl World {
    fn act(&mut self, act: Act) {
        match act {
            Act::Move { node, site, hint } => {
                self.prepare(node, site);
                self.steps_of(10);
                if self.nodes[node]
                    .core
                    .as_ref()
                    .is_none_or(|it| it.stage().is_none())
                {
                    return;
                }
                self.nodes[node].site = site;
                if hint {
                    self.input(node, Core::handle_hint);
                } else {
                    self.input(node, Core::handle_announcement);
                }
            }
            Act::Abort { node } => {
                let active = self.nodes[node].kernel.active;
                self.prepare(node, 9);
                self.steps_of(5);
                self.input(node, Core::abort);
                if let Some(active) = active {
                    self.set_address(node, 3 - active.ifindex, moa(node, 9), false);
                }
                self.nics(node);
            }
            Act::Crash { node, steps } => {
                self.crash(node);
                self.steps_of(steps);
                self.start(node);
            }
            Act::ServerDown { server, down } => self.servers[server].down = down,
            Act::Replug { node, site } => {
                self.nodes[node].kernel.addresses.clear();
                self.nodes[node].site = site;
                self.set_address(node, 1, moa(node, site), true);
                self.nics(node);
            }
            Act::Steps(steps) => self.steps_of(steps),
            Act::Wait(millis) => self.run(ms(millis)),
        }
    }

    fn steps_of(&mut self, steps: usize) {
        for _ in 0..steps {
            let end = self.now + ms(1000);
            self.step(end);
        }
    }

    /// Removes an address of a former site. A node that restarted in a new site, or lost its
    /// confirmation, may keep such an address; its kernel would lose the address sooner or later.
    fn tidy(&mut self) {
        for node in 0..self.nodes.len() {
            let site = self.nodes[node].site;
            if self.nodes[node]
                .core
                .as_ref()
                .is_some_and(|it| it.stage().is_some())
            {
                continue;
            }
            let kernel = &mut self.nodes[node].kernel;
            let here = |address: &std::net::Ipv6Addr| address.segments()[2] == site;
            if kernel.active.is_none_or(|it| !here(&it.moa)) {
                for addresses in kernel.addresses.values_mut() {
                    addresses.retain(here);
                }
                self.set_address(node, 1, moa(node, site), true);
            }
            self.nics(node);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn all_find_each_other_after_any_schedule(
        seed in 1_u64..,
        acts in proptest::collection::vec(any_act(), 0..12),
        (loss, duplication, reordering) in (0_u64..40, 0_u64..40, 0_u64..40),
    ) {
        let mut world = World::new(Setup {
            nodes: 3,
            servers: 2,
            loss,
            duplication,
            reordering,
            dice: Dice(seed),
        });
        world.flows = vec![(0, 1), (1, 0), (1, 2), (2, 0)];
        for act in acts {
            world.act(act);
        }
        world.setup.loss = 0;
        world.setup.reordering = 0;
        world.stop_servers(false);
        world.run(Duration::from_secs(2));
        world.tidy();
        world.run(Duration::from_secs(90));
        for (from, to) in [(0, 1), (1, 0), (1, 2), (2, 0)] {
            let (sender, receiver) = (&world.nodes[from], &world.nodes[to]);
            let active = receiver.kernel.active.unwrap().moa;
            let peer = &sender.kernel.peers[&hoa(to)];
            prop_assert_eq!(peer.0, active, "{} to {}", from, to);
            prop_assert!(world.delivers(from, to), "{} to {}", from, to);
        }
    }

    #[test]
    fn stall_of_a_move_is_short_though_a_tenth_is_lost(seed in 1_u64.., at in 0_usize..60) {
        let mut world = World::new(Setup { loss: 10, reordering: 10, dice: Dice(seed), ..Setup::default() });
        world.flows = vec![(0, 1), (1, 0)];
        world.run(Duration::from_secs(3));
        world.prepare(0, 5);
        world.run(Duration::from_secs(1));
        for _ in 0..at {
            let end = world.now + ms(100);
            world.step(end);
        }
        world.arrive(0, 5);
        world.run(Duration::from_secs(3));
        prop_assert!(world.is_settled(0, 1));
    }

    #[test]
    fn no_packet_of_a_move_comes_as_somebody_elses(
        seed in 1_u64..,
        (before, after) in (0_u64..500, 0_u64..500),
        down: bool,
    ) {
        let mut world = World::new(Setup { loss: 10, reordering: 10, dice: Dice(seed), ..Setup::default() });
        world.flows = vec![(0, 1), (1, 0)];
        world.run(Duration::from_secs(3));
        world.resets = 0;
        world.stop_servers(down);
        world.prepare(0, 5);
        world.run(ms(before));
        world.ready(0);
        world.nodes[0].site = 5;
        // For that long the node does not know of its move, and continues as before.
        world.run(ms(after));
        world.input(0, Core::handle_announcement);
        world.run(Duration::from_secs(3));
        prop_assert_eq!(world.resets, 0);
    }
}
