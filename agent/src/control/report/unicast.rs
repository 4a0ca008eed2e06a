//! `roamcast migrations`: what was done for the unicast addresses of a VM.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use crate::proto::handover::UnreadReport;
use crate::proto::{ClaimOutcome, ForwardRecord, TranslationRecord, UnicastRecord};

/// What has become of the address that a VM is to have at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClaimState {
    /// It is being asked for.
    Asked,
    /// Nobody else has it.
    Unique,
    /// The VM cannot have it.
    Refused,
    /// Somebody else has it too, as was found out after the switch.
    Disputed,
    /// The VM speaks for itself.
    Spoken,
    /// The VM has never spoken from it.
    Silent,
    /// The destination's agent does not know how to find out.
    Unknown,
}

impl ClaimState {
    /// A word for a person.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Asked => "asked",
            Self::Unique => "unique",
            Self::Refused => "refused",
            Self::Disputed => "disputed",
            Self::Spoken => "spoken",
            Self::Silent => "silent",
            Self::Unknown => "unknown",
        }
    }
}

impl From<ClaimOutcome> for ClaimState {
    fn from(outcome: ClaimOutcome) -> Self {
        match outcome {
            ClaimOutcome::Asked => Self::Asked,
            ClaimOutcome::Unique => Self::Unique,
            ClaimOutcome::Refused => Self::Refused,
            ClaimOutcome::Disputed => Self::Disputed,
            ClaimOutcome::Spoken => Self::Spoken,
            ClaimOutcome::Silent => Self::Silent,
            ClaimOutcome::Unknown => Self::Unknown,
        }
    }
}

/// Packets for one address that a VM has left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardRow {
    /// The address.
    pub address: Ipv6Addr,
    /// Where they were sent on to.
    pub to: Ipv6Addr,
    /// Packets sent on.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets that could not be sent on; the counters `forward_*` have the reasons.
    pub dropped: u64,
}

impl From<&ForwardRecord> for ForwardRow {
    fn from(record: &ForwardRecord) -> Self {
        Self {
            address: record.address,
            to: record.to,
            packets: record.packets,
            bytes: record.bytes,
            dropped: record.dropped,
        }
    }
}

/// Packets that a VM has sent from one address that it has left, by one TAP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TranslationRow {
    /// The TAP.
    pub ifindex: u32,
    /// The address.
    pub address: Ipv6Addr,
    /// Packets that were sent from the VM's new address instead.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets that could not be; the counters `forward_*` have the reasons.
    pub dropped: u64,
}

impl From<&TranslationRecord> for TranslationRow {
    fn from(record: &TranslationRecord) -> Self {
        Self {
            ifindex: record.ifindex,
            address: record.address,
            packets: record.packets,
            bytes: record.bytes,
            dropped: record.dropped,
        }
    }
}

/// Packets that a VM had not read when it stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnreadRow {
    /// Packets sent on to its new address.
    pub packets: u64,
    /// Packets that could not be.
    pub dropped: u64,
}

impl From<&UnreadReport> for UnreadRow {
    fn from(report: &UnreadReport) -> Self {
        Self {
            packets: report.packets,
            dropped: report.dropped,
        }
    }
}

/// The unicast addresses of a VM that moves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnicastRow {
    /// The address that it is to have at the destination.
    pub address: Ipv6Addr,
    /// What has become of that.
    pub claim: ClaimState,
    /// The addresses that it has left; at the source only.
    pub forwards: Vec<ForwardRow>,
    /// What was sent on of that which it had not read when it stopped; at the source only.
    #[serde(default)]
    pub unread: UnreadRow,
    /// What it has still sent from them; at the destination only.
    pub translations: Vec<TranslationRow>,
}

impl From<&UnicastRecord> for UnicastRow {
    fn from(record: &UnicastRecord) -> Self {
        Self {
            address: record.address,
            claim: record.claim.into(),
            forwards: record.forwards.iter().map(ForwardRow::from).collect(),
            unread: (&record.unread).into(),
            translations: record
                .translations
                .iter()
                .map(TranslationRow::from)
                .collect(),
        }
    }
}
