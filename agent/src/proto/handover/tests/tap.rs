//! A model of a TAP and its readers.

use std::collections::{BTreeSet, VecDeque};

use common::handover::flow_hash_of;
use common::maps::{Delivered, GateRecord};
use common::signal::CutBasis;
use proptest::prelude::*;

use super::random::Random;
use super::stream;
use crate::proto::Timestamp;
use crate::proto::handover::{Counts, Cut, Path, Placement, Reader, nic_cut};

/// Resolution of the model, microseconds.
const TICK: u64 = 10;
/// Limit of frames that QEMU reads from each queue beside vhost-net.
const MOST_READS: u64 = 2;
/// Frames that vhost-net takes from a queue at once.
const BATCH: usize = 64;

/// A scenario; times in microseconds.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    /// Mean time between two frames.
    pub(super) interval: u64,
    /// Frames per arrival.
    pub(super) burst: u64,
    /// Mean time that QEMU needs per frame.
    pub(super) read: u64,
    /// Path of the frames to the guest.
    pub(super) path: Path,
    /// Number of queues, and of flows; each flow has its queue.
    pub(super) queues: usize,
    pub(super) flows: u16,
    /// Length of a queue, frames.
    pub(super) capacity: usize,
    /// Frames in the queue at the start of the recording.
    pub(super) queued: u64,
    /// Duration of the recording.
    pub(super) recording: u64,
    /// Period of QEMU's pauses, each a tenth of the period; 0 for none.
    pub(super) pause: u64,
    /// Delay of the report of the stop.
    pub(super) report: u64,
    /// Delay of QEMU's read after the stop.
    pub(super) late: u64,
    /// Frames that QEMU then reads from each queue, if vhost-net read before.
    pub(super) own_reads: u64,
    /// Whether QEMU's sleep is visible.
    pub(super) is_seen: bool,
    /// Whether QEMU read a frame before the stop that QEMU could not deliver. QEMU then reads none
    /// after the stop if a probe is there to be dropped; without a probe, QEMU has read two.
    pub(super) held_back: bool,
}

pub(super) fn plans() -> impl Strategy<Value = Plan> {
    let frames = (20..3000u64, 1..8u64, 5..1500u64, 10..1200usize, 0..20u64);
    let times = (
        50_000..800_000u64,
        prop_oneof![Just(0), 5_000..100_000u64],
        0..4_000u64,
        prop_oneof![
            (0..8_000u64).prop_map(|late| (false, late)),
            (0..900_000u64).prop_map(|late| (true, late)),
        ],
    );
    let held_back = prop::bool::weighted(0.2);
    let paths = prop_oneof![Just(Path::Vhost), Just(Path::Probed), Just(Path::Plain)];
    let flows = prop_oneof![Just(1_u16), 2..6_u16];
    let shape = (paths, flows, 1..=MOST_READS);
    (any::<u64>(), frames, times, held_back, shape).prop_map(
        |(seed, frames, times, held_back, (path, flows, own_reads))| {
            let (interval, burst, read, capacity, queued) = frames;
            let (recording, pause, report, (is_seen, late)) = times;
            Plan {
                seed,
                interval,
                burst,
                read,
                path,
                queues: 1,
                flows,
                capacity,
                queued,
                recording,
                pause,
                report,
                late,
                own_reads,
                is_seen,
                held_back: held_back && path != Path::Vhost,
            }
        },
    )
}

/// Plans of a TAP with several queues, which are read more slowly or have fewer frames per queue.
pub(super) fn plans_of_several() -> impl Strategy<Value = Plan> {
    (plans(), 2..5_usize).prop_map(|(plan, queues)| Plan { queues, ..plan })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frame {
    BeforeRecording,
    /// A frame by its number and its flow.
    Numbered(u64, u16),
    Injected,
}

/// One queue of the TAP, and its reader.
#[derive(Default)]
struct Queue {
    frames: VecDeque<Frame>,
    /// Frames taken by vhost-net, but not read yet.
    ahead: VecDeque<Frame>,
    next_read: u64,
    held_back: Option<Frame>,
    reads_left: u64,
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.frames.is_empty() && self.ahead.is_empty()
    }

    fn take(&mut self, path: Path) -> Option<Frame> {
        if path != Path::Vhost {
            return self.frames.pop_front();
        }
        if self.ahead.is_empty() {
            let batch = self.frames.len().min(BATCH);
            self.ahead = self.frames.drain(..batch).collect();
        }
        self.ahead.pop_front()
    }

    /// Puts the frames taken by vhost-net back; the oldest find no room in a full queue.
    fn put_back(&mut self, capacity: usize) {
        while let Some(frame) = self.ahead.pop_back() {
            if self.frames.len() < capacity {
                self.frames.push_front(frame);
            }
        }
    }
}

