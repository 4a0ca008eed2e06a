//! Layouts of the handover: what `gate` does to the frames on their way into a TAP.
//!
//! | map | key | value | written by |
//! |---|---|---|---|
//! | `GATES` | ifindex | [`Gate`] | agent |
//! | `GATE_USAGE` | ifindex | [`GateUsage`] | kernel; made and removed by the agent |
//! | `GATE_RECORDS` | slot × [`RECORDS_PER_SLOT`] + index | [`GateRecord`] | kernel |
//! | `DELIVERED` | [`DeliveredKey`] | [`Delivered`] | kernel; removed by the agent |
//! | `HELD` | ring buffer | [`HeldFrame`] and the frame | kernel |

use super::StreamKey;

/// Frames that one slot of `GATE_RECORDS` holds, a power of two: 1.8 s of 100 Mbit/s in packets of
/// 1400 bytes.
pub const RECORDS_PER_SLOT: u32 = 16_384;

/// Longest frame that `gate` holds, bytes: an aggregate of 64 KiB, or the largest MTU, with an Ethernet
/// header and tags.
pub const HELD_FRAME_BYTES: usize = 65_600 - size_of::<HeldFrame>();

/// What a gate does; a TAP without an entry in `GATES` counts what it delivers.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateMode {
    /// At the source: frames pass, and are numbered and recorded. Of those for an address in
    /// `FORWARDS` copies go to `HELD`.
    Record = 1,
    /// At the destination: multicast frames of routable scope go to `HELD`, until the gate opens.
    Hold = 2,
}

/// Value of `GATES`: 32 bytes, align 8.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gate {
    /// Held frames that the agent is done with, or [`Gate::CLOSED`]. A frame that comes when this
    /// equals [`GateUsage::held`] opens a gate that holds, and passes; `uplink` sends it on if it is
    /// for a VM that a recording gate has seen leave.
    pub replayed: u64,
    /// Until when a gate holds or records, so that it does not outlive an agent that is gone: later
    /// frames pass.
    pub until_ns: u64,
    /// [`GateMode`].
    pub mode: u32,
    /// Slot in `GATE_RECORDS`.
    pub slot: u32,
    /// Whether each recorded frame has a probe before it ([`crate::handover::PROBE_MAC`]): 0 or 1.
    pub probes: u32,
    /// Which aggregates a TAP does not take whole, so that it gets their packets one by one: flags
    /// [`Gate::SPLITS_TCP4`] to [`Gate::SPLITS_UDP`].
    pub splits: u32,
}

impl Gate {
    /// Those of TCP in IPv4.
    pub const SPLITS_TCP4: u32 = 1;
    /// Those of TCP in IPv6.
    pub const SPLITS_TCP6: u32 = 2;
    /// Those of UDP, and of anything that is not known.
    pub const SPLITS_UDP: u32 = 4;

    /// Value of [`Gate::replayed`] with which a gate never opens.
    pub const CLOSED: u64 = u64::MAX;

    /// A gate that records in a slot until a moment.
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

    /// A gate that holds until a moment, unless it is opened before.
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
    /// Frames held so far, or of which a recording gate has kept a copy, and [`GateUsage::OPEN`]
    /// once the gate has opened itself. From then on the number means nothing.
    pub held: u64,
    /// Held frames that found no room in `HELD`. They have their numbers all the same.
    pub lost: u64,
    /// Frames of any kind that went on to the TAP since the recording began, as many as it gets: an
    /// aggregate that it does not take whole ([`Gate::splits`]) counts as its packets.
    pub entered: u64,
    /// Packets that were recorded.
    pub recorded: u64,
}

impl GateUsage {
    /// Flag in [`GateUsage::held`].
    pub const OPEN: u64 = 1 << 63;
}

/// One entry of `GATE_RECORDS`: 32 bytes, align 8. The one at index `n % RECORDS_PER_SLOT` of a slot
/// is that of the `n`-th recorded packet, counted from 0, or of one that many before it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateRecord {
    /// Number of the packet's frame among those that entered the TAP, from 1; 0 while the entry is
    /// written.
    pub number: u64,
    /// [`crate::handover::flow_hash`] of its flow.
    pub flow: u64,
    /// [`crate::handover::fingerprint`] of its payload.
    pub fingerprint: u64,
    /// When it came.
    pub at_ns: u64,
}

/// Key of `DELIVERED`: 44 bytes, align 4.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeliveredKey {
    /// The TAP.
    pub ifindex: u32,
    /// The flow.
    pub stream: StreamKey,
}

/// Value of `DELIVERED`: 16 bytes, align 8. What passed into the TAP; the agent adds what it
/// replays elsewhere.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delivered {
    /// Packets.
    pub packets: u64,
    /// Their bytes, from the Ethernet header on.
    pub bytes: u64,
}

/// Head of a record of `HELD`: 32 bytes, align 8. The frame follows.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldFrame {
    /// Its number among the held frames of the TAP, from 1; of a copy that a recording gate has kept,
    /// that among all that have entered ([`GateUsage::entered`]).
    pub number: u64,
    /// When it came.
    pub at_ns: u64,
    /// The TAP.
    pub ifindex: u32,
    /// Bytes of the frame.
    pub length: u32,
    /// VLAN identifier that stands in metadata instead of the frame, 0 for none.
    pub vlan: u16,
    /// UDP payload of each packet that an aggregated frame stands for, bytes; 0 for a single one.
    pub segment_bytes: u16,
    /// Always zero.
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
