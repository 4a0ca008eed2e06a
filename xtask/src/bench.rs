//! `cargo xtask bench`: what the programs and the signalling cost.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use comfy_table::Table;
use lab::scenario::Testbed;
use lab::scenario::agents::AgentOptions;
use lab::scenario::measure::{self, Mover, RunConfig};
use lab::scenario::stream::{StreamConfig, StreamKind};
use lab::{LabConfig, Site};
use serde::Serialize;

use crate::run::{build, step, workspace};
use crate::setup;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Cost of the `snoop` program, and of 64 VMs of 1,000 addresses each
    Snoop(Output),
    /// Time from MigrationRequest to MigrationResponse with 1, 100 and 1,000 addresses
    Signalling(SignallingArgs),
}

/// Where results go.
#[derive(Debug, Args)]
pub(crate) struct Output {
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Arguments of `cargo xtask bench signalling`.
#[derive(Debug, Args)]
pub(crate) struct SignallingArgs {
    /// Moves of each kind; the median is the result
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    runs: u32,
    #[command(flatten)]
    output: Output,
}

/// One line of the result.
#[derive(Debug, Serialize)]
struct Signalling {
    rate_mbps: f64,
    addresses: u16,
    /// Every run, milliseconds.
    runs_ms: Vec<f64>,
    median_ms: f64,
}

/// Runs a bench.
pub(crate) fn run(verb: &Verb) -> Result<()> {
    setup::ensure()?;
    match verb {
        Verb::Snoop(output) => snoop(output),
        Verb::Signalling(arguments) => signalling(arguments),
    }
}

fn snoop(output: &Output) -> Result<()> {
    let mut command = workspace("bench");
    command.args(["--bench", "bench_snoop", "--"]);
    if let Some(path) = &output.report {
        // The bench runs in its package's folder.
        let path = std::path::absolute(path)?;
        command.arg("--report").arg(path);
    }
    step("bench snoop", &mut command)
}

fn signalling(arguments: &SignallingArgs) -> Result<()> {
    build()?;
    let mut testbed = Testbed::up(LabConfig::new("bench"), 256, Some(AgentOptions::default()))?;
    let mut results = Vec::new();
    for rate_mbps in [2.0, 20.0] {
        for addresses in [1, 100, 1000] {
            let stream = StreamConfig { rate_mbps, flows: addresses, kind: StreamKind::Probe };
            let config = RunConfig { mover: Mover::Migkick, stream, site: Site::Multicast };
            let mut runs_ms = Vec::new();
            for number in 1..=arguments.runs {
                eprintln!("{addresses} addresses at {rate_mbps} Mbit/s, run {number}");
                let run = measure::run(&mut testbed, &config, &mut |_| ())?;
                ensure!(run.row.ok, "The move failed: {:?}", run.row);
                runs_ms.push(run.row.signalling_ms);
            }
            let median_ms = median(&runs_ms);
            results.push(Signalling { rate_mbps, addresses, runs_ms, median_ms });
        }
    }
    drop(testbed);
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header(["Mbit/s", "addresses", "median ms", "runs ms"]);
    for row in &results {
        let runs: Vec<_> = row.runs_ms.iter().map(|ms| format!("{ms:.1}")).collect();
        table.add_row([
            row.rate_mbps.to_string(),
            row.addresses.to_string(),
            format!("{:.1}", row.median_ms),
            runs.join(" "),
        ]);
    }
    println!("{table}");
    match &arguments.output.report {
        Some(path) => write_json(path, &results),
        None => Ok(()),
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

fn write_json(path: &Path, results: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(results)? + "\n";
    fs::write(path, text).with_context(|| format!("Failed to write {}", path.display()))
}
