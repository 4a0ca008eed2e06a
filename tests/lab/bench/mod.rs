//! Reports of the benches of relay, handover and migration, and the summary of their rounds.
//!
//! A round measures every method in turn, so a disturbance of some seconds affects all methods. The
//! summary compares methods within a round and takes the median over the rounds.

pub mod handover;
pub mod migration;
pub mod picture;
pub mod sessions;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Machine of the measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Machine {
    /// Kernel release.
    pub kernel: String,
    /// Name of the processor.
    pub processor: String,
    /// Number of online processors.
    pub cpus: usize,
}

impl Machine {
    /// Reads the properties of this machine.
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
    /// Machine of the measurement.
    pub machine: Machine,
    /// Results, one for each payload and number of TAPs.
    pub settings: Vec<RelaySetting>,
    /// Cost of each program; filled in by `cargo xtask bench relay`.
    pub programs: Vec<ProgramCost>,
}

/// Results of all paths to the TAPs under one load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RelaySetting {
    /// UDP payload, bytes.
    pub payload_bytes: usize,
    /// Number of TAPs that receive the stream.
    pub taps: usize,
    /// Packets sent per second during the measurement of CPU time.
    pub packets_per_second: u32,
    /// Average number of processors that were busy with other work.
    pub other_load: f64,
    /// Results, one for each path.
    pub ways: Vec<RelayWay>,
}

/// One path from the sender to the TAPs.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct RelayWay {
    /// Name of the path.
    pub way: String,
    /// CPU time of the whole path per delivered packet of a stream, nanoseconds.
    pub stream_cpu_ns: Samples,
    /// CPU time of the whole path per delivered packet of a burst, nanoseconds. In a burst, single
    /// packets do not wake the receivers.
    pub burst_cpu_ns: Samples,
    /// Packets delivered per second at full speed, all TAPs together.
    pub full_per_second: Samples,
    /// Packets of the stream that the TAPs should have received, all TAPs together.
    pub sent: u64,
    /// Packets that the TAPs did not receive.
    pub lost: u64,
    /// Packets whose UDP checksum the receiver verified.
    pub checked: u64,
    /// Packets with a wrong checksum.
    pub wrong: u64,
    /// True if source address and ports are the original ones of the stream.
    pub original_source: bool,
}

/// Cost of a program by program test-run, as `bench_relay_programs` reports it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProgramCost {
    /// Name of the program.
    pub program: String,
    /// Kind of the packet that the program gets.
    pub packet: String,
    /// UDP payload of the packet, bytes.
    pub payload_bytes: usize,
    /// Mean time of a run, nanoseconds: the median of several series.
    pub ns_per_packet: u64,
    /// Means of the fastest and the slowest series.
    pub range_ns: [u64; 2],
    /// Median for the traced program with a filter that matches nothing.
    pub traced_ns_per_packet: u64,
}

/// Result of `bench replicate`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReplicateReport {
    /// Machine of the measurement.
    pub machine: Machine,
    /// Results, one for each payload and number of subscribers.
    pub settings: Vec<ReplicateSetting>,
}

/// Results of all methods of replication under one load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ReplicateSetting {
    /// UDP payload, bytes.
    pub payload_bytes: usize,
    /// Number of subscribers.
    pub subscribers: usize,
    /// Packets that the relay receives per second during the measurement of CPU time.
    pub packets_per_second: u32,
    /// Average number of processors that were busy with other work.
    pub other_load: f64,
    /// Results, one for each method.
    pub ways: Vec<ReplicateWay>,
}

/// One method of replication.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct ReplicateWay {
    /// Name of the method.
    pub way: String,
    /// CPU time of the relay per copy of a stream's packet, nanoseconds: the time of the whole path
    /// minus the time of a path whose relay makes no copies.
    pub stream_cpu_ns: Samples,
    /// CPU time of the relay per copy of a burst's packet, nanoseconds. In a burst, single packets
    /// do not wake the receivers.
    pub burst_cpu_ns: Samples,
    /// CPU time of the whole path per copy of a burst's packet, with sender and sink, nanoseconds.
    pub burst_path_cpu_ns: Samples,
    /// Copies that arrive per second at full speed.
    pub full_per_second: Samples,
    /// Copies of the stream that should have arrived.
    pub sent: u64,
    /// Copies that did not arrive.
    pub lost: u64,
}

/// One value of each round.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Samples {
    /// Values in the order of the rounds, which is the same for all methods.
    pub rounds: Vec<f64>,
    /// Median of the rounds.
    pub median: f64,
    /// Median of the quotients with native multicast in the same round.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_native: Option<f64>,
    /// Median of the quotients with the program that uses `recvmmsg` and `sendmmsg`, in the same
    /// round.
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

/// A line of progress that a bench prints as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// Number of finished steps.
    pub done: usize,
    /// Number of all steps.
    pub of: usize,
    /// Current step, as text for people.
    pub what: String,
}

/// Returns the median: the middle value, or the mean of the middle two of an even number of values;
/// 0 without values.
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

/// Returns the median of the quotients of two methods' values, round by round.
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
