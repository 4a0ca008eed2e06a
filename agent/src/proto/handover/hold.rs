//! Destination: the frames held of one TAP, and what of them goes into it.

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

/// Most gaps in the numbers of held frames that are remembered.
const GAPS: usize = 1024;
/// Memory of a packet besides its bytes.
const OVERHEAD_BYTES: usize = size_of::<Replay>() + 16;

/// How much is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HoldLimits {
    /// Memory, bytes.
    pub bytes: usize,
    /// Age before the cut. After it, packets wait for as long as the TAP is full.
    pub age: Duration,
}

/// A packet for the TAP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    place: Place,
    /// When it came.
    pub at: Timestamp,
    /// Its flow; `None` for what is not IPv6.
    pub stream: Option<StreamKey>,
    /// The frame, whole: with its VLAN tag and checksum.
    pub frame: Vec<u8>,
    flow: usize,
    fingerprint: Option<u64>,
}

impl Replay {
    /// The gate's number of the frame that the packet was in.
    pub fn number(&self) -> u64 {
        self.place.0
    }
}

/// The frames that were held of one TAP.
///
/// Before the cut they are kept within limits, the newest ones. The cut says which of them the
/// guest has had; the others wait for the TAP, in the order in which they came, and so do those
/// that come later:
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
    /// How to judge flows of which the source knows nothing; `None` before the cut.
    unseen: Option<Judge>,
    /// Held or waiting packets, by number.
    packets: VecDeque<Replay>,
    bytes: usize,
    flows: Flows,
    /// Highest number of a held frame.
    last_number: u64,
    /// Before the cut: numbers that have not come, with the time of the next that has.
    gaps: VecDeque<(Timestamp, u64)>,
    lost_in_kernel: u64,
    refused: u64,
    /// Whether what goes into the TAP may not come out as it went in.
    is_doubted: bool,
    has_lapsed: bool,
    tap_full: u64,
    tap_full_at_source: Option<u64>,
}

impl Hold {
    /// Holds nothing yet.
    pub fn new(limits: HoldLimits) -> Self {
        Self {
            limits,
            unseen: None,
            packets: VecDeque::new(),
            bytes: 0,
            flows: Flows::default(),
            last_number: 0,
            gaps: VecDeque::new(),
            lost_in_kernel: 0,
            refused: 0,
            is_doubted: false,
            has_lapsed: false,
            tap_full: 0,
            tap_full_at_source: None,
        }
    }

    /// Takes in a frame of `HELD`.
    pub fn push(&mut self, head: &HeldFrame, frame: &[u8]) {
        let at = Timestamp(head.at_ns);
        self.number(head.number, at);
        let frame = tagged(frame, head.vlan);
        for (part, packet) in (0..).zip(split(&frame, head.segment_bytes)) {
            self.push_packet((head.number, part), at, packet);
        }
        self.make_room(at);
    }

    /// Takes in the cut of this NIC, out of a message that says it was sent at `clock_ns` of the
    /// source's clock, and came at `now`. Does nothing after another cut.
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

    /// Replays all that came at `since` or later, because the cut does not come: duplicates before
    /// loss. Does nothing after another cut.
    pub fn cut_blind(&mut self, now: Timestamp, since: Timestamp) {
        self.begin_replay(Judge::blind(now, since), std::iter::empty());
    }

    /// Takes in that `HELD` has been emptied since [`common::maps::GateUsage::held`] was `held`:
    /// what has not come by then has found no room.
    pub fn drained(&mut self, held: u64) {
        if held > self.last_number && !self.is_holding() {
            self.lost_in_kernel += held - self.last_number;
            self.last_number = held;
        }
    }

    /// The packet to be sent into the TAP next. If the TAP takes it, [`Self::replayed`] follows; if
    /// it is full, [`Self::refused`], and the packet stays the next.
    pub fn next_replay(&self) -> Option<&Replay> {
        if self.is_holding() {
            return None;
        }
        self.packets.front()
    }

    /// Takes in that the TAP has taken the next packet, and returns it.
    pub fn replayed(&mut self, now: Timestamp) -> Option<Replay> {
        let packet = self.take_next()?;
        if let Some(flow) = self.flows.get_mut(packet.flow) {
            let held = now.since(packet.at);
            flow.report.replayed += 1;
            flow.report.longest_held = flow.report.longest_held.max(held);
        }
        Some(packet)
    }

    /// Takes in how many frames have found the queue of the TAP full so far.
    pub fn tap_full(&mut self, frames: u64) {
        self.tap_full = frames;
    }

    /// Takes in that the TAP was full.
    pub fn refused(&mut self) {
        self.refused += 1;
    }

    /// Takes in that the TAP will never take the next packet, which is lost.
    pub fn given_up(&mut self) {
        if let Some(packet) = self.take_next()
            && let Some(flow) = self.flows.get_mut(packet.flow)
        {
            flow.report.lost += 1;
        }
    }

    /// The number up to which nothing is to be done any more with the held frames, for
    /// [`common::maps::Gate::replayed`]. `None` before the cut.
    pub fn done(&self) -> Option<u64> {
        if self.is_holding() {
            return None;
        }
        Some(match self.packets.front() {
            Some(Replay {
                place: (number, _), ..
            }) => number.saturating_sub(1),
            None => self.last_number,
        })
    }

    /// Takes in that the TAP has changed while packets were sent into it: nothing is exact.
    pub fn doubt(&mut self) {
        self.is_doubted = true;
    }

    /// Takes in that the gate was not renewed in time: frames have passed, and the VM may get them twice.
    pub fn lapsed(&mut self) {
        self.doubt();
        self.has_lapsed = true;
    }

    /// Lets everything go, and begins anew.
    pub fn forget(&mut self) {
        *self = Self::new(self.limits);
    }

    /// Memory in use, bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What has become of the frames so far.
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

    /// Packets that wait for the TAP; none before the cut.
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

    /// Takes note of a frame's number, and of those before it that have not come. Two CPUs may hand
    /// over theirs in the other order.
    fn number(&mut self, number: u64, at: Timestamp) {
        let next = self.last_number.saturating_add(1);
        let Some(missing) = number.checked_sub(next) else {
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

    /// Lets the oldest packets go until the limits are kept.
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
