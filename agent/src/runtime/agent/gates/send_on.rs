//! Forwards packets that a stopped VM has not read from its TAP to the VM's new address.

use std::collections::BTreeMap;
use std::error::Error;
use std::time::Duration;

use common::maps::{Address, Gate, HeldFrame};

use crate::clock::now;
use crate::datapath::{Datapath, DatapathError};
use crate::net::raw_socket::RawSocket;
use crate::net::tap_socket::Sent;
use crate::proto::handover::{Cut, HoldLimits, Unread, Way};
use crate::proto::{GateEvent, Timestamp};

/// Pause before the next attempt to send on a full socket.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// Copies of one TAP's unicast packets, and the paths for forwarding them.
pub(super) struct SendOn {
    ifindex: u32,
    /// Start of this recording. Frames held before belong to another gate at the same TAP.
    since: Timestamp,
    unread: Unread,
    /// The migration; set when the VM stops.
    migration: Option<u64>,
    paths: BTreeMap<Address, Way>,
    socket: Option<RawSocket>,
    /// Last number published to the gate.
    published: u64,
    /// When to send a packet again that the socket refused.
    retry: Option<Timestamp>,
}

impl SendOn {
    /// Creates an empty store. The caller must do so before the gate records.
    pub(super) fn new(ifindex: u32, limits: HoldLimits) -> Self {
        Self {
            ifindex,
            since: now(),
            unread: Unread::new(limits),
            migration: None,
            paths: BTreeMap::new(),
            socket: None,
            published: Gate::CLOSED,
            retry: None,
        }
    }

    /// Continues after a stop that the source took back.
    pub(super) fn again(self, datapath: &Datapath) -> Self {
        let mut again = Self {
            unread: self.unread.again(),
            migration: None,
            retry: None,
            ..self
        };
        if again.published != Gate::CLOSED {
            again.publish(datapath, Gate::CLOSED);
        }
        again
    }

    /// Adds a frame from `HELD`. Ignores a frame from before `since`.
    pub(super) fn push(&mut self, head: &HeldFrame, frame: &[u8]) {
        if Timestamp(head.at_ns) >= self.since {
            self.unread.push(head, frame);
        }
    }

    /// Handles the stop of the VM.
    pub(super) fn stopped(&mut self, migration: u64) {
        self.migration = Some(migration);
    }

    /// Handles the cut, which says what the VM has read.
    pub(super) fn cut(&mut self, datapath: &Datapath, cut: Cut) {
        if let Err(error) = self.find_paths(datapath) {
            tracing::warn!(
                ifindex = self.ifindex,
                error = &*error,
                "What a VM has not read is not sent on"
            );
        }
        self.unread.cut(cut);
    }

    fn find_paths(&mut self, datapath: &Datapath) -> Result<(), Box<dyn Error>> {
        self.paths = paths(datapath, self.ifindex)?;
        self.socket = Some(RawSocket::open()?);
        Ok(())
    }

    /// Returns true if new frames have to be forwarded at once.
    pub(super) fn is_urgent(&self) -> bool {
        self.unread.is_cut()
    }

    /// Returns when to send a refused packet again.
    pub(super) fn due(&self) -> Option<Timestamp> {
        self.retry
    }

    /// Forwards waiting packets. Publishes to the gate that nothing waits any more.
    pub(super) fn tend(&mut self, datapath: &Datapath) {
        if !self.unread.is_cut() {
            return;
        }
        self.retry = self.send().then(|| now() + RETRY_INTERVAL);
        let lost = match datapath.gate(self.ifindex) {
            Ok(Some((_, usage))) => usage.lost,
            // The TAP is gone, so no further packet enters it.
            Ok(None) | Err(_) => return,
        };
        let done = self.unread.done(lost);
        if done != self.published {
            self.publish(datapath, done);
        }
    }

    /// Returns an event with the packets forwarded or dropped since the last call.
    pub(super) fn report(&mut self) -> Option<GateEvent> {
        Some(GateEvent::SentOn {
            migration: self.migration?,
            report: self.unread.take_report()?,
        })
    }

    /// Sends packets while the socket accepts them. Returns `true` if some have to wait.
    fn send(&mut self) -> bool {
        while let Some((packet, to)) = self.unread.next(&self.paths) {
            let sent = self
                .socket
                .as_ref()
                .map(|socket| socket.send(packet, to.into()));
            match sent {
                Some(Ok(Sent::Queued)) => self.unread.sent(),
                Some(Ok(Sent::Full)) => return true,
                Some(Err(error)) => {
                    tracing::debug!(ifindex = self.ifindex, %error, "A packet is not sent on");
                    self.unread.given_up();
                }
                None => self.unread.given_up(),
            }
        }
        false
    }

    fn publish(&mut self, datapath: &Datapath, done: u64) {
        match datapath.gate_sent_on(self.ifindex, done) {
            Ok(_) => self.published = done,
            Err(error) => tracing::debug!(
                ifindex = self.ifindex,
                error = &error as &dyn Error,
                "Packets for a VM that has stopped pass into its TAP for longer"
            ),
        }
    }
}

/// Returns the forwarding path for each address that the VM of a TAP leaves.
fn paths(datapath: &Datapath, ifindex: u32) -> Result<BTreeMap<Address, Way>, DatapathError> {
    let forwards = datapath.forwards()?.into_iter();
    Ok(forwards
        .filter(|(_, forward)| forward.ifindex == ifindex)
        .map(|(key, forward)| {
            let path = Way {
                to: forward.destination,
                difference: forward.difference,
            };
            (key.address, path)
        })
        .collect())
}
