//! MLD messages of a VM: frames, one after the other, into the tables of one port.
//!
//! The first byte of an input limits the entries of the tables. Then come frames; flags and a
//! length (big-endian `u16`) precede each frame.

use std::collections::BTreeSet;
use std::vec::Vec;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};

use super::finish;
use crate::group;
use crate::maps::{BridgeNumber, ListenerKey};
use crate::snoop::mld::begin;
use crate::snoop::{
    Frame, KERNEL_BYTES, KERNEL_OPTIONS, KERNEL_RECORDS, KERNEL_STEPS, Report, Step, Walk,
    apply_frame,
};
use crate::testing::store::{Meaning, MemoryStore, meaning};
use crate::wire::ipv6;
use crate::wire::mld::{self, AddressRecord, Message, NoMessage, RECORD_BYTES, SOURCE_BYTES};

const IFINDEX: u32 = 7;
const BRIDGE: BridgeNumber = BridgeNumber(3);
/// Flag: leave the checksum unchanged.
const UNFINISHED: u8 = 0x80;
/// Flag: the VLAN tag is in the metadata.
const TAGGED: u8 = 0x40;

/// Limits of the agent, which processes what exceeds the kernel program's limits.
const ALL_OPTIONS: usize = 2048;
const ALL_RECORDS: usize = mld::MAX_BYTES / RECORD_BYTES;

pub(super) fn run(bytes: &[u8]) {
    let Some((bound, mut rest)) = bytes.split_first() else {
        return;
    };
    let mut store = MemoryStore::default();
    if *bound != 0 {
        store.max_listeners = usize::from(bound & 0x0f);
        store.max_sources = usize::from(bound >> 4);
    }
    let mut at_ns = 1_000_000;
    while let Some(([flags, high, low], after)) = rest.split_first_chunk::<3>() {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(after.len());
        let (frame, next) = after.split_at(length);
        rest = next;
        at_ns += 1_000_000;
        take(frame.to_vec(), *flags, at_ns, &mut store);
    }
}

fn take(mut bytes: Vec<u8>, flags: u8, at_ns: u64, store: &mut MemoryStore) {
    if flags & UNFINISHED == 0
        && let Some(frame) = mld::ipv6_frame(&bytes[..])
        && let Ok(found) = ipv6::walk::<_, ALL_OPTIONS>(
            &bytes[..],
            frame.header.next_header,
            frame.payload,
            frame.payload + usize::from(frame.header.payload_length),
        )
        && found.next_header == mld::ICMPV6
    {
        finish(&mut bytes, found.offset);
    }
    let packet = Frame {
        bytes: &bytes,
        vlan_metadata: if flags & TAGGED == 0 { 0 } else { 0x2007 },
    };
    let Some(frame) = mld::ipv6_frame(&packet) else {
        let before = counts(store);
        assert!(apply_frame(&packet, IFINDEX, BRIDGE, at_ns, store));
        assert_eq!(counts(store), before, "what is no IPv6 has been counted");
        return;
    };
    let all = mld::parse::<_, ALL_OPTIONS, { mld::MAX_BYTES }>(&packet, &frame);
    let bounded = mld::parse::<_, KERNEL_OPTIONS, KERNEL_BYTES>(&packet, &frame);
    // The kernel program reads the same message or hands the frame to the agent.
    assert!(bounded == Err(NoMessage::Unfinished) || bounded == all);
    if let Ok(message) = all {
        assert!(!mld::is_hidden(&packet, &frame));
        if packet.vlan_metadata == 0 {
            agrees_with_another_parser(&bytes, &frame, &message);
        }
    }
    let report = Report {
        at_ns,
        ifindex: IFINDEX,
        vlan: frame.vlan,
        bridge: BRIDGE,
        guest_mac: frame.mac,
        by_agent: false,
    };
    let is_hidden = mld::is_hidden(&packet, &frame);
    let by_kernel = bounded.ok().filter(|_| !is_hidden).is_some_and(|message| {
        let mut walk = Walk::new();
        let begun = begin::<_, _, KERNEL_RECORDS>(&packet, &message, &report, &mut walk, store);
        let Some(steps) = begun.ok().filter(|steps| *steps <= KERNEL_STEPS) else {
            return false;
        };
        let done = (0..=steps).any(|_| walk.step(&packet, store) == Step::Done);
        assert!(done, "takes more than {steps} steps");
        true
    });
    let once = is_unbounded(store).then(|| state(store));
    let nothing_refused = apply_frame(&packet, IFINDEX, BRIDGE, at_ns, store);
    let twice = state(store);
    let Some(once) = once else {
        assert!(store.listeners.len() <= store.max_listeners);
        return;
    };
    assert!(nothing_refused);
    // A Report with repeated addresses passes through states that a second run cannot repeat.
    if by_kernel && !repeats(&packet, all.ok()) {
        assert_eq!(once, twice, "the agent repeats what the kernel has done");
    }
}

