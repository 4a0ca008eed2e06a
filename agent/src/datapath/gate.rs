//! Gates of a handover: what `gate` does to the frames of a VM that moves, and what it has counted.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use aya::maps::{Map, MapData, RingBuf};
use common::maps::{
    Delivered, DeliveredKey, Gate, GateMode, GateRecord, GateUsage, HeldFrame, PortKey,
    RECORDS_PER_SLOT,
};

use linux::bpf::record;

use super::hook::{Hook, Program};
use super::sys::Mapping;
use super::table::Table;
use super::{Datapath, DatapathError, lock};
use crate::clock::now;
use crate::net::tc::Parent;

/// How long a gate holds without being renewed while its VM does not run: longer than a busy host keeps an
/// agent from running, because what passes is there for the VM to read, and comes twice.
pub const HOLD_LEASE: Duration = Duration::from_secs(30);
/// The same once its VM may run: longer than an agent takes to be started again, shorter than a viewer waits.
pub const REPLAY_LEASE: Duration = Duration::from_secs(3);
/// How long a gate records without being renewed: longer than a busy host keeps an agent from running,
/// because what is not recorded makes the cut of its VM inexact.
pub const RECORD_LEASE: Duration = Duration::from_secs(30);

fn lease_end(lease: Duration) -> u64 {
    (now() + lease).0
}

/// `GATES` and what belongs to it. Written by this process only, apart from what programs count.
pub(super) struct Gates {
    gates: Table<PortKey, Gate>,
    usage: Table<PortKey, GateUsage>,
    records: Mapping,
    slots: u32,
}

impl Gates {
    /// Takes the maps over, with the gates that are there.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`], [`DatapathError::Layout`].
    pub(super) fn adopt(
        gates: Table<PortKey, Gate>,
        usage: Table<PortKey, GateUsage>,
        records: Option<Map>,
    ) -> Result<Self, DatapathError> {
        let name = "GATE_RECORDS";
        let Some(Map::Array(records)) = records else {
            return Err(DatapathError::Layout { name });
        };
        let info = records.info().map_err(|_| DatapathError::Layout { name })?;
        if info.value_size() as usize != size_of::<GateRecord>() {
            return Err(DatapathError::Layout { name });
        }
        let entries = info.max_entries();
        let gates = Self {
            gates,
            usage,
            records: Mapping::new(records.fd().as_fd(), entries)
                .map_err(|error| DatapathError::Map { name, error })?,
            slots: entries / RECORDS_PER_SLOT,
        };
        // An agent may have been killed between two writes.
        for (ifindex, _) in gates.usage.entries()? {
            if gates.gates.get(&ifindex)?.is_none() {
                gates.usage.remove(&ifindex)?;
            }
        }
        Ok(gates)
    }

    /// Begins anew: nothing is counted yet.
    fn begin(&self, ifindex: u32, gate: &Gate) -> Result<(), DatapathError> {
        if let Some(before) = self.gates.get(&ifindex)? {
            // It must not open by what is counted from now on.
            let closed = Gate {
                replayed: Gate::CLOSED,
                ..before
            };
            self.gates.insert(&ifindex, &closed)?;
        }
        self.usage.insert(&ifindex, &GateUsage::default())?;
        self.gates.insert(&ifindex, gate).inspect_err(|_| {
            // Without a gate it would never be removed.
            if let Err(error) = self.clear(ifindex) {
                tracing::warn!(ifindex, %error, "Gate not removed");
            }
        })
    }

    /// The slot that the port has, or one that no port has.
    fn slot(&self, ifindex: u32) -> Result<u32, DatapathError> {
        let mut taken = BTreeSet::new();
        for (port, gate) in self.gates.entries()? {
            if gate.mode != GateMode::Record as u32 {
                continue;
            }
            if port == ifindex {
                return Ok(gate.slot);
            }
            taken.insert(gate.slot);
        }
        (0..self.slots)
            .find(|slot| !taken.contains(slot))
            .ok_or(DatapathError::NoRecordSlot {
                ifindex,
                slots: self.slots,
            })
    }

