//! Guests that receive streams and migrate at the same time.
//!
//! [`Party::begin`] starts the senders and the receivers. Each [`Party::go`] migrates all guests at
//! once and measures a window around the migrations. [`Party::finish`] ends the streams and only
//! then computes the rows, because a packet counts as lost only if it never arrived.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::Ipv6Addr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use serde_json::Value;

use super::mover::{Journey, Mover, Times};
use super::stream::{Placed, STREAM_TIME, Stream, StreamKind, Streams};
use super::tally::{self, Tally};
use super::{Testbed, ensure_domain_runs_only_on, measure, site_name};
use crate::guest::control::Control;
use crate::probe::clock;
use crate::probe::counters;
use crate::probe::log::Sent;
use crate::probe::metrics::{Arrival, Window};
use crate::probe::places::{self, Counted};
use crate::probe::report::RunRow;
use crate::wait;

/// Time of the measurement after each migration.
const AFTER: Duration = Duration::from_secs(2);
/// Longest wait until a guest receives its streams, until an agent knows a guest's addresses, and
/// until the last packets arrive.
const KNOWN: Duration = Duration::from_secs(20);
/// A guest that counts no packet for this time has received all packets that were sent.
const STILL: Duration = Duration::from_millis(20);

/// A guest that receives streams, its VM host, and its migrations so far.
pub(super) struct Viewer {
    pub(super) domain: String,
    pub(super) control: Control,
    pub(super) streams: Streams,
    /// Index of the guest's VM host.
    pub(super) at: usize,
    moves: Vec<Move>,
}

/// Returns the packet counters of the kernels of a guest and of all VM hosts.
pub(super) fn counted(testbed: &Testbed, guest: &Control) -> Result<Counted> {
    let hosts = testbed.lab().vms().iter();
    Ok(Counted {
        guest: guest.status()?.counters,
        hosts: hosts
            .map(|vms| vms.within(counters::here))
            .collect::<Result<_>>()?,
    })
}

/// Measurements of one migration, kept until the streams end.
struct Move {
    window: Window,
    /// Index of the guest's VM host after the migration.
    at: usize,
    row: RunRow,
    counted: Counted,
    records: [Value; 2],
    /// Received minus sent packets of each stream; `None` unless its packets are identical.
    surplus: Vec<Option<i64>>,
}

/// Results of all migrations of a guest.
#[derive(Debug)]
pub struct Moves {
    /// One row per migration.
    pub rows: Vec<RunRow>,
    /// Window of each migration.
    pub windows: Vec<Window>,
    /// Growth of the kernels' packet counters in each window.
    pub counted: Vec<Counted>,
    /// Records of both agents about each migration, the source's first; null if there is no record.
    pub records: Vec<[Value; 2]>,
    /// Every packet sent, of all streams, in the order of time.
    pub sent: Vec<Sent>,
    /// Every arrival at the application, copies included, in the order of time.
    pub arrivals: Vec<Arrival>,
}

/// Result of [`Party::watch`] for one guest.
struct Watched {
    window: Window,
    counted: Counted,
    /// Received minus sent packets of each stream; `None` unless its packets are identical.
    surplus: Vec<Option<i64>>,
}

/// Packets of a stream since its start, counted while its sender pauses.
#[derive(Clone, Copy)]
struct Counts {
    sent: u64,
    received: u64,
}

impl Viewer {
    pub(super) fn new(domain: &str, control: Control, streams: Streams, at: usize) -> Self {
        Self {
            domain: domain.to_owned(),
            control,
            streams,
            at,
            moves: Vec::new(),
        }
    }

    /// Stores the result of a migration. `self.at` must already be the destination.
    fn note(&mut self, testbed: &Testbed, watched: Watched, records: [Value; 2], row: RunRow) {
        let row = RunRow {
            site: site_name(testbed.lab().config().sites[self.at]).to_owned(),
            memory_mib: testbed.domain().memory_mib,
            flows: true,
            ..row
        };
        self.moves.push(Move {
            window: watched.window,
            at: self.at,
            row,
            counted: watched.counted,
            records,
            surplus: watched.surplus,
        });
    }

    /// Returns the parameters of the guest's migration to the other VM host.
    fn journey<'a>(&'a self, testbed: &'a Testbed) -> Journey<'a> {
        Journey {
            testbed,
            domain: &self.domain,
            control: &self.control,
            from: self.at,
            to: 1 - self.at,
        }
    }

    /// Waits until the source's agent knows the guest's multicast addresses.
    fn wait_known(&self, testbed: &Testbed) -> Result<()> {
        let vms = &testbed.lab().vms()[self.at];
        let wanted = self.streams.addresses();
        let agents = testbed.running_agents()?;
        wait::until("the agent to know the guest", KNOWN, || {
            let listeners = agents.query(vms, "listeners").ok()?;
            let known: Vec<Ipv6Addr> = listeners
                .as_array()?
                .iter()
                .filter(|row| row["domain"] == self.domain)
                .filter_map(|row| row["multicast_address"].as_str()?.parse().ok())
                .collect();
            wanted
                .iter()
                .all(|address| known.contains(address))
                .then_some(())
        })
    }

