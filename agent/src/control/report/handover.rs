//! `roamcast migrations`: how the streams of one NIC were handed over.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use super::Mac;

/// How the destination found where a flow goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// By a packet that both hosts had: exactly.
    Exact,
    /// The same, but the source does not know exactly which was the last that its VM had.
    Estimated,
    /// By time, because no packet could be told from all others.
    Time,
    /// By time, because the source knew nothing of the flow.
    Unseen,
    /// Without a word of the source: all that came during the pause.
    Blind,
}

impl Placement {
    /// A word for a person.
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
    /// The NIC, counted from 0 in the order in which they were done.
    pub nic: u32,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Multicast address.
    pub multicast_address: Ipv6Addr,
    /// Source address.
    pub source: Ipv6Addr,
    /// UDP source port, 0 where there is none.
    pub source_port: u16,
    /// UDP destination port, 0 where there is none.
    pub destination_port: u16,
    /// How it was placed; none if the migration ended before.
    pub placed: Option<Placement>,
    /// Packets that the VM had at the source, since START MIGRATION.
    pub delivered: u64,
    /// Packets that were held at the destination.
    pub held: u64,
    /// Of these, packets that the VM had had at the source.
    pub dropped: u64,
    /// Of these, packets that were put into its TAP.
    pub replayed: u64,
    /// Packets known to be lost.
    pub lost: u64,
    /// Most packets that the VM may have got twice.
    pub duplicated_at_most: u64,
    /// Longest time that a replayed packet was held.
    pub longest_held_ms: f64,
    /// Whether there was too little room for what came during the pause.
    pub overflow: bool,
}

/// What has gone wrong with the frames of one NIC, of whatever flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicRow {
    /// The NIC, as in [`HandoverRow`].
    pub nic: u32,
    /// Frames that came during the pause and could not be held.
    pub not_held: u64,
    /// Whether frames have passed the gate, because the host kept the agent from running: the VM may have got
    /// them twice.
    pub has_lapsed: bool,
    /// Frames that found the queue of the TAP full here, until the gate opened: the VM did not read.
    pub tap_full: u64,
    /// The same at the source, since START MIGRATION.
    pub tap_full_at_source: u64,
}

impl NicRow {
    /// Whether nothing has gone wrong.
    pub fn is_well(&self) -> bool {
        let nic = self.nic;
        *self
            == Self {
                nic,
                ..Self::default()
            }
    }
}

/// Why no gate has held the streams of a NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UngatedReason {
    /// `handover.enabled` is false.
    SwitchedOff,
    /// The kernel did not make the gate; the log says why.
    NotMade,
    /// It had been closed for as long as it may be.
    ClosedTooLong,
    /// The VM ran before its TAP was known.
    RanAlready,
}

impl UngatedReason {
    /// The reason for a person, after "it had no gate:".
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

/// A NIC whose streams may have lost packets, or have come twice or out of order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UngatedRow {
    /// Address of the NIC in the guest.
    pub mac: Mac,
    /// Why nothing held its streams.
    pub reason: UngatedReason,
}
