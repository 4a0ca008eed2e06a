//! Gates of a handover: state and counts of `gate`, which records or holds the frames of a
//! migrating VM.

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

/// Lease of a holding gate while its VM does not run. Longer than a busy host may delay the agent,
/// because a frame that passes waits for the VM to read it, and then arrives twice.
pub const HOLD_LEASE: Duration = Duration::from_secs(30);
/// Lease of a holding gate once its VM may run: longer than a restart of the agent takes, shorter
/// than a viewer waits.
pub const REPLAY_LEASE: Duration = Duration::from_secs(3);
/// Lease of a recording gate: longer than a busy host may delay the agent, because an unrecorded
/// frame makes the cut of its VM inexact.
pub const RECORD_LEASE: Duration = Duration::from_secs(30);

fn lease_end(lease: Duration) -> u64 {
    (now() + lease).0
}

/// `GATES`, `GATE_USAGE` and `GATE_RECORDS`. Only this process writes them, except for what the
/// programs count.
pub(super) struct Gates {
    gates: Table<PortKey, Gate>,
    usage: Table<PortKey, GateUsage>,
    records: Mapping,
    slots: u32,
}

impl Gates {
    /// Takes over the maps, including existing gates.
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

    /// Starts a gate, or restarts it with all counts at zero.
    fn begin(&self, ifindex: u32, gate: &Gate) -> Result<(), DatapathError> {
        if let Some(before) = self.gates.get(&ifindex)? {
            // The old gate must not open because of the new counts.
            let closed = Gate {
                replayed: Gate::CLOSED,
                ..before
            };
            self.gates.insert(&ifindex, &closed)?;
        }
        self.usage.insert(&ifindex, &GateUsage::default())?;
        self.gates.insert(&ifindex, gate).inspect_err(|_| {
            // Usage without a gate would never be removed.
            if let Err(error) = self.clear(ifindex) {
                tracing::warn!(ifindex, %error, "Gate not removed");
            }
        })
    }

    /// Returns the slot of the port, or a free slot.
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

    /// Returns the indices of a slot's records.
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

    /// Removes the gates of the ports selected by `gone`.
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

/// Result of [`Datapath::gate_record_renew`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordLease {
    /// The lease continues.
    Renewed,
    /// The lease continues, but the TAP now accepts other aggregates whole, so the frame numbers
    /// count differently from here on.
    CountsOtherwise,
    /// The lease had ended and is not renewed.
    Ended,
}

/// Returns [`Gate::splits`] of a TAP; 0 (accepts all aggregates whole) if the TAP does not report
/// its features.
fn splits(ifindex: u32) -> u32 {
    super::offload::splits(ifindex).unwrap_or_else(|error| {
        tracing::debug!(ifindex, %error, "What a TAP takes whole is not known");
        0
    })
}

impl Datapath {
    /// Numbers the frames that enter a TAP, starting at 1, and records the multicast ones, for
    /// [`RECORD_LEASE`] unless renewed. Returns the slot of the records. A second call restarts the gate.
    /// With `probes`, `gate` sends a probe before each recorded frame, if that [is
    /// possible](Self::takes_probes).
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

    /// Whether `gate` can send probes into a TAP. On a root qdisc it cannot: the kernel runs
    /// filters with the qdisc's lock held, and sending the probe takes the same lock.
    pub fn takes_probes(&self, ifindex: u32) -> bool {
        let attached = lock(&self.inner.attached);
        attached
            .get(&(Program::Gate, ifindex))
            .is_some_and(|gate| !(gate.hook == Hook::Filter && is_root(gate.parent)))
    }

    /// Holds the multicast frames on their way into a TAP, for [`HOLD_LEASE`] unless renewed.
    /// [`Datapath::held`] returns the frames. A second call restarts the gate.
    ///
    /// # Errors
    ///
    /// [`DatapathError::NoPort`], [`DatapathError::Map`].
    pub fn gate_hold(&self, ifindex: u32) -> Result<(), DatapathError> {
        self.has_gate(ifindex)?;
        lock(&self.inner.gates).begin(ifindex, &Gate::hold(lease_end(HOLD_LEASE)))
    }

    /// Extends a holding gate by `lease` from now; does nothing without a gate. Returns true if the
    /// lease had ended: frames have passed since then.
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

    /// Extends a recording gate to [`RECORD_LEASE`] from now, unless its lease has ended.
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

