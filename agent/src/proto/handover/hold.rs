//! Destination: held frames of one TAP, and the choice of frames to replay.

use std::collections::VecDeque;
use std::time::Duration;

use common::handover::fingerprint;
use common::maps::{HeldFrame, StreamKey};
use common::signal::NicCut;

use super::clock::ClockOffset;
use super::flow::flow_of;
use super::flows::Flows;
use super::judge::{Judge, Message};
use super::matching::Place;
use super::report::{FlowReport, HoldReport};
use super::tag::tagged;
use super::upper::split;
use crate::proto::Timestamp;

/// Limit of remembered gaps in the numbers of held frames.
const GAPS: usize = 1024;
/// Time after which a number counts as lost if later numbers are here and the gate did not count a
/// loss. The gate counts every loss, so this happens only if the kernel or an agent breaks that rule.
const MISSING: Duration = Duration::from_secs(1);
/// Memory of a packet in addition to its bytes.
const OVERHEAD_BYTES: usize = size_of::<Replay>() + 16;

/// Limits of held frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldLimits {
    /// Memory, bytes.
    pub bytes: usize,
    /// Maximum age before the cut. After the cut, packets wait while the TAP is full.
    pub age: Duration,
}

/// A packet for the TAP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    place: Place,
    /// Arrival time of the packet.
    pub at: Timestamp,
    /// Flow of the packet; `None` for packets that are not IPv6.
    pub stream: Option<StreamKey>,
    /// Complete frame, with its VLAN tag and checksum.
    pub frame: Vec<u8>,
    flow: usize,
    fingerprint: Option<u64>,
}

impl Replay {
    /// Returns the gate's number of the frame that contained the packet.
    pub fn number(&self) -> u64 {
        self.place.0
    }
}

/// Held frames of one TAP.
///
/// Before the cut, the newest frames are kept within the limits. The cut tells which frames the guest
/// received. The other frames wait for the TAP in order of arrival, and so do later frames:
///
/// ```text
///            push              cut                 next_replay, replayed
/// HELD  ------------>  held  ------>  waiting  ---------------------->  TAP
///                        |               ^ |
///                too old v        push --' '--> no room: lost
/// ```
#[derive(Debug)]
pub struct Hold {
    limits: HoldLimits,
    /// Judge of flows that the source host did not report; `None` before the cut.
    unseen: Option<Judge>,
    /// Held or waiting packets, by number.
    packets: VecDeque<Replay>,
    bytes: usize,
    flows: Flows,
    /// Highest number of a held frame.
    last_number: u64,
    /// Frames taken from `HELD`.
    taken: u64,
    /// Frames without room in `HELD`, by the gate's latest count.
    lost: u64,
    /// Time since which a number is missing that the gate's count does not explain.
    missing: Option<Timestamp>,
    /// Numbers that were missing for [`MISSING`].
    given_up: u64,
    /// Before the cut: number of missing frames per gap, with the arrival time of the frame after the
    /// gap.
    gaps: VecDeque<(Timestamp, u64)>,
    lost_in_kernel: u64,
    refused: u64,
    /// Whether frames may leave the TAP differently from how they entered, so that nothing is exact.
    is_doubted: bool,
    has_lapsed: bool,
    tap_full: u64,
    tap_full_at_source: Option<u64>,
}

impl Hold {
    /// Creates an empty hold.
    pub fn new(limits: HoldLimits) -> Self {
        Self {
            limits,
            unseen: None,
            packets: VecDeque::new(),
            bytes: 0,
            flows: Flows::default(),
            last_number: 0,
            taken: 0,
            lost: 0,
            missing: None,
            given_up: 0,
            gaps: VecDeque::new(),
            lost_in_kernel: 0,
            refused: 0,
            is_doubted: false,
            has_lapsed: false,
            tap_full: 0,
            tap_full_at_source: None,
        }
    }

    /// Takes a frame of `HELD`.
    pub fn push(&mut self, head: &HeldFrame, frame: &[u8]) {
        let at = Timestamp(head.at_ns);
        self.taken += 1;
        self.number(head.number, at);
        let frame = tagged(frame, head.vlan);
        for (part, packet) in (0..).zip(split(&frame, head.segment_bytes)) {
            self.push_packet((head.number, part), at, packet);
        }
        self.make_room(at);
    }

