//! [`Records`] of MLD: what the records of MLDv2 and the messages of MLDv1 ask for.
//!
//! Deviation: records for scopes up to link-local have no effect, because such an address means
//! nothing on another link; neither do EXCLUDE records for source-specific addresses (RFC 4604
//! §2.2.1).

use super::{Ignored, ListenerStore, Record, RecordType, Records, Report, Walk};
use crate::counter::Counter;
use crate::group;
use crate::maps::Address;
use crate::packet::PacketRead;
use crate::wire::ipv6;
use crate::wire::mld::{
    self, AddressRecord, Message, NoMessage, RECORD_BYTES, ReportV2, SOURCE_BYTES,
};

/// The records of one MLD message.
#[derive(Clone, Copy, Debug, Default)]
pub struct MldRecords {
    /// Offset of the next record header, bytes.
    record: u32,
    /// Offset of the next source, bytes.
    source: u32,
    records_left: u32,
    /// Multicast address of an MLDv1 message.
    v1_address: Address,
    /// Type of the only record of an MLDv1 message; 0 for MLDv2.
    v1_record_type: u8,
}

impl MldRecords {
    /// An MLDv1 message, treated as a record without sources.
    #[inline(always)]
    fn v1(record_type: RecordType, address: &Address) -> Self {
        Self {
            record: 0,
            source: 0,
            records_left: 1,
            v1_address: *address,
            v1_record_type: record_type as u8,
        }
    }

    /// The records of a Report that [`mld::check_records`] accepted.
    #[inline(always)]
    fn v2(report: &ReportV2) -> Self {
        Self {
            record: report.offset as u32,
            source: 0,
            records_left: u32::from(report.count),
            v1_address: ipv6::UNSPECIFIED,
            v1_record_type: 0,
        }
    }
}

impl Records for MldRecords {
    #[inline(always)]
    fn next_record<P: PacketRead + ?Sized>(
        &mut self,
        packet: &P,
    ) -> Option<Result<Record, Ignored>> {
        if self.records_left == 0 {
            return None;
        }
        self.records_left -= 1;
        let is_v1 = self.v1_record_type != 0;
        let multicast_address;
        let record_type;
        let sources;
        if is_v1 {
            multicast_address = self.v1_address;
            record_type = self.v1_record_type;
            sources = 0;
        } else {
            let record = AddressRecord::read(packet, self.record as usize).ok()?;
            multicast_address = record.multicast_address;
            record_type = record.record_type;
            sources = u32::from(record.sources);
            self.source = self.record + RECORD_BYTES as u32;
            self.record =
                self.source + sources * SOURCE_BYTES as u32 + u32::from(record.aux_words) * 4;
        }
        let Some(record_type) = RecordType::from_u8(record_type) else {
            return Some(Err(Ignored(Counter::UnknownRecord)));
        };
        if !group::is_routable(&multicast_address) {
            return Some(Err(Ignored(Counter::IgnoredScope)));
        }
        if (is_v1 || record_type.is_exclude()) && group::is_source_specific(&multicast_address) {
            return Some(Err(Ignored(Counter::IgnoredSsm)));
        }
        Some(Ok(Record {
            multicast_address,
            record_type,
            sources,
            version: if is_v1 { 1 } else { 2 },
        }))
    }

    #[inline(always)]
    fn next_source<P: PacketRead + ?Sized>(
        &mut self,
        packet: &P,
    ) -> Option<Result<Address, Ignored>> {
        let source = packet.read::<SOURCE_BYTES>(self.source as usize).ok()?;
        self.source += SOURCE_BYTES as u32;
        if group::is_multicast(&source) || ipv6::is_unspecified(&source) {
            return Some(Err(Ignored(Counter::InvalidSource)));
        }
        Some(Ok(source))
    }
}

/// Counts a valid message and prepares `walk` to apply it; returns the most steps that the walk
/// takes.
///
/// # Errors
///
/// As [`mld::check_records`].
#[inline(always)]
pub fn begin<P, S, const MAX_RECORDS: usize>(
    packet: &P,
    message: &Message,
    report: &Report,
    walk: &mut Walk<MldRecords>,
    store: &mut S,
) -> Result<usize, NoMessage>
where
    P: PacketRead + ?Sized,
    S: ListenerStore,
{
    match message {
        Message::Query(_) => {
            walk.start(report, MldRecords::default());
            store.count(Counter::GuestQueries);
            Ok(0)
        }
        Message::ReportV1(address) => {
            walk.start(report, MldRecords::v1(RecordType::ModeIsExclude, address));
            store.count(Counter::ReportsV1);
            Ok(1)
        }
        Message::Done(address) => {
            let records = MldRecords::v1(RecordType::ChangeToIncludeMode, address);
            walk.start(report, records);
            store.count(Counter::Dones);
            Ok(1)
        }
        Message::ReportV2(records) => {
            let steps = mld::check_records::<P, MAX_RECORDS>(packet, records)?;
            walk.start(report, MldRecords::v2(records));
            store.count(Counter::ReportsV2);
            Ok(steps)
        }
    }
}
