//! `cargo xtask bench`: cost of the programs, the relay, the signalling and a migration.

mod handover;
mod machine;
mod migration;
mod relay;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use lab::bench::{Progress, median};
use lab::scenario::Testbed;
use lab::scenario::agents::AgentOptions;
use lab::scenario::measure::{self, Mover, RunConfig};
use lab::scenario::stream::{StreamConfig, StreamKind};
use lab::{LabConfig, Site};
use serde::Serialize;
use serde_json::Value;

use crate::run::{go_on_delivered, release_build, root, step, workspace};
use crate::setup;

/// Benches.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Cost of the `snoop` program, and of a host with 64 VMs that listen to 1,000 addresses each
    Snoop(Output),
    /// Cost of the `gate` program per frame into a TAP, without and during a migration of the VM
    Gate(Output),
    /// Path of a relayed stream to 1, 4 and 16 TAPs: CPU time and rate, compared with other paths
    Relay(relay::RelayArgs),
    /// A relay with 1, 10 and 100 subscribers: CPU time and rate, compared with a sendmmsg loop
    Replicate(relay::RelayArgs),
    /// Unicast mobility: cost of the translation, in programs and for applications; throughput of a
    /// mapping server
    Mat(Output),
    /// Handovers at high rates, between TAPs that a program reads: how many of them are exact
    Rates(RatesArgs),
    /// Time from MigrationRequest to MigrationResponse for 1, 100 and 1,000 addresses
    Signalling(SignallingArgs),
    /// Consecutive migrations under one and several streams, between all kinds of networks: each
    /// must be exact
    Handover(handover::HandoverArgs),
    /// The paper's measurements: migrations by GLM, by LM and by libvirt alone, for several memory
    /// sizes and stream rates
    Migration(migration::MigrationArgs),
}

/// Destination of the results.
#[derive(Debug, Args)]
pub(crate) struct Output {
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Arguments of `cargo xtask bench rates`.
#[derive(Debug, Args)]
pub(crate) struct RatesArgs {
    /// Rates of the stream, Mbit/s of UDP payload, in packets of 1450 bytes
    #[arg(long, value_name = "MBPS,..", value_delimiter = ',', default_values_t = [200, 500, 1000],
          value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rates: Vec<u32>,
    /// Pauses of the VM, milliseconds
    #[arg(long, value_name = "MS,..", value_delimiter = ',', default_values_t = [50, 200, 500],
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pauses: Vec<u32>,
    /// Handovers per rate and pause
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    moves: u32,
    #[command(flatten)]
    output: Output,
}

/// Arguments of `cargo xtask bench signalling`.
#[derive(Debug, Args)]
pub(crate) struct SignallingArgs {
    /// Migrations per rate and number of addresses; the median is the result
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=20))]
    runs: u32,
    /// Numbers of multicast addresses; each address is a flow of its own
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_values_t = [1, 100, 1000],
          value_parser = clap::value_parser!(u16).range(1..=2000))]
    addresses: Vec<u16>,
    /// Rates over all flows, Mbit/s
    #[arg(long, value_name = "MBPS,..", value_delimiter = ',', default_values_t = [2.0, 20.0])]
    rates: Vec<f64>,
    #[command(flatten)]
    output: Output,
}

/// One row of the result.
#[derive(Debug, Serialize)]
struct Signalling {
    rate_mbps: f64,
    addresses: u16,
    /// Times of all runs, milliseconds.
    runs_ms: Vec<f64>,
    median_ms: f64,
    /// Number of the destination's probes per verdict, over all runs.
    verdicts: BTreeMap<String, usize>,
    /// Longest time from a join to its verdict, milliseconds.
    longest_probe_ms: u64,
}

/// Runs a bench.
pub(crate) fn run(verb: &Verb) -> Result<()> {
    setup::ensure()?;
    match verb {
        Verb::Snoop(output) => {
            // The bench measures the command as it is delivered.
            release_build()?;
            program("snoop", &[], output)
        }
        Verb::Gate(output) => program("gate", &[], output),
        Verb::Mat(output) => mat(output),
        Verb::Relay(arguments) => relay::relay(arguments),
        Verb::Replicate(arguments) => relay::replicate(arguments),
        Verb::Rates(arguments) => rates(arguments),
        Verb::Signalling(arguments) => signalling(arguments),
        Verb::Handover(arguments) => handover::handover(arguments),
        Verb::Migration(arguments) => migration::migration(arguments),
    }
}

/// Runs the benches of unicast mobility one after the other. The report has the results of each
/// bench.
fn mat(output: &Output) -> Result<()> {
    // The bench measures the mapping server as it is delivered. Benches are release builds too, so
    // they look for the server beside themselves.
    release_build()?;
    let directory = root().join("target/bench");
    fs::create_dir_all(&directory)
        .with_context(|| format!("Failed to create {}", directory.display()))?;
    let mut results = BTreeMap::new();
    for name in ["mat_programs", "mat", "ims"] {
        let path = directory.join(name).with_extension("json");
        program(
            name,
            &[],
            &Output {
                report: Some(path.clone()),
            },
        )?;
        let text = fs::read_to_string(&path).context("The bench has written no report")?;
        results.insert(name, serde_json::from_str::<Value>(&text)?);
    }
    match &output.report {
        Some(path) => write_json(path, &results),
        None => Ok(()),
    }
}

