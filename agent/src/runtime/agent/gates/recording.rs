//! Gate of a TAP whose VM leaves: watches the TAP's queue and places the cut when the VM stops.

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

/// Longest sleep when no sample is due.
const IDLE: Duration = Duration::from_secs(2);
/// Interval at which the agent renews the gate's lease.
const LEASE_INTERVAL: Duration = Duration::from_secs(1);
/// Length of a probe: the shortest Ethernet frame, bytes.
const PROBE_BYTES: usize = 60;
/// Probes per queue. The kernel chooses the queue by hash; with this number a given queue (of at
/// most [`MOST_PROBED`]) gets none in 1 of 10^10 cases.
const PROBES_PER_QUEUE: u32 = 24;
/// Highest number of queues that get probes.
const MOST_PROBED: u32 = 16;
/// Offset of the source address in an untagged IPv6 frame.
const SOURCE_AT: usize = 22;
/// Most readings of one flow at a cut. [`MOST_READINGS`] bounds the readings of all flows, but each
/// flow gets at least one.
const MOST_ROUNDS: usize = 8;
const MOST_READINGS: usize = 4096;
/// IPv6 Next Header "No Next Header" (RFC 8200 §4.7).
const NO_NEXT_HEADER: u8 = 59;

/// Recording of one TAP.
pub(super) struct Recording {
    ifindex: u32,
    mac: Mac,
    slot: u32,
    vhost: bool,
    placement: Placement,
    /// The migration whose source VM has stopped.
    stopped_for: Option<u64>,
    /// QEMU's main loop, which reads the TAP after the stop; `None` if it cannot be observed.
    main_loop: Option<MainLoop>,
    /// Counter of QEMU's own reads, if vhost-net otherwise reads the TAP.
    own_reads: Option<OwnReads>,
    /// Counters of each flow at the start of the recording.
    before: BTreeMap<StreamKey, Delivered>,
    socket: TapSocket,
    /// Current length of each queue, frames.
    capacity: u64,
    /// Last known number of queues; `None` for a single-queue TAP.
    several: Option<u32>,
    /// When to sample the queue next; `None` once the cut is reported.
    due: Option<Timestamp>,
    /// When to renew the gate's lease.
    lease_due: Timestamp,
    /// Copies of unicast packets, for forwarding after the stop.
    pub(super) send_on: SendOn,
}

impl Recording {
    /// Starts recording at the gate.
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

    /// Continues after a stop that the source took back. Returns an event with the frames that the
    /// VM lost meanwhile.
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

    /// Returns when [`Recording::tend`] has work.
    pub(super) fn due(&self, now: Timestamp) -> Timestamp {
        let due = self.due.unwrap_or(now + IDLE);
        self.send_on.due().map_or(due, |retry| retry.min(due))
    }

    /// Handles the stop of the VM.
    pub(super) fn stopped(&mut self, migration: u64, at: Timestamp) {
        self.placement.stopped(at);
        self.stopped_for = Some(migration);
        // The renewal also finds out whether the gate has counted without a gap.
        self.lease_due = at;
        self.send_on.stopped(migration);
        if let Err(error) = self.probe_queues() {
            tracing::debug!(ifindex = self.ifindex, %error, "No frame after the stop");
        }
        self.due = Some(at);
    }

    /// Writes probes, so that each queue has a frame to read.
    fn probe_queues(&mut self) -> io::Result<()> {
        let queues = self.several.unwrap_or(1);
        for frame in probes(queues) {
            match self.socket.send(&frame)? {
                Sent::Queued => self.placement.injected(now()),
                // A full queue has frames to read.
                Sent::Full => {}
            }
        }
        if queues <= MOST_PROBED {
            self.placement.probed();
        }
        Ok(())
    }

    /// Renews the gate's lease, so that recording continues.
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

    /// Samples the queue if a sample is due. Returns the cut once it is placed.
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
            // The TAP is gone; the recording will end soon.
            tracing::debug!(ifindex = self.ifindex, %error, "A queue is not watched");
            self.placement.lost();
        }
        let step = self.placement.poll(now);
        self.take(datapath, step)
    }

    /// Places the cut of a stopped VM from current knowledge, unless the cut is placed already.
    /// Called when the TAP is gone or nobody waits for the VM any longer.
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
                // The cut goes first: the destination waits for it.
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

    /// Reads the packets of each flow since the start of the recording, several times, because
    /// packets still arrive.
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

/// Starts counting QEMU's own reads of the TAP.
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

/// Returns the delivered packets of a TAP by flow.
fn delivered(
    datapath: &Datapath,
    ifindex: u32,
) -> Result<impl Iterator<Item = (StreamKey, Delivered)> + use<>, DatapathError> {
    let all = datapath.delivered(Some(ifindex))?;
    Ok(all
        .into_iter()
        .map(|(key, delivered)| (key.stream, delivered)))
}

/// Returns probes, frames that no guest needs, such that each queue of a TAP gets at least one. The
/// kernel chooses the queue by the addresses of a packet, so several queues need many probes.
pub(super) fn probes(queues: u32) -> Vec<[u8; PROBE_BYTES]> {
    match queues {
        0 | 1 => vec![probe()],
        _ => (0..queues.min(MOST_PROBED) * PROBES_PER_QUEUE)
            .map(probe_packet)
            .collect(),
    }
}

/// Returns a probe like the probes of the gate program.
fn probe() -> [u8; PROBE_BYTES] {
    let mut frame = [0; PROBE_BYTES];
    frame[..6].copy_from_slice(&PROBE_MAC);
    frame[6..12].copy_from_slice(&PROBE_MAC);
    frame[12..14].copy_from_slice(&PROBE_ETHER_TYPE.to_be_bytes());
    frame
}

/// Returns a probe that is an IPv6 packet; each number is a flow of its own.
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
