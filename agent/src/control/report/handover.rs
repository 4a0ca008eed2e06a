//! Columns of `roamcast migrations`: how the destination handed over the streams of each NIC.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use super::Mac;

/// How the destination found the packet at which a flow resumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// From a packet that both hosts recorded: exact.
    Exact,
    /// From a packet that both hosts recorded, but the source does not know the last packet that
    /// its VM read.
    Estimated,
    /// From timestamps, because no packet was distinguishable from all others.
    Time,
    /// From timestamps, because the source had no record of the flow.
    Unseen,
    /// Without a report from the source: the destination replayed all packets of the pause.
    Blind,
}

impl Placement {
    /// Returns the word that tables show.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Estimated => "estimated",
            Self::Time => "by time",
            Self::Unseen => "unseen",
            Self::Blind => "blind",
        }
    }
}

/// One flow of one NIC.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HandoverRow {
    /// Number of the NIC, from 0, in the order of the handovers.
    pub nic: u32,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Destination address of the flow.
    pub multicast_address: Ipv6Addr,
    /// Source address.
    pub source: Ipv6Addr,
    /// UDP source port, 0 where there is none.
    pub source_port: u16,
    /// UDP destination port, 0 where there is none.
    pub destination_port: u16,
    /// How the flow was placed; absent if the migration ended earlier.
    pub placed: Option<Placement>,
    /// Packets that the VM received at the source since START MIGRATION.
    pub delivered: u64,
    /// Packets that the gate held at the destination.
    pub held: u64,
    /// Held packets that the VM had received at the source already.
    pub dropped: u64,
    /// Held packets that the agent wrote to the VM's TAP.
    pub replayed: u64,
    /// Packets known to be lost.
    pub lost: u64,
    /// Upper bound of the packets that the VM received twice.
    pub duplicated_at_most: u64,
    /// Longest time that the gate held a replayed packet.
    pub longest_held_ms: f64,
    /// True if the memory for held packets ran out during the pause.
    pub overflow: bool,
}

/// Faults of one NIC's frames, regardless of their flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicRow {
    /// Number of the NIC, as in [`HandoverRow`].
    pub nic: u32,
    /// Frames that arrived during the pause and that the gate could not hold.
    pub not_held: u64,
    /// True if frames passed the gate because the host kept the agent from running: the VM may have
    /// received them twice.
    pub has_lapsed: bool,
    /// Frames that found the TAP's queue full at the destination, until the gate opened: the VM did
    /// not read.
    pub tap_full: u64,
    /// Frames that found the TAP's queue full at the source, since START MIGRATION.
    pub tap_full_at_source: u64,
}

impl NicRow {
    /// Returns true if no fault occurred.
    pub fn is_well(&self) -> bool {
        let nic = self.nic;
        *self
            == Self {
                nic,
                ..Self::default()
            }
    }
}

/// Why no gate held the streams of a NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UngatedReason {
    /// `handover.enabled` is false.
    SwitchedOff,
    /// The kernel refused the gate; the log has the reason.
    NotMade,
    /// The gate reached its time limit (`handover.gate_max_s`).
    ClosedTooLong,
    /// The VM ran before the agent knew its TAP.
    RanAlready,
}

impl UngatedReason {
    /// Returns the reason for a person, to follow "it had no gate:".
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SwitchedOff => "handover.enabled is false",
            Self::NotMade => "the kernel did not make one, as the agent's log says",
            Self::ClosedTooLong => {
                "it was closed for too long, because libvirt brought no such domain or its copy took \
                 longer than handover.gate_max_s"
            }
            Self::RanAlready => "the VM ran before its TAP was known",
        }
    }
}

/// A NIC whose streams may have lost, doubled or reordered packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UngatedRow {
    /// Ethernet address of the NIC in the guest.
    pub mac: Mac,
    /// Why no gate held the NIC's streams.
    pub reason: UngatedReason,
}
