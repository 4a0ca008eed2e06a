//! Rows about migrations and the reception of their multicast addresses.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use super::{HandoverRow, NicRow, UngatedRow, UnicastRow};

use common::signal::{Phase, ReceptionMode};

use crate::proto::{CopyWay, InTheClear};

/// How a host receives a multicast address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reception {
    /// Joined, and a packet has arrived natively.
    Native,
    /// Joined, but the address is silent at the source too.
    Idle,
    /// Joined, but no packet arrived in time.
    Unreachable,
    /// Refused by policy or limits.
    Refused,
    /// A relay sends the packets.
    Relay,
    /// Joined, and the verdict is still open.
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

/// A multicast address that this host has joined for arriving or arrived VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRow {
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// The joined address.
    pub multicast_address: Ipv6Addr,
    /// How the host receives the address.
    pub mode: Reception,
    /// Time from the join to the verdict.
    pub waited_ms: u64,
    /// Domains for which the host has joined.
    pub domains: Vec<String>,
    /// True if all these domains run here: their own answer to a Query then ends the join.
    pub held: bool,
}

/// How the destination of a migration receives one multicast address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceptionRow {
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// An address to which the domain listens.
    pub multicast_address: Ipv6Addr,
    /// How the destination receives the address.
    pub mode: Reception,
    /// Time from the join to the verdict.
    pub waited_ms: u64,
}

/// Direction of a migration, seen from this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Away from this host.
    Outgoing,
    /// To this host.
    Incoming,
}

/// Stage that a migration has reached, in the order of the variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MigrationPhase {
    /// The destination joins and probes.
    Preparing,
    /// The agents wait for the VM to prepare its idle NIC.
    Ready,
    /// libvirt copies the VM's memory.
    Copying,
    /// libvirt has paused the VM for the switch.
    Switching,
    /// The VM runs at the destination.
    Completed,
}

impl MigrationPhase {
    /// Returns the word that tables show.
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
#[serde(rename_all = "lowercase", tag = "state")]
pub enum Outcome {
    /// The migration is in progress.
    Running,
    /// The domain runs at the destination.
    Completed,
    /// The domain still runs at the source.
    Failed {
        /// The reason in one sentence.
        reason: String,
        /// Code of the reason ([`common::signal::Code`]): its name, or its number if a later version
        /// has added the code.
        code: String,
    },
}

/// How the memory of a VM travels to the destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "way", content = "reason")]
pub enum MemoryWay {
    /// QEMU encrypts it (`VIR_MIGRATE_TLS`).
    Tls,
    /// Inside libvirt's own connection (`VIR_MIGRATE_TUNNELLED`), whose URI decides on encryption.
    Tunnel,
    /// Unencrypted: everybody between the hosts can read it.
    Clear(ClearReason),
}

/// Why memory travels unencrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClearReason {
    /// `libvirt.encrypt` is `never`.
    SwitchedOff,
    /// `VIR_MIGRATE_ZEROCOPY` is set.
    Zerocopy,
    /// QEMU has no certificate at the source; `roamcast status` says why.
    NoCertificateHere,
    /// QEMU has no certificate at the destination; `roamcast status` at the destination says why.
    NoCertificateThere,
}

impl ClearReason {
    /// Returns the reason for a person, to follow "in the clear:".
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

/// A row of `roamcast migrations`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationRow {
    /// Number of the record, counted by this agent.
    pub migration: u64,
    /// Direction, seen from this host.
    pub direction: Direction,
    /// Name of the migrated domain.
    pub domain: String,
    /// UUID, as libvirt writes it.
    pub domain_uuid: String,
    /// Agent at the other end.
    pub peer: String,
    /// Current phase, or the phase at the end.
    pub phase: MigrationPhase,
    /// Time since the migration began.
    pub age_ms: u64,
    /// From the request to the destination's readiness.
    pub signalling_ms: Option<f64>,
    /// From START MIGRATION to the pause.
    pub copy_ms: Option<f64>,
    /// How memory travels; only at the source. Absent if somebody other than the agent asked
    /// libvirt for the migration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryWay>,
    /// Time during which the VM was paused.
    pub vm_pause_ms: Option<f64>,
    /// From the request to the end.
    pub total_ms: Option<f64>,
    /// Memory copied, bytes.
    pub processed_bytes: u64,
    /// Memory of the domain, bytes.
    pub total_bytes: u64,
    /// Verdict for each multicast address of the domain.
    pub receptions: Vec<ReceptionRow>,
    /// Handover of each flow; only at the destination.
    pub handover: Vec<HandoverRow>,
    /// NICs with a fault in the handover; only at the destination.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicRow>,
    /// NICs whose streams no gate held until the VM ran; only at the destination.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub without_gate: Vec<UngatedRow>,
    /// Upper bound of the frames that the VM lost because it ran on at the source after the stop:
    /// QEMU read these frames and discarded them. Only at the source.
    #[serde(default)]
    pub thrown_away_at_most: u64,
    /// Handling of the VM's unicast addresses; absent if the VM named none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unicast: Option<UnicastRow>,
    /// How the migration ended.
    pub outcome: Outcome,
}