    /// Waits until the guest's receiver of `stream` gets no more packets. Returns the number of
    /// packets.
    fn count(&self, stream: &Placed) -> Result<u64> {
        let received = || {
            let status = self.control.status().ok()?;
            let number = stream.receiver_number();
            let receiver = status.receivers.iter().find(|it| it.receiver == number)?;
            Some(receiver.datagrams - receiver.foreign)
        };
        let mut last: Option<(u64, Instant)> = None;
        wait::until("the last packets to arrive", KNOWN, || {
            let count = received()?;
            match last {
                Some((before, since)) if before == count => {
                    (since.elapsed() >= STILL).then_some(count)
                }
                _ => {
                    last = Some((count, Instant::now()));
                    None
                }
            }
        })
    }
}

/// Guests and the senders of their streams.
pub(super) struct Party {
    pub(super) viewers: Vec<Viewer>,
    /// Streams by index; guests may share a stream.
    senders: BTreeMap<u16, (Placed, Stream)>,
}

impl Party {
    /// Starts the streams and the guests' receivers.
    pub(super) fn begin(testbed: &Testbed, viewers: Vec<Viewer>) -> Result<Self> {
        let mut senders = BTreeMap::new();
        for stream in viewers.iter().flat_map(|viewer| viewer.streams.iter()) {
            if let Entry::Vacant(place) = senders.entry(stream.index) {
                let running = Stream::start(testbed.lab(), *stream)?;
                place.insert((*stream, running));
            }
        }
        for viewer in &viewers {
            viewer.control.watch_stalls()?;
            for stream in viewer.streams.iter() {
                let number = stream.receiver_number();
                viewer.control.start_receiver(number, stream.receiver())?;
            }
            for stream in viewer.streams.iter() {
                wait::until("the guest to receive", KNOWN, || {
                    let tally = Tally::take(*stream, Vec::new(), &viewer.control);
                    tally.has_arrived().then_some(())
                })?;
            }
        }
        Ok(Self { viewers, senders })
    }

    /// Migrates every guest to the other VM host, all at the same time, or has all cancelled.
    pub(super) fn go(&mut self, testbed: &Testbed, mover: Mover) -> Result<()> {
        let has_agents = testbed.agents.is_some();
        if has_agents {
            for viewer in &self.viewers {
                viewer.wait_known(testbed)?;
            }
        }
        let (times, watched) = self.watch(testbed, |party| party.travel(testbed, mover))?;
        for ((viewer, times), watched) in self.viewers.iter_mut().zip(times).zip(watched) {
            let to = 1 - viewer.at;
            let end = if mover.arrives() { to } else { viewer.at };
            let host = &testbed.lab().vms()[end];
            ensure_domain_runs_only_on(testbed, &viewer.domain, host.name())?;
            let records = viewer.journey(testbed).records()?;
            let row = if mover.arrives() {
                let addresses = viewer.streams.addresses();
                let mode = has_agents.then(|| measure::mode(testbed, to, &addresses));
                RunRow {
                    baseline: !has_agents,
                    is_promised: testbed.promises(mover, to, viewer.streams.iter()),
                    mode: mode.transpose()?,
                    ..times.row()
                }
            } else {
                RunRow {
                    thrown_away_at_most: records[0]["thrown_away_at_most"].as_u64(),
                    ..times.row()
                }
            };
            viewer.at = end;
            viewer.note(testbed, watched, records, row);
        }
        Ok(())
    }

    /// Measures a window without a migration. Its rows show the losses of the lab itself.
    pub(super) fn stay(&mut self, testbed: &Testbed) -> Result<()> {
        let ((), watched) = self.watch(testbed, |_| Ok(()))?;
        for (viewer, watched) in self.viewers.iter_mut().zip(watched) {
            viewer.note(testbed, watched, Default::default(), RunRow::default());
        }
        Ok(())
    }

