//! State of the host's side of the channel: received and missing frames, replies, outputs, packets.

use std::{
    collections::{BTreeSet, HashMap},
    io::Write as _,
    os::unix::net::UnixStream,
    time::Instant,
};

use super::RETRY_INTERVAL;
use crate::{
    guest::{
        program::Output,
        wire::{Command, FromGuest, Record, Reply, Request, TransportTotals, frame::Frame},
    },
    probe::timeline::Report,
};

/// Totals of an MPEG-TS receiver at one time, since the receiver's start.
#[derive(Clone, Copy, Debug)]
pub struct TransportAt {
    /// Time of the totals, in nanoseconds of the host's monotonic clock.
    pub host_ns: u64,
    /// Totals up to this time.
    pub totals: TransportTotals,
}

/// Counters of the channel's errors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelStats {
    /// Frames received from the guest.
    pub frames: u64,
    /// Bytes that belonged to no whole frame.
    pub skipped_bytes: u64,
    /// Frames that are missing now.
    pub missing: u64,
    /// Frames that arrived after a repeated request.
    pub recovered: u64,
}

#[derive(Default)]
pub(in crate::guest) struct State {
    pub(super) connections: Vec<Connection>,
    pub(super) next_connection: u64,
    pub(super) next_request: u64,
    pub(super) boot_id: Option<String>,
    /// Number of the next new frame; `None` before the first frame after a boot.
    pub(super) expected: Option<u32>,
    pub(super) missing: BTreeSet<u32>,
    /// Time of the last request for missing frames; `None` if no frame is missing.
    pub(super) asked_again: Option<Instant>,
    /// Index of the VM host from which the last frame arrived.
    pub(super) host: Option<usize>,
    pub(super) last_frame: Option<Instant>,
    pub(super) stats: ChannelStats,
    pub(super) replies: HashMap<u64, Reply>,
    pub(in crate::guest) outputs: HashMap<u64, Output>,
    /// Times at which frames were stamped and received.
    pub(super) reports: Vec<Report>,
    pub(super) arrivals: HashMap<u16, Vec<Stamped<Record>>>,
    pub(super) transport: HashMap<u16, Vec<Stamped<TransportTotals>>>,
    /// Start and end of each stall, in nanoseconds of the guest's monotonic clock.
    pub(super) stalls: Vec<(u64, u64)>,
}

/// A value that the guest reported, with its time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stamped<T> {
    /// Time of the value, in nanoseconds of the guest's monotonic clock.
    pub(super) guest_ns: u64,
    /// Number of the frame that carried the value.
    pub(super) number: u32,
    pub(super) what: T,
}

pub(super) struct Connection {
    pub(super) id: u64,
    pub(super) stream: UnixStream,
}

impl State {
    /// Writes to every QEMU. Only the QEMU with the running guest delivers the frame, and the guest
    /// executes a repeated request once.
    pub(super) fn write_all(&mut self, frame: &[u8]) {
        for connection in &mut self.connections {
            let _ = connection.stream.write_all(frame);
        }
    }

    /// Tracks frame numbers and the guest's clock. Returns true if the frame is new.
    pub(super) fn admit(
        &mut self,
        frame: &Frame,
        message: &FromGuest,
        host: usize,
        host_ns: u64,
    ) -> bool {
        let number = frame.number;
        if let FromGuest::Hello(boot_id) = message
            && self.boot_id.as_ref() != Some(boot_id)
        {
            self.boot_id = Some(boot_id.clone());
            self.expected = None;
            self.missing.clear();
            // After a reboot the guest's clock and its receivers start anew, so the old reports are
            // worthless.
            self.reports.clear();
            self.arrivals.clear();
            self.transport.clear();
            self.stalls.clear();
        }
        let expected = *self.expected.get_or_insert(number);
        if number < expected {
            let is_missing = self.missing.remove(&number);
            self.stats.recovered += u64::from(is_missing);
            return is_missing;
        }
        self.missing.extend(expected..number);
        self.expected = Some(number.wrapping_add(1));
        self.reports.push(Report {
            number,
            guest_ns: frame.guest_ns,
            host_ns,
            host: host as u8,
        });
        true
    }

    /// Discards the packets of a receiver.
    pub(super) fn forget_receiver(&mut self, receiver: u16) {
        self.arrivals.remove(&receiver);
        self.transport.remove(&receiver);
    }

    /// Requests missing frames, repeatedly until they have arrived.
    pub(super) fn ask_again(&mut self, connection: u64) {
        let (Some(from), Some(last)) = (self.missing.first(), self.missing.last()) else {
            self.asked_again = None;
            return;
        };
        if self
            .asked_again
            .is_some_and(|asked| asked.elapsed() < RETRY_INTERVAL)
        {
            return;
        }
        let command = Command::Resend {
            from: *from,
            to: last.wrapping_add(1),
        };
        self.asked_again = Some(Instant::now());
        let Ok(frame) = (Request { id: 0, command }).to_frame() else {
            return;
        };
        for connection in self
            .connections
            .iter_mut()
            .filter(|other| other.id == connection)
        {
            let _ = connection.stream.write_all(&frame);
        }
    }

    pub(super) fn handle(&mut self, frame: &Frame, message: FromGuest, host_ns: u64) {
        self.stats.frames += 1;
        match message {
            FromGuest::Hello(_) | FromGuest::Alive => {}
            FromGuest::Reply(reply) => {
                self.replies.insert(reply.id, reply);
            }
            FromGuest::Output(id, is_stderr, bytes) => {
                let output = self.outputs.entry(id).or_default();
                output.add(&bytes, is_stderr, host_ns);
            }
            FromGuest::Exit(id, code) => {
                let output = self.outputs.entry(id).or_default();
                output.finish(code, host_ns);
            }
            FromGuest::Records(receiver, records) => {
                let arrivals = self.arrivals.entry(receiver).or_default();
                arrivals.extend(records.into_iter().map(|record| Stamped {
                    guest_ns: frame.guest_ns,
                    number: frame.number,
                    what: record,
                }));
            }
            FromGuest::Transport(receiver, totals) => {
                let transport = self.transport.entry(receiver).or_default();
                transport.push(Stamped {
                    guest_ns: frame.guest_ns,
                    number: frame.number,
                    what: totals,
                });
            }
            FromGuest::Stall(from_ns, to_ns) => self.stalls.push((from_ns, to_ns)),
        }
    }
}
