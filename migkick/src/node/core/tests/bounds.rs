//! Limits of held and stored data, for any input.

use std::net::SocketAddrV6;
use std::time::Duration;

use common::mat::NODE_PORT;
use common::mat::message::*;
use common::mat::seal::{Keying, seal};
use proptest::prelude::*;

use super::world::*;
use crate::node::core::peer::Used;
use crate::node::core::*;

#[test]
fn frames_are_held_in_bounded_number_and_for_a_bounded_time() {
    let mut world = World::new(Setup::default());
    world.run(ms(100));
    world.stop_servers(true);
    for number in 0..200 {
        world.send_frame(0, 1, vec![number; 1000]);
    }
    let status = |world: &World| world.nodes[0].core.as_ref().unwrap().status(world.now);
    assert_eq!(status(&world).counters.held, MAX_HELD.0 as u64);
    assert_eq!(
        status(&world).counters.hold_overflow,
        200 - MAX_HELD.0 as u64
    );
    world.run(Duration::from_secs(4));
    let kernel = &world.nodes[0].kernel;
    let counters = status(&world).counters;
    assert_eq!(kernel.released.len(), 0);
    // Every frame was refused or dropped.
    assert_eq!(counters.refused + counters.hold_overflow, 200);
}

#[test]
fn unknown_addresses_in_a_flood_are_limited_and_do_not_hurt_the_known() {
    let mut world = World::new(Setup::default());
    world.flows = vec![(0, 1), (1, 0)];
    world.run(ms(500));
    for round in 0..50_u128 {
        for number in 0..200_u128 {
            let hoa = std::net::Ipv6Addr::from_bits(hoa(0).to_bits() + 1000 + round * 200 + number);
            world.input(0, |core, now| core.handle_held(now, hoa, vec![1; 500]));
        }
        world.run(ms(20));
        assert!(world.is_settled(0, 1));
    }
    let status = world.nodes[0].core.as_ref().unwrap().status(world.now);
    assert!(status.peers.len() <= MAX_PEERS);
    assert!(world.servers.iter().map(|it| it.lookups).sum::<usize>() < 1000);
    world.run(Duration::from_secs(60));
    assert_eq!(
        world.nodes[0]
            .core
            .as_ref()
            .unwrap()
            .status(world.now)
            .peers
            .len(),
        1
    );
}

#[test]
fn peer_that_has_gone_for_good_is_looked_for_no_more() {
    let mut world = World::new(Setup::default());
    world.flows = vec![(0, 1), (1, 0)];
    world.run(ms(500));
    world.go(1, 3);
    world.run(ms(500));
    world.flows.clear();
    world.crash(1);
    world.run(Duration::from_secs(3000));
    let lookups = |world: &World| world.servers.iter().map(|it| it.lookups).sum::<usize>();
    let before = lookups(&world);
    world.run(Duration::from_secs(3000));
    assert_eq!(lookups(&world), before);
    let status = world.nodes[0].core.as_ref().unwrap().status(world.now);
    assert_eq!(status.peers, []);
}

#[test]
fn mapping_with_addresses_that_cannot_be_is_no_mapping() {
    for address in ["::", "::1", "ff02::1", "fe80::1", "fd5e:6d61:74::99"] {
        let mut world = World::new(Setup::default());
        world.run(ms(100));
        let address: Ipv6Addr = address.parse().unwrap();
        for server in &mut world.servers {
            let (_, moas, _) = server.mappings.get_mut(&hoa(1)).unwrap();
            moas[0].address = address.octets().into();
        }
        world.send_frame(0, 1, vec![1]);
        world.run(ms(100));
        assert_eq!(world.nodes[0].kernel.refused.len(), 1, "{address}");
        assert!(world.nodes[0].kernel.peers.is_empty());
    }
}

#[derive(Clone, Debug)]
enum Input {
    Bytes(Vec<u8>),
    Server(Box<MatMessage>, u64),
    Peer(Box<MatMessage>, u64, u8),
    Held(u8, Vec<u8>),
    Nics(Vec<(u32, u8)>),
    Usage(u8, u64),
    Prepare(u8),
    Ready,
    Announcement,
    Hint,
    Abort,
    Wait(u64),
}

fn any_moas() -> impl Strategy<Value = Vec<Moa>> {
    let moa = (any::<[u8; 16]>(), any::<u8>()).prop_map(|(address, priority)| Moa {
        address: address.into(),
        priority,
    });
    proptest::collection::vec(moa, 0..10)
}

fn any_message() -> impl Strategy<Value = Box<MatMessage>> {
    let hoas = prop_oneof![
        Just(hoa(1)),
        Just(hoa(2)),
        any::<u128>().prop_map(Ipv6Addr::from_bits)
    ];
    prop_oneof![
        any::<u64>().prop_map(|sequence| Alert { sequence }.into()),
        any::<u64>().prop_map(|sequence| AlertAck { sequence }.into()),
        Just(Echo {}.into()),
        Just(EchoReply {}.into()),
        (any::<u8>(), any::<u64>(), any::<u64>(), any::<u32>()).prop_map(
            |(outcome, sequence, time_ms, lifetime_s)| {
                UpdateReply {
                    outcome: outcome % 6,
                    sequence,
                    time_ms,
                    lifetime_s,
                }
                .into()
            }
        ),
        (
            hoas,
            proptest::option::of((any::<u64>(), any_moas())),
            any::<u32>()
        )
            .prop_map(|(hoa, mapping, lifetime_s)| {
                let mapping = mapping.map(|(sequence, moas)| Mapping { sequence, moas });
                let hoa = hoa.octets().into();
                LookupReply {
                    hoa,
                    mapping,
                    pair_key: [1; 32].into(),
                    lifetime_s,
                }
                .into()
            }),
    ]
    .prop_map(Box::new)
}

