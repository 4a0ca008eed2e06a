//! `gate` by program test-run: its maps and their contents.

use common::maps::{Delivered, DeliveredKey, Gate, GateRecord, GateUsage, HeldFrame, StreamKey};

use crate::kernel::{CONTEXT_IFINDEX, IFINDEX, Kernel};

/// A gate that holds forever.
pub const HOLD: Gate = Gate::hold(u64::MAX);

/// The loaded programs, of which the tests run `gate`.
pub struct Gated {
    /// Programs and maps.
    pub kernel: Kernel,
}

impl Gated {
    /// Loads the programs; `None` if the system does not permit it.
    pub fn load() -> Option<Self> {
        Self::load_with(&[])
    }

    /// Like [`Self::load`], with other map capacities.
    pub fn load_with(capacities: &[(&'static str, u32)]) -> Option<Self> {
        let kernel = Kernel::load_with(capacities)?;
        Some(Self { kernel })
    }

    /// Gives a port a gate, and resets the port's counts.
    pub fn set(&mut self, ifindex: u32, gate: Gate) {
        self.kernel
            .insert("GATE_USAGE", ifindex, GateUsage::default());
        self.kernel.insert("GATES", ifindex, gate);
    }

    /// Switches the gate to recording into a slot.
    pub fn record(&mut self, slot: u32) {
        self.set(IFINDEX, Gate::record(slot, false, u64::MAX));
    }

    /// Switches the gate to holding.
    pub fn hold(&mut self) {
        self.set(IFINDEX, HOLD);
    }

    /// Sets the number of replayed frames.
    pub fn replayed(&mut self, replayed: u64) {
        self.kernel
            .insert("GATES", IFINDEX, Gate { replayed, ..HOLD });
    }

    /// Runs `gate` on a frame. Returns the verdict.
    pub fn run(&mut self, frame: &[u8]) -> i32 {
        self.run_into(IFINDEX, frame)
    }

    /// Runs `gate` at another port, which must exist.
    pub fn run_into(&mut self, ifindex: u32, frame: &[u8]) -> i32 {
        self.kernel
            .run_in("gate", frame, &[(CONTEXT_IFINDEX, ifindex)])
    }

    /// Returns the counts of the port's gate.
    pub fn usage(&mut self) -> GateUsage {
        self.usage_of(IFINDEX)
    }

    /// Returns the counts of the gate of the port with this index.
    pub fn usage_of(&mut self, ifindex: u32) -> GateUsage {
        self.kernel.entry("GATE_USAGE", ifindex).unwrap()
    }

    /// Returns the counts of all flows, sorted.
    pub fn delivered(&mut self) -> Vec<(DeliveredKey, Delivered)> {
        let mut delivered = self.kernel.read("DELIVERED");
        delivered.sort_unstable_by_key(|(key, _)| *key);
        delivered
    }

    /// Returns the count of one flow.
    pub fn delivered_of(&mut self, ifindex: u32, stream: StreamKey) -> Delivered {
        let key = DeliveredKey { ifindex, stream };
        self.kernel.entry("DELIVERED", key).unwrap_or_default()
    }

    /// Returns the first records of the first slot, in memory order.
    pub fn records(&mut self, count: u32) -> Vec<GateRecord> {
        self.kernel.array("GATE_RECORDS", count)
    }

    /// Takes the held frames.
    pub fn held(&mut self) -> Vec<(HeldFrame, Vec<u8>)> {
        let records = self.kernel.ring("HELD");
        records.iter().map(|record| held(record)).collect()
    }
}

/// Parses a record of `HELD` into head and frame.
pub fn held(record: &[u8]) -> (HeldFrame, Vec<u8>) {
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
