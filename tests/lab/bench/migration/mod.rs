//! The paper's section 5 on this lab: moves of a guest under a stream, by its memory and the
//! stream's rate, three ways.
//!
//! | way | moves |
//! |---|---|
//! | [`Way::Glm`] | to another subnet, by Roamcast |
//! | [`Way::Lm`] | to another host of the same subnet, by plain libvirt |
//! | [`Way::Baseline`] | to another subnet, by plain libvirt |
//!
//! Somebody outside of the guest asks for each of them: `migkick` would be a load in the guest that
//! the other ways have not, just when it begins to run again.
//!
//! Flags and limits of the migration are the same on all ways. A run takes every way in turn, so
//! what disturbs the machine for a while disturbs all of them. Each way has a lab and a guest of
//! its own, booted once for each size of memory, which goes to and fro. Between two runs the guest
//! leaves its multicast address and the switches forget it, so each move finds the network as the
//! first did.
//!
//! [`run()`] measures, [`figures`] draws, [`paper`] has what the authors measured.

pub mod figures;
pub mod paper;
mod run;

use serde::{Deserialize, Serialize};

pub use self::run::run;
use super::{Machine, median};
use crate::probe::report::RunRow;
use crate::scenario::agents::AgentOptions;

/// How a guest is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Global live migration: to another subnet, by Roamcast.
    Glm,
    /// Live migration within a subnet, by plain libvirt.
    Lm,
    /// To another subnet by plain libvirt, with no agent.
    Baseline,
}

impl Way {
    /// All of them, in the order they are taken.
    pub const ALL: [Self; 3] = [Self::Glm, Self::Lm, Self::Baseline];

    /// Its name in tables and pictures.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Glm => "GLM",
            Self::Lm => "LM, same subnet",
            Self::Baseline => "libvirt alone",
        }
    }
}

/// A size of memory under a stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// The guest's memory, MiB.
    pub memory_mib: u32,
    /// Rate of the stream, Mbit/s of UDP payload.
    pub rate_mbps: f64,
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// In the order of the report.
    pub loads: Vec<Load>,
    /// Moves of each way under each load.
    pub runs: u32,
    /// The ways, in the order they are taken.
    pub ways: Vec<Way>,
    /// Flags and limits of the migrations, on all ways.
    pub agents: AgentOptions,
}

impl Options {
    /// The paper's sizes and rates, and a stream of 100 Mbit/s to the guest of 256 MiB.
    #[must_use]
    pub fn paper_loads() -> Vec<Load> {
        let mut loads = Self::loads(&[128, 256, 512, 1024], &[2.0, 20.0]);
        let after = loads.iter().rposition(|load| load.memory_mib == 256);
        let dense = Load {
            memory_mib: 256,
            rate_mbps: 100.0,
        };
        loads.insert(after.map_or(0, |index| index + 1), dense);
        loads
    }

    /// Every size of memory under every rate.
    #[must_use]
    pub fn loads(memory_mib: &[u32], rates_mbps: &[f64]) -> Vec<Load> {
        let pairs = memory_mib
            .iter()
            .flat_map(|memory| rates_mbps.iter().map(move |rate| (*memory, *rate)));
        pairs
            .map(|(memory_mib, rate_mbps)| Load {
                memory_mib,
                rate_mbps,
            })
            .collect()
    }

    /// Moves in all.
    #[must_use]
    pub fn moves(&self) -> usize {
        self.loads.len() * self.runs as usize * self.ways.len()
    }
}

/// Result of `bench migration`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrationReport {
    /// Where it ran.
    pub machine: Machine,
    /// `kvm`, or `tcg` where QEMU translates: a guest then needs tens of milliseconds after each
    /// move until its code is translated again.
    pub accelerator: String,
    /// One for each load.
    pub settings: Vec<MigrationSetting>,
    /// Moves that failed, and why.
    pub failures: Vec<String>,
}

