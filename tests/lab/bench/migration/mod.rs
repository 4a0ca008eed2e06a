//! `bench migration`: the measurements of the paper's section 5 in this lab. A guest under a stream
//! migrates by three methods, under several sizes of memory and rates of the stream.
//!
//! | method | migrates |
//! |---|---|
//! | [`Way::Glm`] | to another subnet, by Roamcast |
//! | [`Way::Lm`] | to another host of the same subnet, by plain libvirt |
//! | [`Way::Baseline`] | to another subnet, by plain libvirt |
//!
//! Each migration is requested outside the guest. `migkick` would load the guest just when the
//! guest resumes, and the other methods have no such load.
//!
//! All methods use the same flags and limits. A run takes every method in turn, so a disturbance of
//! the machine affects all methods. Each method has a lab and a guest of its own. The guest boots
//! once for each size of memory and migrates back and forth. Between two runs the guest leaves its
//! multicast address and the switches forget the address, so each migration finds the network in
//! the same state.
//!
//! [`run()`] measures, [`figures`] draws, [`paper`] holds the authors' results.

pub mod figures;
pub mod paper;
mod run;

use serde::{Deserialize, Serialize};

pub use self::run::run;
use super::{Machine, median};
use crate::probe::report::RunRow;
use crate::scenario::agents::AgentOptions;

/// Method of a migration.
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
    /// All methods, in the order of execution.
    pub const ALL: [Self; 3] = [Self::Glm, Self::Lm, Self::Baseline];

    /// Returns the name in tables and pictures.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Glm => "GLM",
            Self::Lm => "LM, same subnet",
            Self::Baseline => "libvirt alone",
        }
    }
}

/// A size of memory and a rate of the stream.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    /// Memory of the guest, MiB.
    pub memory_mib: u32,
    /// Rate of the stream, Mbit/s of UDP payload.
    pub rate_mbps: f64,
}

/// Parameters of the bench.
#[derive(Clone, Debug)]
pub struct Options {
    /// Loads, in the order of the report.
    pub loads: Vec<Load>,
    /// Migrations of each method under each load.
    pub runs: u32,
    /// Methods, in the order of execution.
    pub ways: Vec<Way>,
    /// Flags and limits of the migrations, the same for all methods.
    pub agents: AgentOptions,
}

impl Options {
    /// Returns the paper's sizes and rates, and a stream of 100 Mbit/s to the guest of 256 MiB.
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

    /// Returns every combination of a size of memory and a rate.
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

    /// Returns the number of all migrations.
    #[must_use]
    pub fn moves(&self) -> usize {
        self.loads.len() * self.runs as usize * self.ways.len()
    }
}

/// Result of `bench migration`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrationReport {
    /// Machine of the measurement.
    pub machine: Machine,
    /// `kvm`, or `tcg` if QEMU translates the guest's code: after each migration the guest then
    /// needs tens of milliseconds until its code is translated again.
    pub accelerator: String,
    /// Results, one for each load.
    pub settings: Vec<MigrationSetting>,
    /// Reasons of failed migrations.
    pub failures: Vec<String>,
}

/// Results of all methods under one load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrationSetting {
    /// Memory of the guest, MiB.
    pub memory_mib: u32,
    /// Rate of the stream, Mbit/s of UDP payload.
    pub rate_mbps: f64,
    /// Results, one for each method.
    pub ways: Vec<MigrationWay>,
    /// Median freeze of [`Way::Glm`] divided by the median freeze of [`Way::Lm`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub freeze_ratio: Option<f64>,
}

/// Migrations by one method.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MigrationWay {
    /// Method of all migrations in `runs`.
    pub way: Way,
    /// One row per migration.
    pub runs: Vec<RunRow>,
}

impl MigrationWay {
    /// Returns the value `of` each run, in the order of runs.
    pub fn values(&self, of: impl Fn(&RunRow) -> f64) -> Vec<f64> {
        self.runs.iter().map(of).collect()
    }

    /// Returns the span of a value over the runs.
    pub fn span(&self, of: impl Fn(&RunRow) -> f64) -> Span {
        Span::of(&self.values(of))
    }
}

impl MigrationSetting {
    /// Returns the migrations by a method, if there are any.
    #[must_use]
    pub fn way(&self, way: Way) -> Option<&MigrationWay> {
        let found = self.ways.iter().find(|it| it.way == way);
        found.filter(|it| !it.runs.is_empty())
    }

    /// Computes [`MigrationSetting::freeze_ratio`].
    fn summarize(&mut self) {
        let freeze = |way| Some(self.way(way)?.span(|row| row.freeze_ms).median);
        self.freeze_ratio = freeze(Way::Glm).zip(freeze(Way::Lm)).map(|(a, b)| a / b);
    }
}

/// Minimum, mean, median and maximum of some values; 0 if there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Span {
    /// Smallest value.
    pub min: f64,
    /// Arithmetic mean.
    pub mean: f64,
    /// Median: the middle value, or the mean of the middle two.
    pub median: f64,
    /// Largest value.
    pub max: f64,
}

impl Span {
    /// Computes the span of some values.
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