    /// Runs `action` and measures the streams from before its start to after its end. Returns the
    /// action's result, and the measurement of each guest.
    fn watch<T>(
        &self,
        testbed: &Testbed,
        action: impl FnOnce(&Self) -> Result<T>,
    ) -> Result<(T, Vec<Watched>)> {
        let count_packets = || -> Result<Vec<Counted>> {
            let guests = self.viewers.iter().map(|viewer| &viewer.control);
            guests.map(|guest| counted(testbed, guest)).collect()
        };
        self.pass(STREAM_TIME)?;
        let (before, counted_before) = (self.count()?, count_packets()?);
        let from_ns = clock::now_ns();
        self.pass(STREAM_TIME / 2)?;
        let done = action(self)?;
        self.pass(AFTER)?;
        let window = Window {
            from_ns,
            to_ns: clock::now_ns(),
        };
        let (after, counted_after) = (self.count()?, count_packets()?);
        let surplus = |(before, after): (&Option<Counts>, &Option<Counts>)| {
            let (before, after) = (before.as_ref()?, after.as_ref()?);
            let received = i64::try_from(after.received - before.received).ok()?;
            let sent = i64::try_from(after.sent - before.sent).ok()?;
            Some(received - sent)
        };
        let counts = before.iter().zip(&after);
        let counted = counted_before.iter().zip(&counted_after);
        let watched = counts
            .zip(counted)
            .map(
                |((before, after), (counted_before, counted_after))| Watched {
                    window,
                    counted: counted_after.since(counted_before),
                    surplus: before.iter().zip(after).map(surplus).collect(),
                },
            )
            .collect();
        Ok((done, watched))
    }

    fn travel(&self, testbed: &Testbed, mover: Mover) -> Result<Vec<Times>> {
        thread::scope(|scope| {
            let mut running = Vec::new();
            for viewer in &self.viewers {
                let journey = viewer.journey(testbed);
                running.push(scope.spawn(move || journey.go(mover, &mut |_| {})));
            }
            running
                .into_iter()
                .map(|thread| {
                    let moved = thread.join();
                    moved.map_err(|_| anyhow!("A thread that moves a guest has panicked"))?
                })
                .collect()
        })
    }

    /// Pauses the senders of identical packets and counts the packets, by guest and stream.
    fn count(&self) -> Result<Vec<Vec<Option<Counts>>>> {
        let mut sent = BTreeMap::new();
        for (index, (stream, sender)) in &self.senders {
            if stream.config.kind == StreamKind::Identical {
                sent.insert(*index, sender.rest()?);
            }
        }
        let count = |viewer: &Viewer, stream: &Placed| {
            let Some(sent) = sent.get(&stream.index).copied() else {
                return Ok(None);
            };
            let received = viewer.count(stream)?;
            Ok(Some(Counts { sent, received }))
        };
        let counts = self
            .viewers
            .iter()
            .map(|viewer| viewer.streams.iter().map(|it| count(viewer, it)).collect())
            .collect();
        for index in sent.keys() {
            if let Some((_, sender)) = self.senders.get(index) {
                sender.resume()?;
            }
        }
        counts
    }

    /// Lets the streams run for `time`, then checks that no guest is silent.
    pub(super) fn pass(&self, time: Duration) -> Result<()> {
        measure::pass(self.viewers.iter().map(|viewer| &viewer.control), time)
    }

    /// Ends the streams and returns the results, one for each guest.
    pub(super) fn finish(self) -> Result<Vec<Moves>> {
        self.pass(STREAM_TIME)?;
        let mut sent = BTreeMap::new();
        for (index, (_, sender)) in self.senders {
            sent.insert(index, sender.stop()?);
        }
        self.viewers
            .into_iter()
            .map(|viewer| viewer.finish(&sent))
            .collect()
    }
}

impl Viewer {
    fn finish(self, sent: &BTreeMap<u16, Vec<Sent>>) -> Result<Moves> {
        let mut tallies = Vec::new();
        for stream in self.streams.iter() {
            let sent = sent.get(&stream.index).cloned().unwrap_or_default();
            tallies.push(Tally::take(*stream, sent, &self.control));
            self.control.stop_receiver(stream.receiver_number())?;
        }
        let silent = tallies.iter().find(|tally| !tally.has_arrived());
        if let Some(silent) = silent {
            let address = silent.stream.multicast_address();
            return Err(anyhow!("{} has received nothing of {address}", self.domain));
        }
        let (mut rows, mut windows) = (Vec::new(), Vec::new());
        let (mut counted, mut records) = (Vec::new(), Vec::new());
        for it in self.moves {
            let row = tally::with_stalls(it.row, &self.control, it.window);
            let row = tally::fill(row, &tallies, it.window, &it.surplus);
            rows.push(
                RunRow {
                    lost_at: places::places(row.lost, &it.counted, it.at, &it.records),
                    ..row
                }
                .judged(),
            );
            windows.push(it.window);
            counted.push(it.counted);
            records.push(it.records);
        }
        let mut sent: Vec<_> = tallies.iter().flat_map(|it| it.sent.clone()).collect();
        sent.sort_by_key(|packet| packet.sent_ns);
        let mut arrivals: Vec<_> = tallies.into_iter().flat_map(|it| it.arrivals).collect();
        arrivals.sort_by_key(|arrival| arrival.host_ns);
        Ok(Moves {
            rows,
            windows,
            counted,
            records,
            sent,
            arrivals,
        })
    }
}
