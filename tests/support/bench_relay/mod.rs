//! Cost of the relay, measured on one machine in network namespaces of the bench.
//!
//! | module | holds |
//! |---|---|
//! | `relay` | from a sender to the TAPs of one host, by every path |
//! | `replicate` | from a sender through a relay to its subscribers |
//! | `ways` | the paths to the TAPs: set-up and removal |
//! | `world` | namespaces, links, addresses |
//! | `taps` | the reader of the TAPs, which counts and checks frames |
//! | `sender` | senders at a fixed rate or as fast as possible |
//! | `forward` | userspace relays, for comparison |
//! | `mmsg` | `sendmmsg(2)` and `recvmmsg(2)` |
//! | `cpu` | CPU time of all work for a packet |
//!
//! All namespaces are unnamed, so they disappear with the process, however the process ends.

mod cpu;
mod forward;
mod mmsg;
mod relay;
mod replicate;
mod sender;
mod taps;
mod ways;
mod world;

use std::io::Write as _;
use std::time::Duration;

use anyhow::{Result, anyhow};
use lab::bench::{Machine, Progress, RelayReport, ReplicateReport};

/// Settings and durations of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// UDP payloads, bytes.
    pub payloads: Vec<usize>,
    /// Numbers of TAPs; each number is a setting of its own.
    pub taps: Vec<usize>,
    /// Numbers of subscribers; each number is a setting of its own.
    pub subscribers: Vec<usize>,
    /// Number of rounds; each round measures all paths.
    pub rounds: usize,
    /// Duration of the stream per path and round.
    pub stream: Duration,
    /// Number of bursts per path and round.
    pub bursts: usize,
    /// Duration at full speed per path and round.
    pub full_speed: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            payloads: vec![1400, 100],
            taps: vec![1, 4, 16],
            subscribers: vec![1, 10, 100],
            rounds: 31,
            stream: Duration::from_millis(40),
            bursts: 8,
            full_speed: Duration::from_millis(40),
        }
    }
}

impl Options {
    /// Returns the smallest options that still exercise every path.
    pub fn quick() -> Self {
        Self {
            payloads: vec![1400],
            taps: vec![4],
            subscribers: vec![10],
            rounds: 1,
            stream: Duration::from_millis(50),
            bursts: 2,
            full_speed: Duration::from_millis(50),
        }
    }
}

/// Runs `bench relay` on a thread of its own, because the bench enters namespaces.
///
/// # Errors
///
/// When the set-up fails, or a path delivers nothing.
pub fn relay(options: &Options) -> Result<RelayReport> {
    apart(|| {
        Ok(RelayReport {
            machine: Machine::here()?,
            settings: relay::run(options)?,
            programs: Vec::new(),
        })
    })
}

/// Runs `bench replicate` on a thread of its own, because the bench enters namespaces.
///
/// # Errors
///
/// When the set-up fails, or no copy arrives.
pub fn replicate(options: &Options) -> Result<ReplicateReport> {
    apart(|| {
        Ok(ReplicateReport {
            machine: Machine::here()?,
            settings: replicate::run(options)?,
        })
    })
}

fn apart<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                world::enter()?;
                work()
            })
            .join()
            .map_err(|_| anyhow!("The bench panicked"))?
    })
}

/// Progress of a run, printed as JSON to standard output.
struct Steps {
    done: usize,
    of: usize,
}

impl Steps {
    fn of(of: usize) -> Self {
        Self { done: 0, of }
    }

    fn next(&mut self, what: String) -> Result<()> {
        let progress = Progress {
            done: self.done,
            of: self.of,
            what,
        };
        let mut out = std::io::stdout().lock();
        writeln!(out, "{}", serde_json::to_string(&progress)?)?;
        self.done += 1;
        Ok(())
    }
}
