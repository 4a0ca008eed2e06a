//! A toy protocol of memberships, which shares nothing with MLD, fills the listener tables by the
//! same walk.
//!
//! ```text
//! message   'T' records until '.'
//! record    '=' exactly these sources | '!' all but these | '+' these too | '-' no longer these | '?' a
//!           type of the future; group, number of sources, sources
//! group     last byte of ff1e::; 0 has no effect
//! source    last byte of 2001:db8::; 0 is invalid
//! ```

use std::vec::Vec;

use super::BRIDGE;
use crate::counter::Counter;
use crate::event::Change;
use crate::maps::{Address, FilterMode};
use crate::packet::PacketRead;
use crate::snoop::{Ignored, Record, RecordType, Records, Report, Step, Walk};
use crate::testing::frame::address;
use crate::testing::store::{MemoryStore, meaning};

/// Version in the listener of a VM that speaks the toy protocol.
const VERSION: u8 = 9;

#[derive(Debug, Default)]
struct ToyRecords {
    /// Offset of the next source.
    source: usize,
    /// Offset of the next record.
    record: usize,
}

impl ToyRecords {
    fn of(packet: &[u8]) -> Option<Self> {
        let is_toy = packet.first() == Some(&b'T');
        is_toy.then_some(Self {
            source: 0,
            record: 1,
        })
    }
}

fn with_last_byte(prefix: &str, byte: u8) -> Address {
    let mut address = address(prefix);
    address[15] = byte;
    address
}

impl Records for ToyRecords {
    fn next_record<P: PacketRead + ?Sized>(
        &mut self,
        packet: &P,
    ) -> Option<Result<Record, Ignored>> {
        let [kind] = packet.read::<1>(self.record).ok()?;
        if kind == b'.' {
            return None;
        }
        let [group, sources] = packet.read::<2>(self.record + 1).ok()?;
        self.source = self.record + 3;
        self.record = self.source + usize::from(sources);
        let record_type = match kind {
            b'=' => RecordType::ChangeToIncludeMode,
            b'!' => RecordType::ChangeToExcludeMode,
            b'+' => RecordType::AllowNewSources,
            b'-' => RecordType::BlockOldSources,
            _ => return Some(Err(Ignored(Counter::UnknownRecord))),
        };
        if group == 0 {
            return Some(Err(Ignored(Counter::IgnoredScope)));
        }
        Some(Ok(Record {
            multicast_address: with_last_byte("ff1e::", group),
            record_type,
            sources: sources.into(),
            version: VERSION,
        }))
    }

    fn next_source<P: PacketRead + ?Sized>(
        &mut self,
        packet: &P,
    ) -> Option<Result<Address, Ignored>> {
        let [byte] = packet.read::<1>(self.source).ok()?;
        self.source += 1;
        if byte == 0 {
            return Some(Err(Ignored(Counter::InvalidSource)));
        }
        Some(Ok(with_last_byte("2001:db8::", byte)))
    }
}

/// The tables of one port after some messages, 1 ms apart.
#[derive(Default)]
struct Port {
    store: MemoryStore,
    now_ns: u64,
}

impl Port {
    fn after(messages: &[&[u8]]) -> Self {
        let mut port = Self::default();
        for message in messages {
            port.now_ns += 1_000_000;
            port.feed(message, port.now_ns);
        }
        port
    }

    fn feed(&mut self, message: &[u8], at_ns: u64) {
        let report = Report {
            at_ns,
            ifindex: 7,
            vlan: 0,
            bridge: BRIDGE,
            guest_mac: [2, 0, 0, 0, 0, 1],
            by_agent: false,
        };
        let mut walk = Walk::new();
        walk.start(&report, ToyRecords::of(message).expect("a toy message"));
        while walk.step(message, &mut self.store) == Step::More {}
    }

