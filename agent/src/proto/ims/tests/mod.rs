//! A mapping server on virtual clocks, with a store in memory.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "what fails here is the test that asked for it"
)]
#![cfg_attr(
    fuzzing,
    allow(dead_code, unused_imports, reason = "fuzzing takes a part of it")
)]

#[cfg(test)]
mod attacks;
#[cfg(test)]
mod enrollment;
pub(in crate::proto) mod fuzz;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod mapping;
#[cfg(test)]
mod random;
#[cfg(test)]
mod restart;
#[cfg(test)]
mod shared;

use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use common::mat::entropy::Entropy;
use common::mat::key::{Key, Party, Secret};
use common::mat::message::{
    LookupReply, LookupRequest, MatMessage, Moa, Outcome, UpdateReply, UpdateRequest,
};
use common::mat::seal::{Keying, NONCE_BYTES, Sealed, seal};

use super::*;
use crate::value::Prefix;

const SECRET: [u8; 32] = [7; 32];
/// Wall clock at the start, ms.
const START_MS: u64 = 1_700_000_000_000;

fn hoa(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd5e, 0x6d61, 0x74, 0, 0, 0, 0, number)
}

fn moa(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, number)
}

/// Returns MoAs, of which the first is the destination of data.
fn moas(numbers: &[u16]) -> Vec<Moa> {
    numbers
        .iter()
        .zip(1..)
        .map(|(number, priority)| Moa {
            address: moa(*number).octets().into(),
            priority,
        })
        .collect()
}

fn path(number: u16) -> Path {
    Path {
        remote: SocketAddrV6::new(moa(number), 47414, 0, 0),
        local: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
        ifindex: 2,
    }
}

fn config() -> Config {
    Config {
        home: Prefix::of(hoa(0), 48),
        time_window: Duration::from_secs(120),
        min_lifetime: Duration::from_secs(10),
        max_lifetime: Duration::from_secs(600),
        lookup_lifetime: Duration::from_secs(60),
        negative_lifetime: Duration::from_secs(5),
        requests_per_second: 1000,
        burst: 1000,
        sources: 100,
    }
}

fn key(number: u16, generation: u32) -> Key {
    Secret::new(&SECRET).node(hoa(number).octets(), generation)
}

/// Returns the key of two nodes, each with its generation.
fn pair_key(one: (u16, u32), other: (u16, u32)) -> Key {
    let [one, other] = [one, other].map(|(number, generation)| Party {
        hoa: hoa(number).octets(),
        generation,
    });
    Secret::new(&SECRET).pair(one, other)
}

/// Returns a generator of random numbers, as a server has it.
fn entropy() -> Entropy {
    Entropy::new(|bytes| getrandom::fill(bytes).is_ok())
}

/// The server with its clocks and its store.
struct World {
    ims: Ims,
    config: Config,
    now: Now,
    store: BTreeMap<Hoa, Record>,
    transaction: u64,
    generations: BTreeMap<u16, u32>,
}

impl World {
    fn new() -> Self {
        Self::with(config())
    }

