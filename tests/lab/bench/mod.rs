//! What the benches of relay, handover and migration report, and the summary of their rounds.
//!
//! A round takes every way in turn, so what disturbs the machine for seconds disturbs all of them;
//! ways are compared within a round, and the median over the rounds counts.

pub mod handover;
pub mod migration;
pub mod picture;
pub mod sessions;

use anyhow::{Context, Result};
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

impl Machine {
    /// The machine that this runs on.
    ///
    /// # Errors
    ///
    /// When `/proc` cannot be read.
    pub fn here() -> Result<Self> {
        let read = |path: &str| {
            std::fs::read_to_string(path).with_context(|| format!("Failed to read {path}"))
        };
        let processors = read("/proc/cpuinfo")?;
        let processor = processors
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, name)| name);
        Ok(Self {
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            processor: processor.to_owned(),
            cpus: std::thread::available_parallelism()?.get(),
        })
    }
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
    /// Processors that were busy with other things meanwhile, on average.
    pub other_load: f64,
    /// The ways.
    pub ways: Vec<RelayWay>,
}

/// One way from the sender to the TAPs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RelayWay {
    /// Its name.
    pub way: String,
    /// CPU time of the whole path per delivered packet of a stream, nanoseconds.
    pub stream_cpu_ns: Samples,
    /// The same of bursts, for which nobody is woken packet by packet.
    pub burst_cpu_ns: Samples,
    /// Packets delivered per second at full speed, all TAPs together.
    pub full_per_second: Samples,
    /// Packets of the stream that the TAPs should have got, all TAPs together.
    pub sent: u64,
    /// Those that they did not get.
    pub lost: u64,
    /// Packets whose UDP checksum was computed anew.
    pub checked: u64,
    /// Those whose checksum was wrong.
    pub wrong: u64,
    /// Whether source address and ports are those of the stream.
    pub original_source: bool,
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
    /// The same median of the traced program, with a filter that matches nothing.
    pub traced_ns_per_packet: u64,
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
    /// Processors that were busy with other things meanwhile, on average.
    pub other_load: f64,
    /// The ways.
    pub ways: Vec<ReplicateWay>,
}

/// One way of copying.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ReplicateWay {
    /// Its name.
    pub way: String,
    /// CPU time of the relay per copy of a stream's packet, nanoseconds: that of the whole path
    /// less that of a path whose relay makes no copies.
    pub stream_cpu_ns: Samples,
    /// The same of bursts, for which nobody is woken packet by packet.
    pub burst_cpu_ns: Samples,
    /// CPU time of the whole path per copy of a burst's packet, with sender and sink.
    pub burst_path_cpu_ns: Samples,
    /// Copies that arrive per second at full speed.
    pub full_per_second: Samples,
    /// Copies of the stream that should have arrived.
    pub sent: u64,
    /// Those that did not.
    pub lost: u64,
}

/// One number of each round.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Samples {
    /// In the order of the rounds, which is the same for all ways.
    pub rounds: Vec<f64>,
    /// Their median.
    pub median: f64,
    /// Relative to native multicast in the same round, median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_native: Option<f64>,
    /// Relative to the program with `recvmmsg` and `sendmmsg` in the same round, median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_userspace: Option<f64>,
}

impl Samples {
    /// Computes the medians.
    pub fn summarize(&mut self, native: Option<&Self>, userspace: Option<&Self>) {
        self.median = median(&self.rounds);
        let relative = |to: &Self| ratio(&self.rounds, &to.rounds);
        self.to_native = native.map(relative);
        self.to_userspace = userspace.map(relative);
    }
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
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
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
pub fn ratio(values: &[f64], reference: &[f64]) -> f64 {
    let pairs = values.iter().zip(reference);
    let quotients: Vec<f64> = pairs.map(|(value, reference)| value / reference).collect();
    median(&quotients)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_or_between_the_middle_two() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).abs() < 1e-9);
    }

    #[test]
    fn ratio_compares_within_a_round() {
        // The machine was twice as slow in the second round.
        assert!((ratio(&[2.0, 4.0, 2.2], &[1.0, 2.0, 1.0]) - 2.0).abs() < 1e-9);
    }
}
