//! Moves that are to lose, double and reorder nothing, under all that a handover has to bear.
//!
//! Each case has a lab of its own, and guests that go to and fro without a rest: what one move
//! leaves behind is there when the next one begins.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::sessions::Sessions;
use super::{Machine, Progress, median};
use crate::probe::report::RunRow;
use crate::scenario::Testbed;
use crate::scenario::agents::AgentOptions;
use crate::scenario::crossing::Crossing;
use crate::scenario::measure::Mover;
use crate::scenario::shuttle::{self, Shuttle};
use crate::scenario::stream::{Service, StreamConfig, StreamKind, Streams};
use crate::{LabConfig, Site};

/// The paper's rate, Mbit/s.
const RATE_MBPS: f64 = 20.0;

/// What is moved, and under what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Case {
    /// One stream of 20 Mbit/s, received natively at both ends.
    Native,
    /// The same, received natively at one end and from a relay at the other.
    Relay,
    /// One stream of 100 Mbit/s.
    Dense,
    /// Streams of 2, 20 and 50 Mbit/s to one guest, the last of them source-specific.
    Streams,
    /// Two guests that change places.
    Crossing,
    /// A stream of packets that nothing tells apart.
    Identical,
    /// Moves by `virsh migrate`, which libvirt's hook prepares.
    Virsh,
    /// Moves by `migkick go` of a guest with a permanent address, whose sessions must go on.
    Unicast,
}

impl Case {
    /// All of them, in the order they are taken.
    pub const ALL: [Self; 8] = [
        Self::Native,
        Self::Relay,
        Self::Dense,
        Self::Streams,
        Self::Crossing,
        Self::Identical,
        Self::Virsh,
        Self::Unicast,
    ];

    /// Its name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Relay => "relay",
            Self::Dense => "dense",
            Self::Streams => "streams",
            Self::Crossing => "crossing",
            Self::Identical => "identical",
            Self::Virsh => "virsh",
            Self::Unicast => "unicast",
        }
    }

    /// How many moves show that it holds.
    #[must_use]
    pub fn moves(self) -> u32 {
        match self {
            Self::Native | Self::Relay => 20,
            Self::Dense | Self::Unicast => 10,
            Self::Streams | Self::Crossing | Self::Identical | Self::Virsh => 5,
        }
    }

    fn lab(self) -> LabConfig {
        let mut config = LabConfig::new("benchhand");
        if self == Self::Relay {
            config.sites = [Site::Multicast, Site::UnicastOnly];
            config.relays = 1;
        }
        config.mobility = self == Self::Unicast;
        config
    }

    fn streams(self) -> Result<Streams> {
        let probe = StreamConfig::probe;
        Ok(match self {
            Self::Native | Self::Relay | Self::Virsh | Self::Crossing | Self::Unicast => {
                probe(RATE_MBPS).into()
            }
            Self::Dense => probe(100.0).into(),
            Self::Identical => identical(RATE_MBPS).into(),
            Self::Streams => Streams::placed(
                0,
                &[
                    (probe(2.0), Service::AnySource),
                    (probe(20.0), Service::AnySource),
                    (probe(50.0), Service::SourceSpecific),
                ],
            )?,
        })
    }
}

/// Packets that nothing tells apart.
const fn identical(rate_mbps: f64) -> StreamConfig {
    StreamConfig {
        kind: StreamKind::Identical,
        ..StreamConfig::probe(rate_mbps)
    }
}

/// Result of `bench handover`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HandoverReport {
    /// Where it ran.
    pub machine: Machine,
    /// `kvm`, or `tcg` where QEMU translates.
    pub accelerator: String,
    /// One for each case.
    pub cases: Vec<HandoverCase>,
}

/// The moves of a case.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HandoverCase {
    /// The case.
    pub case: Case,
    /// Each move; of two guests each has a row.
    pub runs: Vec<RunRow>,
    /// How the destination's agent placed the cut of each flow, with how often.
    pub placed: Vec<(String, usize)>,
    /// Most memory that an agent has used, MiB.
    pub agent_mib: f64,
    /// Median of the freeze less the pause, ms.
    pub freeze_over_pause_ms: f64,
    /// Median of the freeze less the longest stall of a thread in the guest, ms.
    pub freeze_over_stall_ms: f64,
    /// The sessions by a permanent address, where the guest has one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub sessions: Option<Sessions>,
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
        }
    }

    /// Whether every move was exact: of packets that can be told apart none was lost, doubled or
    /// reordered; of others none was lost, and at most 5 ms worth doubled. Sessions went on, and where they are the point, were measured.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.runs.iter().all(|row| {
            let may_be_doubled = match row.surplus {
                Some(_) => (identical(row.rate_mbps).packets_per_second() * 0.005) as u64,
                None => 0,
            };
            let exact = row.lost == 0 && row.reordered == 0 && row.duplicated <= may_be_doubled;
            let measured = self.case != Case::Unicast || row.session_gap_ms().is_some();
            row.ok && exact && measured && row.keeps_sessions()
        })
    }
}

