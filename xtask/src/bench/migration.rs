//! `bench migration`: the measurements of the paper's section 5 in this lab.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use comfy_table::{Cell, CellAlignment, Table, presets};
use lab::bench::median;
use lab::bench::migration::{
    self, Load, MigrationReport, MigrationSetting, MigrationWay, Options, Span, Way, figures, paper,
};
use lab::probe::report::RunRow;
use lab::scenario::agents::AgentOptions;

use super::machine::Place;
use super::{with_bar, write_json};
use crate::run::{go_on_delivered, root};

/// Methods of migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum WayKind {
    /// To another subnet, by Roamcast.
    Glm,
    /// To another host of the same subnet, by plain libvirt.
    Lm,
    /// To another subnet, by plain libvirt.
    Baseline,
}

impl From<WayKind> for Way {
    fn from(kind: WayKind) -> Self {
        match kind {
            WayKind::Glm => Self::Glm,
            WayKind::Lm => Self::Lm,
            WayKind::Baseline => Self::Baseline,
        }
    }
}

/// Options of `bench migration`.
#[derive(Debug, Args)]
pub(crate) struct MigrationArgs {
    /// Sizes of the guest's memory, MiB [default: 128,256,512,1024]
    #[arg(long, value_name = "MIB,..", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(96..=8192))]
    memory: Vec<u32>,
    /// Rates of the stream, Mbit/s [default: 2,20, and also 100 with 256 MiB]
    #[arg(long, value_name = "MBPS,..", value_delimiter = ',', value_parser = crate::demo::rate)]
    rates: Vec<f64>,
    /// Migrations per method, memory size and rate
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Methods; each run uses all of them in turn
    #[arg(long, value_name = "WAY,..", value_delimiter = ',', value_enum, default_values_t = [WayKind::Glm, WayKind::Lm, WayKind::Baseline])]
    ways: Vec<WayKind>,
    /// `libvirt.downtime_ms` of the agents, and the same limit for the other methods
    #[arg(long, value_name = "MS", default_value_t = AgentOptions::DEFAULT.downtime_ms, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    downtime_ms: u64,
    /// `libvirt.parallel_connections` of the agents, and the same for the other methods
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=255))]
    parallel_connections: Option<u32>,
    /// `libvirt.flags` of the agents in addition to the default flags, and the same for the other
    /// methods
    #[arg(long, value_name = "FLAG,..", value_delimiter = ',')]
    flags: Vec<String>,
    /// Print the results as JSON instead of tables
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    output: super::Output,
}

impl MigrationArgs {
    fn options(&self) -> Options {
        let loads = match (&self.memory[..], &self.rates[..]) {
            ([], []) => Options::paper_loads(),
            (memory, []) => {
                let is_wanted = |load: &Load| memory.contains(&load.memory_mib);
                let of_paper: Vec<_> = Options::paper_loads();
                let mut loads: Vec<Load> = of_paper.iter().copied().filter(is_wanted).collect();
                let is_new = |size: &&u32| !of_paper.iter().any(|it| it.memory_mib == **size);
                let others: Vec<u32> = memory.iter().filter(is_new).copied().collect();
                loads.extend(Options::loads(&others, &[2.0, 20.0]));
                loads
            }
            ([], rates) => Options::loads(&[128, 256, 512, 1024], rates),
            (memory, rates) => Options::loads(memory, rates),
        };
        // A leaked list, so that the options are `Copy`.
        let flags: Vec<&'static str> = self
            .flags
            .iter()
            .map(|flag| &*Box::leak(flag.clone().into_boxed_str()))
            .collect();
        Options {
            loads,
            runs: self.runs,
            ways: self.ways.iter().map(|way| Way::from(*way)).collect(),
            agents: AgentOptions {
                downtime_ms: self.downtime_ms,
                parallel_connections: self.parallel_connections,
                flags: Box::leak(flags.into_boxed_slice()),
                ..AgentOptions::DEFAULT
            },
        }
    }
}

/// Runs `cargo xtask bench migration`.
pub(super) fn migration(arguments: &MigrationArgs) -> Result<()> {
    let options = arguments.options();
    let moves = options.moves() as u64;
    let report = match arguments.place.run_there(moves)? {
        Some(report) => report,
        None => {
            go_on_delivered()?;
            with_bar(moves, |tell| migration::run(&options, tell))?
        }
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{}", moves_table(&report));
        println!("{}", outage_table(&report));
        ratios(&report);
    }
    if let Some(path) = &arguments.output.report {
        write_json(path, &report)?;
    }
    let directory = root().join("target/bench");
    fs::create_dir_all(&directory)
        .with_context(|| format!("Failed to create {}", directory.display()))?;
    for figure in figures::draw(&report) {
        let path = directory.join(format!("migration-fig{}.svg", figure.number));
        save(&path, &figure.svg)?;
        eprintln!("Picture: {}", path.display());
    }
    ensure!(
        report.failures.is_empty(),
        "{} of {} moves failed:\n{}",
        report.failures.len(),
        options.moves(),
        report.failures.join("\n")
    );
    Ok(())
}

