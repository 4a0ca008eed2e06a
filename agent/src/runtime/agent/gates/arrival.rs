//! Gate of a TAP whose VM arrives: holds frames, compares them with the cut, and replays.

use std::time::Duration;

use common::maps::{GateUsage, HeldFrame};
use common::signal::NicCut;
use common::trace::Decision;

use super::recording::probes;
use crate::clock::now;
use crate::datapath::{Datapath, DatapathError, HOLD_LEASE, REPLAY_LEASE};
use crate::net::tap_queue::TapQueues;
use crate::net::tap_socket::{Sent, TapSocket};
use crate::proto::Timestamp;
use crate::proto::handover::{ClockOffset, Hold, HoldLimits, HoldReport, Pace, SinceFirst};
use crate::runtime::trace::Replays;

/// Interval of the checks whether the gate has opened itself.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);
/// Pause before the next attempt to send, after a burst or a full queue.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);
/// Time without a frame after which the agent opens the gate.
const SILENCE: Duration = Duration::from_secs(3);
/// Interval at which the agent renews the gate's lease.
const LEASE_INTERVAL: Duration = Duration::from_millis(500);

/// State of an arrival.
pub(super) enum Progress {
    /// Frames are still held or wait for the TAP.
    Busy,
    /// The gate is open, and the TAP has all replayed frames.
    Opened(HoldReport),
}

/// Handover of one arriving TAP.
pub(super) struct Arrival {
    ifindex: u32,
    /// Start of this arrival. Earlier frames belong to another arrival at the same TAP.
    since: Timestamp,
    hold: Hold,
    /// Number of the TAP's queues, 0 while unknown; `can_change`: the TAP is multi-queue.
    queues: u32,
    can_change: bool,
    /// True until a probe is in each queue. QEMU, while it waits for its VM, reads one frame ahead
    /// and discards it when vhost-net takes the TAP over; the discarded frame then is a probe.
    wants_first: bool,
    /// Set when the cut arrives.
    replay: Option<Replay>,
    /// True if nothing can be written to the TAP; the gate is then opened without a replay.
    gives_up: bool,
    lease_due: Timestamp,
    /// Frames that found the queue of the TAP full, since this arrival began.
    dropped: SinceFirst,
    replays: Replays,
}

struct Replay {
    socket: TapSocket,
    /// Last number published to the gate.
    published: Option<u64>,
    due: Timestamp,
    last_frame: Timestamp,
    pace: Pace,
}

impl Arrival {
    pub(super) fn new(ifindex: u32, limits: HoldLimits, replays: Replays) -> Self {
        let since = now();
        Self {
            ifindex,
            since,
            hold: Hold::new(limits),
            queues: 0,
            can_change: true,
            wants_first: true,
            replay: None,
            gives_up: false,
            lease_due: since + LEASE_INTERVAL,
            dropped: SinceFirst::default(),
            replays,
        }
    }

    pub(super) fn is_replaying(&self) -> bool {
        self.replay.is_some()
    }

    pub(super) fn due(&self, now: Timestamp) -> Timestamp {
        self.replay
            .as_ref()
            .map_or(self.lease_due, |replay| replay.due.max(now))
    }

    /// Adds a held frame. Ignores a frame from before `since`: it belongs to another arrival at the
    /// TAP.
    pub(super) fn push(&mut self, head: &HeldFrame, frame: &[u8]) {
        let at = Timestamp(head.at_ns);
        if at < self.since {
            return;
        }
        self.hold.push(head, frame);
        if let Some(replay) = &mut self.replay {
            replay.last_frame = at;
            replay.due = at;
        }
    }

    pub(super) fn cut(
        &mut self,
        queues: &mut TapQueues,
        cut: &NicCut,
        clock_ns: u64,
        clock: &ClockOffset,
    ) {
        self.hold.cut(now(), clock_ns, cut, clock);
        self.begin(queues);
    }

    pub(super) fn cut_blind(&mut self, queues: &mut TapQueues, since: Timestamp) {
        self.hold.cut_blind(now(), since);
        self.begin(queues);
    }

    fn begin(&mut self, queues: &mut TapQueues) {
        if self.replay.is_some() {
            return;
        }
        let now = now();
        let read = queues.counts(self.ifindex).map_or(0, |counts| counts.read);
        match TapSocket::open(self.ifindex) {
            Ok(socket) => {
                self.replay = Some(Replay {
                    socket,
                    published: None,
                    due: now,
                    last_frame: now,
                    pace: Pace::new(now, read),
                });
            }
            Err(error) => {
                tracing::warn!(
                    ifindex = self.ifindex,
                    %error,
                    "Nothing can be replayed; the VM loses what came during the pause"
                );
                self.gives_up = true;
            }
        }
    }

