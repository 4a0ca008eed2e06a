//! A TAP whose VM leaves: its queue is watched, and at the stop the cut is placed.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::time::Duration;

use common::handover::{PROBE_ETHER_TYPE, PROBE_MAC};
use common::maps::{Delivered, DeliveredKey, StreamKey};
use common::signal::NicCut;
use common::wire::ethernet;
use nix::net::if_::if_indextoname;

use super::send_on::SendOn;
use crate::clock::now;
use crate::datapath::reads::OwnReads;
use crate::datapath::{Datapath, DatapathError, RecordLease};
use crate::hypervisor::main_loop::MainLoop;
use crate::net::tap_queue::TapQueues;
use crate::net::tap_socket::{Sent, TapSocket};
use crate::proto::handover::{
    Counts, Cut, HoldLimits, Path, Placement, Reader, Reading, Step, nic_cut,
};
use crate::proto::{GateEvent, Mac, Timestamp};

/// Nothing is to be done before so long, when nothing is due.
const IDLE: Duration = Duration::from_secs(2);
/// How often the lease is renewed.
const LEASE_INTERVAL: Duration = Duration::from_secs(1);
/// Shortest Ethernet frame, bytes.
const PROBE_BYTES: usize = 60;
/// So many probes by chance leave none of up to [`MOST_PROBED`] queues out: for each it is one case in
/// 10^10.
const PROBES_PER_QUEUE: u32 = 24;
/// Most queues of a TAP that are sent probes.
const MOST_PROBED: u32 = 16;
/// Where the source address stands in an untagged IPv6 packet's frame.
const SOURCE_AT: usize = 22;
/// How often a flow is read at a cut, and how many readings there are in all unless there are more flows.
const MOST_ROUNDS: usize = 8;
const MOST_READINGS: usize = 4096;
/// IPv6 without anything behind its header.
const NO_NEXT_HEADER: u8 = 59;

/// What is known of one TAP.
pub(super) struct Recording {
    ifindex: u32,
    mac: Mac,
    slot: u32,
    vhost: bool,
    placement: Placement,
    /// The migration for which the VM has stopped.
    stopped_for: Option<u64>,
    /// Who reads the TAP after the stop, if that can be looked at.
    main_loop: Option<MainLoop>,
    /// What that reads, if vhost-net reads the TAP else.
    own_reads: Option<OwnReads>,
    /// What had passed of each flow when it began.
    before: BTreeMap<StreamKey, Delivered>,
    socket: TapSocket,
    /// The length of each queue now, frames.
    capacity: u64,
    /// How many queues it had last, if there can be several.
    several: Option<u32>,
    /// When to look next; `None` once the cut is told.
    due: Option<Timestamp>,
    /// When the gate's lease is to be renewed.
    lease_due: Timestamp,
    /// What is kept of unicast packets.
    pub(super) send_on: SendOn,
}

impl Recording {
    /// Has the gate record.
    pub(super) fn begin(
        datapath: &Datapath,
        queues: &mut TapQueues,
        ifindex: u32,
        (mac, vhost): (Mac, bool),
        limits: HoldLimits,
    ) -> Result<Self, Box<dyn Error>> {
        let socket = TapSocket::open(ifindex)?;
        let send_on = SendOn::new(ifindex, limits);
        let slot = datapath.gate_record(ifindex, !vhost)?;
        let before = delivered(datapath, ifindex)?.collect();
        let capacity = queues.length(ifindex)?.into();
        let several = queues.queues(ifindex)?;
        let main_loop = if_indextoname(ifindex)
            .ok()
            .and_then(|name| MainLoop::of_tap(name.to_str().ok()?));
        let own_reads = (main_loop.as_ref().filter(|_| vhost))
            .and_then(|main_loop| own_reads(datapath, main_loop, ifindex));
        Ok(Self {
            ifindex,
            mac,
            slot,
            vhost,
            placement: Placement::new(capacity),
            stopped_for: None,
            main_loop,
            own_reads,
            before,
            socket,
            capacity,
            several,
            due: Some(Timestamp::default()),
            lease_due: now() + LEASE_INTERVAL,
            send_on,
        })
    }

    /// Goes on after a stop that was none; returns what the VM has lost by it.
    pub(super) fn again(
        mut self,
        datapath: &Datapath,
        queues: &mut TapQueues,
    ) -> (Self, Option<GateEvent>) {
        let event = self.stopped_for.map(|migration| {
            if let Err(error) = self.sample(datapath, queues) {
                tracing::debug!(ifindex = self.ifindex, %error, "What QEMU has read is not known");
            }
            let thrown_away_at_most = self.placement.thrown_away_at_most();
            GateEvent::RunsOn {
                migration,
                thrown_away_at_most,
            }
        });
        let again = Self {
            placement: Placement::new(self.capacity),
            stopped_for: None,
            due: Some(Timestamp::default()),
            send_on: self.send_on.again(datapath),
            ..self
        };
        (again, event)
    }