/// The TAP, and the guest behind the TAP.
pub(super) struct Tap {
    plan: Plan,
    random: Random,
    pub(super) now: u64,
    queues: Vec<Queue>,
    /// Frames that `gate` has counted but that have not reached their queue, with the time of their
    /// arrival there.
    under_way: VecDeque<(u64, Frame)>,
    next_arrival: u64,
    has_stopped: bool,
    /// Flow of each frame, by its number.
    flows: Vec<u16>,
    counts: Counts,
    /// Entered minus read and dropped frames, for an empty queue.
    level: u64,
    pub(super) is_seen_empty: bool,
    /// Numbers of the frames that the guest received.
    pub(super) delivered: BTreeSet<u64>,
    /// Numbers of the frames that found no room.
    dropped: BTreeSet<u64>,
}

impl Tap {
    pub(super) fn new(plan: Plan) -> Self {
        let mut random = Random(plan.seed);
        let counts = Counts {
            taken: random.below(1000),
            dropped: random.below(1000),
            own: (plan.path == Path::Vhost && plan.is_seen).then(|| random.below(10)),
        };
        let queued = plan.queued.min(plan.capacity as u64);
        let reads_left = match plan.path {
            Path::Probed => u64::from(!plan.held_back),
            Path::Vhost => plan.own_reads,
            Path::Plain => 1,
        };
        let queue = |index| Queue {
            frames: (0..if index == 0 { queued } else { 0 })
                .map(|_| Frame::BeforeRecording)
                .collect(),
            reads_left,
            ..Queue::default()
        };
        Self {
            level: 0u64.wrapping_sub(counts.taken + counts.dropped + queued),
            is_seen_empty: false,
            queues: (0..plan.queues).map(queue).collect(),
            plan,
            random,
            now: 0,
            under_way: VecDeque::new(),
            next_arrival: 0,
            has_stopped: false,
            flows: Vec::new(),
            counts,
            delivered: BTreeSet::new(),
            dropped: BTreeSet::new(),
        }
    }

    fn is_stopped(&self) -> bool {
        self.now >= self.plan.recording
    }

    fn entered(&self) -> u64 {
        self.flows.len() as u64
    }

    pub(super) fn run_until(&mut self, end: u64) {
        while self.now < end {
            self.now += TICK;
            self.arrive();
            if self.is_stopped() && !self.has_stopped {
                self.has_stopped = true;
                let capacity = self.plan.capacity;
                self.queues.iter_mut().for_each(|it| it.put_back(capacity));
            }
            for queue in 0..self.queues.len() {
                self.read(queue);
            }
        }
    }

    fn arrive(&mut self) {
        while self.next_arrival <= self.now {
            for _ in 0..=self.random.below(self.plan.burst) {
                let flow = self.random.below(self.plan.flows.into()) as u16;
                self.flows.push(flow);
                let frame = Frame::Numbered(self.entered(), flow);
                let at = self.now + self.random.below(3) * TICK;
                let at = at.max(self.under_way.back().map_or(0, |(at, _)| *at));
                self.under_way.push_back((at, frame));
            }
            let mean = (self.plan.interval * (self.plan.burst + 1)) as f64 / 2.0;
            self.next_arrival += self.random.exponential(mean) as u64 + 1;
        }
        while let Some((_, frame)) = self.under_way.pop_front_if(|(at, _)| *at <= self.now) {
            let Frame::Numbered(number, flow) = frame else {
                continue;
            };
            if !self.enqueue(usize::from(flow) % self.queues.len(), frame) {
                self.dropped.insert(number);
            }
        }
    }

    fn enqueue(&mut self, queue: usize, frame: Frame) -> bool {
        let queue = &mut self.queues[queue];
        let has_room = queue.frames.len() < self.plan.capacity;
        if has_room {
            queue.frames.push_back(frame);
        } else {
            self.counts.dropped += 1;
        }
        has_room
    }