    /// Returns the listeners: group, filter mode and sources.
    fn listeners(&self) -> Vec<(u8, FilterMode, Vec<u8>)> {
        let all = meaning(self.store.listeners.clone(), self.store.sources.clone());
        all.into_iter()
            .map(|(key, (mode, version, _, _, sources))| {
                assert_eq!(version, VERSION);
                (
                    key.multicast_address[15],
                    FilterMode::from_u8(mode).unwrap(),
                    sources.iter().map(|(source, _)| source[15]).collect(),
                )
            })
            .collect()
    }

    fn count(&self, counter: Counter) -> u64 {
        self.store.counters.get(&counter).copied().unwrap_or(0)
    }
}

#[test]
fn joins_leaves_and_sources_of_another_protocol_fill_the_tables() {
    use FilterMode::{Exclude, Include};
    type Case<'a> = (&'a [&'a [u8]], &'a [(u8, FilterMode, &'a [u8])]);
    let cases: &[Case] = &[
        (&[b"T."], &[]),
        (&[b"T!\x01\x00."], &[(1, Exclude, &[])]),
        (&[b"T!\x01\x00.", b"T=\x01\x00."], &[]),
        (&[b"T!\x01\x00=\x01\x00."], &[]),
        (&[b"T=\x01\x02\x05\x06."], &[(1, Include, &[5, 6])]),
        (
            &[b"T=\x01\x01\x05.", b"T+\x01\x01\x06-\x01\x01\x05."],
            &[(1, Include, &[6])],
        ),
        (&[b"T=\x01\x01\x05.", b"T-\x01\x01\x05."], &[]),
        (
            &[b"T!\x01\x02\x05\x06.", b"T+\x01\x01\x05."],
            &[(1, Exclude, &[6])],
        ),
        (
            &[b"T!\x01\x00=\x02\x01\x05!\x03\x01\x06."],
            &[(1, Exclude, &[]), (2, Include, &[5]), (3, Exclude, &[6])],
        ),
    ];
    for (messages, expected) in cases {
        let expected: Vec<_> = expected
            .iter()
            .map(|(group, mode, sources)| (*group, *mode, sources.to_vec()))
            .collect();
        assert_eq!(Port::after(messages).listeners(), expected, "{messages:?}");
    }
}

#[test]
fn records_and_sources_that_the_protocol_ignores_are_counted_and_the_rest_counts() {
    // An unknown type, a group and a source without effect; each has sources after it.
    let port = Port::after(&[b"T?\x01\x02\x05\x06!\x00\x01\x05=\x02\x02\x00\x07!\x03\x00."]);
    let expected = [
        (2, FilterMode::Include, Vec::from([7])),
        (3, FilterMode::Exclude, Vec::new()),
    ];
    assert_eq!(port.listeners(), expected);
    for counter in [
        Counter::UnknownRecord,
        Counter::IgnoredScope,
        Counter::InvalidSource,
    ] {
        assert_eq!(port.count(counter), 1, "{counter:?}");
    }
}

#[test]
fn sources_of_a_record_without_effect_are_skipped() {
    // BLOCK without a listener has no effect; neither has a record that a later one has overtaken.
    let mut port = Port::after(&[b"T-\x01\x02\x05\x06!\x02\x00."]);
    assert_eq!(port.listeners(), [(2, FilterMode::Exclude, Vec::new())]);
    port.feed(b"T=\x02\x02\x05\x06!\x03\x00.", port.now_ns - 1);
    assert_eq!(port.count(Counter::IgnoredStale), 1);
    let groups: Vec<u8> = port.listeners().iter().map(|it| it.0).collect();
    assert_eq!(groups, [2, 3]);
}

#[test]
fn leave_is_told() {
    let port = Port::after(&[b"T!\x01\x00.", b"T=\x01\x00."]);
    let changes: Vec<Change> = port.store.listener_events.iter().map(|it| it.0).collect();
    assert_eq!(changes, [Change::Updated, Change::Removed]);
}

#[test]
fn message_that_ends_within_a_record_keeps_what_came_before() {
    let port = Port::after(&[b"T!\x01\x00=\x02"]);
    assert_eq!(port.listeners(), [(1, FilterMode::Exclude, Vec::new())]);
}
