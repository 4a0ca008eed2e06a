//! Address records of an MLDv2 Report: their layout and their check.

use super::NoMessage;
use crate::counter::Counter;
use crate::maps::Address;
use crate::packet::{PacketRead, Truncated};

/// Length of an address record before its sources, bytes.
pub const RECORD_BYTES: usize = 20;
/// Length of a source, bytes.
pub const SOURCE_BYTES: usize = 16;

/// Position of the records of an MLDv2 Report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportV2 {
    /// Number of records.
    pub count: u16,
    /// Offset of the first record in the frame, bytes.
    pub offset: usize,
    /// End of the message in the frame, bytes.
    pub end: usize,
}

/// Fixed part of an address record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressRecord {
    /// Type as on the wire; see [`RecordType`](crate::snoop::RecordType).
    pub record_type: u8,
    /// Length of the auxiliary data after the sources, 4-byte words.
    pub aux_words: u8,
    /// Number of sources.
    pub sources: u16,
    /// Multicast address of the record, network order.
    pub multicast_address: Address,
}

impl AddressRecord {
    /// Reads the fixed part of the record at `offset`.
    ///
    /// # Errors
    ///
    /// [`Truncated`] when the packet ends within the fixed part.
    #[inline(always)]
    pub fn read<P: PacketRead + ?Sized>(packet: &P, offset: usize) -> Result<Self, Truncated> {
        let [record_type, aux_words, s0, s1] = packet.read::<4>(offset)?;
        Ok(Self {
            record_type,
            aux_words,
            sources: u16::from_be_bytes([s0, s1]),
            multicast_address: packet.read::<16>(offset + 4)?,
        })
    }
}

/// Checks that every record lies within the Report and is for a multicast address. Returns the
/// number of records plus sources. `RECORDS` limits the records.
///
/// # Errors
///
/// [`NoMessage::Malformed`] for the first invalid record; [`NoMessage::Unfinished`] for more
/// records than the limit.
#[inline(always)]
pub fn check_records<P: PacketRead + ?Sized, const RECORDS: usize>(
    packet: &P,
    report: &ReportV2,
) -> Result<usize, NoMessage> {
    let count = usize::from(report.count);
    if count > RECORDS {
        return Err(NoMessage::Unfinished);
    }
    let mut at = report.offset;
    let mut steps = 0;
    for index in 0..RECORDS {
        if index >= count {
            break;
        }
        let Ok([_, aux_words, s0, s1, first]) = packet.read::<5>(at) else {
            return Err(NoMessage::Malformed(Counter::MalformedRecord));
        };
        let sources = usize::from(u16::from_be_bytes([s0, s1]));
        at += RECORD_BYTES + sources * SOURCE_BYTES + usize::from(aux_words) * 4;
        if at > report.end {
            return Err(NoMessage::Malformed(Counter::MalformedRecord));
        }
        if first != 0xff {
            return Err(NoMessage::Malformed(Counter::MalformedAddress));
        }
        steps += 1 + sources;
    }
    Ok(steps)
}