fn any_input() -> impl Strategy<Value = Input> {
    let bytes = || proptest::collection::vec(any::<u8>(), 0..200);
    prop_oneof![
        bytes().prop_map(Input::Bytes),
        (any_message(), any::<u64>()).prop_map(|(it, n)| Input::Server(it, n)),
        (any_message(), any::<u64>(), any::<u8>())
            .prop_map(|(it, n, from)| Input::Peer(it, n, from)),
        (any::<u8>(), bytes()).prop_map(|(hoa, frame)| Input::Held(hoa, frame)),
        proptest::collection::vec((0_u32..4, any::<u8>()), 0..4).prop_map(Input::Nics),
        (any::<u8>(), any::<u64>()).prop_map(|(hoa, packets)| Input::Usage(hoa, packets)),
        any::<u8>().prop_map(Input::Prepare),
        Just(Input::Ready),
        Just(Input::Announcement),
        Just(Input::Hint),
        Just(Input::Abort),
        (0_u64..100_000).prop_map(Input::Wait),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Servers, peers with keys, and this machine send anything in any order: the core never
    /// panics, sleeps, and sends a bounded number of datagrams.
    #[test]
    fn any_inputs_are_survived(inputs in proptest::collection::vec(any_input(), 1..60), guess: bool) {
        let key = common::mat::key::Key([5; 32]);
        let identity = Identity {
            hoa: hoa(0),
            home: (hoa(0), 48),
            key,
            servers: vec![server(0)],
        };
        let mut core = Core::new(identity, Timing::default(), Saved::default(), 0, entropy());
        let mut now = ms(0);
        let place = |last: u8| moa(usize::from(last % 3), 1);
        let nics = vec![NicState { ifindex: 1, addresses: vec![moa(0, 1)] }];
        core.handle_nics(now, nics);
        // Half of the runs know the transactions of the node's requests.
        let mut asked = Vec::new();
        for input in inputs {
            let sealed = |keying, key: &common::mat::key::Key, sender: Ipv6Addr, number, message: &MatMessage| {
                seal(keying, sender.octets(), key, nonce(number), &message.encode(number))
            };
            let number = |number: u64| if guess { asked.last().copied().unwrap_or(number) } else { number };
            match input {
                Input::Bytes(bytes) => {
                    let received = Received { local: place(0), from: server(0), bytes };
                    core.handle_datagram(now, received);
                }
                Input::Server(message, n) => {
                    let bytes = sealed(Keying::Node, &key, hoa(0), number(n), &message);
                    core.handle_datagram(now, Received { local: place(0), from: server(0), bytes });
                }
                Input::Peer(message, n, from) => {
                    let pair = common::mat::key::Key([1; 32]);
                    let bytes = sealed(Keying::Pair, &pair, hoa(1), number(n), &message);
                    let from = SocketAddrV6::new(place(from), NODE_PORT, 0, 0);
                    core.handle_datagram(now, Received { local: place(0), from, bytes });
                }
                Input::Held(last, frame) => core.handle_held(now, hoa(usize::from(last % 5)), frame),
                Input::Nics(nics) => {
                    let nics = nics.into_iter().map(|(ifindex, last)| NicState {
                        ifindex: ifindex + 1,
                        addresses: vec![place(last)],
                    });
                    core.handle_nics(now, nics.collect());
                }
                Input::Usage(last, packets) => {
                    let used = Used { packets, bytes: packets, idle: Some(ms(packets % 100_000)) };
                    core.handle_usage(now, &[(hoa(usize::from(last % 5)), used)]);
                }
                Input::Prepare(last) => core.prepare(now, Place { ifindex: 2, moa: place(last) }),
                Input::Ready => {
                    core.ready(now);
                }
                Input::Announcement => core.handle_announcement(now),
                Input::Hint => core.handle_hint(now),
                Input::Abort => core.abort(now),
                Input::Wait(millis) => {
                    let end = now + ms(millis);
                    let mut turns = 0;
                    while let Some(at) = core.poll_timeout().filter(|at| *at <= end) {
                        now = now.max(at);
                        core.handle_timeout(now);
                        turns += 1;
                        prop_assert!(turns < 20_000, "busy");
                    }
                    now = end;
                }
            }
            let mut sent = 0;
            while let Some(output) = core.poll_output() {
                if let Output::Transmit { bytes, .. } = &output {
                    sent += 1;
                    prop_assert!(bytes.len() <= common::signal::MAX_DATAGRAM_BYTES);
                    let opened = common::mat::seal::Sealed::parse(bytes).unwrap().open(&key);
                    asked.extend(opened.ok().and_then(|it| MatMessage::decode(&it).ok()).map(|it| it.0));
                }
            }
            prop_assert!(sent < 20_000);
            core.status(now);
        }
    }
}
