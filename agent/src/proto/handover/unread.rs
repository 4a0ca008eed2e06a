//! Source: unicast frames that the VM did not read before the stop, for forwarding to the VM's new
//! address.
//!
//! ```text
//!            push               cut                  next, sent
//! HELD  ------------>  kept  ---------->  waiting  -------------> network
//!                        |  had by v           ^
//!           too many v   |  the VM    push ----'
//! ```
//!
//! `gate` copies the frames that enter the TAP for addresses that the VM leaves, with their numbers.
//! The cut tells how far the VM read. While copies wait, `uplink` lets later frames for those addresses
//! pass into the TAP, so that these frames wait behind the copies
//! ([`common::maps::Forward::unread_until_ns`]).

use std::collections::{BTreeMap, VecDeque};

use common::maps::{Address, Gate, HeldFrame};
use common::packet::PacketRead as _;

use super::cut::Cut;
use super::hold::HoldLimits;
use super::readdress::readdress;
use crate::proto::Timestamp;

/// Offset of the destination address in an untagged frame, bytes.
const DESTINATION: usize = 38;

/// New destination of packets for an old address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// New address of the VM.
    pub to: Address,
    /// Difference that the new address adds to a checksum ([`common::maps::Forward::difference`]).
    pub difference: u32,
}

/// Counts of forwarded and dropped packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnreadReport {
    /// Number of forwarded packets.
    pub packets: u64,
    /// Frames and packets that could not be forwarded: `HELD` had no room, the hop limit was exhausted,
    /// or the network did not accept them.
    pub dropped: u64,
}

/// Copy of a frame.
#[derive(Debug)]
struct Kept {
    number: u64,
    at: Timestamp,
    segment_bytes: u16,
    frame: Vec<u8>,
}

impl Kept {
    /// Memory of the copy, bytes.
    fn bytes(&self) -> usize {
        self.frame.len() + size_of::<Self>()
    }
}

/// Copies of the frames of one TAP.
#[derive(Debug)]
pub struct Unread {
    limits: HoldLimits,
    /// Copies, ordered by number.
    frames: VecDeque<Kept>,
    bytes: usize,
    /// Frames taken from `HELD`.
    taken: u64,
    cut: Option<Cut>,
    /// Remaining packets of the current frame.
    packets: VecDeque<Vec<u8>>,
    report: UnreadReport,
}

impl Unread {
    /// Creates an empty store.
    pub fn new(limits: HoldLimits) -> Self {
        Self {
            limits,
            frames: VecDeque::new(),
            bytes: 0,
            taken: 0,
            cut: None,
            packets: VecDeque::new(),
            report: UnreadReport::default(),
        }
    }

    /// Discards the cut and the copies: the VM resumed here and reads the frames itself.
    pub fn again(self) -> Self {
        Self {
            taken: self.taken,
            ..Self::new(self.limits)
        }
    }

    /// Takes a frame of `HELD`.
    pub fn push(&mut self, head: &HeldFrame, frame: &[u8]) {
        self.taken += 1;
        let kept = Kept {
            number: head.number,
            at: Timestamp(head.at_ns),
            segment_bytes: head.segment_bytes,
            frame: frame.to_vec(),
        };
        let at = kept.at;
        if self.cut.is_some_and(|cut| cut.covers(kept.number, at)) {
            return;
        }
        // Two processors may deliver their frames in reverse order.
        let behind = self
            .frames
            .iter()
            .rev()
            .take_while(|other| other.number > kept.number)
            .count();
        self.bytes += kept.bytes();
        self.frames.insert(self.frames.len() - behind, kept);
        self.make_room(at);
    }

    /// Records how far the VM read. Has no effect after another cut.
    pub fn cut(&mut self, cut: Cut) {
        if self.cut.is_some() {
            return;
        }
        self.cut = Some(cut);
        self.frames.retain(|kept| !cut.covers(kept.number, kept.at));
        self.bytes = self.frames.iter().map(Kept::bytes).sum();
    }

    /// Returns true after the cut.
    pub fn is_cut(&self) -> bool {
        self.cut.is_some()
    }

    /// Returns the next packet to send, from its IPv6 header on, with its destination; `None` before
    /// the cut. Call [`Self::sent`] if the network takes the packet, [`Self::given_up`] if the network
    /// never will; otherwise the packet remains the next. Frames for addresses missing in `ways` are
    /// dropped.
    pub fn next(&mut self, ways: &BTreeMap<Address, Way>) -> Option<(&[u8], Address)> {
        self.cut?;
        while self.packets.is_empty() {
            let kept = self.remove_first()?;
            let way = kept.frame[..].read::<16>(DESTINATION).ok();
            let Some(way) = way.and_then(|address| ways.get(&address)) else {
                continue;
            };
            match readdress(&kept.frame, kept.segment_bytes, way) {
                Ok(packets) => self.packets.extend(packets),
                Err(_) => self.report.dropped += 1,
            }
        }
        let packet = self.packets.front()?;
        let to = packet[..].read::<16>(DESTINATION - 14).ok()?;
        Some((packet, to))
    }

    /// Counts the next packet as sent.
    pub fn sent(&mut self) {
        self.report.packets += u64::from(self.packets.pop_front().is_some());
    }

    /// Counts the next packet as dropped.
    pub fn given_up(&mut self) {
        self.report.dropped += u64::from(self.packets.pop_front().is_some());
    }

    /// Returns the value for [`Gate::replayed`], if `HELD` had no room for `lost` frames.
    pub fn done(&self, lost: u64) -> u64 {
        if self.cut.is_none() || !self.packets.is_empty() || !self.frames.is_empty() {
            return Gate::CLOSED;
        }
        self.taken + lost
    }

    /// Returns the counts since the last call; `None` if all are zero.
    pub fn take_report(&mut self) -> Option<UnreadReport> {
        let report = std::mem::take(&mut self.report);
        (report != UnreadReport::default()).then_some(report)
    }

    fn remove_first(&mut self) -> Option<Kept> {
        let kept = self.frames.pop_front()?;
        self.bytes -= kept.bytes();
        Some(kept)
    }

    /// Drops the oldest frames until the limits hold.
    fn make_room(&mut self, now: Timestamp) {
        while let Some(oldest) = self.frames.front() {
            let is_old = self.cut.is_none() && now.since(oldest.at) > self.limits.age;
            if !is_old && self.bytes <= self.limits.bytes {
                break;
            }
            self.remove_first();
            // Before the cut, the VM has long read most old frames, so they do not count as dropped.
            self.report.dropped += u64::from(self.cut.is_some());
        }
    }
}
