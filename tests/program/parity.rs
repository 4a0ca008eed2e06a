//! The kernel programs and userspace agree on the same frames: a corpus of captured frames, and
//! generated frames, valid and broken.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::cell::RefCell;
use std::path::Path;

use common::counter::Counter;
use common::handover::{fingerprint, flow_hash_of, packet};
use common::maps::{BridgeNumber, Delivered, DeliveredKey, StreamKey};
use common::snoop::apply_frame;
use common::testing::frame::{Frame, record};
use common::testing::store::{MemoryStore, meaning};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::gate::Gated;
use support::kernel::{IFINDEX, Kernel, PASS};

/// Both implementations, with everything that they have received so far.
struct Pair {
    kernel: Kernel,
    store: MemoryStore,
    now_ns: u64,
}

impl Pair {
    fn new() -> Option<Self> {
        Some(Self {
            kernel: Kernel::load()?,
            store: MemoryStore::default(),
            now_ns: 1 << 40,
        })
    }

    /// Feeds a frame to both, and compares the resulting state and counters.
    fn feed(&mut self, name: &str, bytes: &[u8]) {
        let unfinished_before = self.kernel.counter(Counter::Unfinished);
        let before = (self.kernel.counted(), self.store.counters.clone());
        self.kernel.snoop(bytes);
        self.kernel.events();
        if self.kernel.counter(Counter::Unfinished) > unfinished_before {
            // The kernel passes this frame to userspace, so there is nothing to compare.
            return;
        }
        self.now_ns += 1_000_000;
        apply_frame(
            bytes,
            IFINDEX,
            BridgeNumber::FIRST,
            self.now_ns,
            &mut self.store,
        );
        assert_eq!(
            meaning(self.kernel.listeners(), self.kernel.sources()),
            meaning(self.store.listeners.clone(), self.store.sources.clone()),
            "listeners after {name}: {bytes:02x?}"
        );
        let difference = |counter: Counter, now: u64, before: &[(Counter, u64)]| {
            now - before
                .iter()
                .find(|(c, _)| *c == counter)
                .map_or(0, |(_, n)| *n)
        };
        let host_before: Vec<_> = before.1.into_iter().collect();
        for counter in Counter::ALL {
            if *counter == Counter::SignallingDatagrams {
                continue;
            }
            let host = self.store.counters.get(counter).copied().unwrap_or(0);
            assert_eq!(
                difference(*counter, self.kernel.counter(*counter), &before.0),
                difference(*counter, host, &host_before),
                "{counter:?} for {name}: {bytes:02x?}"
            );
        }
    }
}

#[test]
fn corpus_means_the_same_to_kernel_and_userspace() {
    let Some(mut pair) = Pair::new() else { return };
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let mut files: Vec<_> = std::fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", directory.display());
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        pair.feed(&file.display().to_string(), &bytes);
        for length in SHORTEST..bytes.len() {
            pair.feed("its beginning", &bytes[..length]);
        }
    }
}

#[test]
fn generated_frames_mean_the_same_to_kernel_and_userspace() {
    let Some(pair) = Pair::new() else { return };
    let pair = RefCell::new(pair);
    let mut runner = TestRunner::new(Config {
        cases: 1500,
        failure_persistence: None,
        ..Config::default()
    });
    runner
        .run(&any_frame(), |bytes| {
            pair.borrow_mut().feed("a generated frame", &bytes);
            Ok(())
        })
        .unwrap();
}

/// Program test-run refuses frames that end before the end of their IPv6 header.
const SHORTEST: usize = 54;

const ADDRESSES: [&str; 6] = [
    "ff1e::1",
    "ff3e::2",
    "ff02::fb",
    "ff15::3",
    "ff38:1::4",
    "2001:db8::9",
];
const SOURCES: [&str; 5] = ["2001:db8::1", "2001:db8::2", "fe80::3", "::", "ff1e::1"];

fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let address = (0..12_usize).prop_map(|i| ADDRESSES.get(i / 2).copied().unwrap_or("ff1e::1"));
    let source = (0..15_usize).prop_map(|i| SOURCES.get(i % 7).copied().unwrap_or("2001:db8::1"));
    let records = prop::collection::vec(
        (
            0..8_u8,
            address.clone(),
            prop::collection::vec(source, 0..6),
        ),
        0..6,
    )
    .prop_map(|records| {
        let records: Vec<_> = records
            .iter()
            .map(|(kind, address, sources)| record(*kind, address, sources))
            .collect();
        Frame::report(&records)
    });
    let v1 = (131..133_u8, address).prop_map(|(kind, address)| Frame::v1(kind, address));
    let query = (any::<u16>(), any::<Option<(u8, u8)>>())
        .prop_map(|(code, v2)| Frame::query("::", code, v2));
    let message = prop_oneof![6 => records, 2 => v1, 1 => query];
    let vlan = prop_oneof![4 => Just(None), 1 => any::<u16>().prop_map(Some)];
    // Positions in the body before the checksum, and anywhere after it.
    let change = prop::option::weighted(0.2, (any::<prop::sample::Index>(), any::<u8>()));
    (
        message,
        vlan,
        change.clone(),
        change,
        prop::option::weighted(0.1, any::<prop::sample::Index>()),
    )
        .prop_map(|(message, vlan, before, after, cut)| {
            let mut frame = message.with(|frame| frame.vlan = vlan);
            if let Some((index, byte)) = before {
                let at = index.index(frame.body.len());
                frame.body[at] = byte;
            }
            let mut bytes = frame.bytes();
            if let Some((index, byte)) = after {
                let at = 12 + index.index(bytes.len() - 12);
                bytes[at] = byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(SHORTEST + cut.index(bytes.len() - SHORTEST));
            }
            bytes
        })
}

/// Frames that enter a TAP: counts and records.
#[test]
fn gate_reads_any_frame_as_userspace_does() {
    let Some(gated) = Gated::load() else {
        return;
    };
    let gated = RefCell::new(gated);
    let frames = (
        0..4_u8,
        proptest::collection::vec(any::<u8>(), 0..1400),
        proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        any::<prop::sample::Index>(),
    );
    let config = Config {
        cases: 2000,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config)
        .run(&frames, |(kind, payload, changes, end)| {
            let mut frame = Frame::udp("2001:db8::1", "ff3e:1::1234", (5000, 5004), &payload)
                .with(|frame| match kind {
                    0 => frame.vlan = Some(7),
                    1 => frame.options = Some(vec![5, 2, 0, 0, 1, 0]),
                    _ => {}
                })
                .bytes();
            for (place, byte) in changes {
                let place = place.index(frame.len().min(70));
                frame[place] = byte;
            }
            if kind == 3 {
                // Program test-run refuses frames that end in the IPv6 header.
                frame.truncate(54 + end.index(frame.len() - 53));
            }
            let mut gated = gated.borrow_mut();
            gated.kernel.clear::<DeliveredKey, Delivered>("DELIVERED");
            gated.record(0);
            prop_assert_eq!(gated.run(&frame), PASS);
            prop_assert_eq!(gated.usage().entered, 1);
            let Some(found) = packet(&frame[..]) else {
                prop_assert_eq!(gated.delivered(), []);
                prop_assert_eq!(gated.usage().recorded, 0);
                return Ok(());
            };
            let key = DeliveredKey {
                ifindex: IFINDEX,
                stream: StreamKey {
                    bridge: BridgeNumber::FIRST,
                    ..found.stream
                },
            };
            let delivered = Delivered {
                packets: 1,
                bytes: frame.len() as u64,
            };
            prop_assert_eq!(gated.delivered(), [(key, delivered)]);
            let record = gated.records(1)[0];
            prop_assert_eq!(record.number, 1);
            prop_assert_eq!(record.flow, flow_hash_of(&found.stream));
            let payload = found.payload;
            let expected = fingerprint(&frame[..], payload.offset, payload.length);
            prop_assert_eq!(Ok(record.fingerprint), expected);
            Ok(())
        })
        .unwrap();
}