/// Whether the tables have no limit.
fn is_unbounded(store: &MemoryStore) -> bool {
    store.max_listeners == usize::MAX
}

fn counts(store: &MemoryStore) -> (usize, u64) {
    (store.listeners.len(), store.counters.values().sum())
}

/// Returns the tables; asserts that each listener has as many sources as its count.
fn state(store: &MemoryStore) -> Vec<(ListenerKey, Meaning)> {
    let all = meaning(store.listeners.clone(), store.sources.clone());
    let all: Vec<_> = all.into_iter().collect();
    for (key, (mode, _, _, _, sources)) in &all {
        assert!(group::is_routable(&key.multicast_address));
        assert!(sources.iter().all(|(_, listed)| listed == mode));
        assert!(
            sources
                .iter()
                .all(|(source, _)| !group::is_multicast(source))
        );
        // A listener in INCLUDE mode has at least one source.
        assert!(*mode == 2 || *mode == 1 && !sources.is_empty());
    }
    all
}

/// Whether a Report has more than one record for an address.
fn repeats(packet: &Frame<'_>, message: Option<Message>) -> bool {
    let Some(Message::ReportV2(records)) = message else {
        return false;
    };
    if mld::check_records::<_, ALL_RECORDS>(packet, &records).is_err() {
        return false;
    }
    let mut seen = BTreeSet::new();
    let mut at = records.offset;
    (0..records.count).any(|_| {
        let record = AddressRecord::read(packet, at).expect("was checked");
        at += RECORD_BYTES
            + usize::from(record.sources) * SOURCE_BYTES
            + usize::from(record.aux_words) * 4;
        !seen.insert(record.multicast_address)
    })
}

fn agrees_with_another_parser(bytes: &[u8], frame: &mld::Ipv6Frame, message: &Message) {
    let theirs = SlicedPacket::from_ethernet(bytes).expect("a packet for etherparse");
    let Some(NetSlice::Ipv6(ip)) = &theirs.net else {
        unreachable!("no IPv6 for etherparse: {bytes:02x?}");
    };
    assert_eq!(ip.header().source(), frame.header.source);
    assert_eq!(ip.header().destination(), frame.header.destination);
    let Some(TransportSlice::Icmpv6(icmp)) = &theirs.transport else {
        unreachable!("no ICMPv6 for etherparse: {bytes:02x?}");
    };
    assert!(icmp.is_checksum_valid(frame.header.source, frame.header.destination));
    let kind = match message {
        Message::Query(_) => mld::LISTENER_QUERY,
        Message::ReportV1(_) => mld::LISTENER_REPORT_V1,
        Message::Done(_) => mld::LISTENER_DONE,
        Message::ReportV2(_) => mld::LISTENER_REPORT_V2,
    };
    assert_eq!(icmp.type_u8(), kind);
}
