//! Events of the kernel programs: the ring buffer `EVENTS` as a stream of [`DatapathEvent`]s.
//!
//! Events are hints, the maps are the truth. The first event is a
//! [`DatapathEvent::Snapshot`], and another one follows whenever the kernel found the ring full
//! (`Counter::EventsLost` grew), after what was still in the ring.
//!
//! A Report that a program could not finish comes whole, and is finished here by the same rules
//! ([`common::snoop`]) over the same maps; what that changes are events like any other.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use common::counter::Counter;
use common::event::{
    Change, FirstPacketEvent, Kind, ListenerEvent, QueryEvent, SourceEvent, UnfinishedEvent,
};
use common::maps::Origin;
use linux::bpf::record;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep_until};

use super::sys::{self, Watched};
use super::{Datapath, DatapathError, lock};
use crate::job::Job;
use crate::proto::{DatapathEvent, Timestamp};

/// Most records taken from the ring at once, so that a flood does not fill the memory: the rest
/// waits in the ring.
const BATCH: usize = 4096;
/// How often the ring and the counter of lost events are looked at without a wake-up.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Rest between two snapshots, which take tens of milliseconds of a processor when the maps are full:
/// whoever can fill the ring has them read again.
const SNAPSHOT_REST: Duration = Duration::from_millis(250);

/// Stream of events; made by [`Datapath::events`].
pub struct Events {
    datapath: Datapath,
    ring: AsyncFd<Watched<RingBuf<MapData>>>,
    pending: VecDeque<DatapathEvent>,
    check: Interval,
    lost: u64,
    snapshot_due: bool,
    snapshot: Job<Result<DatapathEvent, DatapathError>>,
    /// When the next one may begin.
    rested: Instant,
}

impl Datapath {
    /// Starts the stream of events. Only one can exist; must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Events`] for a second call, [`DatapathError::Map`].
    pub fn events(&self) -> Result<Events, DatapathError> {
        let mut ring = lock(&self.inner.events)
            .take()
            .ok_or_else(|| DatapathError::Events(io::ErrorKind::ResourceBusy.into()))?;
        let lost = self.counter(Counter::EventsLost)?;
        // What an earlier agent has left is older than the snapshot. Reports that it left
        // unfinished have to be finished all the same.
        let mut pending = VecDeque::new();
        while let Some(record) = ring.next() {
            if kind(&record) == Some(Kind::Unfinished as u32) {
                self.decode(&record, &mut pending);
            }
        }
        pending.clear();
        let mut check = interval(CHECK_INTERVAL);
        check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Events {
            datapath: self.clone(),
            ring: sys::watch(ring).map_err(DatapathError::Events)?,
            pending,
            check,
            lost,
            snapshot_due: true,
            snapshot: Job::default(),
            rested: Instant::now(),
        })
    }

    /// Turns a record into events. One of an unknown kind or length is ignored: the layout
    /// version in the pin path rules it out.
    fn decode(&self, record: &[u8], events: &mut VecDeque<DatapathEvent>) {
        let event = match kind(record) {
            Some(kind) if kind == Kind::Listener as u32 => record::read::<ListenerEvent>(record)
                .and_then(|event| {
                    Some(DatapathEvent::Listener {
                        change: change(event.change)?,
                        key: event.key,
                        value: event.value,
                    })
                }),
            Some(kind) if kind == Kind::Source as u32 => record::read::<SourceEvent>(record)
                .and_then(|event| {
                    Some(DatapathEvent::Source {
                        change: change(event.change)?,
                        key: event.key,
                        value: event.value,
                    })
                }),
            Some(kind) if kind == Kind::FirstPacket as u32 => {
                record::read::<FirstPacketEvent>(record).and_then(|event| {
                    Some(DatapathEvent::FirstPacket {
                        key: event.key,
                        origin: Origin::from_u32(event.origin)?,
                        at: Timestamp(event.at_ns),
                    })
                })
            }
            Some(kind) if kind == Kind::Query as u32 => {
                record::read::<QueryEvent>(record).map(|event| DatapathEvent::Query {
                    key: event.key,
                    value: event.value,
                })
            }
            Some(kind) if kind == Kind::Unfinished as u32 => {
                if let Some(event) = record::read::<UnfinishedEvent>(record) {
                    self.finish(&event, events);
                }
                None
            }
            _ => None,
        };
        events.extend(event);
    }
}

impl Events {
    /// Waits for the next event. Can be cancelled without losing one.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`], [`DatapathError::Events`].
    pub async fn next(&mut self) -> Result<DatapathEvent, DatapathError> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Ok(event);
            }
            if self.snapshot_due && self.rested <= Instant::now() {
                if self.snapshot.is_idle() {
                    let datapath = self.datapath.clone();
                    self.snapshot.start(move || datapath.snapshot());
                }
                let snapshot = self.snapshot.next().await;
                self.snapshot_due = false;
                self.rested = Instant::now() + SNAPSHOT_REST;
                return snapshot.map_err(|_| DatapathError::Shutdown)?;
            }
            tokio::select! {
                ready = self.ring.readable_mut() => {
                    let mut ready = ready.map_err(DatapathError::Events)?;
                    let drained =
                        drain(&self.datapath, &mut ready.get_inner_mut().0, &mut self.pending);
                    if drained {
                        ready.clear_ready();
                    }
                }
                _ = self.check.tick() => {
                    drain(&self.datapath, &mut self.ring.get_mut().0, &mut self.pending);
                }
                () = sleep_until(self.rested), if self.snapshot_due => {}
            }
            let lost = self.datapath.counter(Counter::EventsLost)?;
            if lost != self.lost {
                tracing::info!(
                    lost = lost.wrapping_sub(self.lost),
                    "events were lost, reading maps"
                );
                self.lost = lost;
                self.snapshot_due = true;
            }
        }
    }
}

/// Takes records from the ring; `false` if more than a batch may be left.
fn drain(
    datapath: &Datapath,
    ring: &mut RingBuf<MapData>,
    events: &mut VecDeque<DatapathEvent>,
) -> bool {
    for _ in 0..BATCH {
        match ring.next() {
            Some(record) => datapath.decode(&record, events),
            None => return true,
        }
    }
    false
}

fn kind(record: &[u8]) -> Option<u32> {
    record.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

fn change(change: u32) -> Option<Change> {
    match change {
        value if value == Change::Updated as u32 => Some(Change::Updated),
        value if value == Change::Removed as u32 => Some(Change::Removed),
        _ => None,
    }
}
