//! `bench handover`: consecutive migrations that must not lose, double or reorder any packet, in
//! all cases that a handover must handle.
//!
//! Each case has a lab of its own, and guests that migrate back and forth without a rest, so a
//! migration starts with everything that the previous migration left behind. The report explains
//! each migration that is not exact ([`Inexact`]).

mod case;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use case::{Case, RATE_MBPS};

use super::sessions::Sessions;
use super::{Machine, Progress, median};
use crate::guest::domain::NicDriver;
use crate::probe::faults::{self, Fault, Faulty, Passed};
use crate::probe::path::{Overtaken, PathWatch};
use crate::probe::places::Counted;
use crate::probe::report::RunRow;
use crate::scenario::Testbed;
use crate::scenario::agents::AgentOptions;
use crate::scenario::crossing::Crossing;
use crate::scenario::shuttle::{Moves, Shuttle};
use crate::scenario::stream::{Service, StreamConfig, Streams};

/// Parameters of the bench.
#[derive(Clone, Debug)]
pub struct HandoverConfig {
    /// Cases, each with its number of migrations.
    pub cases: Vec<(Case, u32)>,
    /// Rate of the stream in cases without a rate of their own, Mbit/s.
    pub rate_mbps: f64,
    /// Queues and readers of the guests' NICs.
    pub driver: NicDriver,
    /// Configuration of the agents.
    pub agents: AgentOptions,
}

/// Result of `bench handover`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HandoverReport {
    /// Machine of the measurement.
    pub machine: Machine,
    /// `kvm`, or `tcg` if QEMU translates the guest's code.
    pub accelerator: String,
    /// Results, one for each case.
    pub cases: Vec<HandoverCase>,
}

/// Result of a case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HandoverCase {
    /// Case that was measured.
    pub case: Case,
    /// One row per migration; each of two guests has a row of its own.
    pub runs: Vec<RunRow>,
    /// Methods by which the destinations' agents placed the cuts, each with its number of flows.
    pub placed: Vec<(String, usize)>,
    /// Peak memory of the agents, MiB.
    pub agent_mib: f64,
    /// Median of the freeze minus the pause, ms.
    pub freeze_over_pause_ms: f64,
    /// Median of the freeze minus the longest stall of a thread in the guest, ms.
    pub freeze_over_stall_ms: f64,
    /// Sessions by a permanent address, if the guest has one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sessions: Option<Sessions>,
    /// Explanations of the migrations that were not exact.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub inexact: Vec<Inexact>,
}

/// Explanation of a migration that was not exact.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Inexact {
    /// Index of the row in [`HandoverCase::runs`].
    pub row: usize,
    /// Packets that were lost, doubled or reordered; at most a thousand.
    pub packets: Vec<Faulty>,
    /// Packets that the application received around the migration.
    pub around: Vec<Passed>,
    /// Packet counters of the kernels during the migration.
    pub counted: Counted,
    /// Packets that were overtaken at an interface before the guest.
    #[serde(default)]
    pub overtaken: Vec<Overtaken>,
    /// Interfaces that the first lost packet passed ([`PathWatch::passed`]).
    #[serde(default)]
    pub passed: Vec<String>,
    /// Records of both agents, the source's first.
    pub records: [Value; 2],
    /// Logs of both agents, only with the first such migration.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub logs: Vec<String>,
}

impl HandoverCase {
    fn new(case: Case, runs: Vec<RunRow>, placed: Vec<(String, usize)>) -> Self {
        let middle = |of: fn(&RunRow) -> f64| median(&runs.iter().map(of).collect::<Vec<_>>());
        Self {
            case,
            placed,
            agent_mib: 0.0,
            freeze_over_pause_ms: middle(|row| row.freeze_ms - row.vm_pause_ms),
            freeze_over_stall_ms: middle(|row| row.freeze_ms - row.stall_ms),
            sessions: Sessions::of(&runs),
            runs,
            inexact: Vec::new(),
        }
    }

    fn explained(self, inexact: Vec<Inexact>) -> Self {
        Self { inexact, ..self }
    }

    /// Returns true if every migration was exact.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.runs.iter().all(|row| self.case.is_exact(row))
    }
}

