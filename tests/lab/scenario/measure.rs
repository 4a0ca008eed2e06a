//! One whole run: boot, stream, move, numbers.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::stream::{self, RECEIVER, STREAM_TIME, Stream, StreamConfig};
use super::{Testbed, virsh};
use crate::guest::control::TransportAt;
use crate::probe::clock;
use crate::probe::log::Sent;
use crate::probe::metrics::{self, Arrival, Window};
use crate::probe::picture::Phase;
use crate::probe::report::RunRow;
use crate::vms::Vms;
use crate::{Site, wait};

/// How long it is watched after the guest runs at the destination.
const AFTER: Duration = Duration::from_secs(3);
/// What the last packets of the window may take to arrive and be reported.
const DRAIN: Duration = Duration::from_millis(500);
/// How long a move may take in all.
const MOVE: Duration = Duration::from_secs(120);

/// Who asks for the move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mover {
    /// `migkick go` in the guest.
    Migkick,
    /// `roamcast migrate` by an operator.
    Operator,
    /// `virsh migrate`, with no Roamcast running: the baseline.
    Virsh,
}

/// What one run is to be.
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// Who asks for the move.
    pub mover: Mover,
    /// The stream.
    pub stream: StreamConfig,
    /// Network of the destination, for the row.
    pub site: Site,
}

/// Everything known about one run.
#[derive(Clone, Debug)]
pub struct Run {
    /// The row of the report.
    pub row: RunRow,
    /// Every packet sent.
    pub sent: Vec<Sent>,
    /// Every packet that reached the application.
    pub arrivals: Vec<Arrival>,
    /// What was looked at.
    pub window: Window,
    /// Phases of the move, in order.
    pub phases: Vec<Phase>,
}

/// Boots the guest, lets it receive, moves it to the second VM host and measures; `tell` hears of
/// each step as it happens.
///
/// # Errors
///
/// When a step fails that is not the move itself; a move that fails gives a row that is not `ok`.
pub fn run(testbed: &mut Testbed, config: &RunConfig, tell: &mut dyn FnMut(&str)) -> Result<Run> {
    tell("boots the guest on vms1");
    testbed.boot()?;
    let stream = Stream::start(testbed.lab(), &config.stream)?;
    tell(&format!(
        "sends {} packets/s to {}",
        config.stream.packets_per_second().round(),
        super::STREAM_ADDRESS
    ));
    testbed
        .guest()?
        .start_receiver(RECEIVER, stream::receiver(&config.stream))?;
    wait_received(testbed, Duration::from_secs(20))?;
    if config.mover != Mover::Virsh {
        stream::wait_snooped(testbed, config.stream.flows)?;
    }
    tell("the guest receives");
    pass(testbed, STREAM_TIME)?;

    let from_ns = clock::now_ns();
    pass(testbed, STREAM_TIME)?;
    let asked_ns = clock::now_ns();
    let moved = go(testbed, config.mover, 0, 1, tell);
    if let Err(error) = &moved {
        tell(&format!("the move failed: {error:#}"));
    }
    pass(testbed, AFTER)?;
    let mode = match &moved {
        Ok(_) if config.mover != Mover::Virsh => Some(mode(testbed, 1)?),
        _ => None,
    };
    let to_ns = clock::now_ns();
    pass(testbed, DRAIN)?;
    let sent = stream.stop()?;
    let arrivals = testbed.guest()?.arrivals(RECEIVER);
    let transport = testbed.guest()?.transport(RECEIVER);
    testbed.guest()?.stop_receiver(RECEIVER)?;

    let window = Window { from_ns, to_ns };
    let mut metrics = metrics::compute(&sent, &arrivals, window);
    let continuity_errors = transport.last().map(|last| {
        let counts: Vec<_> = transport
            .iter()
            .map(|at| (at.host_ns, at.totals.datagrams))
            .collect();
        metrics.freeze_ms = metrics::freeze_of_counter(&counts, window);
        metrics.received = received(&transport, window);
        last.totals.continuity_errors
    });
    let arrived = moved.is_ok() && super::ensure_runs_only_on(testbed, "vms2").is_ok();
    let flows_there = flows_at_end(&arrivals, window) || counts_at_end(&transport, window);
    let times = moved.unwrap_or_default();
    let row = RunRow {
        site: match config.site {
            Site::Multicast => "multicast",
            Site::Late(_) => "late",
            Site::UnicastOnly => "unicast-only",
        }
        .to_owned(),
        baseline: config.mover == Mover::Virsh,
        rate_mbps: config.stream.rate_mbps,
        memory_mib: testbed.domain().memory_mib,
        mode,
        ok: arrived && flows_there,
        continuity_errors,
        ..times.row()
    };
    let phases = times.phases(asked_ns, &arrivals);
    Ok(Run {
        row: row.with_metrics(&metrics),
        sent,
        arrivals,
        window,
        phases,
    })
}

