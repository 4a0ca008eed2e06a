//! Random datagrams and random lives: no panic, and lookups return registered MoAs only.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Event {
    Garbage(Vec<u8>),
    Body {
        node: u16,
        bytes: Vec<u8>,
    },
    Update {
        node: u16,
        sequence: u64,
        moas: Vec<u16>,
        lifetime_s: u32,
    },
    Lookup {
        node: u16,
        wanted: u16,
    },
    Enroll {
        node: u16,
    },
    Store {
        stored: bool,
    },
    Wait(u64),
    SetClock(i64),
    Restart,
}

fn event() -> impl Strategy<Value = Event> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..300);
    prop_oneof![
        2 => bytes().prop_map(Event::Garbage),
        2 => (1..5_u16, bytes()).prop_map(|(node, bytes)| Event::Body { node, bytes }),
        6 => (1..5_u16, 0..20_u64, prop::collection::vec(0..12_u16, 0..10), 0..700_u32)
            .prop_map(|(node, sequence, moas, lifetime_s)| Event::Update {
                node, sequence, moas, lifetime_s,
            }),
        3 => (1..5_u16, 0..6_u16).prop_map(|(node, wanted)| Event::Lookup { node, wanted }),
        1 => (1..5_u16).prop_map(|node| Event::Enroll { node }),
        5 => prop::bool::weighted(0.8).prop_map(|stored| Event::Store { stored }),
        2 => (0..200_u64).prop_map(Event::Wait),
        1 => (-500_000..500_000_i64).prop_map(Event::SetClock),
        1 => Just(Event::Restart),
    ]
}

proptest! {
    #[test]
    fn any_life_leaves_the_tables_in_agreement(events in prop::collection::vec(event(), 1..80)) {
        let mut world = World::new();
        for event in events {
            match event {
                Event::Garbage(bytes) => {
                    world.ims.handle_datagram(world.now, path(1), &bytes);
                }
                Event::Body { node, bytes } => {
                    let key = key(node, 1);
                    let hoa = hoa(node).octets();
                    let datagram = seal(Keying::Node, hoa, &key, [8; NONCE_BYTES], &bytes);
                    world.ims.handle_datagram(world.now, path(node), &datagram);
                }
                Event::Update { node, sequence, moas: list, lifetime_s } => {
                    let mut request = world.request(sequence, moas(&list));
                    request.lifetime_s = lifetime_s;
                    world.send(node, &request.into());
                }
                Event::Lookup { node, wanted } => {
                    let wanted = hoa(wanted).octets().into();
                    world.send(node, &LookupRequest { hoa: wanted }.into());
                }
                Event::Enroll { node } => {
                    world.ims.enroll(world.now, hoa(node), None, 1).unwrap();
                    let known = world.ims.nodes[&hoa(node).octets()].generation;
                    world.generations.insert(node, known);
                }
                Event::Store { stored } => world.store_once(stored),
                Event::Wait(seconds) => world.pass(Duration::from_secs(seconds)),
                Event::SetClock(by_ms) => {
                    world.now.wall_ms = world.now.wall_ms.saturating_add_signed(by_ms);
                }
                Event::Restart => world.restart(),
            }
            while world.ims.poll_reply().is_some() {}
            world.check();
        }
        // All pending writes complete.
        world.store();
        prop_assert!(world.ims.staged.is_empty() && world.ims.waiting.is_empty());
        world.check();
    }

    #[test]
    fn garbage_is_never_answered(bytes in prop::collection::vec(any::<u8>(), 0..1400), known: bool) {
        let mut world = World::new();
        world.lookup(1, 2);
        world.store();
        let mut datagram = b"MA\x01\x00".to_vec();
        datagram.extend(hoa(if known { 1 } else { 9 }).octets());
        datagram.extend(&bytes);
        for datagram in [&bytes, &datagram] {
            world.ims.handle_datagram(world.now, path(1), datagram);
            world.assert_silent();
        }
    }
}