    /// Writes probes to the queues once the TAP accepts frames.
    fn send_first(&mut self, queues: &mut TapQueues) {
        if self.can_change {
            self.count_queues(queues);
        }
        if !self.wants_first {
            return;
        }
        if let Ok(socket) = TapSocket::open(self.ifindex) {
            for frame in probes(self.queues) {
                // A full queue has frames of its own to lose.
                let is_sent = matches!(socket.send(&frame), Ok(Sent::Queued));
                self.wants_first &= !is_sent;
            }
        }
    }

    /// Reads the number of queues. A new queue may lose its first frame and takes over flows of
    /// other queues.
    fn count_queues(&mut self, queues: &mut TapQueues) {
        let Ok(several) = queues.queues(self.ifindex) else {
            return;
        };
        self.can_change = several.is_some();
        let found = several.unwrap_or(1);
        if self.queues != found {
            self.queues = found;
            self.wants_first = true;
            if self.replay.is_some() {
                self.hold.doubt();
            }
        }
    }

    /// Returns the report of all frames until the gate opened.
    fn report(&mut self, queues: &mut TapQueues) -> HoldReport {
        self.count_full(queues);
        self.hold.report()
    }

    fn count_full(&mut self, queues: &mut TapQueues) {
        if let Ok(counts) = queues.counts(self.ifindex) {
            self.hold.tap_full(self.dropped.look(counts.dropped));
        }
    }

    /// Replays pending frames and checks whether the gate is open.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub(super) fn tend(
        &mut self,
        datapath: &Datapath,
        queues: &mut TapQueues,
        now: Timestamp,
    ) -> Result<Progress, DatapathError> {
        if now >= self.lease_due {
            self.lease_due = now + LEASE_INTERVAL;
            let lease = match self.replay {
                None => HOLD_LEASE,
                Some(_) => REPLAY_LEASE,
            };
            if datapath.gate_renew(self.ifindex, lease)? {
                tracing::warn!(
                    ifindex = self.ifindex,
                    "This host kept the agent from running; frames have passed a gate, and its VM may get them twice"
                );
                self.hold.lapsed();
            }
        }
        if self.dropped.is_new() {
            self.count_full(queues);
        }
        self.send_first(queues);
        if self.gives_up {
            datapath.gate_clear(self.ifindex)?;
            return Ok(Progress::Opened(self.report(queues)));
        }
        let Some(replay) = &mut self.replay else {
            return Ok(Progress::Busy);
        };
        if replay.due > now {
            return Ok(Progress::Busy);
        }
        if replay.pace.is_due(now) {
            let read = queues.counts(self.ifindex).map(|counts| counts.read).ok();
            replay.pace.look(now, read, self.hold.waiting());
        }
        if !replay.send(&mut self.hold, self.ifindex, &self.replays) {
            replay.due = now + RETRY_INTERVAL;
            return Ok(Progress::Busy);
        }
        replay.due = now + LOOK_INTERVAL;
        let usage = datapath.gate(self.ifindex)?.map(|(_, usage)| usage);
        if let Some(usage) = usage.filter(|usage| usage.held & GateUsage::OPEN == 0) {
            let is_silent = now.since(replay.last_frame) >= SILENCE;
            if !(is_silent && replay.opens_next(&usage)) {
                replay.publish(&mut self.hold, datapath, self.ifindex, &usage, now)?;
                return Ok(Progress::Busy);
            }
        }
        datapath.gate_clear(self.ifindex)?;
        Ok(Progress::Opened(self.report(queues)))
    }
}

impl Replay {
    /// Writes pending frames to the TAP. Returns `false` if some have to wait.
    fn send(&mut self, hold: &mut Hold, ifindex: u32, replays: &Replays) -> bool {
        while let Some(packet) = hold.next_replay() {
            if !self.pace.allows() {
                return false;
            }
            match self.socket.send(&packet.frame) {
                Ok(Sent::Queued) => {
                    replays.tell(ifindex, Decision::Replayed, packet.number(), &packet.frame);
                    hold.replayed(now());
                    self.pace.sent();
                }
                Ok(Sent::Full) => {
                    hold.refused();
                    return false;
                }
                Err(error) => {
                    tracing::debug!(ifindex, %error, "A packet is not replayed");
                    replays.tell(ifindex, Decision::Dropped, packet.number(), &packet.frame);
                    hold.given_up();
                }
            }
        }
        true
    }

    /// Returns true if the gate opens at the next frame, so that it holds no frame any more. `usage`
    /// must have been read after the last number was published.
    fn opens_next(&self, usage: &GateUsage) -> bool {
        self.published == Some(usage.held)
    }

    /// Publishes the progress of the replay to the gate.
    fn publish(
        &mut self,
        hold: &mut Hold,
        datapath: &Datapath,
        ifindex: u32,
        usage: &GateUsage,
        now: Timestamp,
    ) -> Result<(), DatapathError> {
        hold.counted(now, usage.held, usage.lost);
        let done = hold.done();
        if let Some(done) = done.filter(|_| done != self.published) {
            datapath.gate_replayed(ifindex, done)?;
            self.published = Some(done);
        }
        Ok(())
    }
}
