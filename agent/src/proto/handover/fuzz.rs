//! Frames of the network, samples of a TAP and peers' messages, in any order.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "what fails here is what is looked for"
)]

use std::collections::BTreeMap;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use common::handover::fingerprint;
use common::maps::{Address, Gate, HeldFrame};
use common::signal::{CutBasis, FlowCut, NicCut};

use super::placement::LATEST_CUT;
use super::sample::{datagram, stream};
use super::*;
use crate::proto::Timestamp;

/// Maximum number of inputs per run.
const INPUTS: usize = 400;
const LIMITS: HoldLimits = HoldLimits {
    bytes: 4000,
    age: Duration::from_millis(100),
};
/// Number of distinct flows and payloads.
const FLOWS: u16 = 3;
const LETTERS: u8 = 5;
/// Length of a payload, bytes.
const PAYLOAD: u16 = 32;
const IPV6_HEADER: usize = 40;

/// Feeds inputs while bytes are left.
fn live(bytes: &[u8], mut next: impl FnMut(&mut Unstructured<'_>) -> Result<()>) {
    let mut input = Unstructured::new(bytes);
    for _ in 0..INPUTS {
        if input.is_empty() || next(&mut input).is_err() {
            break;
        }
    }
}

/// Generator of `HELD` entries: numbers, times and frames.
struct Frames {
    now: Timestamp,
    number: u64,
    /// Numbers that have not arrived.
    missing: Vec<u64>,
}

impl Frames {
    fn new() -> Self {
        Self {
            now: Timestamp(10_000_000_000),
            number: 0,
            missing: Vec::new(),
        }
    }

    fn next(&mut self, input: &mut Unstructured<'_>) -> Result<(HeldFrame, Vec<u8>)> {
        let step = input.int_in_range(0..=20_000)?;
        self.now = self.now + Duration::from_micros(step);
        let number = match input.int_in_range(0..=9)? {
            0 => {
                let skipped = input.int_in_range(1..=4)?;
                self.missing.extend(self.number + 1..=self.number + skipped);
                self.number + skipped + 1
            }
            // Two processors delivered their frames in reverse order.
            1 => self.missing.pop().unwrap_or(self.number + 1),
            _ => self.number + 1,
        };
        self.number = self.number.max(number);
        let frame = frame(input)?;
        let head = HeldFrame {
            number,
            at_ns: self.now.0,
            ifindex: 7,
            length: 0,
            vlan: if input.ratio(1, 8)? { 5 } else { 0 },
            segment_bytes: if input.ratio(1, 4)? {
                input.int_in_range(0..=64)?
            } else {
                0
            },
            pad: 0,
        };
        Ok((head, frame))
    }
}

fn payload(letter: u8) -> Vec<u8> {
    vec![letter; PAYLOAD.into()]
}

/// Returns a datagram, or arbitrary bytes.
fn frame(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    if input.ratio(1, 4)? {
        let length = input.int_in_range(0..=200)?;
        return Ok(input.bytes(usize::min(length, input.len()))?.to_vec());
    }
    let flow = stream(input.int_in_range(0..=FLOWS)?);
    let letter = input.int_in_range(0..=LETTERS)?;
    let mut frame = datagram(&flow, input.arbitrary()?, &payload(letter));
    if input.ratio(1, 4)? {
        let at = input.choose_index(frame.len())?;
        frame[at] = input.arbitrary()?;
    }
    Ok(frame)
}

/// Runs a hold: each packet was dropped before the cut, dropped, replayed, lost, or still waits.
pub(crate) fn hold(bytes: &[u8]) {
    let mut world = HoldWorld::new();
    live(bytes, |input| {
        world.next(input)?;
        world.check();
        Ok(())
    });
    world.end();
}

struct HoldWorld {
    hold: Hold,
    frames: Frames,
    clock: ClockOffset,
    /// Number of packets dropped before the cut.
    let_go: Option<u64>,
}

impl HoldWorld {
    fn new() -> Self {
        Self {
            hold: Hold::new(LIMITS),
            frames: Frames::new(),
            clock: ClockOffset::default(),
            let_go: None,
        }
    }

    fn next(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        let now = self.frames.now;
        match input.int_in_range(0..=15)? {
            0..8 => {
                let (head, frame) = self.frames.next(input)?;
                self.hold.push(&head, &frame);
            }
            8 => {
                let clock_ns = self.sources_clock(input)?;
                let nic = self.nic_cut(input)?;
                self.hold.cut(now, clock_ns, &nic, &self.clock);
                self.is_cut();
            }
            9 => {
                let before = Duration::from_micros(input.int_in_range(0..=200_000)?);
                self.hold.cut_blind(now, now - before);
                self.is_cut();
            }
            10 => {
                let clock_ns = self.sources_clock(input)?;
                self.clock.observe(clock_ns, now);
            }
            11 => {
                let held = self.frames.number + input.int_in_range(0..=3)?;
                self.hold.counted(now, held, input.int_in_range(0..=3)?);
            }
            12 if input.ratio(1, 8)? => {
                self.hold.forget();
                self.let_go = None;
            }
            12 => self.hold.doubt(),
            13 => self.hold.refused(),
            14 => self.hold.given_up(),
            _ => {
                for _ in 0..input.int_in_range(1..=8)? {
                    self.replay();
                }
            }
        }
        Ok(())
    }

    /// Returns a time stamp of the source host: one near the local time, or any.
    fn sources_clock(&self, input: &mut Unstructured<'_>) -> Result<u64> {
        if input.ratio(1, 8)? {
            return input.arbitrary();
        }
        let ahead = input.int_in_range(-50_000..=50_000_i64)?;
        Ok(self.frames.now.0.saturating_add_signed(ahead * 1000))
    }

    fn nic_cut(&self, input: &mut Unstructured<'_>) -> Result<NicCut> {
        let basis = [CutBasis::Count, CutBasis::Overflow, CutBasis::Time];
        let mut flows = Vec::new();
        for _ in 0..input.int_in_range(0..=FLOWS + 1)? {
            let stream = stream(input.int_in_range(0..=FLOWS)?);
            let mut fingerprints = Vec::new();
            for _ in 0..input.int_in_range(0..=20)? {
                let letter = input.int_in_range(0..=LETTERS)?;
                let known = fingerprint(&payload(letter)[..], 0, PAYLOAD);
                fingerprints.extend(known.unwrap_or_default().to_le_bytes());
            }
            flows.push(FlowCut {
                vlan: stream.vlan,
                multicast_address: stream.multicast_address.into(),
                source: stream.source.into(),
                source_port: stream.source_port,
                destination_port: stream.destination_port,
                delivered: input.arbitrary()?,
                last_ns: self.sources_clock(input)?,
                fingerprints: fingerprints.into(),
            });
        }
        Ok(NicCut {
            mac: [2; 6].into(),
            basis: *input.choose(&basis)?,
            flows,
            tap_full: input.arbitrary()?,
        })
    }

    /// Returns the number of packets that are gone without being counted.
    fn gone(&self) -> u64 {
        let report = self.hold.report();
        let of = |flow: &FlowReport| flow.held - flow.dropped - flow.replayed - flow.lost;
        report.flows.iter().map(of).sum::<u64>() - self.hold.waiting() as u64
    }

    fn is_cut(&mut self) {
        let gone = self.gone();
        self.let_go.get_or_insert(gone);
    }

    fn replay(&mut self) {
        let Some(next) = self.hold.next_replay() else {
            return;
        };
        assert!(self.let_go.is_some(), "replayed before the cut");
        let number = next.number();
        assert_eq!(
            self.hold.done(),
            Some(number - 1),
            "frames before it are done"
        );
        let taken = self.hold.replayed(self.frames.now);
        assert_eq!(taken.map(|packet| packet.number()), Some(number));
    }

    fn check(&self) {
        assert!(
            self.hold.bytes() <= LIMITS.bytes,
            "more is held than may be"
        );
        match self.let_go {
            None => {
                assert!(self.hold.next_replay().is_none());
                assert_eq!((self.hold.done(), self.hold.waiting()), (None, 0));
            }
            Some(let_go) => assert_eq!(self.gone(), let_go, "a packet is in no count"),
        }
        let exact = |flow: &FlowReport| flow.placed == Some(Placed::Fingerprint);
        for flow in self.hold.report().flows.iter().filter(|flow| exact(flow)) {
            assert!(self.let_go.is_some(), "exact before the cut: {flow:?}");
        }
    }

    /// Delivers all waiting packets to the VM.
    fn end(&mut self) {
        self.hold.cut_blind(self.frames.now, self.frames.now);
        self.is_cut();
        let mut last = 0;
        while let Some(next) = self.hold.next_replay() {
            assert!(last <= next.number(), "out of order");
            last = next.number();
            self.replay();
        }
        self.check();
        assert_eq!((self.hold.bytes(), self.hold.waiting()), (0, 0));
        assert!(self.hold.done() <= Some(self.frames.number + 3));
    }
}

/// Runs a store of unread frames: each packet leaves, complete, to a VM's address, or is counted.
pub(crate) fn unread(bytes: &[u8]) {
    let mut frames = Frames::new();
    let mut unread = Unread::new(LIMITS);
    let mut pushed = 0;
    live(bytes, |input| {
        unread_next(input, &mut frames, &mut unread, &mut pushed)
    });
    unread.cut(Cut::Time(frames.now));
    let ways = ways();
    while unread.next(&ways).is_some() {
        unread.given_up();
    }
    assert_eq!(unread.done(2), pushed + 2, "the gate stays closed");
}

fn unread_next(
    input: &mut Unstructured<'_>,
    frames: &mut Frames,
    unread: &mut Unread,
    pushed: &mut u64,
) -> Result<()> {
    match input.int_in_range(0..=11)? {
        0..6 => {
            let (head, frame) = frames.next(input)?;
            unread.push(&head, &frame);
            *pushed += 1;
        }
        6 => unread.cut(cut(input, frames)?),
        7 if input.ratio(1, 8)? => {
            let fresh = Unread::new(LIMITS);
            *unread = std::mem::replace(unread, fresh).again();
        }
        7 => {
            unread.take_report();
        }
        kind => {
            let ways = ways();
            let Some((packet, to)) = unread.next(&ways) else {
                return Ok(());
            };
            assert!(ways.values().any(|way| way.to == to), "for nobody here");
            let length = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
            assert_eq!(
                packet.len(),
                IPV6_HEADER + length,
                "more or less than a packet"
            );
            assert!(packet[7] > 0, "without a hop left");
            if kind == 8 {
                unread.given_up();
            } else {
                unread.sent();
            }
            // The next packet follows the same path.
            assert!(unread.done(0) == Gate::CLOSED || unread.next(&ways).is_none());
        }
    }
    Ok(())
}

fn cut(input: &mut Unstructured<'_>, frames: &Frames) -> Result<Cut> {
    let number = input.int_in_range(0..=frames.number)?;
    Ok(match input.int_in_range(0..=2)? {
        0 => Cut::Number {
            number,
            overflow: input.arbitrary()?,
        },
        1 => Cut::Among {
            after: number,
            had: 1,
            until: frames.number,
        },
        _ => Cut::Time(frames.now - Duration::from_micros(input.int_in_range(0..=50_000)?)),
    })
}

/// Returns the addresses of two flows, one of which needs another checksum.
fn ways() -> BTreeMap<Address, Way> {
    let way = |flow: u16, difference| {
        let to = [0x20 + flow as u8; 16];
        (stream(flow).multicast_address, Way { to, difference })
    };
    [way(1, 0), way(2, 0x1234)].into()
}

/// Splits an aggregated frame, and checks that the packets' payloads make up the frame's payload.
pub(crate) fn segments(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let segment_bytes = input.int_in_range(0..=40).unwrap_or_default();
    let Ok(frame) = frame(&mut input) else {
        return;
    };
    let packets = split(&frame, segment_bytes);
    let [first, _, ..] = &packets[..] else {
        assert_eq!(
            packets[0].len(),
            frame.len(),
            "a single packet is the frame"
        );
        return;
    };
    let headers = first.len() - usize::from(segment_bytes);
    let payload: Vec<u8> = packets
        .iter()
        .flat_map(|it| &it[headers..])
        .copied()
        .collect();
    assert_eq!(
        payload[..],
        frame[headers..][..payload.len()],
        "in order, and whole"
    );
    let (last, others) = packets.split_last().unwrap_or((first, &[]));
    assert!(others.iter().all(|packet| packet.len() == first.len()));
    assert!((headers + 1..=first.len()).contains(&last.len()));
}

/// Feeds meaningless samples, and checks for one cut, in time, within the frames entered by the stop.
pub(crate) fn placement(bytes: &[u8]) {
    let mut world = PlacementWorld::new();
    live(bytes, |input| world.next(input));
    world.end();
}

struct PlacementWorld {
    placement: Placement,
    now: Timestamp,
    counts: Counts,
    entered: u64,
    reader: Reader,
    stopped: Option<Timestamp>,
    /// Frames entered by the first sample after the stop.
    ceiling: Option<u64>,
    is_cut: bool,
    is_lost: bool,
}

impl PlacementWorld {
    fn new() -> Self {
        Self {
            placement: Placement::new(8),
            now: Timestamp(10_000_000_000),
            counts: Counts {
                taken: 3,
                dropped: 0,
                own: None,
            },
            entered: 0,
            reader: Reader::Unknown,
            stopped: None,
            ceiling: None,
            is_cut: false,
            is_lost: false,
        }
    }

    fn next(&mut self, input: &mut Unstructured<'_>) -> Result<()> {
        match input.int_in_range(0..=15)? {
            0..3 => self.entered += input.int_in_range(0..=12)?,
            3..6 => {
                let more = input.int_in_range(0..=12)?;
                self.counts.taken = self.counts.taken.saturating_add(more);
            }
            6 => {
                let more = input.int_in_range(0..=3)?;
                self.counts.dropped = self.counts.dropped.saturating_add(more);
            }
            7 => {
                let own = input.int_in_range(0..=3)?;
                self.counts.own = Some(self.counts.own.unwrap_or_default() + own);
            }
            8 => self.reader = *input.choose(&[Reader::Unknown, Reader::Busy, Reader::Asleep])?,
            9 if input.ratio(1, 8)? => {
                let path = *input.choose(&[Path::Vhost, Path::Probed, Path::Plain])?;
                self.placement.read_by(path, input.int_in_range(0..=4)?);
            }
            9 if input.ratio(1, 8)? => {
                self.counts.taken = input.arbitrary()?;
                self.counts.dropped = input.arbitrary()?;
            }
            9 if input.ratio(1, 16)? && self.stopped.is_none() => {
                self.stopped = Some(self.now);
                self.placement.stopped(self.now);
            }
            9 if input.ratio(1, 16)? => {
                self.is_lost = true;
                self.placement.lost();
            }
            9 if self.stopped.is_some() => self.placement.probed(),
            9 => {}
            10 if self.stopped.is_some() => self.placement.injected(self.now),
            10 => self.now = self.now + Duration::from_micros(input.int_in_range(0..=3000)?),
            11..14 => {
                self.drive();
            }
            // A reader that keeps up, for a while.
            _ => {
                let (rounds, frames) = (input.int_in_range(1..=100)?, input.int_in_range(0..=3)?);
                for _ in 0..rounds {
                    self.entered += frames;
                    self.counts.taken = self.counts.taken.saturating_add(frames);
                    self.drive();
                }
            }
        }
        Ok(())
    }

    /// Performs one step of the placement.
    fn drive(&mut self) -> bool {
        match self.placement.poll(self.now) {
            Step::SampleAt(due) => {
                assert!(due.since(self.now) <= Duration::from_secs(2), "not in time");
                self.now = self.now.max(due) + Duration::from_micros(10);
                if !self.is_lost {
                    self.sample();
                }
                true
            }
            Step::Cut(cut) => {
                let stopped = self.stopped.expect("not before the stop");
                assert!(!std::mem::replace(&mut self.is_cut, true), "a second cut");
                let late = self.now.since(stopped);
                assert!(
                    late <= LATEST_CUT + Duration::from_millis(5),
                    "too late: {late:?}"
                );
                self.check(cut);
                true
            }
            Step::Revised(cut) => {
                assert!(self.is_cut, "nothing to revise");
                self.check(cut);
                true
            }
            Step::Done => {
                assert!(self.is_cut, "without a cut");
                false
            }
        }
    }

    fn sample(&mut self) {
        if self.stopped.is_some() {
            self.ceiling.get_or_insert(self.entered);
        }
        self.placement
            .sample(self.now, self.reader, self.counts, self.entered);
    }

    fn check(&self, cut: Cut) {
        let ceiling = self.ceiling.unwrap_or(u64::MAX);
        let is_by_the_stop = match cut {
            Cut::Number { number, .. } => number <= ceiling,
            Cut::Among { after, until, .. } => after <= until && until <= ceiling,
            Cut::Time(at) => Some(at) <= self.stopped,
        };
        assert!(is_by_the_stop, "{cut:?}");
    }

    fn end(&mut self) {
        if self.stopped.is_none() {
            self.stopped = Some(self.now);
            self.placement.stopped(self.now);
        }
        for _ in 0..2000 {
            if !self.drive() {
                return;
            }
        }
        panic!("never done: {:?}", self.placement);
    }
}
