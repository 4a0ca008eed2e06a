//! The thread's loop: waits for commands, held frames and deadlines, and passes them to the TAPs.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use common::maps::{GateMode, HeldFrame};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use tokio::sync::mpsc::UnboundedSender;

use super::GatesError;
use super::Message;
use super::arrival::{Arrival, Progress};
use super::recording::Recording;
use crate::clock::now;
use crate::config::Handover;
use crate::datapath::{Datapath, Held, REPLAY_LEASE};
use crate::net::tap_queue::TapQueues;
use crate::proto::handover::HoldLimits;
use crate::proto::{GateCommand, GateEvent, Timestamp};
use crate::runtime::trace::Replays;

/// Interval at which held frames are read while nobody waits for them. The ring buffer has room for
/// many times more.
const TAKE_INTERVAL: Duration = Duration::from_millis(5);
/// Longest sleep.
const IDLE: Duration = Duration::from_secs(1);

/// State of a TAP's gate.
enum Tap {
    /// The VM leaves.
    Recording(Box<Recording>),
    /// The VM arrives.
    Arrival(Box<Arrival>),
    /// An earlier agent held frames for this TAP. The gate stays closed for [`REPLAY_LEASE`], in
    /// case the migration continues.
    Orphan { until: Timestamp },
}

/// State of the thread.
pub(super) struct GateThread {
    datapath: Datapath,
    held: Held,
    queues: TapQueues,
    limits: HoldLimits,
    taps: BTreeMap<u32, Tap>,
    commands: Receiver<Message>,
    woken: UnixStream,
    events: UnboundedSender<GateEvent>,
    replays: Replays,
}

impl GateThread {
    pub(super) fn new(
        datapath: Datapath,
        queues: TapQueues,
        config: &Handover,
        (commands, woken): (Receiver<Message>, UnixStream),
        events: UnboundedSender<GateEvent>,
        replays: Replays,
    ) -> Result<Self, GatesError> {
        let mut held = datapath.held()?;
        // Unread frames of an earlier agent belong to no known arrival.
        while held.next(|_, _| ()).is_some() {}
        let mut taps = BTreeMap::new();
        for (ifindex, gate, _) in datapath.gates()? {
            if gate.mode == GateMode::Hold as u32 {
                let until = Timestamp(gate.until_ns).min(now() + REPLAY_LEASE);
                taps.insert(ifindex, Tap::Orphan { until });
            } else {
                datapath.gate_clear(ifindex)?;
            }
        }
        Ok(Self {
            held,
            datapath,
            queues,
            limits: HoldLimits {
                bytes: usize::try_from(u64::from(config.held_mib) << 20).unwrap_or(usize::MAX),
                age: config.held,
            },
            taps,
            commands,
            woken,
            events,
            replays,
        })
    }

