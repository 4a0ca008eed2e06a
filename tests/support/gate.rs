//! `gate` by program test-run: its maps and their contents.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "what fails here is the test that asked for it"
)]
#![allow(dead_code, reason = "shared by several test targets")]

use common::maps::{Delivered, DeliveredKey, Gate, GateRecord, GateUsage, HeldFrame, StreamKey};

use crate::support::{CONTEXT_IFINDEX, IFINDEX, Kernel};

/// A gate that holds forever.
pub(crate) const HOLD: Gate = Gate::hold(u64::MAX);

/// The loaded programs, of which the tests run `gate`.
pub(crate) struct Gated {
    pub(crate) kernel: Kernel,
}

impl Gated {
    /// Loads the programs; `None` if the system does not permit it.
    pub(crate) fn load() -> Option<Self> {
        Self::load_with(&[])
    }

    /// Like [`Self::load`], with other map capacities.
    pub(crate) fn load_with(capacities: &[(&'static str, u32)]) -> Option<Self> {
        let kernel = Kernel::load_with(capacities)?;
        Some(Self { kernel })
    }

    /// Gives a port a gate, and resets the port's counts.
    pub(crate) fn set(&mut self, ifindex: u32, gate: Gate) {
        self.kernel
            .insert("GATE_USAGE", ifindex, GateUsage::default());
        self.kernel.insert("GATES", ifindex, gate);
    }

    /// Switches the gate to recording into a slot.
    pub(crate) fn record(&mut self, slot: u32) {
        self.set(IFINDEX, Gate::record(slot, false, u64::MAX));
    }

    /// Switches the gate to holding.
    pub(crate) fn hold(&mut self) {
        self.set(IFINDEX, HOLD);
    }

    /// Sets the number of replayed frames.
    pub(crate) fn replayed(&mut self, replayed: u64) {
        self.kernel
            .insert("GATES", IFINDEX, Gate { replayed, ..HOLD });
    }

    /// Runs `gate` on a frame. Returns the verdict.
    pub(crate) fn run(&mut self, frame: &[u8]) -> i32 {
        self.run_into(IFINDEX, frame)
    }

    /// Runs `gate` at another port, which must exist.
    pub(crate) fn run_into(&mut self, ifindex: u32, frame: &[u8]) -> i32 {
        self.kernel
            .run_in("gate", frame, &[(CONTEXT_IFINDEX, ifindex)])
    }

    pub(crate) fn usage(&mut self) -> GateUsage {
        self.usage_of(IFINDEX)
    }

    pub(crate) fn usage_of(&mut self, ifindex: u32) -> GateUsage {
        self.kernel.entry("GATE_USAGE", ifindex).unwrap()
    }

    /// Returns the counts of all flows, sorted.
    pub(crate) fn delivered(&mut self) -> Vec<(DeliveredKey, Delivered)> {
        let mut delivered = self.kernel.read("DELIVERED");
        delivered.sort_unstable_by_key(|(key, _)| *key);
        delivered
    }

    /// Returns the count of one flow.
    pub(crate) fn delivered_of(&mut self, ifindex: u32, stream: StreamKey) -> Delivered {
        let key = DeliveredKey { ifindex, stream };
        self.kernel.entry("DELIVERED", key).unwrap_or_default()
    }

    /// Returns the first records of the first slot, in memory order.
    pub(crate) fn records(&mut self, count: u32) -> Vec<GateRecord> {
        self.kernel.array("GATE_RECORDS", count)
    }

    /// Takes the held frames.
    pub(crate) fn held(&mut self) -> Vec<(HeldFrame, Vec<u8>)> {
        let records = self.kernel.ring("HELD");
        records.iter().map(|record| held(record)).collect()
    }
}

/// Parses a record of `HELD` into head and frame.
pub(crate) fn held(record: &[u8]) -> (HeldFrame, Vec<u8>) {
    let u64_at = |at: usize| u64::from_ne_bytes(record[at..at + 8].try_into().unwrap());
    let u32_at = |at: usize| u32::from_ne_bytes(record[at..at + 4].try_into().unwrap());
    let u16_at = |at: usize| u16::from_ne_bytes(record[at..at + 2].try_into().unwrap());
    let head = HeldFrame {
        number: u64_at(0),
        at_ns: u64_at(8),
        ifindex: u32_at(16),
        length: u32_at(20),
        vlan: u16_at(24),
        segment_bytes: u16_at(26),
        pad: u32_at(28),
    };
    (head, record[32..].to_vec())
}
