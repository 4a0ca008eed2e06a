//! Source: number of the last frame that the guest received.

mod number;

use std::collections::VecDeque;
use std::time::Duration;

use super::cut::Cut;
use super::evidence::{Counts, Evidence, Sample};
use super::since_first::SinceFirst;
use crate::proto::Timestamp;

/// Sample interval until the least queue difference is certain.
const EAGER_INTERVAL: Duration = Duration::from_millis(1);
/// Sample interval after [`EAGER_SAMPLES`] uncertain samples.
const PATIENT_INTERVAL: Duration = Duration::from_millis(5);
const EAGER_SAMPLES: usize = 1000;
/// Sample interval once the least difference is certain.
const INTERVAL: Duration = Duration::from_millis(20);
/// Divisor of the interval that gives the random part. Without jitter, a sender in step with the timer
/// would show the queue always at the same moment, just after a frame arrived.
const JITTER: u32 = 2;
/// Sample interval after the stop.
const STOPPED_INTERVAL: Duration = Duration::from_millis(2);
/// Waiting time of a frame after which nobody reads any more, if the reader's state is unknown. QEMU's
/// main loop turns within one or two milliseconds on an idle machine, so this time leaves room for a
/// busy machine. The VM stops for longer in any case.
const SETTLE: Duration = Duration::from_millis(20);
/// Time after the stop at which the cut is made from the available data, because the destination host
/// waits for the cut.
const DEADLINE: Duration = Duration::from_millis(80);
/// Deadline of the cut while the reader is busy, or sleeps beside a frame but was not sampled twice: a
/// late cut is better than a wrong cut. No cut follows later than this time after the stop; the
/// destination host relies on this bound.
pub const LATEST_CUT: Duration = Duration::from_secs(1);
/// Delay before the next sample if the TAP could not be read before the stop.
const RETRY: Duration = Duration::from_secs(2);
/// Time after the stop during which late reads are detected; most TAPs are deleted earlier.
const WATCH: Duration = Duration::from_secs(1);
/// Frames that vhost-net takes from a queue in advance (`VHOST_NET_BATCH`). At the stop, vhost-net puts
/// unread frames back.
const AHEAD: u64 = 64;
/// Sample interval for several queues, short so that few frames arrive in between.
const SEVERAL_INTERVAL: Duration = Duration::from_millis(5);

/// Number of remembered samples: 80 s of a recording, or 20 s of a recording that stays uncertain. No
/// frame waits for longer.
const HISTORY: usize = 4096;

/// State of QEMU's main thread, which reads the TAP after the VM stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reader {
    /// The state is not known.
    #[default]
    Unknown,
    /// The thread runs, or waits for a lock.
    Busy,
    /// The thread sleeps until an event arrives.
    Asleep,
}

/// Path of frames from the TAP to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Path {
    /// Through vhost-net.
    Vhost,
    /// Through QEMU, with a probe before each frame ([`common::handover::PROBE_MAC`]).
    #[default]
    Probed,
    /// Through QEMU without probes.
    Plain,
}

/// Next action of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Take a sample at this time, or at once if the time has passed.
    SampleAt(Timestamp),
    /// The cut; returned once.
    Cut(Cut),
    /// A later cut: QEMU read a frame later than expected, so the guest received more than the first
    /// cut says. The destination host may have replayed already and must correct its record.
    Revised(Cut),
    /// Nothing is left to do.
    Done,
}

