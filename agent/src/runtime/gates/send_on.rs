//! What a VM that has stopped has not read of its TAP: sent on to the address that it has now.

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

/// Pause before a packet is offered again to a socket that was full.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// The copies of one TAP, and the way out.
pub(super) struct SendOn {
    ifindex: u32,
    /// When it began: what was held before is of another gate at the same TAP.
    since: Timestamp,
    unread: Unread,
    /// The migration, once the VM has stopped.
    migration: Option<u64>,
    ways: BTreeMap<Address, Way>,
    socket: Option<RawSocket>,
    /// What the gate was told last.
    published: u64,
    /// When a packet that was refused is offered again.
    retry: Option<Timestamp>,
}

impl SendOn {
    /// Keeps nothing yet. To be made before the gate records.
    pub(super) fn new(ifindex: u32, limits: HoldLimits) -> Self {
        Self {
            ifindex,
            since: now(),
            unread: Unread::new(limits),
            migration: None,
            ways: BTreeMap::new(),
            socket: None,
            published: Gate::CLOSED,
            retry: None,
        }
    }

    /// Goes on after a stop that was none.
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

    /// Takes in a frame of `HELD`.
    pub(super) fn push(&mut self, head: &HeldFrame, frame: &[u8]) {
        if Timestamp(head.at_ns) >= self.since {
            self.unread.push(head, frame);
        }
    }

    /// The VM was said to have stopped.
    pub(super) fn stopped(&mut self, migration: u64) {
        self.migration = Some(migration);
    }

    /// What the VM has read is known.
    pub(super) fn cut(&mut self, datapath: &Datapath, cut: Cut) {
        if let Err(error) = self.find_ways(datapath) {
            tracing::warn!(
                ifindex = self.ifindex,
                error = &*error,
                "What a VM has not read is not sent on"
            );
        }
        self.unread.cut(cut);
    }

    fn find_ways(&mut self, datapath: &Datapath) -> Result<(), Box<dyn Error>> {
        self.ways = ways(datapath, self.ifindex)?;
        self.socket = Some(RawSocket::open()?);
        Ok(())
    }

    /// Whether what comes next is to be sent on at once.
    pub(super) fn is_urgent(&self) -> bool {
        self.unread.is_cut()
    }

    /// When a packet is to be offered again.
    pub(super) fn due(&self) -> Option<Timestamp> {
        self.retry
    }

    /// Sends on what waits, and tells the gate when nothing does.
    pub(super) fn tend(&mut self, datapath: &Datapath) {
        if !self.unread.is_cut() {
            return;
        }
        self.retry = self.send().then(|| now() + RETRY_INTERVAL);
        let lost = match datapath.gate(self.ifindex) {
            Ok(Some((_, usage))) => usage.lost,
            // The TAP is gone, and nothing passes into it any more.
            Ok(None) | Err(_) => return,
        };
        let done = self.unread.done(lost);
        if done != self.published {
            self.publish(datapath, done);
        }
    }

    /// What has become of packets since this was asked last.
    pub(super) fn report(&mut self) -> Option<GateEvent> {
        Some(GateEvent::SentOn {
            migration: self.migration?,
            report: self.unread.take_report()?,
        })
    }

    /// Sends packets for as long as the network takes them; `true` if some have to wait.
    fn send(&mut self) -> bool {
        while let Some((packet, to)) = self.unread.next(&self.ways) {
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

/// Where packets go for the addresses that the VM of a TAP leaves.
fn ways(datapath: &Datapath, ifindex: u32) -> Result<BTreeMap<Address, Way>, DatapathError> {
    let forwards = datapath.forwards()?.into_iter();
    Ok(forwards
        .filter(|(_, forward)| forward.ifindex == ifindex)
        .map(|(key, forward)| {
            let way = Way {
                to: forward.destination,
                difference: forward.difference,
            };
            (key.address, way)
        })
        .collect())
}