/// All ways under one load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrationSetting {
    /// The guest's memory, MiB.
    pub memory_mib: u32,
    /// Rate of the stream, Mbit/s of UDP payload.
    pub rate_mbps: f64,
    /// The ways, each with its moves.
    pub ways: Vec<MigrationWay>,
    /// Median freeze of [`Way::Glm`] over that of [`Way::Lm`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub freeze_ratio: Option<f64>,
}

/// The moves by one way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrationWay {
    /// The way.
    pub way: Way,
    /// Each move.
    pub runs: Vec<RunRow>,
}

impl MigrationWay {
    /// A number of each run.
    pub fn values(&self, of: impl Fn(&RunRow) -> f64) -> Vec<f64> {
        self.runs.iter().map(of).collect()
    }

    /// The span of a number over the runs.
    pub fn span(&self, of: impl Fn(&RunRow) -> f64) -> Span {
        Span::of(&self.values(of))
    }
}

impl MigrationSetting {
    /// The moves by a way, if there are some.
    #[must_use]
    pub fn way(&self, way: Way) -> Option<&MigrationWay> {
        let found = self.ways.iter().find(|it| it.way == way);
        found.filter(|it| !it.runs.is_empty())
    }

    /// Compares the ways.
    fn summarize(&mut self) {
        let freeze = |way| Some(self.way(way)?.span(|row| row.freeze_ms).median);
        self.freeze_ratio = freeze(Way::Glm).zip(freeze(Way::Lm)).map(|(a, b)| a / b);
    }
}

/// Least, mean, median and most of some values; 0 of none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Span {
    /// Least.
    pub min: f64,
    /// Mean.
    pub mean: f64,
    /// Median.
    pub median: f64,
    /// Most.
    pub max: f64,
}

impl Span {
    /// The span of some values.
    #[must_use]
    pub fn of(values: &[f64]) -> Self {
        if values.is_empty() {
            return Self::default();
        }
        Self {
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            mean: values.iter().sum::<f64>() / values.len() as f64,
            median: median(values),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moves(way: Way, freezes: &[f64]) -> MigrationWay {
        let row = |freeze: &f64| RunRow {
            freeze_ms: *freeze,
            ..RunRow::default()
        };
        MigrationWay {
            way,
            runs: freezes.iter().map(row).collect(),
        }
    }

    pub(super) fn setting(memory_mib: u32, rate_mbps: f64) -> MigrationSetting {
        let mut setting = MigrationSetting {
            memory_mib,
            rate_mbps,
            ways: vec![
                moves(Way::Glm, &[220.0, 180.0, 210.0]),
                moves(Way::Lm, &[200.0, 100.0, 300.0]),
                moves(Way::Baseline, &[]),
            ],
            freeze_ratio: None,
        };
        setting.summarize();
        setting
    }

    #[test]
    fn paper_is_measured_and_one_dense_stream() {
        let loads = Options::paper_loads();
        let all: Vec<_> = loads
            .iter()
            .map(|load| (load.memory_mib, load.rate_mbps))
            .collect();
        assert_eq!(all.len(), 9);
        assert_eq!(all[..3], [(128, 2.0), (128, 20.0), (256, 2.0)]);
        assert_eq!(all[4], (256, 100.0));
    }

    #[test]
    fn freezes_are_compared_by_their_medians() {
        let setting = setting(128, 20.0);
        assert!((setting.freeze_ratio.unwrap() - 1.05).abs() < 1e-9);
        assert!(setting.way(Way::Baseline).is_none(), "no run, no way");
    }

    #[test]
    fn span_has_least_mean_median_and_most() {
        let span = Span::of(&[1.0, 2.0, 6.0]);
        assert_eq!(
            (span.min, span.mean, span.median, span.max),
            (1.0, 3.0, 2.0, 6.0)
        );
        assert_eq!(Span::of(&[]), Span::default());
    }
}