/// Finds the cut of one TAP. Each queue of the TAP is read in order of arrival.
///
/// `gate` counts entering frames, the kernel counts taken and dropped frames, but the counters start at
/// different times. The difference `entered - taken - dropped` is the length of the queue plus a
/// constant. A queue is never shorter than empty, so the least difference is that constant. With the
/// constant, every sample tells which of the frames that had entered by then were read since:
///
/// ```text
/// entered  ...-----------|-----------------------|-------...
///                      sample                next sample
/// read     ...-----------+-------| now
///           all of these    and so many more, in order, unless some were dropped
/// ```
///
/// QEMU reads one more frame after the stop, or read one before that QEMU could not deliver; the guest
/// receives neither. Of two such frames, the first is a probe ([`common::handover::PROBE_MAC`]). With
/// vhost-net, QEMU polls the TAP again when the VM stops and vhost-net has put back the frames taken in
/// advance. QEMU then reads one frame, and another frame if a kick of the guest was in progress; so
/// QEMU's own reads are counted ([`Counts::own`]). The driver sends a frame into the TAP after the
/// stop, so that QEMU has a frame to read. If QEMU's main thread sleeps although that frame is present,
/// QEMU has finished reading ([`Reader`]).
///
/// The numbers cannot reveal one case: a queue that is never empty at a sample, because the guest does
/// not keep up, looks shorter than the queue is. So the least difference must have occurred often.
/// Otherwise the constant is assumed so small that the queue was full when the queue was longest.
///
/// Several queues have no common order, and the counters cover all queues together. A sample that found
/// all queues empty proves that every frame entered by then was read. Of the later reads, one frame per
/// queue belongs to QEMU, once each queue had a frame to read. If no other frame was read later, the
/// cut is at that sample. Otherwise the flows of the later frames decide ([`Cut::Among`]), because a
/// flow stays in one queue.
#[derive(Debug)]
pub struct Placement {
    /// Capacity of each queue, frames.
    capacity: u64,
    path: Path,
    queues: u32,
    injected: u64,
    /// Whether each queue had a frame to read after the stop.
    is_probed: bool,
    evidence: Evidence,
    /// Latest samples, oldest first.
    history: VecDeque<Sample>,
    /// Time of the last observed increase of the read frames.
    moved: Timestamp,
    /// Time since which a frame waits, or since which an injected frame is available to QEMU.
    waiting: Option<Timestamp>,
    stopped: Option<Timestamp>,
    /// Number of the last frame that can have been delivered, since that frame arrived before the stop.
    ceiling: Option<u64>,
    reader: Reader,
    /// QEMU's own reads at the start of the recording.
    own_before: Option<u64>,
    /// Frames that found no room in the queue.
    dropped: SinceFirst,
    /// Whether vhost-net read after QEMU: then the fate of QEMU's frames is unknown.
    is_given_back: bool,
    /// Whether the last sample was taken while the reader slept beside a waiting frame, and was not the
    /// first sample since the stop. Frames that had entered by that first sample are in the queue by
    /// the next sample.
    is_left_alone: bool,
    /// Whether the TAP was deleted.
    is_lost: bool,
    /// Number of delivered frames at the time of the cut.
    given: Option<u64>,
}

/// Returns a pseudo-random time below `bound`, derived from the low digits of the sample's time.
fn chance(at: Timestamp, bound: Duration) -> Duration {
    let spread = at.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let nanos = (bound.as_nanos() * u128::from(spread)) >> 32;
    Duration::from_nanos(u64::try_from(nanos).unwrap_or_default())
}

impl Placement {
    /// Starts with a recording. `capacity` is the length of each queue, frames (`txqueuelen`).
    pub fn new(capacity: u64) -> Self {
        Self {
            capacity,
            path: Path::default(),
            queues: 1,
            injected: 0,
            is_probed: false,
            evidence: Evidence::default(),
            history: VecDeque::new(),
            moved: Timestamp::default(),
            waiting: None,
            stopped: None,
            ceiling: None,
            reader: Reader::Unknown,
            own_before: None,
            dropped: SinceFirst::default(),
            is_given_back: false,
            is_left_alone: false,
            is_lost: false,
            given: None,
        }
    }

    /// Takes the path of frames to the guest and the number of queues; called before each sample. A
    /// removed queue takes its uncounted frames along, so a change of the number restarts the evidence.
    pub fn read_by(&mut self, path: Path, queues: u32) {
        self.path = path;
        if self.queues != queues {
            self.queues = queues;
            self.recounted();
        }
    }

    /// Discards all samples, because the frames are counted differently from now on.
    pub fn recounted(&mut self) {
        self.evidence = Evidence::default();
        self.history.clear();
    }