    /// The places of a slot's records.
    fn places(&self, slot: u32) -> std::ops::Range<usize> {
        let count = RECORDS_PER_SLOT as usize;
        let start = (slot as usize).saturating_mul(count);
        let end = start.saturating_add(count).min(self.records.entries());
        start..end
    }

    fn clear(&self, ifindex: u32) -> Result<(), DatapathError> {
        self.gates.remove(&ifindex)?;
        self.usage.remove(&ifindex).map(drop)
    }

    /// Removes the gates of ports.
    pub(super) fn clear_if(&self, gone: impl Fn(u32) -> bool) -> Result<(), DatapathError> {
        for (ifindex, _) in self.gates.entries()? {
            if gone(ifindex) {
                self.clear(ifindex)?;
            }
        }
        Ok(())
    }

    fn with_usage(&self, ifindex: u32, gate: Gate) -> Result<(Gate, GateUsage), DatapathError> {
        Ok((gate, self.usage.get(&ifindex)?.unwrap_or_default()))
    }
}

/// What became of the lease of a gate that records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordLease {
    /// It goes on.
    Renewed,
    /// It goes on, but the TAP takes other aggregates whole than before, so frames are counted otherwise.
    CountsOtherwise,
    /// It had ended, and is not renewed.
    Ended,
}

/// [`Gate::splits`] of a TAP; one that does not say takes all aggregates whole.
fn splits(ifindex: u32) -> u32 {
    super::offload::splits(ifindex).unwrap_or_else(|error| {
        tracing::debug!(ifindex, %error, "What a TAP takes whole is not known");
        0
    })
}

impl Datapath {
    /// Numbers the frames that enter a TAP from now on, from 1, and records those of multicast, for
    /// [`RECORD_LEASE`] unless it is renewed. Returns the slot that they are recorded in. May be called again, to begin anew. `probes`: each
    /// of them has a probe before it, if that [is possible](Self::takes_probes).
    ///
    /// # Errors
    ///
    /// [`DatapathError::NoPort`], [`DatapathError::NoRecordSlot`], [`DatapathError::Map`].
    pub fn gate_record(&self, ifindex: u32, probes: bool) -> Result<u32, DatapathError> {
        self.has_gate(ifindex)?;
        let gates = lock(&self.inner.gates);
        let slot = gates.slot(ifindex)?;
        for place in gates.places(slot) {
            gates.records.clear(place);
        }
        let probes = probes && self.takes_probes(ifindex);
        let gate = Gate {
            splits: splits(ifindex),
            ..Gate::record(slot, probes, lease_end(RECORD_LEASE))
        };
        gates.begin(ifindex, &gate)?;
        Ok(slot)
    }

    /// Whether `gate` can send probes into a TAP. On a root qdisc it cannot: the kernel holds the
    /// qdisc's lock while filters run, and the probe needs that lock.
    pub fn takes_probes(&self, ifindex: u32) -> bool {
        let attached = lock(&self.inner.attached);
        attached
            .get(&(Program::Gate, ifindex))
            .is_some_and(|gate| !(gate.hook == Hook::Filter && is_root(gate.parent)))
    }

    /// Holds the multicast frames on their way into a TAP from now on, for [`HOLD_LEASE`] unless it is
    /// renewed: they come by [`Datapath::held`]. May be called again, to begin anew.
    ///
    /// # Errors
    ///
    /// [`DatapathError::NoPort`], [`DatapathError::Map`].
    pub fn gate_hold(&self, ifindex: u32) -> Result<(), DatapathError> {
        self.has_gate(ifindex)?;
        lock(&self.inner.gates).begin(ifindex, &Gate::hold(lease_end(HOLD_LEASE)))
    }