    /// Runs until the handle is dropped.
    pub(super) fn run(mut self) {
        loop {
            self.sleep();
            loop {
                match self.commands.try_recv() {
                    Ok((command, ready)) => {
                        self.perform(command);
                        if let Some(ready) = ready {
                            let _ = ready.send(());
                        }
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return,
                }
            }
            self.take_held();
            self.tend();
        }
    }

    /// Sleeps until a descriptor is ready or a deadline passes.
    fn sleep(&mut self) {
        let now = now();
        let mut due = now + IDLE;
        let mut urgent = false;
        for tap in self.taps.values() {
            let of_tap = match tap {
                Tap::Recording(recording) => {
                    urgent |= recording.send_on.is_urgent();
                    recording.due(now).min(now + TAKE_INTERVAL)
                }
                Tap::Arrival(arrival) => {
                    urgent |= arrival.is_replaying();
                    arrival.due(now).min(now + TAKE_INTERVAL)
                }
                Tap::Orphan { until } => *until,
            };
            due = due.min(of_tap);
        }
        let mut fds = vec![PollFd::new(self.woken.as_fd(), PollFlags::POLLIN)];
        if urgent {
            fds.push(PollFd::new(self.held.as_fd(), PollFlags::POLLIN));
        }
        // A signal or an error ends the sleep early, which is harmless.
        let _ = ppoll(
            &mut fds,
            Some(TimeSpec::from_duration(due.since(now))),
            None,
        );
        let mut bytes = [0; 64];
        while matches!(self.woken.read(&mut bytes), Ok(count) if count == bytes.len()) {}
    }

    fn perform(&mut self, command: GateCommand) {
        match command {
            GateCommand::Record {
                ifindex,
                mac,
                vhost,
            } => self.record(ifindex, mac, vhost),
            GateCommand::Cut {
                ifindex,
                migration,
                stopped,
            } => {
                if let Some(Tap::Recording(recording)) = self.taps.get_mut(&ifindex) {
                    recording.stopped(migration, stopped);
                }
            }
            GateCommand::Hold { ifindex } => {
                let arrival = Arrival::new(ifindex, self.limits, self.replays.clone());
                self.taps.insert(ifindex, Tap::Arrival(Box::new(arrival)));
            }
            GateCommand::Replay {
                ifindex,
                cut,
                clock_ns,
                clock,
            } => {
                // Frames that arrived before the cut must be held before the cut is applied.
                self.take_held();
                if let Some(Tap::Arrival(arrival)) = self.taps.get_mut(&ifindex) {
                    arrival.cut(&mut self.queues, &cut, clock_ns, &clock);
                }
            }
            GateCommand::ReplayBlind { ifindex, since } => {
                self.take_held();
                if let Some(Tap::Arrival(arrival)) = self.taps.get_mut(&ifindex) {
                    arrival.cut_blind(&mut self.queues, since);
                }
            }
            GateCommand::Clear { ifindex } => self.clear(ifindex),
        }
    }

    fn record(&mut self, ifindex: u32, mac: [u8; 6], vhost: bool) {
        let begun = match self.taps.remove(&ifindex) {
            Some(Tap::Arrival(arrival)) => {
                // The VM leaves again before its arrival is complete; the arrival goes on.
                self.taps.insert(ifindex, Tap::Arrival(arrival));
                None
            }
            Some(Tap::Recording(recording)) => {
                let (again, event) = recording.again(&self.datapath, &mut self.queues);
                if let Some(event) = event {
                    self.tell(event);
                }
                Some(again)
            }
            Some(Tap::Orphan { .. }) | None => {
                let (datapath, queues) = (&self.datapath, &mut self.queues);
                match Recording::begin(datapath, queues, ifindex, (mac, vhost), self.limits) {
                    Ok(recording) => Some(recording),
                    Err(error) => {
                        tracing::warn!(
                            ifindex,
                            error = &*error,
                            "A TAP is not recorded; its VM may lose and double packets"
                        );
                        None
                    }
                }
            }
        };
        match begun {
            Some(recording) => {
                self.taps
                    .insert(ifindex, Tap::Recording(Box::new(recording)));
            }
            None => self.tell(GateEvent::NotRecorded { ifindex }),
        }
    }

    fn clear(&mut self, ifindex: u32) {
        // Includes the copies of unicast packets.
        self.take_held();
        if let Some(Tap::Recording(mut recording)) = self.taps.remove(&ifindex) {
            if let Some(cut) = recording.conclude(&self.datapath) {
                self.tell(GateEvent::Cut { ifindex, cut });
            }
            recording.send_on.tend(&self.datapath);
            if let Some(event) = recording.send_on.report() {
                self.tell(event);
            }
        }
        if let Err(error) = self.datapath.gate_clear(ifindex) {
            tracing::warn!(
                ifindex,
                error = &error as &dyn std::error::Error,
                "Cannot open a gate; it opens by itself"
            );
        }
    }

    /// Takes all held frames out of the ring buffer.
    fn take_held(&mut self) {
        let taps = &mut self.taps;
        let mut push = |head: &HeldFrame, frame: &[u8]| match taps.get_mut(&head.ifindex) {
            Some(Tap::Arrival(arrival)) => arrival.push(head, frame),
            Some(Tap::Recording(recording)) => recording.send_on.push(head, frame),
            Some(Tap::Orphan { .. }) | None => {}
        };
        while self.held.next(&mut push).is_some() {}
    }

    /// Runs everything whose deadline has passed.
    fn tend(&mut self) {
        let now = now();
        let ifindexes: Vec<u32> = self.taps.keys().copied().collect();
        for ifindex in ifindexes {
            match self.taps.get_mut(&ifindex) {
                Some(Tap::Recording(recording)) => {
                    recording.renew(&self.datapath, now);
                    let cut = recording.tend(&self.datapath, &mut self.queues, now);
                    recording.send_on.tend(&self.datapath);
                    let events = [
                        cut.map(|cut| GateEvent::Cut { ifindex, cut }),
                        recording.send_on.report(),
                    ];
                    for event in events.into_iter().flatten() {
                        self.tell(event);
                    }
                }
                Some(Tap::Arrival(arrival)) => {
                    match arrival.tend(&self.datapath, &mut self.queues, now) {
                        Ok(Progress::Busy) => {}
                        Ok(Progress::Opened(report)) => {
                            self.taps.remove(&ifindex);
                            self.tell(GateEvent::Opened { ifindex, report });
                        }
                        Err(error) => tracing::warn!(
                            ifindex,
                            error = &error as &dyn std::error::Error,
                            "A gate cannot be tended; it opens when its lease ends"
                        ),
                    }
                }
                Some(Tap::Orphan { until }) if *until <= now => self.clear(ifindex),
                Some(Tap::Orphan { .. }) | None => {}
            }
        }
    }

    fn tell(&self, event: GateEvent) {
        // The send fails only if the agent is ending.
        let _ = self.events.send(event);
    }
}
