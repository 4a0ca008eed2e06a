//! Layouts of the handover: how `gate` treats frames on their way into a TAP.
//!
//! | map | key | value | written by |
//! |---|---|---|---|
//! | `GATES` | ifindex | [`Gate`] | agent |
//! | `GATE_USAGE` | ifindex | [`GateUsage`] | kernel; the agent creates and removes entries |
//! | `GATE_RECORDS` | slot × [`RECORDS_PER_SLOT`] + index | [`GateRecord`] | kernel |
//! | `DELIVERED` | [`DeliveredKey`] | [`Delivered`] | kernel; the agent removes entries |
//! | `HELD` | ring buffer | [`HeldFrame`] and the frame | kernel |

use super::StreamKey;

/// Records of one slot of `GATE_RECORDS`, a power of two: 1.8 s of 100 Mbit/s in packets of 1400
/// bytes.
pub const RECORDS_PER_SLOT: u32 = 16_384;

/// Longest frame that `gate` holds, bytes: a GSO frame of 64 KiB, or the largest MTU, with Ethernet
/// header and tags.
pub const HELD_FRAME_BYTES: usize = 65_600 - size_of::<HeldFrame>();

/// Mode of a gate. For a TAP without an entry in `GATES`, `gate` only counts delivered packets.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateMode {
    /// Source: `gate` passes, numbers and records frames. `HELD` receives copies of frames for an
    /// address in `FORWARDS`.
    Record = 1,
    /// Destination: multicast frames of routable scope go to `HELD` until the gate opens.
    Hold = 2,
}

/// Value of `GATES`: 32 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    /// Held frames that the agent has processed, or [`Gate::CLOSED`]. When a frame finds `replayed`
    /// equal to [`GateUsage::held`], a holding gate opens and the frame passes; for a recording
    /// gate, `uplink` then forwards the frames of the VM that has left.
    pub replayed: u64,
    /// End of holding or recording: later frames pass. The limit opens the gate of an agent that is
    /// gone.
    pub until_ns: u64,
    /// [`GateMode`].
    pub mode: u32,
    /// Slot in `GATE_RECORDS`.
    pub slot: u32,
    /// Whether a probe precedes each recorded frame ([`crate::handover::PROBE_MAC`]): 0 or 1.
    pub probes: u32,
    /// GSO kinds that the TAP does not take whole, so that the kernel segments them: flags
    /// [`Gate::SPLITS_TCP4`] to [`Gate::SPLITS_UDP`].
    pub splits: u32,
}

impl Gate {
    /// Flag: TCP over IPv4.
    pub const SPLITS_TCP4: u32 = 1;
    /// Flag: TCP over IPv6.
    pub const SPLITS_TCP6: u32 = 2;
    /// Flag: UDP and every unknown kind.
    pub const SPLITS_UDP: u32 = 4;

    /// Value of [`Gate::replayed`] that keeps the gate closed.
    pub const CLOSED: u64 = u64::MAX;

    /// A gate that records in `slot` until `until_ns`.
    pub const fn record(slot: u32, probes: bool, until_ns: u64) -> Self {
        Self {
            replayed: Self::CLOSED,
            until_ns,
            mode: GateMode::Record as u32,
            slot,
            probes: probes as u32,
            splits: 0,
        }
    }

    /// A gate that holds until `until_ns`, or until it opens.
    pub const fn hold(until_ns: u64) -> Self {
        Self {
            replayed: Self::CLOSED,
            until_ns,
            mode: GateMode::Hold as u32,
            slot: 0,
            probes: 0,
            splits: 0,
        }
    }
}

/// Value of `GATE_USAGE`: 32 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateUsage {
    /// Frames held so far (holding gate) or copied so far (recording gate). The gate sets
    /// [`GateUsage::OPEN`] when it opens; the number means nothing afterwards.
    pub held: u64,
    /// Held frames that found no room in `HELD`. Each of them has a number.
    pub lost: u64,
    /// Frames of any kind that entered the TAP since the start of the recording. A GSO frame that
    /// the kernel segments ([`Gate::splits`]) counts as its segments.
    pub entered: u64,
    /// Recorded packets.
    pub recorded: u64,
}

impl GateUsage {
    /// Flag in [`GateUsage::held`]: the gate is open.
    pub const OPEN: u64 = 1 << 63;
}

/// Entry of `GATE_RECORDS`: 32 bytes, align 8. Index `n % RECORDS_PER_SLOT` of a slot holds the
/// `n`-th recorded packet, counted from 0, or one a multiple of `RECORDS_PER_SLOT` earlier.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateRecord {
    /// Number of the packet's frame among the frames that entered the TAP, from 1; 0 during an
    /// update.
    pub number: u64,
    /// [`crate::handover::flow_hash`] of the packet's flow.
    pub flow: u64,
    /// [`crate::handover::fingerprint`] of the packet's payload.
    pub fingerprint: u64,
    /// Arrival of the packet.
    pub at_ns: u64,
}

/// Key of `DELIVERED`: 44 bytes, align 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeliveredKey {
    /// TAP that the flow enters.
    pub ifindex: u32,
    /// Flow of the packets.
    pub stream: StreamKey,
}

/// Value of `DELIVERED`: 16 bytes, align 8. Packets that passed into the TAP. The agent counts
/// replayed packets elsewhere.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivered {
    /// Delivered packets; a GSO frame counts as its segments.
    pub packets: u64,
    /// Bytes of these packets, from the Ethernet header on.
    pub bytes: u64,
}

/// Header of a record of `HELD`: 32 bytes, align 8. The frame follows.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldFrame {
    /// Number of the frame among the held frames of the TAP, from 1. For a copy of a recording
    /// gate, the number among all frames that entered the TAP ([`GateUsage::entered`]).
    pub number: u64,
    /// Arrival of the frame.
    pub at_ns: u64,
    /// TAP that the frame enters.
    pub ifindex: u32,
    /// Length of the frame, bytes.
    pub length: u32,
    /// VLAN identifier in the skb metadata, 0 for none.
    pub vlan: u16,
    /// L4 payload of each segment of a GSO frame, bytes; 0 without GSO.
    pub segment_bytes: u16,
    /// Padding, always zero.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<Gate>() == 32 && align_of::<Gate>() == 8);
    assert!(size_of::<GateUsage>() == 32 && align_of::<GateUsage>() == 8);
    assert!(size_of::<GateRecord>() == 32 && align_of::<GateRecord>() == 8);
    assert!(size_of::<DeliveredKey>() == 44 && align_of::<DeliveredKey>() == 4);
    assert!(size_of::<Delivered>() == 16 && align_of::<Delivered>() == 8);
    assert!(size_of::<HeldFrame>() == 32 && align_of::<HeldFrame>() == 8);
    assert!(RECORDS_PER_SLOT.is_power_of_two());
};
