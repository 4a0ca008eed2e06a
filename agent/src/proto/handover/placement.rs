//! Source: which frame was the last that the guest has had.

use std::collections::VecDeque;
use std::time::Duration;

use super::cut::Cut;
use super::evidence::{Counts, Evidence, Sample};
use super::since_first::SinceFirst;
use crate::proto::Timestamp;

/// Time between two samples until it is known what an empty queue looks like.
const EAGER_INTERVAL: Duration = Duration::from_millis(1);
/// The same after [`EAGER_SAMPLES`] that have not shown it.
const PATIENT_INTERVAL: Duration = Duration::from_millis(5);
const EAGER_SAMPLES: usize = 1000;
/// The same once it is known.
const INTERVAL: Duration = Duration::from_millis(20);
/// The part of it that is added by chance: a sender and this timer that keep step would show a queue
/// always at the same moment, when a frame has just come.
const JITTER: u32 = 2;
/// Time between two samples after the stop.
const STOPPED_INTERVAL: Duration = Duration::from_millis(2);
/// Where the reader cannot be looked at, nobody reads any more when a frame has been waiting for so
/// long: QEMU's main loop comes round within a millisecond or two of an idle machine, and this leaves
/// some for a busy one. The VM stands still for longer in any case.
const SETTLE: Duration = Duration::from_millis(20);
/// After so long the cut is made with what there is, because the destination waits for it.
const DEADLINE: Duration = Duration::from_millis(80);
/// The same while the reader is seen to be busy: a cut that is late is better than one that is wrong. No
/// cut comes later than so long after the stop; the destination relies on it.
pub const LATEST_CUT: Duration = Duration::from_secs(1);
/// Before the stop, a TAP that could not be looked at is looked at again after so long.
const RETRY: Duration = Duration::from_secs(2);
/// For so long after the stop a late read is looked for; most TAPs are gone before.
const WATCH: Duration = Duration::from_secs(1);
/// Frames that vhost-net takes out of a queue ahead of those that it has read (`VHOST_NET_BATCH`). What it
/// has not read at the stop, it puts back.
const AHEAD: u64 = 64;
/// Time between two samples of several queues, so that few frames come in it.
const SEVERAL_INTERVAL: Duration = Duration::from_millis(5);

/// Samples that are remembered: 80 s of a recording, or 20 s of one that stays uncertain. A frame
/// does not wait for longer.
const HISTORY: usize = 4096;

/// What is known of who reads the TAP once the VM has stopped: QEMU's main thread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reader {
    /// Nothing.
    #[default]
    Unknown,
    /// It works, or waits for a lock.
    Busy,
    /// It sleeps until something comes that it waits for.
    Asleep,
}

/// How frames come from the TAP to the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Path {
    /// By vhost-net.
    Vhost,
    /// By QEMU, with a probe before each ([`common::handover::PROBE_MAC`]).
    #[default]
    Probed,
    /// By QEMU.
    Plain,
}

/// What the driver is to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Take a sample at this time, or at once if it is past.
    SampleAt(Timestamp),
    /// This is the cut; given once.
    Cut(Cut),
    /// The guest has had a frame more than the cut says: QEMU has read one later than it ever should.
    /// The destination may have replayed by then, so its record is to say so.
    Revised(Cut),
    /// Nothing any more.
    Done,
}

/// Finds the cut of one TAP, the frames of each of whose queues are read in the order in which they came.
///
/// `gate` counts what enters, the kernel what is read and what is dropped, but from different
/// beginnings. Their difference `entered - taken - dropped` is the length of the queue and a
/// constant; since the queue is never shorter than empty, the least difference is that constant.
/// With it, every sample tells which of the frames that had entered by then have been read since:
///
/// ```text
/// entered  ...-----------|-----------------------|-------...
///                      sample                next sample
/// read     ...-----------+-------| now
///           all of these    and so many more, in order, unless some were dropped
/// ```
///
/// QEMU reads one more frame after the stop, or has read one before that it could not hand over, either
/// of which the guest never gets; of two, the first is a probe ([`common::handover::PROBE_MAC`]). With
/// vhost-net, QEMU polls the TAP again when the VM stops and vhost-net has put back what it has taken
/// ahead. Then QEMU reads one frame, and another if a kick of the guest was under way, so its own reads
/// are counted ([`Counts::own`]). A frame that the driver sends into the TAP once the VM has stopped makes
/// sure that there is one to read. That QEMU has read is known when its main thread sleeps although that
/// frame is there ([`Reader`]).
///
/// What the numbers cannot tell: a queue that is never empty when a sample is taken, because the
/// guest does not keep up, looks shorter than it is. So the least difference must have been found
/// often. Else the constant is taken to be so small that the queue was full when it was longest.
///
/// Between several queues there is no order, and the counts are of all of them. But a sample that found all
/// of them empty says that all had been read by then that had entered. Of what was read later, one frame for
/// each queue is QEMU's, once each has had one to read. If that is all, the cut is at that sample; else what
/// has come since decides ([`Cut::Among`]): a flow stays in one queue.
#[derive(Debug)]
pub struct Placement {
    /// Most frames in a queue.
    capacity: u64,
    path: Path,
    queues: u32,
    injected: u64,
    /// Whether each queue has had a frame to read after the stop.
    is_probed: bool,
    evidence: Evidence,
    /// The last samples, oldest first.
    history: VecDeque<Sample>,
    /// When the number of frames read was last seen to grow.
    moved: Timestamp,
    /// Since when a frame has been waiting, or has been sent for QEMU to take.
    waiting: Option<Timestamp>,
    stopped: Option<Timestamp>,
    /// Number of the last frame that can have been delivered, since it came before the stop.
    ceiling: Option<u64>,
    reader: Reader,
    /// Frames that QEMU itself had read when this began.
    own_before: Option<u64>,
    /// Frames that have found no room.
    dropped: SinceFirst,
    /// Whether vhost-net has read after QEMU had: then nobody knows what became of QEMU's frames.
    is_given_back: bool,
    /// Whether the last sample was taken after the reader was seen asleep beside a frame that waited,
    /// and not as the first since the stop: what had entered by that is in the queue by the next.
    is_left_alone: bool,
    /// Whether the TAP is gone.
    is_lost: bool,
    /// Frames delivered, by what was known when the cut was given.
    given: Option<u64>,
}