    fn read(&mut self, index: usize) {
        let queue = &mut self.queues[index];
        if self.has_stopped {
            // A frame that nobody receives.
            if self.now >= self.plan.recording + self.plan.late
                && queue.reads_left > 0
                && queue.frames.pop_front().is_some()
            {
                queue.reads_left -= 1;
                self.counts.taken += 1;
                self.counts.own = self.counts.own.map(|own| own + 1);
            }
            return;
        }
        let pause = self.plan.pause;
        if pause > 0 && self.now % pause < pause / 10 {
            return;
        }
        while queue.next_read <= self.now {
            let Some(frame) = queue.take(self.plan.path) else {
                queue.next_read = self.now + TICK;
                return;
            };
            self.counts.taken += 1;
            queue.next_read += self.random.exponential(self.plan.read as f64) as u64 + 1;
            let frame = if self.plan.held_back {
                queue.held_back.replace(frame)
            } else {
                Some(frame)
            };
            if let Some(Frame::Numbered(number, _)) = frame {
                self.delivered.insert(number);
            }
        }
    }

    /// Advances the time between two system calls.
    fn run_for_a_moment(&mut self) {
        let ticks = self.random.below(3);
        self.run_until(self.now + ticks * TICK);
    }

    /// Returns the visible state of QEMU's main thread.
    fn reader(&self) -> Reader {
        let is_done = |queue: &Queue| queue.reads_left == 0 || queue.frames.is_empty();
        let is_asleep = if self.is_stopped() {
            self.now >= self.plan.recording + self.plan.late && self.queues.iter().all(is_done)
        } else {
            self.queues.iter().all(Queue::is_empty)
        };
        match (self.plan.is_seen, is_asleep) {
            (false, _) => Reader::Unknown,
            (true, true) => Reader::Asleep,
            (true, false) => Reader::Busy,
        }
    }

    pub(super) fn sample(&mut self, placement: &mut Placement) {
        let at = Timestamp(self.now * 1000);
        let reader = self.reader();
        self.run_for_a_moment();
        let mut counts = self.counts;
        self.run_for_a_moment();
        counts.dropped = self.counts.dropped;
        self.run_for_a_moment();
        counts.own = self.counts.own;
        self.run_for_a_moment();
        let entered = self.entered();
        let queued = entered.wrapping_sub(counts.taken + counts.dropped);
        self.is_seen_empty |= queued == self.level;
        placement.read_by(self.plan.path, self.queues.len() as u32);
        placement.sample(at, reader, counts, entered);
    }

    /// Sends a frame into each queue, as the agent does.
    pub(super) fn probe(&mut self, placement: &mut Placement) {
        for queue in 0..self.queues.len() {
            if self.enqueue(queue, Frame::Injected) {
                placement.injected(Timestamp(self.now * 1000));
            }
        }
        placement.probed();
    }

    /// Returns what the source reports with this cut, and the packets that the cut loses or duplicates.
    /// A cut may be too early if the cut says so.
    pub(super) fn fault(&self, cut: Cut) -> (CutBasis, Option<String>) {
        let hash = |flow: u16| flow_hash_of(&stream(flow));
        let records: Vec<_> = (1..)
            .zip(&self.flows)
            .map(|(number, flow)| GateRecord {
                number,
                flow: hash(*flow),
                fingerprint: number,
                at_ns: number,
            })
            .collect();
        let numbers = |flow: u16| (1_u64..).zip(&self.flows).filter(move |it| *it.1 == flow);
        let flows: Vec<_> = (0..self.plan.flows)
            .map(|flow| {
                let packets = numbers(flow).count() as u64;
                (stream(flow), Delivered { packets, bytes: 0 })
            })
            .collect();
        let reach = nic_cut(
            [2; 6],
            &cut,
            &records,
            &super::read(&flows, Timestamp(u64::MAX)),
        );
        let basis = reach.cut.basis;
        let fault = (0..self.plan.flows).find_map(|flow| {
            let mut cuts = reach.cut.flows.iter();
            let said = cuts
                .find(|it| it.stream() == stream(flow))
                .map_or(0, |it| it.delivered);
            let is_had = |number| self.delivered.contains(&number);
            let had = numbers(flow).enumerate().filter(|(_, it)| is_had(it.0));
            let had = had.last().map_or(0, |(place, _)| place as u64 + 1);
            let left = |number| !is_had(number) && !self.dropped.contains(&number);
            let left = numbers(flow).position(|(number, _)| left(number));
            let is_late = left.is_some_and(|left| said > left as u64);
            let is_early = basis == CutBasis::Count && said < had;
            (is_late || is_early)
                .then(|| format!("flow {flow}: {said} said, {had} had, {left:?} left"))
        });
        (basis, fault)
    }
}
