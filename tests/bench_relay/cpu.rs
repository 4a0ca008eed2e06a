//! CPU time of everything that a packet meets.
//!
//! On `veth` the way of a packet runs in the sender's own system call, up to the queue of the
//! TAP or socket; sender, reader and the userspace relays are threads of this process. So it is
//! the time that the scheduler has given to this process, plus what `ksoftirqd` took when it had
//! to help, plus that of a relay in a process of its own. Unlike the shares of `/proc/stat`,
//! which are samples at ticks and so beat with a sender's own ticks, these are exact; and what
//! else the machine does is not in them.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::time::{ClockId, clock_gettime};

/// Reads it.
pub struct CpuClock {
    /// `schedstat` of the threads `ksoftirqd` and of other processes.
    others: Vec<PathBuf>,
}

impl CpuClock {
    /// A clock of this process and the kernel's helpers.
    pub fn new() -> Result<Self> {
        let mut others = Vec::new();
        for entry in fs::read_dir("/proc")
            .context("Failed to list /proc")?
            .flatten()
        {
            let path = entry.path();
            // A process may be gone meanwhile.
            let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
            if name.starts_with("ksoftirqd/") {
                others.push(path.join("schedstat"));
            }
        }
        Ok(Self { others })
    }

    /// The time so far, with that of another process.
    pub fn now(&self, process: Option<u32>) -> Result<Duration> {
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

/// CPU time that others take meanwhile: what the measurements have to put up with.
pub struct OtherLoad<'a> {
    clock: &'a CpuClock,
    start: Instant,
    own: Duration,
    idle: Duration,
}

impl<'a> OtherLoad<'a> {
    pub fn start(clock: &'a CpuClock) -> Result<Self> {
        Ok(Self {
            clock,
            start: Instant::now(),
            own: clock.now(None)?,
            idle: idle()?,
        })
    }

    /// Processors that were busy with others, on average.
    pub fn end(self) -> Result<f64> {
        let elapsed = self.start.elapsed().as_secs_f64();
        let own = (self.clock.now(None)? - self.own).as_secs_f64();
        let idle = (idle()?.saturating_sub(self.idle)).as_secs_f64();
        let processors = std::thread::available_parallelism()?.get() as f64;
        Ok((processors - (own + idle) / elapsed).max(0.0))
    }
}

/// Time that all processors were idle. Unlike the other numbers of the file it is not a sample.
fn idle() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("Failed to read /proc/stat")?;
    let ticks = text
        .split_whitespace()
        .nth(4)
        .and_then(|it| it.parse::<u64>().ok());
    // In hundredths of a second on every architecture.
    let ticks = ticks.context("/proc/stat has no idle time")?;
    Ok(Duration::from_millis(ticks * 10))
}
