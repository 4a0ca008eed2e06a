//! Rows about migrations and how their multicast addresses are received.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use super::{HandoverRow, NicRow, UngatedRow, UnicastRow};

use common::signal::{Phase, ReceptionMode};

use crate::proto::{CopyWay, InTheClear};

/// How a multicast address is received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reception {
    /// Joined; a packet has come natively.
    Native,
    /// Joined; silent at the source too.
    Idle,
    /// Joined; nothing came in time.
    Unreachable,
    /// Refused by policy or limits.
    Refused,
    /// A relay sends it.
    Relay,
    /// Joined; the verdict is open.
    Probing,
}

impl From<ReceptionMode> for Reception {
    fn from(mode: ReceptionMode) -> Self {
        match mode {
            ReceptionMode::Native => Self::Native,
            ReceptionMode::Idle => Self::Idle,
            ReceptionMode::Unreachable => Self::Unreachable,
            ReceptionMode::Refused => Self::Refused,
            ReceptionMode::Relay => Self::Relay,
        }
    }
}

/// A multicast address that this host has joined for VMs that arrive or have arrived.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRow {
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Multicast address.
    pub multicast_address: Ipv6Addr,
    /// How it is received.
    pub mode: Reception,
    /// From the join to the verdict.
    pub waited_ms: u64,
    /// Domains that it is joined for.
    pub domains: Vec<String>,
    /// Whether they all run here: the join then ends with their own answer to a Query.
    pub held: bool,
}

/// How one multicast address of a migration is received at its destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceptionRow {
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Multicast address.
    pub multicast_address: Ipv6Addr,
    /// How it is received.
    pub mode: Reception,
    /// From the join to the verdict.
    pub waited_ms: u64,
}

/// Which way a migration goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Away from this host.
    Outgoing,
    /// To this host.
    Incoming,
}

/// Where a migration stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MigrationPhase {
    /// The destination joins and probes.
    Preparing,
    /// Waiting for the VM to prepare its idle NIC.
    Ready,
    /// libvirt copies memory.
    Copying,
    /// The VM is paused for the switch.
    Switching,
    /// The VM runs at the destination.
    Completed,
}

impl MigrationPhase {
    /// A word for a person.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Ready => "ready",
            Self::Copying => "copying",
            Self::Switching => "switching",
            Self::Completed => "completed",
        }
    }
}

impl From<Phase> for MigrationPhase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Preparing => Self::Preparing,
            Phase::Ready => Self::Ready,
            Phase::Copying => Self::Copying,
            Phase::Switching => Self::Switching,
            Phase::Completed => Self::Completed,
        }
    }
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "state", content = "reason")]
pub enum Outcome {
    /// It has not.
    Running,
    /// The domain runs at the destination.
    Completed,
    /// The domain runs where it was; why, in one sentence.
    Failed(String),
}

/// How the memory of a VM goes to the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "way", content = "reason")]
pub enum MemoryWay {
    /// Encrypted by QEMU.
    Tls,
    /// In libvirt's connection, as its URI says.
    Tunnel,
    /// So that everybody between the hosts can read it.
    Clear(ClearReason),
}

/// Why memory goes in the clear.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClearReason {
    /// `libvirt.encrypt` is `never`.
    SwitchedOff,
    /// `VIR_MIGRATE_ZEROCOPY` is set.
    Zerocopy,
    /// QEMU has no certificate at the source; `roamcast status` says why.
    NoCertificateHere,
    /// It has none at the destination; `roamcast status` says there why.
    NoCertificateThere,
}

impl ClearReason {
    /// The reason for a person, after "in the clear:".
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SwitchedOff => "libvirt.encrypt is \"never\"",
            Self::Zerocopy => "VIR_MIGRATE_ZEROCOPY does not go with TLS",
            Self::NoCertificateHere => "QEMU has no certificate here, as `roamcast status` says",
            Self::NoCertificateThere => {
                "QEMU has no certificate there, as `roamcast status` says there"
            }
        }
    }
}

impl From<&CopyWay> for MemoryWay {
    fn from(way: &CopyWay) -> Self {
        match way {
            CopyWay::Tls => Self::Tls,
            CopyWay::Tunnel => Self::Tunnel,
            CopyWay::Clear(why) => Self::Clear(match why {
                InTheClear::Never => ClearReason::SwitchedOff,
                InTheClear::Zerocopy => ClearReason::Zerocopy,
                InTheClear::Source { .. } => ClearReason::NoCertificateHere,
                InTheClear::Destination { .. } => ClearReason::NoCertificateThere,
            }),
        }
    }
}

/// One of `roamcast migrations`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationRow {
    /// Number of the record, counted by this agent.
    pub migration: u64,
    /// Which way.
    pub direction: Direction,
    /// Domain that moves.
    pub domain: String,
    /// Its UUID.
    pub domain_uuid: String,
    /// The agent at the other end.
    pub peer: String,
    /// Where it stands, or stood at its end.
    pub phase: MigrationPhase,
    /// Since it began.
    pub age_ms: u64,
    /// From the request to the destination's readiness.
    pub signalling_ms: Option<f64>,
    /// From START MIGRATION to the pause.
    pub copy_ms: Option<f64>,
    /// How memory goes; at the source only, and absent where somebody else than the agent has libvirt move
    /// the domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryWay>,
    /// How long the VM was paused.
    pub vm_pause_ms: Option<f64>,
    /// From the request to the end.
    pub total_ms: Option<f64>,
    /// Memory copied, bytes.
    pub processed_bytes: u64,
    /// Memory in all, bytes.
    pub total_bytes: u64,
    /// Verdict for each multicast address.
    pub receptions: Vec<ReceptionRow>,
    /// How each flow was handed over; at the destination only.
    pub handover: Vec<HandoverRow>,
    /// NICs with whose frames something has gone wrong; at the destination only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicRow>,
    /// NICs with streams that no gate has held until the VM ran; at the destination only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without_gate: Vec<UngatedRow>,
    /// Frames at most that the VM has lost because it ran on here after it had stopped: QEMU had read them,
    /// and threw them away; at the source only.
    #[serde(default)]
    pub thrown_away_at_most: u64,
    /// What was done for the VM's unicast addresses; absent where it has named none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unicast: Option<UnicastRow>,
    /// How it ended.
    pub outcome: Outcome,
}
