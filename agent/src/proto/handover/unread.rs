//! Source: the unicast frames that the VM has not read when it stops, for the address that it has now.
//!
//! ```text
//!            push               cut                  next, sent
//! HELD  ------------>  kept  ---------->  waiting  -------------> network
//!                        |  had by v           ^
//!           too many v   |  the VM    push ----'
//! ```
//!
//! `gate` keeps copies of the frames that enter the TAP for addresses which the VM leaves, by their
//! numbers; the cut says how far the VM has read. While some wait, `uplink` lets others for those
//! addresses pass into the TAP, so that they wait behind ([`common::maps::Forward::unread_until_ns`]).

use std::collections::{BTreeMap, VecDeque};

use common::maps::{Address, Gate, HeldFrame};
use common::packet::PacketRead as _;

use super::cut::Cut;
use super::hold::HoldLimits;
use super::readdress::readdress;
use crate::proto::Timestamp;

/// Where the destination address stands in a frame without a tag, bytes.
const DESTINATION: usize = 38;

/// Where packets for an address go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// The address that the VM has now.
    pub to: Address,
    /// What that adds to a checksum ([`common::maps::Forward::difference`]).
    pub difference: u32,
}

/// What has become of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnreadReport {
    /// Packets sent on.
    pub packets: u64,
    /// Frames and packets that could not be: `HELD` had no room, the hop limit was used up, or the
    /// network does not take them.
    pub dropped: u64,
}

/// A copy of a frame.
#[derive(Debug)]
struct Kept {
    number: u64,
    at: Timestamp,
    segment_bytes: u16,
    frame: Vec<u8>,
}

impl Kept {
    /// Memory, bytes.
    fn bytes(&self) -> usize {
        self.frame.len() + size_of::<Self>()
    }
}

/// The copies of one TAP.
#[derive(Debug)]
pub struct Unread {
    limits: HoldLimits,
    /// By number.
    frames: VecDeque<Kept>,
    bytes: usize,
    /// Frames that have come out of `HELD`.
    taken: u64,
    cut: Option<Cut>,
    /// Of the frame that is sent next: packets that have not been.
    packets: VecDeque<Vec<u8>>,
    report: UnreadReport,
}

impl Unread {
    /// Keeps nothing yet.
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

    /// Forgets the cut and what was kept: the VM runs on, and reads it.
    pub fn again(self) -> Self {
        Self {
            taken: self.taken,
            ..Self::new(self.limits)
        }
    }

    /// Takes in a frame of `HELD`.
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
        // Two processors may hand over theirs in the other order.
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

    /// Takes in how far the VM has read. Does nothing after another cut.
    pub fn cut(&mut self, cut: Cut) {
        if self.cut.is_some() {
            return;
        }
        self.cut = Some(cut);
        self.frames.retain(|kept| !cut.covers(kept.number, kept.at));
        self.bytes = self.frames.iter().map(Kept::bytes).sum();
    }

    /// Whether the VM's reach is known.
    pub fn is_cut(&self) -> bool {
        self.cut.is_some()
    }

    /// The packet that is to be sent next, from its IPv6 header on, with its destination. If the
    /// network takes it, [`Self::sent`] follows; if it never will, [`Self::given_up`]; else the packet
    /// stays the next. Nothing before the cut. What is for no address of `ways` is let go.
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

    /// Takes in that the next packet was sent.
    pub fn sent(&mut self) {
        self.report.packets += u64::from(self.packets.pop_front().is_some());
    }

    /// Takes in that the next packet cannot be sent.
    pub fn given_up(&mut self) {
        self.report.dropped += u64::from(self.packets.pop_front().is_some());
    }

    /// The value for [`Gate::replayed`], when for `lost` of those that were kept `HELD` had no room.
    pub fn done(&self, lost: u64) -> u64 {
        if self.cut.is_none() || !self.packets.is_empty() || !self.frames.is_empty() {
            return Gate::CLOSED;
        }
        self.taken + lost
    }

    /// What has become of packets since this was asked last; `None` for nothing.
    pub fn take_report(&mut self) -> Option<UnreadReport> {
        let report = std::mem::take(&mut self.report);
        (report != UnreadReport::default()).then_some(report)
    }

    fn remove_first(&mut self) -> Option<Kept> {
        let kept = self.frames.pop_front()?;
        self.bytes -= kept.bytes();
        Some(kept)
    }

    /// Lets the oldest frames go until the limits are kept.
    fn make_room(&mut self, now: Timestamp) {
        while let Some(oldest) = self.frames.front() {
            let is_old = self.cut.is_none() && now.since(oldest.at) > self.limits.age;
            if !is_old && self.bytes <= self.limits.bytes {
                break;
            }
            self.remove_first();
            // Before the cut most were read long ago.
            self.report.dropped += u64::from(self.cut.is_some());
        }
    }
}