    fn with(config: Config) -> Self {
        Self {
            ims: Ims::new(config.clone(), Secret::new(&SECRET), entropy()),
            config,
            now: Now {
                monotonic: Timestamp(1_000_000_000),
                wall_ms: START_MS,
            },
            store: BTreeMap::new(),
            transaction: 0,
            generations: BTreeMap::new(),
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now.monotonic = self.now.monotonic + time;
        self.now.wall_ms += time.as_millis() as u64;
        self.ims.handle_timeout(self.now);
    }

    /// Starts a new process with the former process's store.
    fn restart(&mut self) {
        self.ims = Ims::new(self.config.clone(), Secret::new(&SECRET), entropy());
        let records = self
            .store
            .iter()
            .map(|(hoa, record)| (*hoa, Record::decode(&record.encode()).unwrap()));
        self.ims.restore(self.now, records);
        self.ims.handle_timeout(self.now);
    }

    /// Stores pending writes until none is left.
    fn store(&mut self) {
        loop {
            let writes = self.ims.poll_writes();
            if writes.is_empty() {
                return;
            }
            let hoas: Vec<Hoa> = writes.iter().map(|write| write.hoa).collect();
            self.put(writes);
            self.ims.handle_stored(self.now, &hoas, true);
        }
    }

    fn sealed(&mut self, number: u16, message: &MatMessage) -> Vec<u8> {
        self.transaction += 1;
        let generation = self.generations.get(&number).copied().unwrap_or(1);
        sealed(number, generation, self.transaction, message)
    }

    fn send(&mut self, number: u16, message: &MatMessage) {
        let datagram = self.sealed(number, message);
        self.ims.handle_datagram(self.now, path(number), &datagram);
    }

    /// Returns the next answer, opened with the key of the node.
    fn answer(&mut self, number: u16) -> Option<MatMessage> {
        let generation = self.generations.get(&number).copied().unwrap_or(1);
        let reply = self.ims.poll_reply()?;
        assert_eq!(reply.path, path(number));
        let sealed = Sealed::parse(&reply.bytes).unwrap();
        assert_eq!(sealed.keying, Keying::Node);
        assert_eq!(sealed.hoa, hoa(number).octets());
        let message = sealed.open(&key(number, generation)).unwrap();
        Some(MatMessage::decode(&message).unwrap().1)
    }

    fn request(&self, sequence: u64, list: Vec<Moa>) -> UpdateRequest {
        UpdateRequest {
            sequence,
            time_ms: self.now.wall_ms,
            lifetime_s: 100,
            moas: list,
        }
    }

    fn update_with(&mut self, number: u16, request: UpdateRequest) -> UpdateReply {
        self.send(number, &request.into());
        self.store();
        match self.answer(number) {
            Some(MatMessage::UpdateReply(reply)) => reply,
            other => panic!("{other:?}"),
        }
    }

    fn update(&mut self, number: u16, sequence: u64, list: Vec<Moa>) -> Outcome {
        let request = self.request(sequence, list);
        let reply = self.update_with(number, request);
        Outcome::from_number(reply.outcome).unwrap()
    }

    fn lookup(&mut self, number: u16, wanted: u16) -> LookupReply {
        let wanted = hoa(wanted).octets().into();
        self.send(number, &LookupRequest { hoa: wanted }.into());
        match self.answer(number) {
            Some(MatMessage::LookupReply(reply)) => reply,
            other => panic!("{other:?}"),
        }
    }

    /// Returns the numbers of the MoAs that a lookup finds.
    fn found(&mut self, number: u16, wanted: u16) -> Vec<u16> {
        self.lookup(number, wanted)
            .mapping
            .map(|mapping| mapping.moas)
            .unwrap_or_default()
            .iter()
            .map(|moa| u16::from_be_bytes([moa.address[14], moa.address[15]]))
            .collect()
    }

    /// Completes the pending writes once, stored or failed.
    fn store_once(&mut self, stored: bool) {
        let writes = self.ims.poll_writes();
        let hoas: Vec<Hoa> = writes.iter().map(|write| write.hoa).collect();
        if stored {
            self.put(writes);
        }
        self.ims.handle_stored(self.now, &hoas, stored);
    }

    /// Stores records; asserts that each replaces the one that the server expects.
    fn put(&mut self, writes: Vec<Write>) {
        for write in writes {
            let stored = self.store.get(&write.hoa).map(Record::version);
            assert_eq!(stored, write.expected, "the server does not know its store");
            assert!(
                stored <= Some(write.record.version()),
                "a version went back"
            );
            self.store.insert(write.hoa, write.record);
        }
    }

    /// Asserts that no address has two living nodes, and that the tables agree.
    fn check(&self) {
        let ims = &self.ims;
        let now = self.now.monotonic;
        let mut seen = BTreeMap::new();
        for (hoa, node) in &ims.nodes {
            if node.lives(now) {
                for moa in &node.moas {
                    assert_eq!(seen.insert(*moa.address, *hoa), None);
                }
                let held = node.moas.iter().all(|moa| {
                    let other = [0xff; 16];
                    ims.holders.other(&moa.address, &other, now) == Some(*hoa)
                });
                assert!(held, "a living address is not held");
            }
            let due = ims.ends.iter().find(|(_, it)| it == hoa).map(|it| it.0);
            assert_eq!(due, node.due);
            assert_eq!(node.due, node.next_end());
        }
        assert!(ims.waiting.keys().all(|hoa| ims.staged.contains_key(hoa)));
    }

    /// Asserts that neither an answer nor a write is pending.
    fn assert_silent(&mut self) {
        assert_eq!(self.ims.poll_reply(), None);
        assert_eq!(self.ims.poll_writes(), []);
    }
}

fn sealed(number: u16, generation: u32, transaction: u64, message: &MatMessage) -> Vec<u8> {
    let mut nonce = [9; NONCE_BYTES];
    nonce[..8].copy_from_slice(&transaction.to_be_bytes());
    let message = message.encode(transaction);
    let hoa = hoa(number).octets();
    seal(Keying::Node, hoa, &key(number, generation), nonce, &message)
}