/// Waits until the application has got something.
fn wait_received(testbed: &Testbed, deadline: Duration) -> Result<()> {
    let control = testbed.guest()?;
    wait::until("the guest to receive", deadline, || {
        let stamped = !control.arrivals(RECEIVER).is_empty();
        let counted = control
            .transport(RECEIVER)
            .last()
            .is_some_and(|at| at.totals.datagrams > 0);
        (stamped || counted).then_some(())
    })
}

/// Datagrams of a transport stream that came within a window.
fn received(transport: &[TransportAt], window: Window) -> u64 {
    let until = |ns: u64| {
        let before = transport.iter().rev().find(|at| at.host_ns < ns);
        before.map_or(0, |at| at.totals.datagrams)
    };
    until(window.to_ns) - until(window.from_ns)
}

/// Whether a transport stream was received in the last half second.
fn counts_at_end(transport: &[TransportAt], window: Window) -> bool {
    let late = Window {
        from_ns: window.to_ns.saturating_sub(LATE_NS),
        to_ns: window.to_ns,
    };
    received(transport, late) > 0
}

/// The end of the window, in which the stream must flow: half a second, in nanoseconds.
const LATE_NS: u64 = 500_000_000;

/// Whether the application got something new from the destination in the last half second.
fn flows_at_end(arrivals: &[Arrival], window: Window) -> bool {
    let late = window.to_ns.saturating_sub(LATE_NS);
    arrivals
        .iter()
        .rev()
        .take_while(|arrival| arrival.host_ns >= late)
        .any(|arrival| {
            // Host 1 is the second VM host.
            arrival.host == 1
        })
}

/// Lets the stream run for a while, as part of what is measured.
pub(super) fn pass(testbed: &Testbed, time: Duration) -> Result<()> {
    std::thread::sleep(time);
    let silence = testbed.guest()?.silence().unwrap_or(Duration::MAX);
    ensure!(
        silence < Duration::from_secs(30),
        "The guest has said nothing for {silence:?}"
    );
    Ok(())
}

/// Durations of a move, milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Times {
    signalling_ms: f64,
    copy_ms: f64,
    vm_pause_ms: f64,
    total_ms: f64,
}

impl Times {
    /// A row with these times.
    pub(super) fn row(&self) -> RunRow {
        RunRow {
            signalling_ms: self.signalling_ms,
            copy_ms: self.copy_ms,
            vm_pause_ms: self.vm_pause_ms,
            total_ms: self.total_ms,
            ..RunRow::default()
        }
    }

    /// The phases after a request. When the application moved is known from its packets, and the
    /// copy went before that.
    fn phases(&self, asked_ns: u64, arrivals: &[Arrival]) -> Vec<Phase> {
        // Durations of a move are far below the 2^53 up to which this is exact.
        let ns = |ms: f64| (ms * 1e6) as u64;
        let phase = |name: &str, from_ns: u64, to_ns: u64| Phase {
            name: name.to_owned(),
            from_ns,
            to_ns,
        };
        let mut phases = vec![phase(
            "signalling",
            asked_ns,
            asked_ns + ns(self.signalling_ms),
        )];
        let left = arrivals.iter().rev().find(|arrival| arrival.host == 0);
        let came = arrivals.iter().find(|arrival| arrival.host == 1);
        if let (Some(left), Some(came)) = (left, came) {
            let copy_ns = left.host_ns.saturating_sub(ns(self.copy_ms)).max(asked_ns);
            phases.push(phase("copy", copy_ns, left.host_ns));
            phases.push(phase("switch", left.host_ns, came.host_ns));
        }
        phases
    }
}

/// Moves the guest from one VM host to another, by their indices.
pub(super) fn go(
    testbed: &mut Testbed,
    mover: Mover,
    from: usize,
    to: usize,
    tell: &mut dyn FnMut(&str),
) -> Result<Times> {
    let hosts = testbed.lab().vms().clone();
    let (from, to) = (&hosts[from], &hosts[to]);
    match mover {
        Mover::Migkick => by_migkick(testbed, from, to, tell),
        Mover::Operator => by_operator(testbed, from, to),
        Mover::Virsh => by_virsh(testbed, from, to),
    }
}

