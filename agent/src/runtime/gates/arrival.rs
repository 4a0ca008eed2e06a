//! A TAP whose VM comes: frames are held, judged by the cut, and replayed.

use std::time::Duration;

use common::maps::{GateUsage, HeldFrame};
use common::signal::NicCut;

use super::recording::lengthen;
use crate::clock::now;
use crate::datapath::{Datapath, DatapathError};
use crate::net::tap_queue::TapQueues;
use crate::net::tap_socket::{Sent, TapSocket};
use crate::proto::Timestamp;
use crate::proto::handover::{ClockOffset, Hold, HoldLimits, HoldReport, Pace};

/// How often it is looked whether the gate has opened itself.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);
/// Pause before a frame is offered again, after a burst or to a queue that was full.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);
/// After so long without a frame the gate is opened from here.
const SILENCE: Duration = Duration::from_secs(3);
/// A held frame that has not come after so long does not come.
const LOST_AFTER: Duration = Duration::from_millis(10);
/// How often the gate's lease is renewed.
const LEASE_INTERVAL: Duration = Duration::from_millis(500);
/// Frames that the queue gets room for, until the VM has read what was replayed: 7 s of 100 Mbit/s in
/// packets of 1400 bytes, for half a megabyte.
const QUEUE_LENGTH: u32 = 65_536;
/// How often a queue is looked at until it may have its old length again.
const DRAIN_INTERVAL: Duration = Duration::from_millis(500);
/// How long a VM may take to catch up once it has read what was replayed: more has come meanwhile.
const CATCH_UP: Duration = Duration::from_secs(10);
/// When a queue is left as it is.
const DRAIN_TIME: Duration = Duration::from_secs(60);

/// How an arrival stands.
pub(super) enum Progress {
    /// It goes on.
    Busy,
    /// The gate is open, and everything is in the TAP.
    Opened {
        report: HoldReport,
        drain: Option<Drain>,
    },
}

/// One TAP.
pub(super) struct Arrival {
    ifindex: u32,
    /// When it began.
    since: Timestamp,
    hold: Hold,
    /// From the cut on.
    replay: Option<Replay>,
    /// Nothing can be put into the TAP, so the gate is better open.
    gives_up: bool,
    lease_due: Timestamp,
}

struct Replay {
    socket: TapSocket,
    /// What the gate was told last.
    published: Option<u64>,
    due: Timestamp,
    last_frame: Timestamp,
    pace: Pace,
    /// The gate was opened from here; what it held just before may still come.
    cleared: bool,
    /// Length of the queue before.
    length: Option<u32>,
}

impl Arrival {
    pub(super) fn new(ifindex: u32, limits: HoldLimits) -> Self {
        let since = now();
        Self {
            ifindex,
            since,
            hold: Hold::new(limits),
            replay: None,
            gives_up: false,
            lease_due: since + LEASE_INTERVAL,
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

    /// Takes in a held frame. One that came before is of another arrival at the same TAP.
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
        let length = lengthen(queues, self.ifindex, QUEUE_LENGTH);
        let read = queues.counts(self.ifindex).map_or(0, |counts| counts.read);
        match TapSocket::open(self.ifindex) {
            Ok(socket) => {
                self.replay = Some(Replay {
                    socket,
                    published: None,
                    due: now,
                    last_frame: now,
                    pace: Pace::new(now, read),
                    cleared: false,
                    length,
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

    /// Replays what can be, and finds out whether the gate is open.
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
            datapath.gate_renew(self.ifindex)?;
        }
        if self.gives_up {
            datapath.gate_clear(self.ifindex)?;
            return Ok(Progress::Opened {
                report: self.hold.report(),
                drain: None,
            });
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
        if !replay.send(&mut self.hold, self.ifindex) {
            replay.due = now + RETRY_INTERVAL;
            return Ok(Progress::Busy);
        }
        replay.due = now + LOOK_INTERVAL;
        if !replay.cleared {
            let usage = datapath.gate(self.ifindex)?.map(|(_, usage)| usage);
            match usage.filter(|usage| usage.held & GateUsage::OPEN == 0) {
                Some(usage) => {
                    replay.publish(&mut self.hold, datapath, self.ifindex, &usage, now)?;
                    if now.since(replay.last_frame) >= SILENCE {
                        // What it holds at this moment comes with the next look.
                        datapath.gate_clear(self.ifindex)?;
                        replay.cleared = true;
                    }
                    return Ok(Progress::Busy);
                }
                None => datapath.gate_clear(self.ifindex)?,
            }
        }
        let read = replay.pace.expected();
        Ok(Progress::Opened {
            report: self.hold.report(),
            drain: replay
                .length
                .map(|length| Drain::new(self.ifindex, length, read)),
        })
    }
}

impl Replay {
    /// Puts into the queue what is to be replayed; `false` if something has to wait.
    fn send(&mut self, hold: &mut Hold, ifindex: u32) -> bool {
        while let Some(packet) = hold.next_replay() {
            if !self.pace.allows() {
                return false;
            }
            match self.socket.send(&packet.frame) {
                Ok(Sent::Queued) => {
                    hold.replayed(now());
                    self.pace.sent();
                }
                Ok(Sent::Full) => {
                    hold.refused();
                    return false;
                }
                Err(error) => {
                    tracing::debug!(ifindex, %error, "A packet is not replayed");
                    hold.given_up();
                }
            }
        }
        true
    }

    /// Tells the gate how far it is replayed.
    fn publish(
        &mut self,
        hold: &mut Hold,
        datapath: &Datapath,
        ifindex: u32,
        usage: &GateUsage,
        now: Timestamp,
    ) -> Result<(), DatapathError> {
        if now.since(self.last_frame) >= LOST_AFTER {
            hold.drained(usage.held);
        }
        let done = hold.done();
        if let Some(done) = done.filter(|_| done != self.published) {
            datapath.gate_replayed(ifindex, done)?;
            self.published = Some(done);
        }
        Ok(())
    }
}

/// A queue that gets its old length again when its VM has read what was put into it.
pub(super) struct Drain {
    ifindex: u32,
    length: u32,
    /// What the hypervisor has to have read, and when it was first seen to have.
    read: u64,
    read_since: Option<Timestamp>,
    due: Timestamp,
    until: Timestamp,
}

impl Drain {
    pub(super) fn new(ifindex: u32, length: u32, read: u64) -> Self {
        let now = now();
        Self {
            ifindex,
            length,
            read,
            read_since: None,
            due: now + DRAIN_INTERVAL,
            until: now + DRAIN_TIME,
        }
    }

    pub(super) fn due(&self) -> Timestamp {
        self.due
    }

    /// How long the queue was before.
    pub(super) fn length(&self) -> u32 {
        self.length
    }

    /// Returns whether it is done.
    pub(super) fn tend(&mut self, queues: &mut TapQueues, now: Timestamp) -> bool {
        if now < self.due {
            return false;
        }
        self.due = now + DRAIN_INTERVAL;
        let Ok(counts) = queues.counts(self.ifindex) else {
            return true;
        };
        if counts.read < self.read {
            return now >= self.until;
        }
        if now.since(*self.read_since.get_or_insert(now)) < CATCH_UP {
            return false;
        }
        if let Err(error) = queues.set_length(self.ifindex, self.length) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "A queue stays longer than it was"
            );
        }
        true
    }
}