/// A time below `bound` that the moment of a sample decides, whose last digits are chance.
fn chance(at: Timestamp, bound: Duration) -> Duration {
    let spread = at.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    let nanos = (bound.as_nanos() * u128::from(spread)) >> 32;
    Duration::from_nanos(u64::try_from(nanos).unwrap_or_default())
}

impl Placement {
    /// Begins with a recording. `capacity` is the length of each queue, frames (`txqueuelen`).
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

    /// Takes in how frames go to the guest, and in how many queues; to be called before each sample. With a
    /// queue that goes, what is in it goes too and is counted nowhere, so everything begins anew.
    pub fn read_by(&mut self, path: Path, queues: u32) {
        self.path = path;
        if self.queues != queues {
            self.queues = queues;
            self.recounted();
        }
    }

    /// Takes in that frames are counted in another way from now on: samples of before do not tell anything.
    pub fn recounted(&mut self) {
        self.evidence = Evidence::default();
        self.history.clear();
    }

    /// Takes in what was read at `at`: first `reader`, then `counts`, then `entered`
    /// ([`common::maps::GateUsage::entered`]). In this order the counts have all that a reader who
    /// sleeps has read, and a frame that comes in between makes the queue look longer, which does no
    /// harm.
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

    /// Takes in that no sample can be taken, because the TAP is gone: what is known now is all.
    pub fn lost(&mut self) {
        self.is_lost = true;
    }

    /// Takes in that the VM has stopped.
    pub fn stopped(&mut self, at: Timestamp) {
        self.stopped.get_or_insert(at);
    }

    /// The cut by time: at the stop, or when the VM is known to have run last if that is earlier, for on
    /// a loaded host the stop is reported late.
    fn at_stop(&self, stopped: Timestamp) -> Cut {
        let delivered = self.delivered();
        let before = |sample: &&Sample| sample.counts.taken < delivered;
        let ran = self.history.iter().rev().find(before);
        Cut::at_stop(ran.map_or(stopped, |sample| sample.at.min(stopped)))
    }

    /// Takes in that a frame was sent into the TAP past the gate, after the stop. One that was
    /// refused, the queue being full, was not sent.
    pub fn injected(&mut self, at: Timestamp) {
        self.injected += 1;
        self.waiting.get_or_insert(at);
    }

    /// Takes in that each of several queues has been sent a frame, or was full, after the stop.
    pub fn probed(&mut self) {
        self.is_probed = true;
    }

    /// Frames that have found no room since this began.
    pub fn tap_full(&self) -> Option<u64> {
        let last = self.history.back()?;
        self.dropped.at(last.counts.dropped)
    }

    /// Frames at most that the VM loses if it runs on after it has stopped: those that QEMU has read since,
    /// which it throws away. What came before the stop is read first, then what was sent for QEMU to read.
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