/// Measures; `tell` hears of each move as it begins.
///
/// # Errors
///
/// When a lab cannot be built, a guest does not boot, or a move fails.
pub fn run(
    cases: &[(Case, u32)],
    agents: AgentOptions,
    tell: &mut dyn FnMut(&Progress),
) -> Result<HandoverReport> {
    let mut report = HandoverReport {
        machine: Machine::here()?,
        accelerator: String::new(),
        cases: Vec::new(),
    };
    let of = cases.iter().map(|(_, moves)| *moves as usize).sum();
    let mut done = 0;
    for &(case, moves) in cases {
        let mut tell = |number: u32| {
            let what = format!("{}, move {number} of {moves}", case.name());
            tell(&Progress { done, of, what });
            done += 1;
        };
        let mut testbed = Testbed::up(case.lab(), 128, Some(agents))?;
        report.accelerator = testbed.domain().accelerator.name().to_owned();
        let measured = match case {
            Case::Crossing => crossing(&mut testbed, moves, &mut tell),
            _ => to_and_fro(&mut testbed, case, moves, &mut tell),
        };
        let measured = measured.with_context(|| format!("Case {}", case.name()))?;
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
    moves: u32,
    tell: &mut dyn FnMut(u32),
) -> Result<HandoverCase> {
    if case == Case::Virsh {
        let lab = crate::Lab::attach(&testbed.lab().config().name)?;
        testbed.agents()?.install_hooks(&lab)?;
    }
    let mover = match case {
        Case::Virsh => Mover::Virsh,
        Case::Unicast => Mover::Migkick,
        _ => Mover::Operator,
    };
    let mut placed = Placed::default();
    let mut shuttle = Shuttle::begin(testbed, case.streams()?)?;
    for number in 1..=moves {
        tell(number);
        shuttle.go(mover)?;
        let to = usize::from(number % 2 == 1);
        placed.add(&shuttle::last_record(shuttle.testbed(), to)?);
    }
    Ok(HandoverCase::new(case, shuttle.finish()?.rows, placed.0))
}

fn crossing(testbed: &mut Testbed, moves: u32, tell: &mut dyn FnMut(u32)) -> Result<HandoverCase> {
    let case = Case::Crossing;
    let streams = |place| {
        Streams::placed(
            place,
            &[(StreamConfig::probe(RATE_MBPS), Service::AnySource)],
        )
    };
    let mut crossing = Crossing::begin(testbed, [streams(0)?, streams(1)?])?;
    let mut placed = Placed::default();
    for number in 1..=moves {
        tell(number);
        crossing.go(Mover::Operator)?;
        for host in 0..2 {
            placed.add_last_incoming(crossing.testbed(), host)?;
        }
    }
    let rows = crossing.finish()?.into_iter().flat_map(|it| it.rows);
    Ok(HandoverCase::new(case, rows.collect(), placed.0))
}

/// Most memory that an agent has used, MiB.
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

/// How cuts were placed, in the agent's words.
#[derive(Default)]
struct Placed(Vec<(String, usize)>);

impl Placed {
    /// Counts the flows of a record.
    fn add(&mut self, record: &serde_json::Value) {
        for flow in record["handover"].as_array().into_iter().flatten() {
            let word = flow["placed"].as_str().unwrap_or("not placed");
            match self.0.iter_mut().find(|(known, _)| known == word) {
                Some((_, count)) => *count += 1,
                None => self.0.push((word.to_owned(), 1)),
            }
        }
    }

    /// The same of the newest record of a guest that has come.
    fn add_last_incoming(&mut self, testbed: &Testbed, host: usize) -> Result<()> {
        let records = shuttle::records(testbed, host)?;
        let incoming = records
            .iter()
            .rev()
            .find(|it| it["direction"] == "incoming");
        self.add(incoming.context("The agent has no record of a guest that came")?);
        Ok(())
    }
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
        let mut placed = Placed::default();
        placed.add(&serde_json::json!({"handover": [
            {"placed": "exact"}, {"placed": "by_time"}, {"placed": "exact"}
        ]}));
        assert_eq!(
            placed.0,
            [("exact".to_owned(), 2), ("by_time".to_owned(), 1)]
        );
    }
}