    /// Has a gate that holds go on for `lease`; does nothing where there is none. Returns whether it had
    /// lapsed: then frames have passed it since.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn gate_renew(&self, ifindex: u32, lease: Duration) -> Result<bool, DatapathError> {
        let now = now().0;
        let mut has_lapsed = false;
        self.change(ifindex, GateMode::Hold, |gate| {
            has_lapsed = gate.until_ns < now;
            Gate {
                until_ns: lease_end(lease),
                ..gate
            }
        })?;
        Ok(has_lapsed)
    }

    /// Has a gate that records go on for [`RECORD_LEASE`].
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn gate_record_renew(&self, ifindex: u32) -> Result<RecordLease, DatapathError> {
        let (now, splits) = (now().0, splits(ifindex));
        let mut lease = RecordLease::Ended;
        self.change(ifindex, GateMode::Record, |gate| {
            if gate.until_ns < now {
                return gate;
            }
            lease = if gate.splits == splits {
                RecordLease::Renewed
            } else {
                RecordLease::CountsOtherwise
            };
            Gate {
                until_ns: lease_end(RECORD_LEASE),
                splits,
                ..gate
            }
        })?;
        Ok(lease)
    }

    /// Says how many held frames are done with: replayed, discarded, or lost ([`GateUsage::lost`]).
    /// The gate opens itself at the first frame that finds no other one held. Returns whether there
    /// is a gate that holds.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn gate_replayed(&self, ifindex: u32, replayed: u64) -> Result<bool, DatapathError> {
        self.change(ifindex, GateMode::Hold, |gate| Gate { replayed, ..gate })
    }

    /// Says how many of the copies are done with that a recording gate has kept for addresses which its
    /// VM leaves: sent on, had by the VM, or lost. When no other one waits, `uplink` sends on what comes
    /// ([`common::maps::Forward::unread_until_ns`]). Returns whether there is a gate that records.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn gate_sent_on(&self, ifindex: u32, done: u64) -> Result<bool, DatapathError> {
        self.change(ifindex, GateMode::Record, |gate| Gate {
            replayed: done,
            ..gate
        })
    }

    /// Has a recording go on without probes, before `gate` gets to a place where they would have
    /// the kernel wait for itself.
    pub(super) fn stop_probes(&self, ifindex: u32) -> Result<(), DatapathError> {
        let gates = lock(&self.inner.gates);
        match gates.gates.get(&ifindex)? {
            Some(gate) if gate.probes != 0 => {
                gates.gates.insert(&ifindex, &Gate { probes: 0, ..gate })
            }
            _ => Ok(()),
        }
    }

    fn change(
        &self,
        ifindex: u32,
        mode: GateMode,
        change: impl FnOnce(Gate) -> Gate,
    ) -> Result<bool, DatapathError> {
        let gates = lock(&self.inner.gates);
        let Some(gate) = gates.gates.get(&ifindex)? else {
            return Ok(false);
        };
        if gate.mode != mode as u32 {
            return Ok(false);
        }
        gates.gates.insert(&ifindex, &change(gate))?;
        Ok(true)
    }

    /// Lets all frames into a TAP, and forgets what was recorded; does nothing where there is no
    /// gate. A frame that a program is looking at meanwhile may still be held.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn gate_clear(&self, ifindex: u32) -> Result<(), DatapathError> {
        lock(&self.inner.gates).clear(ifindex)
    }

    /// The gate of a TAP and what it has counted, if there is one.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn gate(&self, ifindex: u32) -> Result<Option<(Gate, GateUsage)>, DatapathError> {
        let gates = lock(&self.inner.gates);
        let gate = gates.gates.get(&ifindex)?;
        gate.map(|gate| gates.with_usage(ifindex, gate)).transpose()
    }

    /// All gates, those of an earlier agent included, by the ifindex of their TAPs.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn gates(&self) -> Result<Vec<(u32, Gate, GateUsage)>, DatapathError> {
        let gates = lock(&self.inner.gates);
        let entries = gates.gates.entries()?;
        entries
            .into_iter()
            .map(|(ifindex, gate)| {
                let (gate, usage) = gates.with_usage(ifindex, gate)?;
                Ok((ifindex, gate, usage))
            })
            .collect()
    }

    /// The newest records of a slot by their numbers, ascending: of those that were made when
    /// `usage` was read, and of some that came since. One that is being written is left out.
    /// Takes tens of microseconds.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn gate_records(
        &self,
        slot: u32,
        usage: &GateUsage,
    ) -> Result<Vec<GateRecord>, DatapathError> {
        let gates = lock(&self.inner.gates);
        let recorded = usize::try_from(usage.recorded).unwrap_or(usize::MAX);
        let places = gates.places(slot);
        // Programs on several processors take a number and a place in two steps, so the order of
        // the places is not quite that of the numbers.
        let mut records: Vec<GateRecord> = places
            .take(recorded)
            .filter_map(|place| gates.records.read(place))
            .collect();
        records.sort_unstable_by_key(|record| record.number);
        Ok(records)
    }

    /// What has passed into TAPs, or one of them, by flow. Reads a whole map.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn delivered(
        &self,
        ifindex: Option<u32>,
    ) -> Result<Vec<(DeliveredKey, Delivered)>, DatapathError> {
        let mut delivered = self.inner.delivered.entries()?;
        if let Some(ifindex) = ifindex {
            delivered.retain(|(key, _)| key.ifindex == ifindex);
        }
        Ok(delivered)
    }

    /// What has passed into a TAP of one flow; `None` if nothing has.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn delivered_of(&self, key: &DeliveredKey) -> Result<Option<Delivered>, DatapathError> {
        self.inner.delivered.get(key)
    }

    /// The frames that gates hold, of all TAPs. Only one reader can exist. Frames that an earlier
    /// agent has left are among them.
    ///
    /// # Errors
    ///
    /// [`DatapathError::HeldTaken`] for a second call.
    pub fn held(&self) -> Result<Held, DatapathError> {
        let ring = lock(&self.inner.held)
            .take()
            .ok_or(DatapathError::HeldTaken)?;
        Ok(Held(ring))
    }

    /// Forgets what passed into ports; returns the number of flows.
    pub(super) fn forget_delivered_if(
        &self,
        gone: impl Fn(u32) -> bool,
    ) -> Result<usize, DatapathError> {
        let mut forgotten = 0;
        for (key, _) in self.inner.delivered.entries()? {
            if gone(key.ifindex) && self.inner.delivered.remove(&key)? {
                forgotten += 1;
            }
        }
        Ok(forgotten)
    }

    /// Whether `gate` is on the port: without it nothing would be held, and nobody would notice.
    fn has_gate(&self, ifindex: u32) -> Result<(), DatapathError> {
        if lock(&self.inner.attached).contains_key(&(Program::Gate, ifindex)) {
            Ok(())
        } else {
            Err(DatapathError::NoPort(ifindex))
        }
    }
}