    /// Takes the values read at `at`: first `reader`, then `counts`, then `entered`
    /// ([`common::maps::GateUsage::entered`]). In this order, the counts include all reads of a
    /// sleeping reader. A frame that arrives in between makes the queue look longer, which is harmless.
    pub fn sample(&mut self, at: Timestamp, reader: Reader, counts: Counts, entered: u64) {
        self.is_lost = false;
        self.reader = reader;
        self.is_left_alone =
            reader == Reader::Asleep && self.waiting.is_some() && self.ceiling.is_some();
        let sample = Sample {
            at,
            entered: entered.saturating_add(self.injected),
            counts,
        };
        let last = self.history.back();
        if last.is_none_or(|last| last.counts.taken != counts.taken) {
            self.moved = at;
        }
        self.own_before = self.own_before.or(counts.own);
        self.dropped.look(counts.dropped);
        if self.stopped.is_some() {
            self.ceiling.get_or_insert(entered);
            let waits = self.injected > 0 || self.evidence.is_longer_than_least(&sample);
            self.waiting = waits.then(|| self.waiting.unwrap_or(at));
        } else {
            self.is_given_back |= last.is_some_and(|last| self.is_read_by_both(last, &sample));
            self.evidence.take(last, &sample);
        }
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(sample);
    }

    /// Records that the TAP is gone: no further sample is possible.
    pub fn lost(&mut self) {
        self.is_lost = true;
    }

    /// Records that the VM stopped.
    pub fn stopped(&mut self, at: Timestamp) {
        self.stopped.get_or_insert(at);
    }

    /// Returns the cut by time: at the stop, or when the VM is known to have run last if that time is
    /// earlier. On a loaded host, the report of the stop is late.
    fn at_stop(&self, stopped: Timestamp) -> Cut {
        let delivered = self.delivered();
        let before = |sample: &&Sample| sample.counts.taken < delivered;
        let ran = self.history.iter().rev().find(before);
        Cut::at_stop(ran.map_or(stopped, |sample| sample.at.min(stopped)))
    }

    /// Records that a frame was sent into the TAP past the gate, after the stop. A frame refused by a
    /// full queue does not count.
    pub fn injected(&mut self, at: Timestamp) {
        self.injected += 1;
        self.waiting.get_or_insert(at);
    }

    /// Records that each of several queues was sent a frame, or was full, after the stop.
    pub fn probed(&mut self) {
        self.is_probed = true;
    }

    /// Returns the frames that found no room since the start; `None` before the first sample.
    pub fn tap_full(&self) -> Option<u64> {
        let last = self.history.back()?;
        self.dropped.at(last.counts.dropped)
    }

    /// Returns an upper bound of the frames that the VM loses if the VM resumes after the stop: QEMU
    /// discards the frames read since. Frames from before the stop are read first, then the injected
    /// frames.
    pub fn thrown_away_at_most(&self) -> u64 {
        let (Some(_), Some(last)) = (self.stopped, self.history.back()) else {
            return 0;
        };
        let queues = u64::from(self.queues);
        let read = match (self.path, self.own(last)) {
            (Path::Vhost, Some(own)) => own,
            (Path::Vhost, None) => 2 * queues,
            (Path::Probed | Path::Plain, _) => queues,
        };
        let (Some(ceiling), Some((least, _))) = (self.ceiling, self.evidence.least) else {
            return read;
        };
        if queues > 1 || !self.evidence.is_sure() {
            return read;
        }
        match self.reach(least, last.counts.taken.saturating_sub(read)) {
            (number, true) => {
                let of_before = read.min(ceiling.saturating_sub(number));
                of_before + (read - of_before).saturating_sub(self.injected)
            }
            (_, false) => read,
        }
    }

    /// Returns the next action.
    pub fn poll(&mut self, now: Timestamp) -> Step {
        let Some(stopped) = self.stopped else {
            return Step::SampleAt(if self.is_lost {
                now + RETRY
            } else {
                self.next_sample()
            });
        };
        let next = match self.history.back() {
            Some(last) if self.ceiling.is_some() => last.at + STOPPED_INTERVAL,
            _ => stopped,
        };
        match self.given {
            None if self.is_settled() => self.give(self.cut(stopped, self.is_observed())),
            None if self.is_lost || now >= stopped + self.patience() => {
                self.give(self.cut(stopped, false))
            }
            None => Step::SampleAt(next.min(stopped + self.patience())),
            Some(_) if self.is_lost => Step::Done,
            Some(given) if given != self.delivered() && self.is_revisable() => {
                self.given = Some(self.delivered());
                Step::Revised(self.cut(stopped, self.is_observed()))
            }
            Some(_) if now >= stopped + WATCH => Step::Done,
            Some(_) => Step::SampleAt(next + PATIENT_INTERVAL),
        }
    }