/// Explains the migrations of one guest that were not exact. `first` is the index of the guest's
/// first row in the case.
fn explain(case: Case, first: usize, moves: &Moves, path: &PathWatch) -> Result<Vec<Inexact>> {
    let watched = moves.windows.iter().zip(&moves.counted).zip(&moves.records);
    let rows = moves.rows.iter().enumerate().zip(watched);
    rows.filter(|((_, row), _)| !case.is_exact(row))
        .map(|((index, _), ((window, counted), records))| {
            let packets = faults::faults(&moves.sent, &moves.arrivals, *window);
            let lost = packets.iter().find(|packet| packet.fault == Fault::Lost);
            let passed = lost.map(|packet| path.passed(packet.flow, packet.sequence));
            Ok(Inexact {
                row: first + index,
                passed: passed.transpose()?.unwrap_or_default(),
                packets,
                around: faults::around_the_move(&moves.arrivals, *window),
                counted: counted.clone(),
                overtaken: path.overtaken(*window)?,
                records: records.clone(),
                logs: Vec::new(),
            })
        })
        .collect()
}

/// Runs the bench. Calls `tell` at the start of each migration.
///
/// # Errors
///
/// When a lab cannot be built, a guest does not boot, or a migration fails.
pub fn run(config: &HandoverConfig, tell: &mut dyn FnMut(&Progress)) -> Result<HandoverReport> {
    let mut report = HandoverReport {
        machine: Machine::here()?,
        accelerator: String::new(),
        cases: Vec::new(),
    };
    let of = config.cases.iter().map(|(_, moves)| *moves as usize).sum();
    let mut done = 0;
    for &(case, moves) in &config.cases {
        let mut tell = |number: u32| {
            let what = format!("{}, move {number} of {moves}", case.name());
            tell(&Progress { done, of, what });
            done += 1;
        };
        let mut testbed = Testbed::up(case.lab(), 128, Some(case.agents(config.agents)))?;
        testbed.read_nics_by(config.driver);
        report.accelerator = testbed.domain().accelerator.name().to_owned();
        let rate_mbps = config.rate_mbps;
        let measured = match case {
            Case::Crossing => crossing(&mut testbed, rate_mbps, moves, &mut tell),
            Case::Soak => soak(&mut testbed, rate_mbps, moves, &mut tell),
            _ => to_and_fro(&mut testbed, case, rate_mbps, moves, &mut tell),
        };
        let mut measured = measured.with_context(|| format!("Case {}", case.name()))?;
        if let Some(first) = measured.inexact.first_mut() {
            let [vms1, vms2] = testbed.lab().vms().clone();
            let agents = testbed.agents()?;
            first.logs = vec![agents.log(&vms1), agents.log(&vms2)];
        }
        report.cases.push(HandoverCase {
            agent_mib: peak_mib(&mut testbed)?,
            ..measured
        });
    }
    Ok(report)
}

fn to_and_fro(
    testbed: &mut Testbed,
    case: Case,
    rate_mbps: f64,
    moves: u32,
    tell: &mut dyn FnMut(u32),
) -> Result<HandoverCase> {
    if case == Case::Virsh {
        let lab = crate::Lab::attach(&testbed.lab().config().name)?;
        testbed.agents()?.install_hooks(&lab)?;
    }
    let path = PathWatch::start(testbed.lab().path())?;
    let mut shuttle = Shuttle::begin(testbed, case.streams(rate_mbps)?)?;
    for number in 1..=moves {
        tell(number);
        shuttle.go(case.mover())?;
    }
    let moves = shuttle.finish()?;
    let inexact = explain(case, 0, &moves, &path)?;
    let words = placed(&moves.records);
    Ok(HandoverCase::new(case, moves.rows, words).explained(inexact))
}

/// Migrates at most `moves` times, judges each migration at once, and stops after the first
/// migration that is not exact.
fn soak(
    testbed: &mut Testbed,
    rate_mbps: f64,
    moves: u32,
    tell: &mut dyn FnMut(u32),
) -> Result<HandoverCase> {
    let case = Case::Soak;
    let streams = case.streams(rate_mbps)?;
    let (mut runs, mut inexact, mut records) = (Vec::new(), Vec::new(), Vec::new());
    for number in 1..=moves {
        tell(number);
        // Each migration has a stream of its own, whose numbers begin again.
        let path = PathWatch::start(testbed.lab().path())?;
        let mut shuttle = match number {
            1 => Shuttle::begin(testbed, streams.clone())?,
            _ => Shuttle::resume(testbed, streams.clone())?,
        };
        shuttle.go(case.mover())?;
        let moves = shuttle.finish()?;
        inexact = explain(case, runs.len(), &moves, &path)?;
        runs.extend(moves.rows);
        records.extend(moves.records);
        if !inexact.is_empty() {
            break;
        }
    }
    Ok(HandoverCase::new(case, runs, placed(&records)).explained(inexact))
}