fn is_root(parent: Option<Parent>) -> bool {
    matches!(parent, None | Some(Parent::Root { .. }))
}

/// Frames that gates hold; made by [`Datapath::held`]. For a thread of its own, which takes frames
/// until there is none, and then waits by `poll(2)` until the descriptor can be read.
pub struct Held(RingBuf<MapData>);

impl Held {
    /// Takes the next frame, if there is one, and passes it on where it lies: its head and its
    /// bytes, from the Ethernet header on. Its room is free when `visit` returns.
    ///
    /// Frames may come in another order than that of their numbers, because programs on several
    /// processors take a number and the room for the frame in two steps.
    pub fn next<T>(&mut self, visit: impl FnOnce(&HeldFrame, &[u8]) -> T) -> Option<T> {
        loop {
            let record = self.0.next()?;
            // What is not of this layout is ignored: the layout version in the pin path rules it
            // out.
            if let Some((head, frame)) = parts(&record) {
                return Some(visit(&head, frame));
            }
        }
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Held {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Head and frame of a record.
fn parts(record: &[u8]) -> Option<(HeldFrame, &[u8])> {
    let head: HeldFrame = record::read(record)?;
    let length = usize::try_from(head.length).ok()?;
    let frame = record.get(size_of::<HeldFrame>()..)?.get(..length)?;
    Some((head, frame))
}