    fn give(&mut self, cut: Cut) -> Step {
        self.given = Some(self.delivered());
        Step::Cut(cut)
    }

    /// Returns a lower bound of the frames that were read and delivered to the guest.
    fn delivered(&self) -> u64 {
        let taken = self.history.back().map_or(0, |last| last.counts.taken);
        taken.saturating_sub(self.undelivered().0)
    }

    /// Returns QEMU's own reads since the start of the recording; `None` if unknown.
    fn own(&self, sample: &Sample) -> Option<u64> {
        Some(sample.counts.own?.saturating_sub(self.own_before?))
    }

    /// Returns true if QEMU had read frames by `last` and vhost-net read more by `sample`.
    fn is_read_by_both(&self, last: &Sample, sample: &Sample) -> bool {
        let by_vhost = |sample: &Sample| {
            (sample.counts.taken).saturating_sub(sample.counts.own.unwrap_or_default())
        };
        self.own(last).is_some_and(|own| own > 0) && by_vhost(sample) > by_vhost(last)
    }

    fn next_sample(&self) -> Timestamp {
        let Some(last) = self.history.back() else {
            return Timestamp::default();
        };
        let interval = if self.evidence.is_sure() && self.queues > 1 {
            SEVERAL_INTERVAL
        } else if self.evidence.is_sure() {
            INTERVAL
        } else if self.history.len() < EAGER_SAMPLES {
            EAGER_INTERVAL
        } else {
            PATIENT_INTERVAL
        };
        last.at + interval + chance(last.at, interval / JITTER)
    }

    /// Returns the maximum delay of the cut after the stop.
    fn patience(&self) -> Duration {
        match self.reader {
            Reader::Busy => LATEST_CUT,
            // The next sample settles the cut, however late this host lets the agent take it.
            Reader::Asleep if self.waiting.is_some() => LATEST_CUT,
            Reader::Unknown | Reader::Asleep => DEADLINE,
        }
    }

    /// Returns true if QEMU has finished reading: a frame was available, and QEMU slept or, if QEMU's
    /// state is unknown, did not read the frame for [`SETTLE`]. An injected frame either still waits,
    /// or was the frame that QEMU reads after the stop.
    fn is_settled(&self) -> bool {
        let (Some(last), Some(waiting)) = (self.history.back(), self.waiting) else {
            return false;
        };
        self.ceiling.is_some()
            && match self.reader {
                Reader::Asleep => self.is_left_alone,
                Reader::Busy => false,
                Reader::Unknown => last.at.since(waiting.max(self.moved)) >= SETTLE,
            }
    }

    /// Returns true if the reader was seen asleep. Only that proves that QEMU has finished reading; the
    /// time since the last read proves nothing on a loaded host.
    fn is_observed(&self) -> bool {
        self.reader == Reader::Asleep
    }

    /// Returns true if the cut can be revised. A frame counts as read before the frame counts as QEMU's
    /// own; both counts agree once QEMU sleeps again.
    fn is_revisable(&self) -> bool {
        self.evidence.is_sure() && (self.reader == Reader::Unknown || self.is_settled())
    }

    /// Returns an upper bound of the frames that QEMU reads after the stop or had held back at the
    /// stop, and whether the bound is exact.
    ///
    /// Without a probe, nobody can tell whether QEMU held back one frame of a queue. All probes go to
    /// one queue. Beside vhost-net, QEMU reads each queue that has a frame, so a lower count belongs to
    /// another thread.
    fn undelivered(&self) -> (u64, bool) {
        let queues = u64::from(self.queues);
        let own = self.history.back().and_then(|last| self.own(last));
        match (self.path, own) {
            (Path::Vhost, Some(own)) if own >= queues && !self.is_given_back => (own, true),
            (Path::Probed, _) if self.queues == 1 => (1, true),
            (Path::Vhost | Path::Probed | Path::Plain, _) => (2 * queues, false),
        }
    }
}
