//! Two servers, their nodes and their store in any order: the servers end with what the store has.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Event {
    Update {
        node: u16,
        sequence: u64,
        moas: Vec<u16>,
        lifetime_s: u32,
    },
    Enroll(u16),
    Write,
    /// A transaction whose end the server takes for a failure, although the records are stored.
    WriteInVain,
    Learn,
    Wait(u64),
    Restart,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (1..4_u16, 0..20_u64, prop::collection::vec(0..8_u16, 0..4), 0..300_u32).prop_map(
            |(node, sequence, moas, lifetime_s)| Event::Update { node, sequence, moas, lifetime_s },
        ),
        1 => (1..4_u16).prop_map(Event::Enroll),
        6 => Just(Event::Write),
        1 => Just(Event::WriteInVain),
        6 => Just(Event::Learn),
        1 => (0..100_u64).prop_map(Event::Wait),
        1 => Just(Event::Restart),
    ]
}

proptest! {
    #[test]
    fn servers_agree_with_their_store_when_all_is_told(
        events in prop::collection::vec((0..2_usize, event()), 1..80),
    ) {
        let (shelf, one, other) = two();
        let mut servers = [one, other];
        let mut newest = BTreeMap::new();
        for (index, event) in events {
            let now = servers[0].world.now;
            let server = &mut servers[index];
            match event {
                Event::Update { node, sequence, moas: list, lifetime_s } => {
                    let generation = stored(&shelf, node).map_or(1, |it| it.0.max(1));
                    server.world.generations.insert(node, generation);
                    let mut request = server.world.request(sequence, moas(&list));
                    request.lifetime_s = lifetime_s;
                    server.world.send(node, &request.into());
                }
                Event::Enroll(node) => server.enroll(node),
                Event::Write => drop(server.write()),
                Event::WriteInVain => {
                    let writes = server.world.ims.poll_writes();
                    server.store.swap(&writes).unwrap();
                    let hoas: Vec<Hoa> = writes.iter().map(|write| write.hoa).collect();
                    server.world.ims.handle_stored(now, &hoas, false);
                }
                Event::Learn => drop(server.learn()),
                Event::Wait(seconds) => {
                    for server in &mut servers {
                        server.world.pass(Duration::from_secs(seconds));
                    }
                }
                Event::Restart => {
                    *server = Server::start(&shelf, index, now);
                }
            }
            for server in &mut servers {
                while server.world.ims.poll_reply().is_some() {}
                server.world.check();
            }
            // Whoever writes, no version goes back.
            for (hoa, record) in &shelf.lock().unwrap().records {
                let before = newest.insert(*hoa, record.version());
                prop_assert!(before <= Some(record.version()));
            }
        }
        settle(&mut servers);
        // A write that seemed to fail is known at the next one, so that each node speaks once more.
        for number in 1..4 {
            let generation = |server: &Server| {
                let node = server.world.ims.nodes.get(&hoa(number).octets());
                node.map_or(0, |node| node.generation)
            };
            let [one, other] = &mut servers;
            let server = if generation(one) < generation(other) { other } else { one };
            server.world.generations.insert(number, generation(server).max(1));
            server.send(number, 1000, Vec::new());
        }
        settle(&mut servers);
        let shelf = shelf.lock().unwrap();
        for server in &servers {
            let ims = &server.world.ims;
            prop_assert!(ims.staged.is_empty() && ims.waiting.is_empty());
            server.world.check();
            for number in 1..4 {
                let hoa = hoa(number).octets();
                prop_assert_eq!(shelf.records[&hoa].sequence, 1000);
                prop_assert_eq!(ims.nodes[&hoa].version(), shelf.records[&hoa].version());
            }
        }
    }
}

/// Writes and tells all that waits.
fn settle(servers: &mut [Server; 2]) {
    for _ in 0..3 {
        for server in &mut *servers {
            server.write_all();
            server.learn_all();
        }
    }
}