    /// Takes the cut of this NIC from a message that was sent at `clock_ns` of the source host's clock
    /// and arrived at `now`. Has no effect after another cut.
    pub fn cut(&mut self, now: Timestamp, clock_ns: u64, nic: &NicCut, clock: &ClockOffset) {
        self.tap_full_at_source = self.tap_full_at_source.or(nic.tap_full);
        let mut clock = *clock;
        clock.observe(clock_ns, now);
        let message = Message {
            nic,
            clock_ns,
            now,
            clock,
        };
        let unseen = Judge::unseen(&message);
        let judges = nic.flows.iter().map(|flow| {
            let judge = Judge::of_flow(flow, &message);
            (flow.stream(), flow.delivered, judge)
        });
        self.begin_replay(unseen, judges);
    }

    /// Replays all packets that arrived at `since` or later, because no cut arrives: duplicates are
    /// better than loss. Has no effect after another cut.
    pub fn cut_blind(&mut self, now: Timestamp, since: Timestamp) {
        self.begin_replay(Judge::blind(now, since), std::iter::empty());
    }

    /// Takes the gate's counts: numbered frames and frames without room in `HELD`
    /// ([`common::maps::GateUsage`]). A number that is neither lost nor here belongs to a frame on its
    /// way through `HELD`, however long that takes.
    pub fn counted(&mut self, now: Timestamp, held: u64, lost: u64) {
        self.lost = lost;
        if self.is_holding() {
            return;
        }
        let known = self.known();
        if known == held && held > self.last_number {
            self.lost_in_kernel += held - self.last_number;
            self.last_number = held;
        }
        let missing = self.last_number.saturating_sub(known);
        if missing == 0 {
            self.missing = None;
        } else if now.since(*self.missing.get_or_insert(now)) >= MISSING {
            self.given_up += missing;
            self.doubt();
        }
    }

    /// Returns the next packet for the TAP. Call [`Self::replayed`] if the TAP takes the packet. Call
    /// [`Self::refused`] if the TAP is full; the packet then remains the next.
    pub fn next_replay(&self) -> Option<&Replay> {
        if self.is_holding() {
            return None;
        }
        self.packets.front()
    }

    /// Removes and returns the next packet, which the TAP took.
    pub fn replayed(&mut self, now: Timestamp) -> Option<Replay> {
        let packet = self.take_next()?;
        if let Some(flow) = self.flows.get_mut(packet.flow) {
            let held = now.since(packet.at);
            flow.report.replayed += 1;
            flow.report.longest_held = flow.report.longest_held.max(held);
        }
        Some(packet)
    }

    /// Takes the number of frames that found the TAP's queue full so far.
    pub fn tap_full(&mut self, frames: u64) {
        self.tap_full = frames;
    }

    /// Counts a packet that found the TAP full.
    pub fn refused(&mut self) {
        self.refused += 1;
    }

    /// Drops the next packet, which the TAP will never take, and counts the packet as lost.
    pub fn given_up(&mut self) {
        if let Some(packet) = self.take_next()
            && let Some(flow) = self.flows.get_mut(packet.flow)
        {
            flow.report.lost += 1;
        }
    }

    /// Returns the number of held frames that are handled, for [`common::maps::Gate::replayed`]: all
    /// of them only if no frame is on its way through `HELD`. `None` before the cut.
    pub fn done(&self) -> Option<u64> {
        if self.is_holding() {
            return None;
        }
        Some(match self.packets.front() {
            Some(Replay {
                place: (number, _), ..
            }) => number.saturating_sub(1),
            None => self.known(),
        })
    }

    /// Returns the number of frames whose fate is known: taken, or without room in `HELD`.
    fn known(&self) -> u64 {
        self.taken + self.lost + self.given_up
    }

    /// Marks all placements as inexact, because the TAP changed during the replay.
    pub fn doubt(&mut self) {
        self.is_doubted = true;
    }

    /// Records that the gate was not renewed in time: frames passed the gate, and the VM may receive them
    /// twice.
    pub fn lapsed(&mut self) {
        self.doubt();
        self.has_lapsed = true;
    }

    /// Discards everything and starts again.
    pub fn forget(&mut self) {
        *self = Self::new(self.limits);
    }

    /// Returns the memory in use, bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the result of the handover so far.
    pub fn report(&self) -> HoldReport {
        let mut flows = self.flows.reports();
        if self.is_doubted {
            flows.iter_mut().for_each(FlowReport::doubt);
        }
        HoldReport {
            flows,
            lost_in_kernel: self.lost_in_kernel,
            refused: self.refused,
            waiting: self.waiting(),
            has_lapsed: self.has_lapsed,
            tap_full: self.tap_full,
            tap_full_at_source: self.tap_full_at_source,
        }
    }