    /// Sets the number of held frames that are finished: replayed, discarded, or lost
    /// ([`GateUsage::lost`]). The gate opens itself at the first frame that finds no other frame
    /// held. Returns true if a gate holds.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn gate_replayed(&self, ifindex: u32, replayed: u64) -> Result<bool, DatapathError> {
        self.change(ifindex, GateMode::Hold, |gate| Gate { replayed, ..gate })
    }

    /// Sets the number of finished copies among those that a recording gate has kept for addresses
    /// which its VM leaves: forwarded, read by the VM, or lost. Once no copy waits, `uplink`
    /// forwards new frames ([`common::maps::Forward::unread_until_ns`]). Returns true if a gate
    /// records.
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

    /// Disables the probes of a recording, before `gate` moves to a root qdisc, where a probe would
    /// deadlock the kernel.
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

    /// Removes a gate and its records, so that all frames enter the TAP; does nothing without a
    /// gate. A program that runs at this moment may still hold a frame.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn gate_clear(&self, ifindex: u32) -> Result<(), DatapathError> {
        lock(&self.inner.gates).clear(ifindex)
    }

    /// Returns the gate of a TAP with its counts, `None` without a gate.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn gate(&self, ifindex: u32) -> Result<Option<(Gate, GateUsage)>, DatapathError> {
        let gates = lock(&self.inner.gates);
        let gate = gates.gates.get(&ifindex)?;
        gate.map(|gate| gates.with_usage(ifindex, gate)).transpose()
    }

    /// Returns all gates, including those of an earlier agent, by the ifindex of their TAPs.
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

    /// Returns the newest records of a slot in ascending order of their numbers: those that existed
    /// when `usage` was read, and some later ones. Skips a record that a program is writing. Takes
    /// tens of microseconds.
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
        // Programs on several CPUs take a number and an index in two steps, so the order of the
        // indices may differ from the order of the numbers.
        let mut records: Vec<GateRecord> = places
            .take(recorded)
            .filter_map(|place| gates.records.read(place))
            .collect();
        records.sort_unstable_by_key(|record| record.number);
        Ok(records)
    }

    /// Returns the packets delivered into all TAPs or one of them, by flow. Reads a whole map.
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

    /// Returns the packets of one flow delivered into a TAP; `None` if there were none.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn delivered_of(&self, key: &DeliveredKey) -> Result<Option<Delivered>, DatapathError> {
        self.inner.delivered.get(key)
    }

    /// Takes the reader of the frames that gates hold, over all TAPs, including frames that an
    /// earlier agent left. Only one reader can exist.
    ///
    /// # Errors
    ///
    /// [`DatapathError::HeldTaken`] at a second call.
    pub fn held(&self) -> Result<Held, DatapathError> {
        let ring = lock(&self.inner.held)
            .take()
            .ok_or(DatapathError::HeldTaken)?;
        Ok(Held(ring))
    }

    /// Removes the delivery counts of the ports selected by `gone`; returns the number of flows.
    pub(super) fn forget_delivered_if(
        &self,
        gone: impl Fn(u32) -> bool,
    ) -> Result<usize, DatapathError> {
        let delivered = &self.inner.delivered;
        Ok(delivered.remove_if(|key| gone(key.ifindex))?.len())
    }

    /// Fails unless `gate` is attached to the port. Otherwise no frame would be held, and nothing
    /// would show the failure.
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

/// Reader of held frames; created by [`Datapath::held`]. Intended for a dedicated thread, which
/// takes frames until none is left, and then waits by `poll(2)` for a readable descriptor.
pub struct Held(RingBuf<MapData>);

impl Held {
    /// Takes the next frame, if any, and passes it in place to `visit`: its head, and its bytes
    /// from the Ethernet header on. The ring reuses the space once `visit` returns.
    ///
    /// The order of the frames may differ from the order of their numbers, because programs on
    /// several CPUs take a number and ring space in two steps.
    pub fn next<T>(&mut self, visit: impl FnOnce(&HeldFrame, &[u8]) -> T) -> Option<T> {
        loop {
            let record = self.0.next()?;
            // Ignores records of another layout, which the layout version in the pin path excludes.
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

/// Splits a record into head and frame.
fn parts(record: &[u8]) -> Option<(HeldFrame, &[u8])> {
    let head: HeldFrame = record::read(record)?;
    let length = usize::try_from(head.length).ok()?;
    let frame = record.get(size_of::<HeldFrame>()..)?.get(..length)?;
    Some((head, frame))
}
