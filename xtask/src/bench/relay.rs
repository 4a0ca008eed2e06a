//! `bench relay` and `bench replicate`: runs the bench, shows its progress and its results.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use clap::Args;
use comfy_table::{Cell, CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use lab::bench::picture::{self, Bar, Kind, Panel};
use lab::bench::{
    ProgramCost, Progress, RelayReport, RelayWay, ReplicateReport, ReplicateWay, Samples,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::write_json;
use crate::run::{root, step, workspace};

/// Options of both benches.
#[derive(Debug, Args)]
pub(crate) struct RelayArgs {
    /// Rounds; each round measures all methods, and the medians are the result
    #[arg(long, value_name = "N", default_value_t = 31, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Numbers of TAPs or of subscribers [default: 1,4,16 or 1,10,100]
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=200))]
    counts: Vec<u16>,
    /// UDP payloads, bytes [default: 1400,100]
    #[arg(long, value_name = "N,..", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(16..=1400))]
    payloads: Vec<u16>,
    #[command(flatten)]
    output: super::Output,
}

/// Report of the bench programs.
#[derive(Deserialize)]
struct Programs {
    costs: Vec<ProgramCost>,
}

/// Runs `cargo xtask bench relay`.
pub(super) fn relay(arguments: &RelayArgs) -> Result<()> {
    let directory = prepare()?;
    let programs = directory.join("relay-programs.json");
    let mut command = workspace("bench");
    command.args(["--bench", "bench_relay_programs", "--", "--report"]);
    command.arg(&programs).stdout(Stdio::null());
    step("programs by test-run", &mut command)?;
    let mut report: RelayReport = run("relay", arguments, &directory)?;
    report.programs = read::<Programs>(&programs)?.costs;
    println!("{}", relay_table(&report));
    println!("{}", program_table(&report.programs));
    let title = format!(
        "CPU time of the whole path per delivered packet, ns ({}, {})",
        report.machine.kernel, report.machine.processor
    );
    let settings = || report.settings.iter();
    let panels = settings()
        .map(|it| (it, "stream"))
        .chain(settings().map(|it| (it, "bursts")))
        .map(|(setting, load)| Panel {
            title: format!(
                "{load}, {} bytes, {}",
                setting.payload_bytes,
                count(setting.taps, "TAP")
            ),
            bars: setting
                .ways
                .iter()
                .map(|way| match load {
                    "stream" => bar(&way.way, &way.stream_cpu_ns),
                    _ => bar(&way.way, &way.burst_cpu_ns),
                })
                .collect(),
        });
    draw(&directory.join("relay.svg"), &title, panels)?;
    told(report.settings.iter().map(|it| it.other_load));
    finish(arguments, &report)
}

/// Runs `cargo xtask bench replicate`.
pub(super) fn replicate(arguments: &RelayArgs) -> Result<()> {
    let directory = prepare()?;
    let report: ReplicateReport = run("replicate", arguments, &directory)?;
    println!("{}", replicate_table(&report));
    let title = format!(
        "CPU time of a relay per copy of bursts, ns ({}, {})",
        report.machine.kernel, report.machine.processor
    );
    let panels = report.settings.iter().map(|setting| Panel {
        title: format!(
            "{} bytes, {}",
            setting.payload_bytes,
            count(setting.subscribers, "subscriber")
        ),
        bars: setting
            .ways
            .iter()
            .map(|way| bar(&way.way, &way.burst_cpu_ns))
            .collect(),
    });
    draw(&directory.join("replicate.svg"), &title, panels)?;
    told(report.settings.iter().map(|it| it.other_load));
    finish(arguments, &report)
}

/// Builds the benches. Returns the directory for their reports.
fn prepare() -> Result<PathBuf> {
    let mut command = workspace("bench");
    command.args(["--bench", "bench_relay", "--bench", "bench_relay_programs"]);
    step("build", command.arg("--no-run"))?;
    let directory = root().join("target/bench");
    fs::create_dir_all(&directory)
        .with_context(|| format!("Failed to create {}", directory.display()))?;
    Ok(directory)
}

/// Runs the bench behind a progress bar.
fn run<T: DeserializeOwned>(what: &str, arguments: &RelayArgs, directory: &Path) -> Result<T> {
    let path = directory.join(format!("{what}.json"));
    let list = |numbers: &[u16]| numbers.iter().map(u16::to_string).collect::<Vec<_>>();
    let mut command = workspace("bench");
    command.args(["--quiet", "--bench", "bench_relay", "--", what, "--report"]);
    command.arg(&path);
    command.args(["--rounds", &arguments.rounds.to_string()]);
    for (option, numbers) in [
        ("--counts", &arguments.counts),
        ("--payloads", &arguments.payloads),
    ] {
        if !numbers.is_empty() {
            command.args([option, &list(numbers).join(",")]);
        }
    }
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("Failed to start {command:?}"))?;
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {percent:>3}% [{eta} left] {msg}") {
        bar.set_style(style);
    }
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let line = line.context("Failed to read from the bench")?;
            let Ok(progress) = serde_json::from_str::<Progress>(&line) else {
                continue;
            };
            bar.set_length(progress.of as u64);
            bar.set_position(progress.done as u64);
            bar.set_message(progress.what);
        }
    }
    let status = child.wait().context("Failed to wait for the bench")?;
    bar.finish_and_clear();
    ensure!(status.success(), "bench {what} ended with {status}");
    read(&path)
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text =
        fs::read_to_string(path).with_context(|| format!("Failed to read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not as expected", path.display()))
}

