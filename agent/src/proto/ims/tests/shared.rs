//! Two servers with one store in memory: a second implementation of [`MappingStore`].

mod random;
mod toy;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use self::toy::{Shelf, ToyStore};
use super::*;

/// Changes on their way to a server.
type Changes = Arc<Mutex<VecDeque<(Hoa, Record)>>>;

/// A server with its end of the store.
struct Server {
    world: World,
    store: ToyStore,
    changes: Changes,
}

impl Server {
    fn start(shelf: &Arc<Mutex<Shelf>>, server: usize, now: Now) -> Self {
        let store = ToyStore {
            shelf: Arc::clone(shelf),
            server,
        };
        let changes = Changes::default();
        let told = Arc::clone(&changes);
        store
            .watch(move |hoa, record| told.lock().unwrap().push_back((hoa, record)))
            .unwrap();
        let mut world = World::new();
        world.now = now;
        let mut records = Vec::new();
        store
            .load(|hoa, record| records.push((hoa, record)))
            .unwrap();
        world.ims.restore(now, records);
        Self {
            world,
            store,
            changes,
        }
    }

    /// Writes once what waits; returns whether anything did.
    fn write(&mut self) -> bool {
        let writes = self.world.ims.poll_writes();
        let outcomes = self.store.swap(&writes).unwrap();
        assert_eq!(outcomes.len(), writes.len());
        for (write, swapped) in writes.iter().zip(outcomes) {
            let now = self.world.now;
            self.world.ims.handle_swapped(now, write.hoa, swapped);
        }
        !writes.is_empty()
    }

    /// Writes until nothing waits.
    fn write_all(&mut self) {
        for _ in 0..100 {
            if !self.write() {
                return;
            }
        }
        panic!("the server writes without end");
    }

    /// Takes one change by the other server; returns whether there was one.
    fn learn(&mut self) -> bool {
        let change = self.changes.lock().unwrap().pop_front();
        let Some((hoa, record)) = change else {
            return false;
        };
        self.world.ims.handle_change(self.world.now, hoa, record);
        true
    }

    fn learn_all(&mut self) {
        while self.learn() {}
    }

    fn send(&mut self, number: u16, sequence: u64, list: Vec<Moa>) {
        let request = self.world.request(sequence, list);
        self.world.send(number, &request.into());
    }

    /// Returns outcome and sequence of the next answer to an update.
    fn answer(&mut self, number: u16) -> (Outcome, u64) {
        match self.world.answer(number) {
            Some(MatMessage::UpdateReply(reply)) => {
                (Outcome::from_number(reply.outcome).unwrap(), reply.sequence)
            }
            other => panic!("{other:?}"),
        }
    }

    fn update(&mut self, number: u16, sequence: u64, list: Vec<Moa>) -> (Outcome, u64) {
        self.send(number, sequence, list);
        self.write_all();
        self.answer(number)
    }

    fn found(&mut self, number: u16) -> Vec<u16> {
        let found = self.world.found(99, number);
        self.write_all();
        found
    }

    fn enroll(&mut self, number: u16) {
        let now = self.world.now;
        let generation = None;
        self.world
            .ims
            .enroll(now, hoa(number), generation, 7)
            .unwrap();
    }
}

fn two() -> (Arc<Mutex<Shelf>>, Server, Server) {
    let shelf = Arc::default();
    let now = World::new().now;
    let [one, other] = [0, 1].map(|server| Server::start(&shelf, server, now));
    (shelf, one, other)
}

/// Returns the version of a node in the store.
fn stored(shelf: &Arc<Mutex<Shelf>>, number: u16) -> Option<(u32, u64)> {
    let shelf = shelf.lock().unwrap();
    let record = shelf.records.get(&hoa(number).octets())?;
    Some((record.generation, record.sequence))
}

#[test]
fn newer_write_of_one_server_arrives_at_the_other() {
    let (_, mut one, mut other) = two();
    assert_eq!(one.update(1, 1, moas(&[10])), (Outcome::Accepted, 1));
    assert_eq!(other.found(1), [0_u16; 0]);
    other.learn_all();
    assert_eq!(other.found(1), [10]);
    assert_eq!(other.update(1, 2, moas(&[11])), (Outcome::Accepted, 2));
    assert_eq!(one.found(1), [10]);
    one.learn_all();
    assert_eq!(one.found(1), [11]);
    // The address that the node left at the other server is closed here too.
    assert_eq!(one.update(2, 1, moas(&[10])).0, Outcome::BadAddresses);
    assert!(one.world.ims.counters().changes_by_others > 0);
}

#[test]
fn write_with_a_stale_sequence_loses_and_the_node_is_told_the_known_one() {
    let (shelf, mut one, mut other) = two();
    one.update(1, 1, moas(&[10]));
    other.learn_all();
    other.update(1, 5, moas(&[15]));
    // The first server does not know of the second's write yet.
    assert_eq!(one.update(1, 4, moas(&[14])), (Outcome::OldSequence, 5));
    assert_eq!(one.world.ims.counters().writes_lost, 1);
    assert_eq!(stored(&shelf, 1), Some((1, 5)));
    assert_eq!(one.found(1), [15]);
    // The address of the write that lost is free.
    assert_eq!(one.update(2, 1, moas(&[14])).0, Outcome::Accepted);
    one.world.check();
}

