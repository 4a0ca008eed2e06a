//! What the relay costs, measured on one machine in namespaces of its own.
//!
//! | module | holds |
//! |---|---|
//! | [`relay`] | from a sender to the TAPs of one host, by every way there is |
//! | [`replicate`] | from a sender through a relay to its subscribers |
//! | [`ways`] | the ways to the TAPs: set up, taken away |
//! | [`world`] | namespaces, links, addresses |
//! | [`taps`] | what takes frames out of the TAPs, counts and checks them |
//! | [`sender`] | what sends, at a fixed rate or as fast as it can |
//! | [`forward`] | relays in userspace, to compare with |
//! | [`mmsg`] | `sendmmsg(2)` and `recvmmsg(2)` |
//! | [`cpu`] | CPU time of everything that a packet meets |
//!
//! Everything is in namespaces without a name, and so is gone with the process, however it ends.
#![allow(
    unreachable_pub,
    reason = "the modules of a bench and of the test that runs it"
)]

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

/// How long and how much.
#[derive(Clone, Debug)]
pub struct Options {
    /// UDP payloads, bytes.
    pub payloads: Vec<usize>,
    /// Numbers of TAPs.
    pub taps: Vec<usize>,
    /// Numbers of subscribers.
    pub subscribers: Vec<usize>,
    /// Rounds, each of all ways.
    pub rounds: usize,
    /// Time of the stream on one way in one round.
    pub stream: Duration,
    /// Bursts on one way in one round.
    pub bursts: usize,
    /// Time at full speed, likewise.
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
    /// Just enough to see that everything works.
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

/// `bench relay`, on a thread of its own, which enters namespaces.
///
/// # Errors
///
/// When something can't be set up, or a way delivers nothing.
pub fn relay(options: &Options) -> Result<RelayReport> {
    apart(|| {
        Ok(RelayReport {
            machine: Machine::here()?,
            settings: relay::run(options)?,
            programs: Vec::new(),
        })
    })
}

/// `bench replicate`, likewise.
///
/// # Errors
///
/// When something can't be set up, or no copy arrives.
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

/// Steps done and to do, told on standard output.
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
