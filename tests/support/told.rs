//! Reports of the traced programs, decoded from the bytes of the records.

use common::maps::{BridgeNumber, StreamKey};
use common::trace::{Cpu, Decision, FRAME_BYTES, Filter, Program, Reason, Record};

use crate::kernel::Kernel;

/// Far more lines per second than a test makes.
pub const RATE: u32 = 1_000_000;

/// A decision: program, verdict on the frame, and reason.
pub type Told = (&'static str, &'static str, Option<&'static str>);

/// Makes the programs report every decision.
pub fn tell_everything(kernel: &mut Kernel) {
    tell(kernel, Filter::everything(RATE));
}

/// Makes the programs report what a filter passes, with a full budget.
pub fn tell(kernel: &mut Kernel, filter: Filter) {
    kernel.set_array("TRACE_FILTER", 0, filter);
}

/// Takes the waiting records.
pub fn records(kernel: &mut Kernel) -> Vec<Record> {
    let records = kernel.ring("TRACE");
    records.iter().map(|bytes| record(bytes)).collect()
}

/// Takes the only record.
pub fn only(kernel: &mut Kernel) -> Record {
    let records = records(kernel);
    assert_eq!(records.len(), 1, "{:?}", decisions(&records));
    records[0]
}

/// Returns the number of decisions that were left out.
pub fn left_out(kernel: &mut Kernel) -> u64 {
    let cpus: Vec<Cpu> = kernel.per_cpu("TRACE_CPU");
    cpus.iter().map(|cpu| cpu.budget.left_out).sum()
}

/// Returns the names of what a record reports.
pub fn decision(record: &Record) -> Told {
    (
        Program::from_number(record.program).unwrap().as_str(),
        Decision::from_number(record.decision).unwrap().as_str(),
        Reason::from_number(record.reason).as_str(),
    )
}

/// Returns the names of what each record reports.
pub fn decisions(records: &[Record]) -> Vec<Told> {
    records.iter().map(decision).collect()
}

/// Returns source and destination with their ports.
pub fn flow(record: &Record) -> (([u8; 16], u16), ([u8; 16], u16)) {
    let flow = record.flow().unwrap();
    (
        (flow.source, flow.source_port),
        (flow.destination, flow.destination_port),
    )
}

fn record(bytes: &[u8]) -> Record {
    assert_eq!(bytes.len(), size_of::<Record>());
    let u64_at = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
    let u32_at = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    let u16_at = |at: usize| u16::from_ne_bytes(bytes[at..at + 2].try_into().unwrap());
    let address_at = |at: usize| bytes[at..at + 16].try_into().unwrap();
    Record {
        at_ns: u64_at(0),
        number: u64_at(8),
        ifindex: u32_at(16),
        length: u32_at(20),
        program: bytes[24],
        decision: bytes[25],
        reason: u16_at(26),
        vlan: u16_at(28),
        copied: u16_at(30),
        stream: StreamKey {
            multicast_address: address_at(32),
            source: address_at(48),
            source_port: u16_at(64),
            destination_port: u16_at(66),
            vlan: u16_at(68),
            bridge: BridgeNumber(u16_at(70)),
        },
        frame: bytes[72..72 + FRAME_BYTES].try_into().unwrap(),
    }
}
