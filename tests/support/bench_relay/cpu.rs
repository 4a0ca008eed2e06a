//! CPU time of all work for a packet: sender, kernel, relay and receiver.
//!
//! On `veth` a packet's path runs in the sender's own system call, up to the queue of the TAP or
//! socket. The sender, the reader and the userspace relays are threads of this process. The CPU
//! time of a packet is therefore the scheduler's run time of this process, plus the run time of
//! `ksoftirqd`, which takes over surplus work, plus the run time of a relay in a process of its
//! own. These run times are exact and exclude the other load of the machine. The shares of
//! `/proc/stat` are samples at ticks and beat with the period of a sender.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::time::{ClockId, clock_gettime};

/// Reads the run times of this process, of `ksoftirqd` and, if asked, of one other process.
pub(super) struct CpuClock {
    /// `schedstat` files of the `ksoftirqd` threads.
    others: Vec<PathBuf>,
}

impl CpuClock {
    /// Returns a clock for this process and the `ksoftirqd` threads.
    pub(super) fn new() -> Result<Self> {
        let mut others = Vec::new();
        for entry in fs::read_dir("/proc")
            .context("Failed to list /proc")?
            .flatten()
        {
            let path = entry.path();
            // The process may have ended since the listing of `/proc`.
            let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
            if name.starts_with("ksoftirqd/") {
                others.push(path.join("schedstat"));
            }
        }
        Ok(Self { others })
    }

    /// Returns the CPU time so far, including the time of `process` if given.
    pub(super) fn now(&self, process: Option<u32>) -> Result<Duration> {
        let own = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)
            .context("Failed to read the CPU time of this process")?;
        let mut time = Duration::from(own);
        let process = process.map(|id| PathBuf::from(format!("/proc/{id}/schedstat")));
        for path in self.others.iter().chain(&process) {
            let text = fs::read_to_string(path)
                .with_context(|| format!("Failed to read {}", path.display()))?;
            let nanoseconds = text.split(' ').next().and_then(|it| it.parse().ok());
            let nanoseconds = nanoseconds
                .with_context(|| format!("{} is not as expected: {text}", path.display()))?;
            time += Duration::from_nanos(nanoseconds);
        }
        Ok(time)
    }
}

/// CPU time that other processes take during a measurement, which disturbs the result.
pub(super) struct OtherLoad<'a> {
    clock: &'a CpuClock,
    start: Instant,
    own: Duration,
    idle: Duration,
}

impl<'a> OtherLoad<'a> {
    pub(super) fn start(clock: &'a CpuClock) -> Result<Self> {
        Ok(Self {
            clock,
            start: Instant::now(),
            own: clock.now(None)?,
            idle: idle()?,
        })
    }

    /// Returns the mean number of processors that were busy with other processes.
    pub(super) fn end(self) -> Result<f64> {
        let elapsed = self.start.elapsed().as_secs_f64();
        let own = (self.clock.now(None)? - self.own).as_secs_f64();
        let idle = (idle()?.saturating_sub(self.idle)).as_secs_f64();
        let processors = std::thread::available_parallelism()?.get() as f64;
        Ok((processors - (own + idle) / elapsed).max(0.0))
    }
}

/// Returns the idle time, summed over all processors. Unlike the other numbers of `/proc/stat`, the
/// idle time is no sample.
fn idle() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("Failed to read /proc/stat")?;
    let ticks = text
        .split_whitespace()
        .nth(4)
        .and_then(|it| it.parse::<u64>().ok());
    // The unit is a hundredth of a second on every architecture.
    let ticks = ticks.context("/proc/stat has no idle time")?;
    Ok(Duration::from_millis(ticks * 10))
}
