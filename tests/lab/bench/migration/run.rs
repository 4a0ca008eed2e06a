//! Runs the migrations of `bench migration`, load by load, with every method in each run.

use anyhow::{Context, Result};

use super::{Load, MigrationReport, MigrationSetting, MigrationWay, Options, Way};
use crate::LabConfig;
use crate::bench::{Machine, Progress};
use crate::probe::report::RunRow;
use crate::scenario::Testbed;
use crate::scenario::measure::Mover;
use crate::scenario::shuttle::Shuttle;
use crate::scenario::stream::{StreamConfig, Streams};

/// Runs the bench. Calls `tell` at the start of each migration.
///
/// # Errors
///
/// When a lab cannot be built or a guest does not boot. A failed migration is in the report.
pub fn run(options: &Options, tell: &mut dyn FnMut(&Progress)) -> Result<MigrationReport> {
    let mut report = MigrationReport {
        machine: Machine::here()?,
        accelerator: String::new(),
        settings: Vec::new(),
        failures: Vec::new(),
    };
    let mut done = 0;
    let mut tell = |done: usize, what: String| {
        tell(&Progress {
            done,
            of: options.moves(),
            what,
        });
    };
    let mut loads = &options.loads[..];
    while let Some(first) = loads.first() {
        let memory_mib = first.memory_mib;
        let same = loads
            .iter()
            .take_while(|load| load.memory_mib == memory_mib);
        let (these, rest) = loads.split_at(same.count());
        loads = rest;
        let mut testbeds = Vec::new();
        for way in &options.ways {
            tell(
                done,
                format!("{memory_mib} MiB: boots a guest for {}", way.name()),
            );
            testbeds.push((*way, testbed(*way, memory_mib, options)?));
        }
        for load in these {
            let mut setting = empty(load, options);
            for number in 1..=options.runs {
                for (index, (way, testbed)) in testbeds.iter_mut().enumerate() {
                    let what = format!(
                        "{memory_mib} MiB, {} Mbit/s, run {number}: {}",
                        load.rate_mbps,
                        way.name()
                    );
                    tell(done, what.clone());
                    done += 1;
                    report.accelerator = testbed.domain().accelerator.name().to_owned();
                    match one(testbed, *way, load) {
                        Ok(row) => setting.ways[index].runs.push(row),
                        Err(error) => {
                            report.failures.push(format!("{what}: {error:#}"));
                            // VM host and receivers of the guest are unknown after a failure.
                            testbed.boot()?;
                        }
                    }
                }
            }
            setting.summarize();
            report.settings.push(setting);
        }
    }
    tell(done, "takes the labs down".to_owned());
    Ok(report)
}

fn empty(load: &Load, options: &Options) -> MigrationSetting {
    let way = |way: &Way| MigrationWay {
        way: *way,
        runs: Vec::new(),
    };
    MigrationSetting {
        memory_mib: load.memory_mib,
        rate_mbps: load.rate_mbps,
        ways: options.ways.iter().map(way).collect(),
        freeze_ratio: None,
    }
}

/// Builds a lab for one method, with a guest on the first VM host.
fn testbed(way: Way, memory_mib: u32, options: &Options) -> Result<Testbed> {
    let (name, agents) = match way {
        Way::Glm => ("benchglm", Some(options.agents)),
        Way::Lm => ("benchlm", None),
        Way::Baseline => ("benchplain", None),
    };
    let config = LabConfig {
        same_subnet: way == Way::Lm,
        ..LabConfig::new(name)
    };
    let testbed = Testbed::up(config, memory_mib, agents)?;
    let mut testbed = testbed.with_limits_of(options.agents);
    testbed.boot()?;
    Ok(testbed)
}

/// Migrates to the other VM host once. Makes the switches forget the stream's listeners after the
/// migration.
fn one(testbed: &mut Testbed, way: Way, load: &Load) -> Result<RunRow> {
    let streams = Streams::from(StreamConfig::probe(load.rate_mbps));
    let addresses = streams.addresses();
    let mut shuttle = Shuttle::resume(testbed, streams)?;
    shuttle.go(match way {
        Way::Glm => Mover::Operator,
        Way::Lm | Way::Baseline => Mover::Virsh,
    })?;
    let moves = shuttle.finish()?;
    testbed.lab().forget_listeners(&addresses)?;
    moves.rows.into_iter().next().context("The move has no row")
}
