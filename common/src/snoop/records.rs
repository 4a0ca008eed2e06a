//! The seam between the protocols of memberships and the listener tables: a protocol reads a packet
//! and yields records, [`Walk`](super::Walk) applies the records to the tables.
//!
//! | part | rule |
//! |---|---|
//! | protocol ([`Records`]) | position and size of records and sources, meaning of their types, versions, valid addresses and sources, scopes without effect |
//! | [`Walk`](super::Walk) | filter modes, lists and generations of listeners, overtaken records, limits |
//!
//! [`mld`](super::mld) is the only protocol. IGMP carries the same records with addresses of 4 bytes,
//! which it yields IPv4-mapped.

use crate::counter::Counter;
use crate::maps::Address;
use crate::packet::PacketRead;

/// Type of an address record (RFC 9777 §5.2.12; IGMPv3 has the same types with the same numbers).
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordType {
    /// Answer to a Query: the filter mode is INCLUDE with these sources.
    ModeIsInclude = 1,
    /// Answer to a Query: the filter mode is EXCLUDE with these sources.
    ModeIsExclude = 2,
    /// The filter mode has changed to INCLUDE with these sources; an empty list means a leave.
    ChangeToIncludeMode = 3,
    /// The filter mode has changed to EXCLUDE with these sources.
    ChangeToExcludeMode = 4,
    /// The listener also wants these sources.
    AllowNewSources = 5,
    /// The listener no longer wants these sources.
    BlockOldSources = 6,
}

impl RecordType {
    /// Decodes the type; `None` for unknown types, which receivers skip (§5.2.12).
    #[inline(always)]
    pub fn from_u8(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::ModeIsInclude),
            2 => Some(Self::ModeIsExclude),
            3 => Some(Self::ChangeToIncludeMode),
            4 => Some(Self::ChangeToExcludeMode),
            5 => Some(Self::AllowNewSources),
            6 => Some(Self::BlockOldSources),
            _ => None,
        }
    }

    /// Whether records of this type answer a Query.
    #[inline(always)]
    pub fn is_answer(self) -> bool {
        matches!(self, Self::ModeIsInclude | Self::ModeIsExclude)
    }

    /// Whether records of this type set the filter mode EXCLUDE.
    #[inline(always)]
    pub fn is_exclude(self) -> bool {
        matches!(self, Self::ModeIsExclude | Self::ChangeToExcludeMode)
    }
}

/// A record, without its sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Multicast address of the listener, network order.
    pub multicast_address: Address,
    /// What the listener asks for.
    pub record_type: RecordType,
    /// Number of sources, valid or not.
    pub sources: u32,
    /// Version of the protocol that the listener speaks.
    pub version: u8,
}

/// The protocol gives this record or source no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ignored(
    /// Counter of the reason.
    pub Counter,
);

/// The records of one message, in the order of the packet.
///
/// A call reads one record header or one source, at constant cost: a kernel program makes each call
/// in one iteration of its loop.
///
/// Verifier: addresses are returned by value. Behind a reference, their alignment would be unknown,
/// and the compiler would copy them byte by byte.
pub trait Records {
    /// Reads the next record. Skips the sources of the record before that the caller has not read.
    /// `None` after the last record, or where the packet ends.
    ///
    /// An [`Ignored`] record has no sources for the caller.
    fn next_record<P: PacketRead + ?Sized>(
        &mut self,
        packet: &P,
    ) -> Option<Result<Record, Ignored>>;

    /// Reads the next source of the last record; `None` where the packet ends. The caller asks at most
    /// as often as the record has sources.
    fn next_source<P: PacketRead + ?Sized>(
        &mut self,
        packet: &P,
    ) -> Option<Result<Address, Ignored>>;
}