fn finish(arguments: &RelayArgs, report: &impl Serialize) -> Result<()> {
    match &arguments.output.report {
        Some(path) => write_json(path, report),
        None => Ok(()),
    }
}

/// Prints a warning if the machine was not idle enough.
fn told(loads: impl Iterator<Item = f64>) {
    let most = loads.fold(0.0, f64::max);
    if most > 0.2 {
        println!(
            "The machine was not quiet: up to {most:.1} processors were busy with other things."
        );
    }
}

fn relay_table(report: &RelayReport) -> Table {
    let mut table = table(&[
        "bytes",
        "TAPs",
        "way",
        "stream: CPU ns",
        "x native",
        "x mmsg",
        "bursts: CPU ns",
        "x native",
        "x mmsg",
        "packets/s",
        "lost",
        "wrong sums",
        "source kept",
    ]);
    for setting in &report.settings {
        for way in &setting.ways {
            let RelayWay {
                stream_cpu_ns: stream,
                burst_cpu_ns: bursts,
                ..
            } = way;
            table.add_row(cells(&[
                setting.payload_bytes.to_string(),
                setting.taps.to_string(),
                way.way.clone(),
                format!("{:.0}", stream.median),
                times(stream.to_native),
                times(stream.to_userspace),
                format!("{:.0}", bursts.median),
                times(bursts.to_native),
                times(bursts.to_userspace),
                format!("{:.0}", way.full_per_second.median),
                format!("{} of {}", way.lost, way.sent),
                format!("{} of {}", way.wrong, way.checked),
                if way.original_source { "yes" } else { "no" }.to_owned(),
            ]));
        }
    }
    table
}

fn replicate_table(report: &ReplicateReport) -> Table {
    let mut table = table(&[
        "bytes",
        "subscribers",
        "way",
        "stream: CPU ns a copy",
        "x mmsg",
        "bursts: CPU ns a copy",
        "x mmsg",
        "whole path: CPU ns",
        "x mmsg",
        "copies/s",
        "lost",
    ]);
    for setting in &report.settings {
        for way in &setting.ways {
            let ReplicateWay {
                stream_cpu_ns: stream,
                burst_cpu_ns: bursts,
                burst_path_cpu_ns: path,
                ..
            } = way;
            table.add_row(cells(&[
                setting.payload_bytes.to_string(),
                setting.subscribers.to_string(),
                way.way.clone(),
                format!("{:.0}", stream.median),
                times(stream.to_userspace),
                format!("{:.0}", bursts.median),
                times(bursts.to_userspace),
                format!("{:.0}", path.median),
                times(path.to_userspace),
                format!("{:.0}", way.full_per_second.median),
                format!("{} of {}", way.lost, way.sent),
            ]));
        }
    }
    table
}

fn program_table(costs: &[ProgramCost]) -> Table {
    let mut table = table(&[
        "bytes",
        "program",
        "packet",
        "ns by test-run",
        "range",
        "traced, in vain",
    ]);
    for cost in costs {
        let [fastest, slowest] = cost.range_ns;
        table.add_row(cells(&[
            cost.payload_bytes.to_string(),
            cost.program.clone(),
            cost.packet.clone(),
            cost.ns_per_packet.to_string(),
            format!("{fastest}-{slowest}"),
            cost.traced_ns_per_packet.to_string(),
        ]));
    }
    table
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header(header);
    table
}

/// Aligns numbers right and names left.
fn cells(texts: &[String]) -> impl Iterator<Item = Cell> {
    texts.iter().map(|text| {
        let is_number = text.starts_with(|first: char| first.is_ascii_digit());
        Cell::new(text).set_alignment(if is_number {
            CellAlignment::Right
        } else {
            CellAlignment::Left
        })
    })
}

fn times(ratio: Option<f64>) -> String {
    ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}"))
}

fn count(number: usize, of: &str) -> String {
    format!("{number} {of}{}", if number == 1 { "" } else { "s" })
}

fn bar(way: &str, samples: &Samples) -> Bar {
    let ratio = samples.to_native.or(samples.to_userspace);
    Bar {
        name: way.to_owned(),
        value: samples.median,
        text: format!("{:.0} ({} x)", samples.median, times(ratio)),
        kind: if way.starts_with("roamcast") || way == "replicate" {
            Kind::Own
        } else if way.starts_with("native") {
            Kind::Reference
        } else {
            Kind::Other
        },
    }
}

fn draw(path: &Path, title: &str, panels: impl Iterator<Item = Panel>) -> Result<()> {
    let panels: Vec<Panel> = panels.collect();
    fs::write(path, picture::svg(title, &panels))
        .with_context(|| format!("Failed to write {}", path.display()))?;
    println!("Picture: {}", path.display());
    Ok(())
}