#[test]
fn update_that_is_newer_than_the_winner_is_written_after_it() {
    let (shelf, mut one, mut other) = two();
    one.update(1, 1, moas(&[10]));
    other.learn_all();
    other.update(1, 5, moas(&[15]));
    assert_eq!(one.update(1, 6, moas(&[16])), (Outcome::Accepted, 6));
    assert_eq!(one.world.ims.counters().writes_lost, 1);
    assert_eq!(stored(&shelf, 1), Some((1, 6)));
    other.learn_all();
    assert_eq!(other.found(1), [16]);
}

#[test]
fn node_that_tells_both_servers_the_same_is_acknowledged_by_both() {
    let (_, mut one, mut other) = two();
    one.send(1, 1, moas(&[10]));
    other.send(1, 1, moas(&[10]));
    one.write_all();
    other.write_all();
    assert_eq!(one.answer(1), (Outcome::Accepted, 1));
    assert_eq!(other.answer(1), (Outcome::Accepted, 1));
    assert_eq!(other.world.ims.counters().updates_repeated, 1);
}

#[test]
fn change_that_overtakes_the_server_s_own_write_stays() {
    let (shelf, mut one, mut other) = two();
    one.update(1, 1, moas(&[10]));
    other.learn_all();
    one.send(1, 2, moas(&[12]));
    let writes = one.world.ims.poll_writes();
    let outcomes = one.store.swap(&writes).unwrap();
    assert_eq!(outcomes, [Swapped::Stored]);
    // The other server's next write is told before the end of the own one.
    other.learn_all();
    other.update(1, 3, moas(&[13]));
    one.learn_all();
    let now = one.world.now;
    one.world
        .ims
        .handle_swapped(now, writes[0].hoa, Swapped::Stored);
    assert_eq!(one.answer(1), (Outcome::OldSequence, 3));
    assert_eq!(one.found(1), [13]);
    assert_eq!(stored(&shelf, 1), Some((1, 3)));
    one.world.check();
}

#[test]
fn old_and_repeated_changes_have_no_effect() {
    let (shelf, mut one, mut other) = two();
    one.update(1, 1, moas(&[10]));
    let old = shelf.lock().unwrap().records[&hoa(1).octets()].clone();
    other.learn_all();
    other.update(1, 2, moas(&[11]));
    one.learn_all();
    let before = one.world.ims.counters().changes_by_others;
    let new = shelf.lock().unwrap().records[&hoa(1).octets()].clone();
    for record in [old, new] {
        let now = one.world.now;
        one.world.ims.handle_change(now, hoa(1).octets(), record);
    }
    assert_eq!(one.found(1), [11]);
    assert_eq!(one.world.ims.counters().changes_by_others, before);
    assert_eq!(one.update(1, 3, moas(&[12])), (Outcome::Accepted, 3));
    assert_eq!(one.world.ims.counters().writes_lost, 0);
}

#[test]
fn key_that_another_server_replaced_is_refused_here() {
    let (shelf, mut one, mut other) = two();
    one.update(1, 1, moas(&[10]));
    other.learn_all();
    other.enroll(1);
    other.write_all();
    // An update on its way is void with its key; nobody could read an answer.
    one.send(1, 2, moas(&[12]));
    one.write_all();
    assert_eq!(one.world.ims.poll_reply(), None);
    assert_eq!(stored(&shelf, 1), Some((2, 0)));
    one.send(1, 3, moas(&[13]));
    one.world.assert_silent();
    assert_eq!(one.world.ims.counters().old_keys, 1);
    one.world.generations.insert(1, 2);
    assert_eq!(one.update(1, 1, moas(&[14])), (Outcome::Accepted, 1));
}

#[test]
fn operators_who_enroll_a_node_at_both_servers_at_once_get_the_same_key() {
    let (shelf, mut one, mut other) = two();
    one.enroll(1);
    other.enroll(1);
    for server in [&mut one, &mut other] {
        server.write_all();
        let enrolled = server.world.ims.poll_enrolled().unwrap();
        assert_eq!((enrolled.request, enrolled.generation), (7, Some(1)));
    }
    assert_eq!(stored(&shelf, 1), Some((1, 0)));
}

#[test]
fn enrollment_that_loses_to_an_update_of_the_old_key_is_written_after_it() {
    let (shelf, mut one, mut other) = two();
    one.update(1, 1, moas(&[10]));
    other.learn_all();
    other.update(1, 2, moas(&[12]));
    one.enroll(1);
    one.write_all();
    let enrolled = one.world.ims.poll_enrolled().unwrap();
    assert_eq!(enrolled.generation, Some(2));
    assert_eq!(stored(&shelf, 1), Some((2, 0)));
}

#[test]
fn of_two_nodes_that_got_an_address_at_two_servers_the_one_that_ends_last_keeps_it() {
    let (_, mut one, mut other) = two();
    one.update(1, 1, moas(&[10]));
    other.world.pass(Duration::from_secs(1));
    other.update(2, 1, moas(&[10]));
    one.world.pass(Duration::from_secs(1));
    for server in [&mut one, &mut other] {
        server.learn_all();
        server.world.check();
        assert_eq!(server.found(1), [0_u16; 0]);
        assert_eq!(server.found(2), [10]);
    }
}

#[test]
fn store_that_lost_its_records_gets_them_again() {
    let (shelf, mut one, _) = two();
    one.update(1, 1, moas(&[10]));
    shelf.lock().unwrap().records.clear();
    assert_eq!(one.update(1, 2, moas(&[11])), (Outcome::Accepted, 2));
    assert_eq!(one.world.ims.counters().writes_lost, 1);
    assert_eq!(stored(&shelf, 1), Some((1, 2)));
}
