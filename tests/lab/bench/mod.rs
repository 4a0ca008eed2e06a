//! What the benches of the relay report, and the summary of their rounds.
//!
//! A round takes every way in turn, so what disturbs the machine for seconds disturbs all of them;
//! ways are compared within a round, and the median over the rounds counts.

pub mod picture;

use serde::{Deserialize, Serialize};

/// The machine that was measured on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// Kernel release.
    pub kernel: String,
    /// Name of the processor.
    pub processor: String,
    /// Processors that are online.
    pub cpus: usize,
}

/// Result of `bench relay`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RelayReport {
    /// Where it ran.
    pub machine: Machine,
    /// One for each payload and number of TAPs.
    pub settings: Vec<RelaySetting>,
    /// Cost of each program; filled in by `cargo xtask bench relay`.
    pub programs: Vec<ProgramCost>,
}

/// All ways to the TAPs, under one load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RelaySetting {
    /// UDP payload, bytes.
    pub payload_bytes: usize,
    /// TAPs that receive the stream.
    pub taps: usize,
    /// Packets per second that are sent while the CPU time is measured.
    pub packets_per_second: u32,
    /// The ways.
    pub ways: Vec<RelayWay>,
}

/// One way from the sender to the TAPs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RelayWay {
    /// Its name.
    pub way: String,
    /// Its rounds, in the order of the other ways' rounds.
    pub rounds: Vec<RelayRound>,
    /// Median CPU time of the whole path per delivered packet.
    pub cpu_ns: f64,
    /// The same relative to native multicast in the same round, median.
    pub cpu_to_native: f64,
    /// Relative to the relay by `recvmmsg` and `sendmmsg` in the same round, median.
    pub cpu_to_userspace: f64,
    /// Median of the most packets per second that were delivered, all TAPs together.
    pub delivered_per_second: f64,
    /// The same relative to native multicast in the same round, median.
    pub rate_to_native: f64,
    /// Packets whose UDP checksum was computed anew.
    pub checked: u64,
    /// Those whose checksum was wrong.
    pub wrong: u64,
    /// Whether source address and ports are those of the stream.
    pub original_source: bool,
}

/// One round of one way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RelayRound {
    /// CPU time of the whole path per delivered packet, nanoseconds.
    pub cpu_ns: f64,
    /// Packets that the TAPs should have got meanwhile and did not get.
    pub lost: u64,
    /// Packets delivered each second while the sender sends as fast as it can.
    pub delivered_per_second: f64,
}

/// Cost of a program by program test-run, as `bench_relay_programs` reports it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProgramCost {
    /// The program.
    pub program: String,
    /// What packet it meets.
    pub packet: String,
    /// Its UDP payload, bytes.
    pub payload_bytes: usize,
    /// Mean time of a run, nanoseconds: the median of some series.
    pub ns_per_packet: u64,
    /// Fastest and slowest series.
    pub range_ns: [u64; 2],
}

/// Result of `bench replicate`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReplicateReport {
    /// Where it ran.
    pub machine: Machine,
    /// One for each payload and number of subscribers.
    pub settings: Vec<ReplicateSetting>,
}

/// All ways to the subscribers, under one load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReplicateSetting {
    /// UDP payload, bytes.
    pub payload_bytes: usize,
    /// Subscribers of the stream.
    pub subscribers: usize,
    /// Packets per second that the relay receives while the CPU time is measured.
    pub packets_per_second: u32,
    /// The ways.
    pub ways: Vec<ReplicateWay>,
}

/// One way of copying.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReplicateWay {
    /// Its name.
    pub way: String,
    /// Its rounds, in the order of the other ways' rounds.
    pub rounds: Vec<ReplicateRound>,
    /// Median CPU time of the relay per copy, nanoseconds.
    pub cpu_ns: f64,
    /// The same with sender and sink, median.
    pub path_ns: f64,
    /// CPU time of the relay relative to that of the `sendmmsg` loop in the same round, median.
    pub cpu_to_loop: f64,
    /// The same with sender and sink, median.
    pub path_to_loop: f64,
    /// Median of the most copies per second that arrived.
    pub copies_per_second: f64,
    /// The same relative to the loop, median.
    pub rate_to_loop: f64,
}

/// One round of one way of copying.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReplicateRound {
    /// CPU time of the relay per copy, nanoseconds: that of the whole path less that of a path
    /// whose relay makes no copies.
    pub cpu_ns: f64,
    /// CPU time of the whole path per copy, nanoseconds.
    pub path_ns: f64,
    /// Copies that should have arrived and did not.
    pub lost: u64,
    /// Copies each second while the sender sends as fast as it can.
    pub copies_per_second: f64,
}

/// A line that a bench prints while it runs, as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// Steps done.
    pub done: usize,
    /// Steps in all.
    pub of: usize,
    /// What is measured now.
    pub what: String,
}

/// Median; the mean of the middle two of an even number, 0 of none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
    if sorted.len().is_multiple_of(2) && middle > 0 {
        f64::midpoint(at(middle - 1), at(middle))
    } else {
        at(middle)
    }
}

/// Median of the quotients of two ways' values, round by round.
pub fn ratio(
    values: impl IntoIterator<Item = f64>,
    reference: impl IntoIterator<Item = f64>,
) -> f64 {
    let pairs = values.into_iter().zip(reference);
    median(pairs.map(|(value, reference)| value / reference))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_or_between_the_middle_two() {
        assert!((median([3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median([4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median([]).abs() < 1e-9);
    }

    #[test]
    fn ratio_compares_within_a_round() {
        // The machine was twice as slow in the second round.
        assert!((ratio([2.0, 4.0, 2.2], [1.0, 2.0, 1.0]) - 2.0).abs() < 1e-9);
    }
}