fn crossing(
    testbed: &mut Testbed,
    rate_mbps: f64,
    moves: u32,
    tell: &mut dyn FnMut(u32),
) -> Result<HandoverCase> {
    let case = Case::Crossing;
    let streams = |place| {
        Streams::placed(
            place,
            &[(StreamConfig::probe(rate_mbps), Service::AnySource)],
        )
    };
    let path = PathWatch::start(testbed.lab().path())?;
    let mut crossing = Crossing::begin(testbed, [streams(0)?, streams(1)?])?;
    for number in 1..=moves {
        tell(number);
        crossing.go(case.mover())?;
    }
    let (mut rows, mut inexact, mut records) = (Vec::new(), Vec::new(), Vec::new());
    for moves in crossing.finish()? {
        inexact.extend(explain(case, rows.len(), &moves, &path)?);
        rows.extend(moves.rows);
        records.extend(moves.records);
    }
    Ok(HandoverCase::new(case, rows, placed(&records)).explained(inexact))
}

/// Returns the peak memory of the agents, MiB.
fn peak_mib(testbed: &mut Testbed) -> Result<f64> {
    let hosts = testbed.lab().vms().clone();
    let agents = testbed.agents()?;
    let mut peak = 0.0_f64;
    for vms in &hosts {
        let status = agents.query(vms, "status")?;
        let process = &status["pid"];
        let text = std::fs::read_to_string(format!("/proc/{process}/status"))
            .with_context(|| format!("The agent on {} has no process {process}", vms.name()))?;
        let kib = text
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"))
            .and_then(|kib| kib.trim().parse::<f64>().ok())
            .context("The kernel does not say how much memory a process has used")?;
        peak = peak.max(kib / 1024.0);
    }
    Ok(peak)
}

/// Returns the methods by which cuts were placed, in the words of the destinations' records, each
/// with its number of flows.
fn placed(records: &[[Value; 2]]) -> Vec<(String, usize)> {
    let mut counts: Vec<(String, usize)> = Vec::new();
    let flows = records.iter().map(|[_, record]| &record["handover"]);
    for flow in flows.filter_map(Value::as_array).flatten() {
        let word = flow["placed"].as_str().unwrap_or("not placed");
        match counts.iter_mut().find(|(known, _)| known == word) {
            Some((_, count)) => *count += 1,
            None => counts.push((word.to_owned(), 1)),
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(row: RunRow) -> HandoverCase {
        HandoverCase::new(Case::Native, vec![row], Vec::new())
    }

    fn whole() -> RunRow {
        RunRow {
            ok: true,
            sent: 1000,
            ..RunRow::default()
        }
    }

    #[test]
    fn one_packet_lost_doubled_or_reordered_is_not_exact() {
        assert!(case(whole()).is_exact());
        for spoil in [
            |row: &mut RunRow| row.lost = 1,
            |row: &mut RunRow| row.duplicated = 1,
            |row: &mut RunRow| row.reordered = 1,
            |row: &mut RunRow| row.ok = false,
            |row: &mut RunRow| row.tcp_resets = Some(1),
        ] {
            let mut row = whole();
            spoil(&mut row);
            assert!(!case(row).is_exact());
        }
    }

    #[test]
    fn a_move_whose_sessions_were_late_or_not_measured_is_not_exact() {
        let unicast = |row| HandoverCase::new(Case::Unicast, vec![row], Vec::new()).is_exact();
        let gap = |gap_ms| RunRow {
            ping_gap_ms: Some(gap_ms),
            ..whole()
        };
        assert!(unicast(gap(60.0)));
        assert!(!unicast(gap(600.0)));
        assert!(!unicast(whole()));
    }

    #[test]
    fn cancelled_move_may_lose_what_its_record_names() {
        let is_exact = |lost, thrown_away_at_most| {
            Case::Cancelled.is_exact(&RunRow {
                lost,
                thrown_away_at_most,
                ..whole()
            })
        };
        assert!(is_exact(0, Some(0)));
        assert!(is_exact(2, Some(2)));
        assert!(!is_exact(3, Some(2)));
        assert!(!is_exact(1, None));
        assert!(!Case::Native.is_exact(&RunRow {
            lost: 1,
            thrown_away_at_most: Some(1),
            ..whole()
        }));
    }

    #[test]
    fn of_identical_packets_five_milliseconds_may_be_doubled() {
        let row = |duplicated| RunRow {
            duplicated,
            rate_mbps: 20.0,
            surplus: Some(duplicated as i64),
            ..whole()
        };
        assert!(case(row(9)).is_exact());
        assert!(!case(row(10)).is_exact());
    }

    #[test]
    fn flows_are_counted_by_how_they_were_placed() {
        let record = serde_json::json!({"handover": [
            {"placed": "exact"}, {"placed": "by_time"}, {"placed": "exact"}
        ]});
        assert_eq!(
            placed(&[[Value::Null, record], Default::default()]),
            [("exact".to_owned(), 2), ("by_time".to_owned(), 1)]
        );
    }
}
