//! A model of a TAP and of QEMU that reads it, against which the placement is tested.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::random::Random;
use crate::proto::Timestamp;
use crate::proto::handover::{Counts, Cut, Placement, Reader, Step};

/// Resolution of the model, microseconds.
const TICK: u64 = 10;

/// What happens to the frames, times in microseconds.
#[derive(Clone, Debug)]
struct Plan {
    seed: u64,
    /// Mean time between two frames.
    interval: u64,
    /// How many come at once.
    burst: u64,
    /// Mean time that QEMU takes for a frame.
    read: u64,
    /// Length of the queue, frames.
    capacity: usize,
    /// Frames there when the recording begins.
    queued: u64,
    /// How long the recording lasts.
    recording: u64,
    /// QEMU pauses once in this time for a tenth of it; 0 for never.
    pause: u64,
    /// How late the stop is reported.
    report: u64,
    /// How late QEMU reads after the stop.
    late: u64,
    /// Whether it can be seen when QEMU sleeps.
    is_seen: bool,
    /// Whether QEMU has read a frame before the stop that it could not hand over. It reads none
    /// after it, then.
    held_back: bool,
}

fn plans() -> impl Strategy<Value = Plan> {
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
    (any::<u64>(), frames, times, held_back).prop_map(|(seed, frames, times, held_back)| {
        let (interval, burst, read, capacity, queued) = frames;
        let (recording, pause, report, (is_seen, late)) = times;
        Plan {
            seed,
            interval,
            burst,
            read,
            capacity,
            queued,
            recording,
            pause,
            report,
            late,
            is_seen,
            held_back,
        }
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Frame {
    BeforeRecording,
    Numbered(u64),
    Injected,
}

/// The TAP, and the guest behind it.
struct Tap {
    plan: Plan,
    random: Random,
    now: u64,
    queue: VecDeque<Frame>,
    /// Frames that have been counted by `gate` and not come to the queue, with the time when they
    /// do.
    under_way: VecDeque<(u64, Frame)>,
    next_arrival: u64,
    next_read: u64,
    entered: u64,
    counts: Counts,
    /// What has entered less what was read and dropped, of an empty queue.
    level: u64,
    is_seen_empty: bool,
    /// Number of the last frame that the guest has had.
    delivered: u64,
    held_back: Option<Frame>,
    reads_left: u64,
}

impl Tap {
    fn new(plan: Plan) -> Self {
        let mut random = Random(plan.seed);
        let counts = Counts {
            taken: random.below(1000),
            dropped: random.below(1000),
        };
        let queued = plan.queued.min(plan.capacity as u64);
        Self {
            level: 0u64.wrapping_sub(counts.taken + counts.dropped + queued),
            is_seen_empty: false,
            queue: (0..queued).map(|_| Frame::BeforeRecording).collect(),
            reads_left: u64::from(!plan.held_back),
            plan,
            random,
            now: 0,
            under_way: VecDeque::new(),
            next_arrival: 0,
            next_read: 0,
            entered: 0,
            counts,
            delivered: 0,
            held_back: None,
        }
    }

    fn is_stopped(&self) -> bool {
        self.now >= self.plan.recording
    }

    fn run_until(&mut self, end: u64) {
        while self.now < end {
            self.now += TICK;
            self.arrive();
            self.read();
        }
    }

    fn arrive(&mut self) {
        while self.next_arrival <= self.now {
            for _ in 0..=self.random.below(self.plan.burst) {
                self.entered += 1;
                let at = self.now + self.random.below(3) * TICK;
                let at = at.max(self.under_way.back().map_or(0, |(at, _)| *at));
                self.under_way
                    .push_back((at, Frame::Numbered(self.entered)));
            }
            let mean = (self.plan.interval * (self.plan.burst + 1)) as f64 / 2.0;
            self.next_arrival += self.random.exponential(mean) as u64 + 1;
        }
        while let Some((_, frame)) = self.under_way.pop_front_if(|(at, _)| *at <= self.now) {
            self.enqueue(frame);
        }
    }

    fn enqueue(&mut self, frame: Frame) -> bool {
        let has_room = self.queue.len() < self.plan.capacity;
        if has_room {
            self.queue.push_back(frame);
        } else {
            self.counts.dropped += 1;
        }
        has_room
    }

    fn read(&mut self) {
        if self.is_stopped() {
            // The one frame that nobody gets.
            if self.now >= self.plan.recording + self.plan.late
                && self.reads_left > 0
                && self.queue.pop_front().is_some()
            {
                self.reads_left -= 1;
                self.counts.taken += 1;
            }
            return;
        }
        let pause = self.plan.pause;
        if pause > 0 && self.now % pause < pause / 10 {
            return;
        }
        while self.next_read <= self.now {
            let Some(frame) = self.queue.pop_front() else {
                self.next_read = self.now + TICK;
                return;
            };
            self.counts.taken += 1;
            self.next_read += self.random.exponential(self.plan.read as f64) as u64 + 1;
            let frame = if self.plan.held_back {
                self.held_back.replace(frame)
            } else {
                Some(frame)
            };
            if let Some(Frame::Numbered(number)) = frame {
                self.delivered = number;
            }
        }
    }

    /// What passes between two system calls.
    fn run_for_a_moment(&mut self) {
        let ticks = self.random.below(3);
        self.run_until(self.now + ticks * TICK);
    }

    /// What QEMU's main thread is seen to do.
    fn reader(&self) -> Reader {
        let is_asleep = if self.is_stopped() {
            self.now >= self.plan.recording + self.plan.late
                && (self.reads_left == 0 || self.queue.is_empty())
        } else {
            self.queue.is_empty()
        };
        match (self.plan.is_seen, is_asleep) {
            (false, _) => Reader::Unknown,
            (true, true) => Reader::Asleep,
            (true, false) => Reader::Busy,
        }
    }

    fn sample(&mut self, placement: &mut Placement) {
        let at = Timestamp(self.now * 1000);
        let reader = self.reader();
        self.run_for_a_moment();
        let mut counts = self.counts;
        self.run_for_a_moment();
        counts.dropped = self.counts.dropped;
        self.run_for_a_moment();
        let queued = self.entered.wrapping_sub(counts.taken + counts.dropped);
        self.is_seen_empty |= queued == self.level;
        placement.sample(at, reader, counts, self.entered);
    }
}

/// What came of a plan.
struct Outcome {
    cut: Cut,
    delivered: u64,
    stopped: Timestamp,
    /// Whether a sample was taken of an empty queue.
    is_seen_empty: bool,
}

fn run(plan: &Plan) -> Outcome {
    let mut tap = Tap::new(plan.clone());
    let mut placement = Placement::new(plan.capacity as u64);
    let reported = plan.recording + plan.report;
    let mut is_injected = false;
    loop {
        let now = Timestamp(tap.now * 1000);
        if tap.now >= reported {
            placement.stopped(now);
        }
        match placement.poll(now) {
            Step::SampleAt(due) if due <= now => {
                tap.sample(&mut placement);
                if tap.now >= reported && !is_injected {
                    is_injected = true;
                    if tap.enqueue(Frame::Injected) {
                        placement.injected(Timestamp(tap.now * 1000));
                    }
                }
            }
            Step::SampleAt(due) => {
                let due = due.0.div_ceil(1000);
                let due = if tap.now < reported {
                    due.min(reported)
                } else {
                    due
                };
                tap.run_until(due);
            }
            Step::Cut(cut) => {
                return Outcome {
                    cut,
                    delivered: tap.delivered,
                    stopped: Timestamp(plan.recording * 1000),
                    is_seen_empty: tap.is_seen_empty,
                };
            }
            step => panic!("{step:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn cut_is_where_the_guest_stopped(plan in plans()) {
        let outcome = run(&plan);
        // Queues that were never seen empty are the subject of the test below.
        prop_assume!(outcome.is_seen_empty);
        match outcome.cut {
            Cut::Number { number, overflow: false } => {
                prop_assert_eq!(number, outcome.delivered);
            }
            Cut::Number { number, overflow: true } => {
                prop_assert!(number <= outcome.delivered);
            }
            Cut::Time(until) => prop_assert!(until <= outcome.stopped),
        }
    }
}

/// A guest that receives 1725 frames a second and needs `read` microseconds for each.
fn steady(seed: u64, read: u64) -> Plan {
    Plan {
        seed,
        interval: 580,
        burst: 1 + seed % 5,
        read,
        capacity: 1000,
        queued: seed % 20,
        recording: 1_000_000,
        pause: 0,
        report: 2_000,
        late: 1_000,
        is_seen: false,
        held_back: false,
    }
}

#[test]
fn cut_is_exact_where_the_guest_keeps_up() {
    for seed in 0..100 {
        let outcome = run(&Plan {
            is_seen: seed % 2 == 1,
            ..steady(seed, 30 + seed * 4)
        });
        assert_eq!(
            outcome.cut,
            Cut::Number {
                number: outcome.delivered,
                overflow: false
            }
        );
    }
}

#[test]
fn cut_is_no_later_than_the_stop_where_the_guest_does_not_keep_up() {
    for seed in 0..300 {
        let outcome = run(&steady(seed, 480 + seed));
        match outcome.cut {
            Cut::Number { number, .. } => assert!(number <= outcome.delivered, "{seed}"),
            Cut::Time(_) => assert!(outcome.is_seen_empty, "{seed}"),
        }
    }
}