    /// Returns what to do next.
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
            None if self.is_settled() => self.give(self.cut(stopped, true)),
            None if self.is_lost || now >= stopped + self.patience() => {
                self.give(self.cut(stopped, false))
            }
            None => Step::SampleAt(next.min(stopped + self.patience())),
            Some(_) if self.is_lost => Step::Done,
            Some(given) if given != self.delivered() && self.is_revisable() => {
                self.given = Some(self.delivered());
                Step::Revised(self.cut(stopped, true))
            }
            Some(_) if now >= stopped + WATCH => Step::Done,
            Some(_) => Step::SampleAt(next + PATIENT_INTERVAL),
        }
    }

    fn give(&mut self, cut: Cut) -> Step {
        self.given = Some(self.delivered());
        Step::Cut(cut)
    }

    /// Frames read that the guest has had, at least.
    fn delivered(&self) -> u64 {
        let taken = self.history.back().map_or(0, |last| last.counts.taken);
        taken.saturating_sub(self.undelivered().0)
    }

    /// Frames that QEMU itself has read since this began.
    fn own(&self, sample: &Sample) -> Option<u64> {
        Some(sample.counts.own?.saturating_sub(self.own_before?))
    }

    /// Whether QEMU had read frames by `last`, and vhost-net has read more by `sample`.
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

    /// How long after the stop the cut may be waited for.
    fn patience(&self) -> Duration {
        match self.reader {
            Reader::Busy => LATEST_CUT,
            Reader::Unknown | Reader::Asleep => DEADLINE,
        }
    }

    /// Whether QEMU reads no more: a frame was there to read, and QEMU slept or, where that cannot be
    /// seen, has not read it for [`SETTLE`]. A frame that was sent is either among those that wait, or
    /// was the one that is read after the stop.
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

    /// Whether a cut can be revised. A frame is counted as read before it is counted as QEMU's, which has
    /// happened when QEMU sleeps again.
    fn is_revisable(&self) -> bool {
        self.evidence.is_sure() && (self.reader == Reader::Unknown || self.is_settled())
    }

    /// Frames that QEMU reads after the stop, and has held back then, at most, and whether it is not fewer.
    ///
    /// Without a probe nobody can tell whether QEMU has held one frame back of a queue or not; and all probes
    /// go to one queue. QEMU beside vhost-net reads each queue that has a frame, so a count of fewer was of
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

    fn cut(&self, stopped: Timestamp, settled: bool) -> Cut {
        let (_, is_known) = self.undelivered();
        let delivered = self.delivered();
        let (Some((least, _)), Some(greatest)) = (self.evidence.least, self.evidence.greatest)
        else {
            return self.at_stop(stopped);
        };
        let is_sure = self.evidence.is_sure();
        let is_certain = is_sure && is_known && settled;
        if self.queues > 1 {
            // What QEMU has held back of a queue, it may have held back for long.
            let is_found = is_sure && is_known;
            let cut = is_found.then(|| self.cut_of_several(least, delivered, settled));
            return cut.flatten().unwrap_or_else(|| self.at_stop(stopped));
        }
        if !is_sure && self.evidence.is_mostly_empty() {
            return self.at_stop(stopped);
        }
        let ahead = if self.path == Path::Vhost { AHEAD } else { 0 };
        let full = greatest.saturating_sub_unsigned(self.capacity + ahead);
        let (number, exact) = self.reach(if is_sure { least } else { full }, delivered);
        Cut::Number {
            number: self.ceiling.map_or(number, |ceiling| number.min(ceiling)),
            overflow: !(is_certain && exact),
        }
    }

    /// The cut if `delivered` frames at least were, in whatever order, and `least` is the difference of
    /// empty queues. If after a sample no fewer were read than QEMU reads in the end, the VM ran at the sample.
    fn cut_of_several(&self, least: i64, delivered: u64, settled: bool) -> Option<Cut> {
        let last = self.history.back()?;
        let was_empty = |sample: &&Sample| {
            sample.left_of(sample.counts.taken) == least && sample.counts.taken <= delivered
        };
        let sample = self.history.iter().rev().find(was_empty)?;
        let after = self
            .ceiling
            .map_or(sample.entered, |it| it.min(sample.entered));
        let had = delivered - sample.counts.taken;
        let is_certain = settled && self.is_probed;
        Some(match self.ceiling {
            Some(until)
                if is_certain
                    && had > 0
                    && after < until
                    && last.counts.dropped == sample.counts.dropped =>
            {
                Cut::Among { after, had, until }
            }
            _ => Cut::Number {
                number: after,
                overflow: !(is_certain && had == 0),
            },
        })
    }

    /// The number of the last of `delivered` frames, if `constant` is the difference of an empty
    /// queue, and whether it cannot have been a later one.
    fn reach(&self, constant: i64, delivered: u64) -> (u64, bool) {
        let left = |sample: &Sample| sample.left_of(delivered).saturating_sub(constant);
        // Of a sample whose frames were all delivered and no others, the last may have been dropped.
        let before = self.history.iter().rposition(|sample| left(sample) < 0);
        let at = || self.history.iter().rposition(|sample| left(sample) == 0);
        let mut later = self
            .history
            .iter()
            .skip(before.or_else(at).unwrap_or(usize::MAX));
        let Some(sample) = later.next() else {
            return (0, false);
        };
        let number = sample.entered.saturating_add(left(sample).unsigned_abs());
        // What had entered by a sample has reached the queue, or its end, by the next.
        let mut reached = later.skip_while(|later| later.entered < number);
        let next = reached.nth(1);
        (
            number,
            next.is_some_and(|next| next.counts.dropped == sample.counts.dropped),
        )
    }
}
