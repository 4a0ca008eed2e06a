//! Source: received packets of each flow, for the message to the destination host.

use std::collections::BTreeMap;

use common::handover::flow_hash_of;
use common::maps::{GateRecord, RECORDS_PER_SLOT, StreamKey};
use common::signal::{FlowCut, MAX_CUT_FLOWS, MAX_FINGERPRINT_BYTES, NicCut};

use super::cut::Cut;
use crate::proto::{Mac, Timestamp};

/// Limit of fingerprints per flow.
pub(super) const FLOW_FINGERPRINTS: usize = MAX_FINGERPRINT_BYTES / 8;
/// Limit of fingerprints per NIC. With 8 bytes per fingerprint, and 80 bytes for the rest of each of up
/// to 900 flows, a NIC's part of the message stays below 600 KiB.
pub(super) const NIC_FINGERPRINTS: usize = 65_536;
/// Maximum age of a fingerprinted packet relative to the last packet, nanoseconds. No two paths differ
/// by more.
const SPAN_NS: u64 = 1_000_000_000;
/// Maximum number of entries that the CPUs overwrite during the reading, one per CPU.
const IN_WRITING: usize = 256;
/// Minimum number of fingerprints per flow, if the flow has that many records.
const LEAST_FINGERPRINTS: usize = 16;

/// Delay after which an arrived packet is counted in `DELIVERED`, nanoseconds, unless its CPU is
/// interrupted.
const COUNTING_NS: u64 = 5000;

/// Count of a flow in `DELIVERED` since the start of the recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Time just before the reading.
    pub from: Timestamp,
    /// Number of counted packets.
    pub packets: u64,
    /// Time just after the reading.
    pub until: Timestamp,
}

/// Received packets of a NIC, with a count of unusable records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicReach {
    /// Content of the message.
    pub cut: NicCut,
    /// Records of flows that are not among the known flows.
    pub unknown_records: u64,
}

/// Builds the cut of the NIC with the address `mac` from the entries of its slot in `GATE_RECORDS`, in
/// any order, and from the counts of each flow in `DELIVERED`, read before the entries.
///
/// A slot that is not full has a record of every packet, and the number of records is the number of
/// received packets. An overwritten slot lacks the oldest records, and `DELIVERED` has the better
/// count. But `DELIVERED` also counts packets after the cut; the slot has their records, because they
/// are the newest. A packet that arrived during the reading of `DELIVERED` may or may not be counted.
/// So of several readings of a flow, a reading without arrivals counts.
pub fn nic_cut(
    mac: Mac,
    cut: &Cut,
    records: &[GateRecord],
    flows: &[(StreamKey, Vec<Reading>)],
) -> NicReach {
    let mut records: Vec<&GateRecord> = records.iter().filter(|r| r.number != 0).collect();
    records.sort_unstable_by_key(|record| record.number);
    let cut = &resolved(*cut, &records);
    let is_whole = records.len() + IN_WRITING < RECORDS_PER_SLOT as usize;
    let oldest_ns = records.first().map_or(0, |record| record.at_ns);
    let mut tracks: BTreeMap<u64, Track<'_>> = flows
        .iter()
        .map(|(stream, _)| (flow_hash_of(stream), Track::default()))
        .collect();
    let mut unknown_records = 0;
    for record in records {
        let Some(track) = tracks.get_mut(&record.flow) else {
            unknown_records += 1;
            continue;
        };
        if was_had(cut, record) {
            track.had.push(record);
        } else {
            track.after_ns.push(record.at_ns);
        }
    }
    let mut cuts = Vec::new();
    for (stream, readings) in flows {
        let Some(track) = tracks.get(&flow_hash_of(stream)) else {
            continue;
        };
        let had = if is_whole {
            track.had.len() as u64
        } else {
            track.counted(readings).max(track.had.len() as u64)
        };
        if had > 0 {
            cuts.push((stream, had, track));
        }
    }
    cuts.sort_unstable_by_key(|(stream, ..)| **stream);
    cuts.truncate(MAX_CUT_FLOWS);
    let most = fair_share(
        cuts.iter().map(|(.., track)| track.recent().len()),
        NIC_FINGERPRINTS,
    );
    let flows = cuts
        .iter()
        .map(|(stream, had, track)| FlowCut {
            vlan: stream.vlan,
            multicast_address: stream.multicast_address.into(),
            source: stream.source.into(),
            source_port: stream.source_port,
            destination_port: stream.destination_port,
            delivered: *had,
            // A flow without records was silent for longer than the records reach back.
            last_ns: track.had.last().map_or(oldest_ns, |record| record.at_ns),
            fingerprints: newest(track.recent(), most)
                .iter()
                .flat_map(|record| record.fingerprint.to_le_bytes())
                .collect::<Vec<u8>>()
                .into(),
        })
        .collect();
    NicReach {
        cut: NicCut {
            mac: mac.into(),
            basis: cut.basis(),
            flows,
            tap_full: None,
        },
        unknown_records,
    }
}