    /// Returns the number of packets that wait for the TAP; 0 before the cut.
    pub fn waiting(&self) -> usize {
        if self.is_holding() {
            0
        } else {
            self.packets.len()
        }
    }

    fn is_holding(&self) -> bool {
        self.unseen.is_none()
    }

    /// Records a frame's number and the missing numbers before it. Two CPUs may deliver their frames in
    /// reverse order.
    fn number(&mut self, number: u64, at: Timestamp) {
        let next = self.last_number.saturating_add(1);
        let Some(missing) = number.checked_sub(next) else {
            self.given_up = self.given_up.saturating_sub(1);
            let counted = if self.is_holding() {
                self.gaps.back_mut().map(|(_, missing)| missing)
            } else {
                Some(&mut self.lost_in_kernel)
            };
            if let Some(counted) = counted {
                *counted = counted.saturating_sub(1);
            }
            return;
        };
        self.last_number = number;
        if !self.is_holding() {
            self.lost_in_kernel += missing;
        } else if missing > 0 {
            self.gaps.push_back((at, missing));
            if self.gaps.len() > GAPS {
                self.gaps.pop_front();
            }
        }
    }

    fn push_packet(&mut self, place: Place, at: Timestamp, frame: Vec<u8>) {
        let found = flow_of(&frame, 0);
        let fingerprint =
            found.and_then(|found| fingerprint(&frame[..], found.payload, found.length).ok());
        let stream = found.map(|found| found.stream);
        let is_holding = self.is_holding();
        let flow = self.flows.find_or_add(stream, self.unseen.as_ref());
        let Some(state) = self.flows.get_mut(flow) else {
            return;
        };
        state.report.held += 1;
        if !is_holding && !state.replays(fingerprint, place, at) {
            return;
        }
        self.bytes += frame.len() + OVERHEAD_BYTES;
        let packet = Replay {
            place,
            at,
            stream,
            frame,
            flow,
            fingerprint,
        };
        let behind = self
            .packets
            .iter()
            .rev()
            .take_while(|other| other.place > place)
            .count();
        self.packets.insert(self.packets.len() - behind, packet);
    }

    /// Drops the oldest packets until the limits hold.
    fn make_room(&mut self, now: Timestamp) {
        let is_holding = self.is_holding();
        while let Some(packet) = self.packets.front() {
            let is_old = is_holding && now.since(packet.at) > self.limits.age;
            if !is_old && self.bytes <= self.limits.bytes {
                break;
            }
            let (flow, at) = (packet.flow, packet.at);
            self.remove_first();
            let Some(state) = self.flows.get_mut(flow) else {
                continue;
            };
            if is_holding {
                state.let_go = state.let_go.max(Some(at));
            } else {
                state.report.lost += 1;
            }
        }
    }

    fn begin_replay(
        &mut self,
        unseen: Judge,
        judges: impl Iterator<Item = (StreamKey, u64, Judge)>,
    ) {
        if !self.is_holding() {
            return;
        }
        self.flows.set_judges(judges, &unseen);
        for packet in &self.packets {
            if let Some(judge) = self.flows.judge_mut(packet.flow) {
                judge.see(packet.fingerprint, packet.place, packet.at);
            }
        }
        self.flows.settle();
        self.lost_in_kernel = self
            .gaps
            .drain(..)
            .filter(|(at, _)| unseen.is_due(*at))
            .map(|(_, missing)| missing)
            .sum();
        let (flows, bytes) = (&mut self.flows, &mut self.bytes);
        self.packets.retain(|packet| {
            let replays = flows
                .get_mut(packet.flow)
                .is_some_and(|flow| flow.replays(packet.fingerprint, packet.place, packet.at));
            if !replays {
                *bytes -= packet.frame.len() + OVERHEAD_BYTES;
            }
            replays
        });
        self.flows.go_live();
        self.unseen = Some(unseen);
    }

    fn take_next(&mut self) -> Option<Replay> {
        if self.is_holding() {
            return None;
        }
        self.remove_first()
    }

    fn remove_first(&mut self) -> Option<Replay> {
        let packet = self.packets.pop_front()?;
        self.bytes -= packet.frame.len() + OVERHEAD_BYTES;
        Some(packet)
    }
}
