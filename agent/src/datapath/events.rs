//! Events of the eBPF programs: the ring buffer `EVENTS` as a stream of [`DatapathEvent`]s.
//!
//! The maps are authoritative, events are hints. The first event is a [`DatapathEvent::Snapshot`].
//! Whenever the kernel found the ring full (`Counter::EventsLost` grew), another snapshot follows
//! the events still in the ring.
//!
//! A Report that a program cannot finish arrives as a complete frame. Userspace finishes the Report
//! by the same rules ([`common::snoop`]) on the same maps, and reports the changes as ordinary
//! events.

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

/// Most records taken from the ring in one batch, so that a flood does not fill the memory; the
/// rest stays in the ring.
const BATCH: usize = 4096;
/// Interval between checks of the ring and of the lost events without a wake-up.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Pause between two snapshots. A snapshot of full maps takes tens of milliseconds of CPU time, and
/// a VM that fills the ring triggers snapshots.
const SNAPSHOT_REST: Duration = Duration::from_millis(250);

/// Stream of events; created by [`Datapath::events`].
pub struct Events {
    datapath: Datapath,
    ring: AsyncFd<Watched<RingBuf<MapData>>>,
    pending: VecDeque<DatapathEvent>,
    check: Interval,
    lost: u64,
    snapshot_due: bool,
    snapshot: Job<Result<DatapathEvent, DatapathError>>,
    /// Earliest start of the next snapshot.
    rested: Instant,
}

impl Datapath {
    /// Starts the stream of events. Only one stream can exist. Must be called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Events`] at a second call, [`DatapathError::Map`].
    pub fn events(&self) -> Result<Events, DatapathError> {
        let mut ring = lock(&self.inner.events)
            .take()
            .ok_or_else(|| DatapathError::Events(io::ErrorKind::ResourceBusy.into()))?;
        let lost = self.counter(Counter::EventsLost)?;
        // Events of an earlier agent are older than the snapshot and are dropped. Reports that the
        // earlier agent left unfinished still have to be finished.
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

    /// Converts a record into events. Ignores unknown kinds and lengths, which the layout version
    /// in the pin path excludes.
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
    /// Waits for the next event. Cancel safe.
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

/// Takes records from the ring; returns false if the batch ended before the ring was empty.
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