/// Runs a bench program with arguments and shows its output.
fn program(name: &str, arguments: &[String], output: &Output) -> Result<()> {
    let mut command = workspace("bench");
    command.args(["--bench", &format!("bench_{name}"), "--"]);
    command.args(arguments);
    if let Some(path) = &output.report {
        // The bench runs in its package's folder, so the path must be absolute.
        let path = std::path::absolute(path)?;
        command.arg("--report").arg(path);
    }
    step(&format!("bench {name}"), &mut command)
}

fn rates(arguments: &RatesArgs) -> Result<()> {
    let list = |numbers: &[u32]| {
        let texts: Vec<String> = numbers.iter().map(u32::to_string).collect();
        texts.join(",")
    };
    let given = [
        ("--rates", list(&arguments.rates)),
        ("--pauses", list(&arguments.pauses)),
        ("--moves", arguments.moves.to_string()),
    ];
    let given: Vec<String> = given
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .collect();
    program("rates", &given, &arguments.output)
}

fn signalling(arguments: &SignallingArgs) -> Result<()> {
    go_on_delivered()?;
    let mut testbed = Testbed::up(LabConfig::new("bench"), 256, Some(AgentOptions::DEFAULT))?;
    let mut results = Vec::new();
    for &rate_mbps in &arguments.rates {
        for &addresses in &arguments.addresses {
            let stream = StreamConfig {
                rate_mbps,
                flows: addresses,
                kind: StreamKind::Probe,
            };
            let config = RunConfig {
                mover: Mover::Migkick,
                stream: (&stream).into(),
                site: Site::Multicast,
            };
            let mut runs_ms = Vec::new();
            let mut verdicts = BTreeMap::new();
            let mut longest_probe_ms = 0;
            for number in 1..=arguments.runs {
                eprintln!("{addresses} addresses at {rate_mbps} Mbit/s, run {number}");
                let run = measure::run(&mut testbed, &config, &mut |_| ())?;
                ensure!(run.row.flows, "The move failed: {:?}", run.row);
                runs_ms.push(run.row.signalling_ms);
                for reception in receptions(&mut testbed)? {
                    let mode = reception["mode"].as_str().unwrap_or("unknown").to_owned();
                    *verdicts.entry(mode).or_insert(0) += 1;
                    let waited = reception["waited_ms"].as_u64().unwrap_or_default();
                    longest_probe_ms = longest_probe_ms.max(waited);
                }
            }
            let median_ms = median(&runs_ms);
            results.push(Signalling {
                rate_mbps,
                addresses,
                runs_ms,
                median_ms,
                verdicts,
                longest_probe_ms,
            });
        }
    }
    drop(testbed);
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "Mbit/s",
        "addresses",
        "median ms",
        "runs ms",
        "longest probe ms",
        "verdicts",
    ]);
    for row in &results {
        let runs: Vec<_> = row.runs_ms.iter().map(|ms| format!("{ms:.1}")).collect();
        table.add_row([
            row.rate_mbps.to_string(),
            row.addresses.to_string(),
            format!("{:.1}", row.median_ms),
            runs.join(" "),
            row.longest_probe_ms.to_string(),
            row.verdicts
                .iter()
                .map(|(mode, count)| format!("{count} {mode}"))
                .collect::<Vec<_>>()
                .join(", "),
        ]);
    }
    println!("{table}");
    match &arguments.output.report {
        Some(path) => write_json(path, &results),
        None => Ok(()),
    }
}

/// Returns the probes of the last migration, from the source agent's record.
fn receptions(testbed: &mut Testbed) -> Result<Vec<Value>> {
    let vms1 = testbed.lab().vms1().clone();
    let migrations = testbed.agents()?.query(&vms1, "migrations")?;
    let last = migrations.as_array().and_then(|rows| rows.last());
    let receptions = last.and_then(|row| row["receptions"].as_array());
    receptions
        .cloned()
        .context("The agent's record has no receptions")
}

/// Runs a bench of `moves` migrations with a progress bar.
fn with_bar<T>(moves: u64, run: impl FnOnce(&mut dyn FnMut(&Progress)) -> Result<T>) -> Result<T> {
    let bar = ProgressBar::new(moves);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} [{eta} left] {msg}") {
        bar.set_style(style);
    }
    let result = run(&mut |progress| {
        bar.set_position(progress.done as u64);
        bar.set_message(progress.what.clone());
        bar.tick();
        if bar.is_hidden() {
            eprintln!(
                "{} of {}: {}",
                progress.done + 1,
                progress.of,
                progress.what
            );
        }
    });
    bar.finish_and_clear();
    result
}

fn write_json(path: &Path, results: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(results)? + "\n";
    fs::write(path, text).with_context(|| format!("Failed to write {}", path.display()))
}