fn save(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("Failed to write {}", path.display()))
}

/// Renders the medians of each method, and the sums of packets over all its runs.
fn moves_table(report: &MigrationReport) -> Table {
    let mut table = table(&[
        "MiB",
        "Mbit/s",
        "way",
        "runs",
        "sent",
        "lost",
        "doubled",
        "reordered",
        "freeze ms",
        "stall ms",
        "pause ms",
        "clock stop ms",
        "signalling ms",
        "copy ms",
        "total ms",
    ]);
    each_way(report, |setting, way| {
        let sum = |of: fn(&RunRow) -> u64| way.runs.iter().map(of).sum::<u64>().to_string();
        let middle = |of: fn(&RunRow) -> f64| format!("{:.1}", way.span(of).median);
        table.add_row(cells(&[
            setting.memory_mib.to_string(),
            setting.rate_mbps.to_string(),
            way.way.name().to_owned(),
            way.runs.len().to_string(),
            sum(|row| row.sent),
            sum(|row| row.lost),
            sum(|row| row.duplicated),
            sum(|row| row.reordered),
            middle(|row| row.freeze_ms),
            middle(|row| row.stall_ms),
            middle(|row| row.vm_pause_ms),
            middle(|row| row.clock_stop_ms),
            middle(|row| row.signalling_ms),
            middle(|row| row.copy_ms),
            middle(|row| row.total_ms),
        ]));
    });
    table
}

/// Renders table 3 of the paper, in seconds: minimum, average and maximum.
fn outage_table(report: &MigrationReport) -> Table {
    let mut table = table(&[
        "MiB",
        "Mbit/s",
        "way",
        "freeze s: min avg max",
        "lost s: min avg max",
        "paper s: min avg max",
        "whole move s: min avg max",
    ]);
    each_way(report, |setting, way| {
        let seconds = |span: Span| {
            let [min, mean, max] = [span.min, span.mean, span.max].map(|ms| ms / 1e3);
            format!("{min:.2} {mean:.2} {max:.2}")
        };
        let load = Load {
            memory_mib: setting.memory_mib,
            rate_mbps: setting.rate_mbps,
        };
        let of_paper = match way.way {
            Way::Glm => paper::outage(load).map_or_else(String::new, |span| {
                format!("{:.2} {:.2} {:.2}", span.min, span.mean, span.max)
            }),
            Way::Lm => format!("{:.2} on average", paper::LM_OUTAGE),
            Way::Baseline => String::new(),
        };
        table.add_row(cells(&[
            setting.memory_mib.to_string(),
            setting.rate_mbps.to_string(),
            way.way.name().to_owned(),
            seconds(way.span(|row| row.freeze_ms)),
            seconds(way.span(|row| row.loss_ms)),
            of_paper,
            seconds(way.span(|row| row.total_ms)),
        ]));
    });
    table
}

fn each_way(report: &MigrationReport, mut add: impl FnMut(&MigrationSetting, &MigrationWay)) {
    for setting in &report.settings {
        for way in &setting.ways {
            add(setting, way);
        }
    }
}

/// Prints the ratio of GLM to LM, and by how much the freeze of a stream exceeds the pause.
fn ratios(report: &MigrationReport) {
    let ratios: Vec<f64> = report
        .settings
        .iter()
        .filter_map(|setting| setting.freeze_ratio)
        .collect();
    if !ratios.is_empty() {
        println!(
            "Freeze of GLM over that of LM, by medians: {} (median {:.2})",
            ratios
                .iter()
                .map(|ratio| format!("{ratio:.2}"))
                .collect::<Vec<_>>()
                .join(" "),
            median(&ratios)
        );
    }
    for way in Way::ALL {
        let of_all = |of: fn(&RunRow) -> f64| {
            let ways = report
                .settings
                .iter()
                .filter_map(|setting| setting.way(way));
            let values: Vec<f64> = ways.flat_map(|way| way.values(of)).collect();
            (!values.is_empty()).then(|| median(&values))
        };
        let over_pause = of_all(|row| row.freeze_ms - row.vm_pause_ms);
        let over_stall = of_all(|row| row.freeze_ms - row.stall_ms);
        if let Some((over_pause, over_stall)) = over_pause.zip(over_stall) {
            println!(
                "{}: a stream is frozen {over_pause:.1} ms longer than the VM is paused, and \
                 {over_stall:.1} ms longer than any application in it is stalled (medians)",
                way.name()
            );
        }
    }
    if report.accelerator == "tcg" {
        println!(
            "QEMU translates the guest's code (no KVM), and begins anew after each move: a part of \
             every freeze."
        );
    }
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
        let is_number = text.parse::<f64>().is_ok();
        Cell::new(text).set_alignment(if is_number {
            CellAlignment::Right
        } else {
            CellAlignment::Left
        })
    })
}