    /// When [`Recording::tend`] has something to do.
    pub(super) fn due(&self, now: Timestamp) -> Timestamp {
        let due = self.due.unwrap_or(now + IDLE);
        self.send_on.due().map_or(due, |retry| retry.min(due))
    }

    /// The VM was said to have stopped.
    pub(super) fn stopped(&mut self, migration: u64, at: Timestamp) {
        self.placement.stopped(at);
        self.stopped_for = Some(migration);
        // Whether frames are counted as before is known then.
        self.lease_due = at;
        self.send_on.stopped(migration);
        if let Err(error) = self.probe_queues() {
            tracing::debug!(ifindex = self.ifindex, %error, "No frame after the stop");
        }
        self.due = Some(at);
    }

    /// Makes sure that there is a frame to read in each queue.
    fn probe_queues(&mut self) -> io::Result<()> {
        let queues = self.several.unwrap_or(1);
        for frame in probes(queues) {
            match self.socket.send(&frame)? {
                Sent::Queued => self.placement.injected(now()),
                // Then there are others to read.
                Sent::Full => {}
            }
        }
        if queues <= MOST_PROBED {
            self.placement.probed();
        }
        Ok(())
    }

    /// Has the gate go on recording.
    pub(super) fn renew(&mut self, datapath: &Datapath, now: Timestamp) {
        if now < self.lease_due {
            return;
        }
        self.lease_due = now + LEASE_INTERVAL;
        match datapath.gate_record_renew(self.ifindex) {
            Ok(RecordLease::Renewed) => {}
            Ok(RecordLease::CountsOtherwise) => self.placement.recounted(),
            Ok(RecordLease::Ended) => {
                tracing::warn!(
                    ifindex = self.ifindex,
                    "This host kept the agent from running; what a VM has had is not known exactly"
                );
                self.placement.lost();
                self.lease_due = Timestamp(u64::MAX);
            }
            Err(error) => {
                tracing::debug!(ifindex = self.ifindex, %error, "A recording is not renewed");
            }
        }
    }

    /// Looks at the queue when it is due; returns the cut once it is placed.
    pub(super) fn tend(
        &mut self,
        datapath: &Datapath,
        queues: &mut TapQueues,
        now: Timestamp,
    ) -> Option<NicCut> {
        if self.due? > now {
            return None;
        }
        match self.placement.poll(now) {
            Step::SampleAt(due) if due > now => {
                self.due = Some(due);
                return None;
            }
            Step::SampleAt(_) => {}
            step => return self.take(datapath, step),
        }
        if let Err(error) = self.sample(datapath, queues) {
            // The TAP is gone; so is the recording, soon.
            tracing::debug!(ifindex = self.ifindex, %error, "A queue is not watched");
            self.placement.lost();
        }
        let step = self.placement.poll(now);
        self.take(datapath, step)
    }

    /// Places the cut of a VM that has stopped by what is known now, unless it is placed: the TAP is gone,
    /// or nobody waits for its VM any longer.
    pub(super) fn conclude(&mut self, datapath: &Datapath) -> Option<NicCut> {
        self.placement.lost();
        let step = self.placement.poll(now());
        self.take(datapath, step)
    }

    fn take(&mut self, datapath: &Datapath, step: Step) -> Option<NicCut> {
        match step {
            Step::SampleAt(due) => {
                self.due = Some(due);
                None
            }
            Step::Cut(cut) => {
                self.due = Some(now());
                // First, because the destination waits for it.
                let told = self.cut(datapath, &cut);
                tracing::trace!(ifindex = self.ifindex, placement = ?self.placement, "What the cut follows from");
                self.send_on.cut(datapath, cut);
                told
            }
            Step::Revised(cut) => {
                tracing::warn!(
                    ifindex = self.ifindex,
                    ?cut,
                    "A frame was read later than it should have been; the VM may get a packet twice"
                );
                self.due = Some(now());
                self.cut(datapath, &cut)
            }
            Step::Done => {
                self.due = None;
                None
            }
        }
    }

    fn sample(
        &mut self,
        datapath: &Datapath,
        queues: &mut TapQueues,
    ) -> Result<(), Box<dyn Error>> {
        let reader = self
            .main_loop
            .as_ref()
            .map_or(Reader::Unknown, MainLoop::look);
        if self.several.is_some() {
            self.several = queues.queues(self.ifindex)?;
        }
        let counts = queues.counts(self.ifindex)?;
        let (gate, usage) = datapath.gate(self.ifindex)?.ok_or("its gate is gone")?;
        let own = self.own_reads.as_ref().map(OwnReads::count);
        let counts = Counts {
            taken: counts.read,
            dropped: counts.dropped,
            own: own.transpose()?,
        };
        let path = match (self.vhost, gate.probes != 0) {
            (true, _) => Path::Vhost,
            (false, true) => Path::Probed,
            (false, false) => Path::Plain,
        };
        self.placement.read_by(path, self.several.unwrap_or(1));
        self.placement.sample(now(), reader, counts, usage.entered);
        Ok(())
    }