fn by_migkick(
    testbed: &mut Testbed,
    from: &Vms,
    to: &Vms,
    tell: &mut dyn FnMut(&str),
) -> Result<Times> {
    let mut running = testbed.guest()?.spawn("migkick", &["go", to.name()])?;
    while let Some(line) = running.next_line(MOVE)? {
        tell(&format!("migkick: {}", line.text));
    }
    let output = running.wait(MOVE)?;
    ensure!(
        output.code == Some(0),
        "migkick ended with {:?}: {}",
        output.code,
        output.stderr().trim()
    );
    recorded(testbed, from)
}

fn by_operator(testbed: &mut Testbed, from: &Vms, to: &Vms) -> Result<Times> {
    let name = testbed.domain_name().to_owned();
    let agents = testbed.agents()?;
    from.output(&mut agents.command(from, &["migrate", &name, to.name()]))?;
    recorded(testbed, from)
}

/// The source agent's record of its last migration.
fn recorded(testbed: &mut Testbed, source: &Vms) -> Result<Times> {
    let agents = testbed.agents()?;
    let migrations = agents.query(source, "migrations")?;
    let record = migrations
        .as_array()
        .and_then(|rows| rows.iter().rev().find(|row| row["direction"] == "outgoing"))
        .with_context(|| format!("The agent has no record of the move: {migrations}"))?;
    let ms = |key: &str| record[key].as_f64();
    let (Some(signalling_ms), Some(copy_ms), Some(total_ms)) =
        (ms("signalling_ms"), ms("copy_ms"), ms("total_ms"))
    else {
        bail!("The agent's record lacks times: {record}");
    };
    Ok(Times {
        signalling_ms,
        copy_ms,
        total_ms,
        vm_pause_ms: ms("vm_pause_ms").unwrap_or_default(),
    })
}

/// How the destination receives the guest's addresses: `native` or `relay`, several with commas
/// between them.
pub(super) fn mode(testbed: &mut Testbed, host: usize) -> Result<String> {
    let vms = testbed.lab().vms()[host].clone();
    let streams = testbed.agents()?.query(&vms, "streams")?;
    let rows = streams.as_array().context("No table of streams")?;
    let modes: BTreeSet<&str> = rows.iter().filter_map(|row| row["mode"].as_str()).collect();
    Ok(modes.into_iter().collect::<Vec<_>>().join(","))
}

fn by_virsh(testbed: &Testbed, from: &Vms, to: &Vms) -> Result<Times> {
    let name = testbed.domain_name();
    let uri = to.uri();
    let memory = format!("tcp://[{}]", to.address());
    let arguments = [
        "migrate",
        "--live",
        "--p2p",
        "--persistent",
        "--undefinesource",
        "--domain",
        name,
        "--desturi",
        &uri,
        "--migrateuri",
        &memory,
    ];
    let started = Instant::now();
    virsh(from, &arguments)?;
    let total_ms = started.elapsed().as_secs_f64() * 1e3;
    let job = virsh(to, &["domjobinfo", "--completed", "--rawstats", name])
        .or_else(|_| virsh(to, &["domjobinfo", "--completed", name]))?;
    Ok(Times {
        copy_ms: total_ms,
        total_ms,
        signalling_ms: 0.0,
        vm_pause_ms: downtime_ms(&job),
    })
}

/// Reads the pause from `virsh domjobinfo`, in either of its forms; 0 where it is not given.
fn downtime_ms(job: &str) -> f64 {
    job.lines()
        .find_map(|line| {
            let (key, value) = line.split_once(':')?;
            let key = key.trim();
            (key == "downtime" || key == "Total downtime").then(|| {
                value
                    .split_whitespace()
                    .next()
                    .and_then(|number| number.parse().ok())
            })?
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downtime_is_read_from_job_statistics() {
        assert_eq!(
            downtime_ms("Job type:  Completed\nTotal downtime:   157 ms\n"),
            157.0
        );
        assert_eq!(downtime_ms("operation: 5\ndowntime: 98\n"), 98.0);
        assert_eq!(downtime_ms("Job type: None\n"), 0.0);
    }
}
