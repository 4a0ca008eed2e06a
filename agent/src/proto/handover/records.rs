//! Source: what the guest has had of each flow, for the message to the destination.

use std::collections::BTreeMap;

use common::handover::flow_hash_of;
use common::maps::{GateRecord, RECORDS_PER_SLOT, StreamKey};
use common::signal::{FlowCut, MAX_CUT_FLOWS, MAX_FINGERPRINT_BYTES, NicCut};

use super::cut::Cut;
use crate::proto::{Mac, Timestamp};

/// Most fingerprints of one flow.
pub(super) const FLOW_FINGERPRINTS: usize = MAX_FINGERPRINT_BYTES / 8;
/// Most fingerprints of one NIC. With 8 bytes for each, and 80 for the rest of each of up to 900
/// flows, its part of the message stays below 600 KiB.
pub(super) const NIC_FINGERPRINTS: usize = 65_536;
/// Fingerprints are those of packets that came at most so long before the last one, nanoseconds:
/// no two paths are further apart.
const SPAN_NS: u64 = 1_000_000_000;
/// At most so many entries are being written over when they are read, one by each CPU.
const IN_WRITING: usize = 256;
/// So many are given of a flow in any case, if there are so many.
const LEAST_FINGERPRINTS: usize = 16;

/// A packet is in `DELIVERED` at most so long after it came, nanoseconds, if nothing holds its CPU up.
const COUNTING_NS: u64 = 5000;

/// What `DELIVERED` had counted of a flow, since the beginning of the recording, at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// When it was about to be read.
    pub from: Timestamp,
    /// Packets.
    pub packets: u64,
    /// When it had been read.
    pub until: Timestamp,
}

/// What the source says of a NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NicReach {
    /// For the message.
    pub cut: NicCut,
    /// Records of flows that are not among the known ones.
    pub unknown_records: u64,
}

/// Makes the cut of the NIC with the address `mac` of the entries of its slot in `GATE_RECORDS`, in
/// any order, and of what `DELIVERED` has counted of each flow, read before the entries.
///
/// A slot that has not been used up has a record of every packet, and their number is what the
/// guest has had. Of a slot that was written over, the oldest are gone, and `DELIVERED` knows
/// better; but it counts what came after the cut too, the records of which are there, because they
/// are the newest. Whether one that came while `DELIVERED` was read is counted nobody knows: of several
/// readings of a flow, one counts in which none came.
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
            // A flow without a record has none because it was silent for longer.
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

/// The records of one flow.
#[derive(Default)]
struct Track<'a> {
    /// Those of packets that the guest has had, oldest first.
    had: Vec<&'a GateRecord>,
    /// When those came that came after the cut.
    after_ns: Vec<u64>,
}

impl<'a> Track<'a> {
    /// What `DELIVERED` says that came before the cut; rather too few than too many.
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

    /// The records whose fingerprints are of use.
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

/// A cut somewhere among several frames is at one if all of them are recorded and of one flow: that
/// has one order.
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

/// The last `most` items.
fn newest<T>(items: &[T], most: usize) -> &[T] {
    items
        .get(items.len().saturating_sub(most)..)
        .unwrap_or_default()
}

/// The largest share that each may have at most, so that all together have no more than `total`.
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