    fn cut(&mut self, datapath: &Datapath, cut: &Cut) -> Option<NicCut> {
        let read = || {
            let flows = self.readings(datapath)?;
            let usage = datapath.gate(self.ifindex)?.map(|(_, usage)| usage);
            let records = datapath.gate_records(self.slot, &usage.unwrap_or_default())?;
            Ok(nic_cut(self.mac, cut, &records, &flows))
        };
        match read() {
            Ok(mut reach) => {
                reach.cut.tap_full = self.placement.tap_full();
                tracing::debug!(
                    ifindex = self.ifindex,
                    ?cut,
                    flows = reach.cut.flows.len(),
                    unknown_records = reach.unknown_records,
                    tap_full = reach.cut.tap_full,
                    "Cut is placed"
                );
                Some(reach.cut)
            }
            Err(error) => {
                let error: DatapathError = error;
                tracing::warn!(
                    ifindex = self.ifindex,
                    error = &error as &dyn Error,
                    "What a VM has had cannot be read"
                );
                None
            }
        }
    }

    /// Reads what has passed of each flow since the beginning, some times over, because packets come
    /// meanwhile.
    fn readings(
        &self,
        datapath: &Datapath,
    ) -> Result<Vec<(StreamKey, Vec<Reading>)>, DatapathError> {
        let mut flows: Vec<(StreamKey, Vec<Reading>)> = delivered(datapath, self.ifindex)?
            .map(|(stream, _)| (stream, Vec::new()))
            .collect();
        let rounds = (MOST_READINGS / flows.len().max(1)).clamp(1, MOST_ROUNDS);
        for _ in 0..rounds {
            for (stream, readings) in &mut flows {
                let key = DeliveredKey {
                    ifindex: self.ifindex,
                    stream: *stream,
                };
                let from = now();
                let total = datapath.delivered_of(&key)?.unwrap_or_default();
                readings.push(Reading {
                    from,
                    packets: self.since_begin(stream, total),
                    until: now(),
                });
            }
        }
        Ok(flows)
    }

    fn since_begin(&self, stream: &StreamKey, total: Delivered) -> u64 {
        let before = self.before.get(stream).copied().unwrap_or_default();
        total.packets.saturating_sub(before.packets)
    }
}

/// Has the reads of QEMU itself counted.
fn own_reads(datapath: &Datapath, main_loop: &MainLoop, ifindex: u32) -> Option<OwnReads> {
    match datapath.own_reads(main_loop.process(), main_loop.descriptors()) {
        Ok(reads) => Some(reads),
        Err(error) => {
            tracing::warn!(
                ifindex,
                error = &error as &dyn Error,
                "What QEMU reads of a TAP beside vhost-net is not counted; the VM may get a packet twice"
            );
            None
        }
    }
}

/// What has passed into a TAP, by flow.
fn delivered(
    datapath: &Datapath,
    ifindex: u32,
) -> Result<impl Iterator<Item = (StreamKey, Delivered)> + use<>, DatapathError> {
    let all = datapath.delivered(Some(ifindex))?;
    Ok(all
        .into_iter()
        .map(|(key, delivered)| (key.stream, delivered)))
}

/// Frames that nobody misses, of which each of so many queues of a TAP gets one. The kernel chooses the queue
/// by the addresses of a packet, so several take many.
pub(super) fn probes(queues: u32) -> Vec<[u8; PROBE_BYTES]> {
    match queues {
        0 | 1 => vec![probe()],
        _ => (0..queues.min(MOST_PROBED) * PROBES_PER_QUEUE)
            .map(probe_packet)
            .collect(),
    }
}

/// A probe like those of `gate`.
fn probe() -> [u8; PROBE_BYTES] {
    let mut frame = [0; PROBE_BYTES];
    frame[..6].copy_from_slice(&PROBE_MAC);
    frame[6..12].copy_from_slice(&PROBE_MAC);
    frame[12..14].copy_from_slice(&PROBE_ETHER_TYPE.to_be_bytes());
    frame
}

/// A probe that is an IPv6 packet of its own flow for each number.
fn probe_packet(number: u32) -> [u8; PROBE_BYTES] {
    let mut frame = probe();
    frame[12..14].copy_from_slice(&ethernet::IPV6.to_be_bytes());
    frame[14] = 6 << 4;
    frame[20] = NO_NEXT_HEADER;
    frame[SOURCE_AT..SOURCE_AT + 4].copy_from_slice(&[0xfe, 0x80, 0, 0]);
    frame[SOURCE_AT + 12..SOURCE_AT + 16].copy_from_slice(&number.to_be_bytes());
    frame[SOURCE_AT + 16..SOURCE_AT + 20].copy_from_slice(&[0xfe, 0x80, 0, 0]);
    frame
}