/// Records of one flow.
#[derive(Default)]
struct Track<'a> {
    /// Records of packets that the guest received, oldest first.
    had: Vec<&'a GateRecord>,
    /// Arrival times of packets after the cut.
    after_ns: Vec<u64>,
}

impl<'a> Track<'a> {
    /// Returns the count of packets before the cut according to `DELIVERED`; rather too low than too
    /// high.
    fn counted(&self, readings: &[Reading]) -> u64 {
        let came = |by: u64| self.after_ns.iter().filter(|at| **at <= by).count() as u64;
        let mut least = None;
        for reading in readings {
            let surely = came(reading.from.0.saturating_sub(COUNTING_NS));
            let perhaps = came(reading.until.0);
            let packets = reading.packets.saturating_sub(perhaps);
            if surely == perhaps {
                return packets;
            }
            least = least.max(Some(packets));
        }
        least.unwrap_or_default()
    }

    /// Returns the records with useful fingerprints.
    fn recent(&self) -> &[&'a GateRecord] {
        let Some(last) = self.had.last() else {
            return &[];
        };
        let since_ns = last.at_ns.saturating_sub(SPAN_NS);
        let within = self
            .had
            .iter()
            .rev()
            .take_while(|record| record.at_ns >= since_ns)
            .count();
        newest(
            &self.had,
            within.clamp(LEAST_FINGERPRINTS, FLOW_FINGERPRINTS),
        )
    }
}

/// Resolves a cut among several frames to one frame, if all these frames are recorded and belong to one
/// flow, since a flow has one order.
fn resolved(cut: Cut, records: &[&GateRecord]) -> Cut {
    let Cut::Among { after, had, until } = cut else {
        return cut;
    };
    let flows = (records.iter())
        .filter(|record| (after + 1..=until).contains(&record.number))
        .map(|record| record.flow);
    let is_whole = flows.clone().count() as u64 == until.saturating_sub(after);
    let is_one = flows.clone().zip(flows.skip(1)).all(|(a, b)| a == b);
    if is_whole && is_one {
        Cut::Number {
            number: after + had,
            overflow: false,
        }
    } else {
        Cut::Number {
            number: after,
            overflow: true,
        }
    }
}

fn was_had(cut: &Cut, record: &GateRecord) -> bool {
    match *cut {
        Cut::Number { number, .. } => record.number <= number,
        Cut::Among { after, .. } => record.number <= after,
        Cut::Time(until) => record.at_ns <= until.0,
    }
}

/// Returns the last `most` items.
fn newest<T>(items: &[T], most: usize) -> &[T] {
    items
        .get(items.len().saturating_sub(most)..)
        .unwrap_or_default()
}

/// Returns the largest share per flow such that all shares together do not exceed `total`.
fn fair_share(wanted: impl Iterator<Item = usize> + Clone, total: usize) -> usize {
    let sum = |share: usize| {
        wanted
            .clone()
            .map(|wanted| wanted.min(share))
            .sum::<usize>()
    };
    let (mut fits, mut exceeds) = (0, FLOW_FINGERPRINTS + 1);
    while exceeds - fits > 1 {
        let middle = usize::midpoint(fits, exceeds);
        if sum(middle) <= total {
            fits = middle;
        } else {
            exceeds = middle;
        }
    }
    fits
}
