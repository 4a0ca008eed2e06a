//! One guest under one stream, moved to and fro; each move is a row of its own.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::measure::{self, Mover};
use super::stream::{self, RECEIVER, STREAM_TIME, Stream, StreamConfig};
use super::{Testbed, ensure_runs_only_on};
use crate::probe::clock;
use crate::probe::log::Sent;
use crate::probe::metrics::{self, Arrival, Window};
use crate::probe::report::RunRow;
use crate::wait;

/// How long it is watched after each move.
const AFTER: Duration = Duration::from_secs(2);
/// How long an agent may take to know the guest that has come.
const KNOWN: Duration = Duration::from_secs(20);

/// A guest that receives, and where it is.
pub struct Shuttle<'a> {
    testbed: &'a mut Testbed,
    config: StreamConfig,
    stream: Stream,
    /// Index of the VM host that the guest runs on.
    at: usize,
    moves: Vec<(Window, RunRow)>,
}

/// Everything known about the moves.
#[derive(Debug)]
pub struct Moves {
    /// One for each move.
    pub rows: Vec<RunRow>,
    /// Every packet sent.
    pub sent: Vec<Sent>,
    /// Every packet that reached the application.
    pub arrivals: Vec<Arrival>,
}

impl<'a> Shuttle<'a> {
    /// Boots the guest on the first VM host, and lets it receive.
    ///
    /// # Errors
    ///
    /// When a step fails.
    pub fn begin(testbed: &'a mut Testbed, config: StreamConfig) -> Result<Self> {
        testbed.boot()?;
        let stream = Stream::start(testbed.lab(), &config)?;
        let guest = testbed.guest()?;
        guest.start_receiver(RECEIVER, stream::receiver(&config))?;
        guest.wait_arrivals(RECEIVER, 1, Duration::from_secs(20))?;
        Ok(Self {
            testbed,
            config,
            stream,
            at: 0,
            moves: Vec::new(),
        })
    }

    /// The lab, its guest and its agents.
    pub fn testbed(&mut self) -> &mut Testbed {
        self.testbed
    }

    /// Moves the guest to the other VM host.
    ///
    /// # Errors
    ///
    /// When the move fails, or the guest does not run there and only there after it.
    pub fn go(&mut self, mover: Mover) -> Result<()> {
        let to = 1 - self.at;
        if mover != Mover::Virsh {
            self.wait_known()?;
        }
        measure::pass(self.testbed, STREAM_TIME)?;
        let from_ns = clock::now_ns();
        measure::pass(self.testbed, STREAM_TIME / 2)?;
        let times = measure::go(self.testbed, mover, self.at, to, &mut |_| {})?;
        self.at = to;
        measure::pass(self.testbed, AFTER)?;
        let to_ns = clock::now_ns();
        let host = self.testbed.lab().vms()[to].name().to_owned();
        ensure_runs_only_on(self.testbed, &host)?;
        let mode = match mover {
            Mover::Virsh => None,
            Mover::Migkick | Mover::Operator => Some(measure::mode(self.testbed, to)?),
        };
        let row = RunRow {
            baseline: mover == Mover::Virsh,
            rate_mbps: self.config.rate_mbps,
            memory_mib: self.testbed.domain().memory_mib,
            mode,
            ok: true,
            ..times.row()
        };
        self.moves.push((Window { from_ns, to_ns }, row));
        Ok(())
    }

    /// Waits until the agent that the guest leaves knows what it listens to.
    fn wait_known(&mut self) -> Result<()> {
        let vms = self.testbed.lab().vms()[self.at].clone();
        let flows = usize::from(self.config.flows);
        let agents = self.testbed.agents()?;
        wait::until("the agent to know the guest", KNOWN, || {
            let listeners = agents.query(&vms, "listeners").ok()?;
            let rows = listeners.as_array()?;
            let known = rows.iter().filter(|row| !row["domain"].is_null()).count();
            (known >= flows).then_some(())
        })
    }

    /// Ends the stream, and counts.
    ///
    /// # Errors
    ///
    /// When the sender failed, or nothing arrived.
    pub fn finish(self) -> Result<Moves> {
        measure::pass(self.testbed, STREAM_TIME)?;
        let sent = self.stream.stop()?;
        let guest = self.testbed.guest()?;
        let arrivals = guest.arrivals(RECEIVER);
        guest.stop_receiver(RECEIVER)?;
        ensure!(!arrivals.is_empty(), "The guest has received nothing");
        let rows = self
            .moves
            .into_iter()
            .map(|(window, row)| row.with_metrics(&metrics::compute(&sent, &arrivals, window)))
            .collect();
        Ok(Moves {
            rows,
            sent,
            arrivals,
        })
    }
}

/// The newest record of a VM host's agent.
///
/// # Errors
///
/// When it has none.
pub fn last_record(testbed: &mut Testbed, host: usize) -> Result<Value> {
    let vms = testbed.lab().vms()[host].clone();
    let migrations = testbed.agents()?.query(&vms, "migrations")?;
    let last = migrations.as_array().and_then(|rows| rows.last()).cloned();
    last.with_context(|| format!("{} has no record: {migrations}", vms.name()))
}
