//! Columns of `roamcast migrations`: what the agents did for the unicast addresses of a VM.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use crate::proto::handover::UnreadReport;
use crate::proto::{ClaimOutcome, ForwardRecord, TranslationRecord, UnicastRecord};

/// State of the address that a VM is to use at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClaimState {
    /// Duplicate Address Detection is running.
    Asked,
    /// No other node has the address.
    Unique,
    /// The VM cannot have it.
    Refused,
    /// Another node has the address too; it answered after the switch.
    Disputed,
    /// The VM has sent from the address itself.
    Spoken,
    /// The VM has never sent from the address.
    Silent,
    /// The destination's agent cannot check the address.
    Unknown,
}

impl ClaimState {
    /// Returns the word that tables show.
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

/// Forwarding for one address that a VM has left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardRow {
    /// An address of the VM at the source.
    pub address: Ipv6Addr,
    /// Address to which the agent forwards the packets.
    pub to: Ipv6Addr,
    /// Packets forwarded.
    pub packets: u64,
    /// Bytes forwarded.
    pub bytes: u64,
    /// Packets that could not be forwarded; the counters `forward_*` have the reasons.
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

/// Translation of packets that a VM still sends from an old address through one TAP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TranslationRow {
    /// Interface index of the TAP.
    pub ifindex: u32,
    /// An address of the VM at the source.
    pub address: Ipv6Addr,
    /// Packets translated to the VM's new address.
    pub packets: u64,
    /// Bytes translated.
    pub bytes: u64,
    /// Packets that could not be translated; the counters `forward_*` have the reasons.
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

/// Packets that were in the TAP's queue when the VM stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnreadRow {
    /// Packets forwarded to the VM's new address.
    pub packets: u64,
    /// Packets that could not be forwarded.
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

/// Unicast addresses of a VM that migrates.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnicastRow {
    /// Address that the VM is to use at the destination.
    pub address: Ipv6Addr,
    /// State of that address.
    pub claim: ClaimState,
    /// Forwarding for each address that the VM has left; only at the source.
    pub forwards: Vec<ForwardRow>,
    /// Packets that the VM had not read when it stopped; only at the source.
    #[serde(default)]
    pub unread: UnreadRow,
    /// Translation of packets that the VM still sends from its old addresses; only at the
    /// destination.
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
