//! `cargo xtask demo`: migrates a real VM under a stream to another subnet and counts what the
//! application in the VM receives.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use comfy_table::{Cell, CellAlignment, Table};
use lab::probe::ffmpeg::Packing;
use lab::probe::picture::{self, Picture};
use lab::probe::report::{FlapRow, Report, RunRow};
use lab::scenario::Testbed;
use lab::scenario::agents::AgentOptions;
use lab::scenario::flap::{self, Flap};
use lab::scenario::measure::{self, Mover, Run, RunConfig};
use lab::scenario::stream::{self, Placed, StreamConfig};
use lab::{LabConfig, Site};

use crate::run::{build, root};
use crate::setup;

/// Number of changes of `--relay-flap`: multicast removed and restored.
const FLAPS: u32 = 2;

/// Network of the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SiteKind {
    /// The multicast tree reaches the site at once.
    Multicast,
    /// The tree needs `--late-ms` to grow after the first MLD Report.
    Late,
    /// The site has no multicast; a relay sends the stream by unicast.
    UnicastOnly,
}

/// Sender and content of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum StreamKind {
    /// Numbered and timestamped packets of 1450 bytes; each is accounted for.
    Probe,
    /// MPEG-TS over UDP by ffmpeg; continuity-counter errors are counted.
    Ffmpeg,
    /// MPEG-TS over RTP by ffmpeg.
    FfmpegRtp,
}

impl From<StreamKind> for stream::StreamKind {
    fn from(kind: StreamKind) -> Self {
        match kind {
            StreamKind::Probe => Self::Probe,
            StreamKind::Ffmpeg => Self::Ffmpeg(Packing::Udp),
            StreamKind::FfmpegRtp => Self::Ffmpeg(Packing::Rtp),
        }
    }
}

/// Interface of the join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Join {
    /// First NIC of the guest.
    Eth0,
    /// Device of the guest's permanent address; needs `--unicast`.
    Mat0,
}

impl Join {
    fn interface(self) -> &'static str {
        match self {
            Self::Eth0 => "eth0",
            Self::Mat0 => "mat0",
        }
    }
}

/// Arguments of `cargo xtask demo`.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Network of the destination.
    #[arg(long, value_enum, default_value_t = SiteKind::Multicast)]
    site: SiteKind,
    /// Time that the tree of the site `late` needs to grow, milliseconds.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    late_ms: u64,
    /// Rate of the stream, Mbit/s of UDP payload.
    #[arg(long, value_name = "MBPS", default_value_t = 20.0, value_parser = rate)]
    rate: f64,
    /// Memory of the guest, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(96..=8192))]
    memory: u32,
    /// Number of migrations; each one moves a freshly booted guest.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Migrate by plain libvirt, without Roamcast.
    #[arg(long)]
    baseline: bool,
    /// Kind of the stream.
    #[arg(long, value_enum, default_value_t = StreamKind::Probe)]
    stream: StreamKind,
    /// Instead of migrating the guest, remove multicast from its site and restore it, twice.
    #[arg(long, conflicts_with_all = ["site", "baseline", "runs", "stream"])]
    relay_flap: bool,
    /// Run no relay; a site without multicast then receives nothing.
    #[arg(long, conflicts_with = "relay_flap")]
    no_relay: bool,
    /// Run no gates; the migration then loses and doubles packets.
    #[arg(long, conflicts_with = "baseline")]
    no_gate: bool,
    /// In addition to the stream, run sessions between a correspondent and the guest, by their
    /// permanent addresses.
    #[arg(long, conflicts_with_all = ["baseline", "relay_flap"])]
    unicast: bool,
    /// Interface on which the guest joins the stream.
    #[arg(long, value_enum, default_value_t = Join::Eth0)]
    join: Join,
    /// Write the rows as JSON.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

/// Parses a rate in Mbit/s.
pub(crate) fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (0.1..=1000.0).contains(&rate) => Ok(rate),
        _ => Err("must be a number from 0.1 to 1000".to_owned()),
    }
}

impl DemoArgs {
    fn site(&self) -> Site {
        match self.site {
            SiteKind::Multicast => Site::Multicast,
            SiteKind::Late => Site::Late(self.late_ms),
            SiteKind::UnicastOnly => Site::UnicastOnly,
        }
    }
}

/// Runs the demo. Fails if any row is not `ok`.
pub(crate) fn run(args: &DemoArgs) -> Result<()> {
    ensure!(
        args.unicast || args.join == Join::Eth0,
        "There is no mat0 without a permanent address: add --unicast"
    );
    setup::ensure()?;
    build()?;
    let started = Instant::now();
    let mut tell = |text: &str| eprintln!("[{:7.3} s] {text}", started.elapsed().as_secs_f64());
    let site = args.site();
    let mut lab = LabConfig::new("demo");
    lab.sites = [Site::Multicast, site];
    let relay = args.relay_flap || (site == Site::UnicastOnly && !args.baseline && !args.no_relay);
    lab.relays = usize::from(relay);
    lab.mobility = args.unicast;
    let relay = if relay { ", a relay" } else { "" };
    let mobility = if args.unicast {
        ", a mapping server, a correspondent"
    } else {
        ""
    };
    tell(&format!(
        "brings the lab up: sender, router, two sites, two VM hosts with libvirtd{relay}{mobility}"
    ));
    let agents = (!args.baseline).then_some(AgentOptions {
        no_gate: args.no_gate,
        ..AgentOptions::DEFAULT
    });
    let mut testbed = Testbed::up(lab, args.memory, agents)?;
    let stream = StreamConfig {
        rate_mbps: args.rate,
        flows: 1,
        kind: args.stream.into(),
    };
    let config = RunConfig {
        mover: if args.baseline {
            Mover::Virsh
        } else {
            Mover::Migkick
        },
        stream: Placed::from(&stream).on(args.join.interface()),
        site,
    };
    let directory = root().join("target/demo");
    fs::create_dir_all(&directory)
        .with_context(|| format!("Failed to create {}", directory.display()))?;
    let mut report = Report::default();
    let runs = if args.relay_flap { 0 } else { args.runs };
    if args.relay_flap {
        let flap = flap::run(&mut testbed, &stream, FLAPS, &mut tell)?;
        let path = directory.join("relay-flap.svg");
        save(&path, &draw_flap(&flap))?;
        tell(&format!("picture: {}", path.display()));
        report.flaps = flap.rows;
    }
    for number in 1..=runs {
        if args.runs > 1 {
            tell(&format!("run {number} of {}", args.runs));
        }
        let run = measure::run(&mut testbed, &config, &mut tell)?;
        if !run.sent.is_empty() {
            let path = directory.join(format!("run-{number}.svg"));
            save(&path, &draw(&run))?;
            tell(&format!("picture: {}", path.display()));
        }
        report.runs.push(run.row);
    }
    tell("takes the lab down");
    drop(testbed);
    if args.relay_flap {
        println!("{}", flap_table(&report.flaps));
    } else {
        println!("{}", table(&report.runs));
        for line in losses(&report.runs) {
            println!("{line}");
        }
    }
    if let Some(path) = &args.report {
        save(path, &(serde_json::to_string_pretty(&report)? + "\n"))?;
    }
    let bad = report.flaps.iter().filter(|row| !row.ok()).count();
    ensure!(
        bad == 0,
        "{bad} of {} changes doubled packets, or lost some on the way back",
        report.flaps.len()
    );
    let failed = report.runs.iter().filter(|row| !row.ok).count();
    ensure!(
        failed == 0,
        "{failed} of {} moves failed, or were not exact where that is promised",
        report.runs.len()
    );
    Ok(())
}

fn save(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("Failed to write {}", path.display()))
}

fn draw_flap(flap: &Flap) -> String {
    picture::svg(&Picture {
        title: "Multicast is taken away from the guest's site and given back, twice",
        sent: &flap.sent,
        arrivals: &flap.arrivals,
        flow: 0,
        hosts: &["vms1"],
        phases: &flap.phases,
        marks: &[],
        window: flap.window,
    })
}

fn draw(run: &Run) -> String {
    let row = &run.row;
    let by = if row.baseline {
        "plain libvirt"
    } else {
        "Roamcast"
    };
    let title = format!(
        "A move by {by}, site {}, {} Mbit/s: {} lost, {} doubled",
        row.site, row.rate_mbps, row.lost, row.duplicated
    );
    picture::svg(&Picture {
        title: &title,
        sent: &run.sent,
        arrivals: &run.arrivals,
        flow: 0,
        hosts: &["vms1", "vms2"],
        phases: &run.phases,
        marks: &[],
        window: run.window,
    })
}

/// Renders one line per change, for people.
fn flap_table(rows: &[FlapRow]) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "to",
        "Mbit/s",
        "sent",
        "lost",
        "doubled",
        "reordered",
        "loss ms",
        "freeze ms",
        "took ms",
        "ok",
    ]);
    for row in rows {
        table.add_row([
            row.to.clone(),
            row.rate_mbps.to_string(),
            row.sent.to_string(),
            row.lost.to_string(),
            row.duplicated.to_string(),
            row.reordered.to_string(),
            format!("{:.1}", row.loss_ms),
            format!("{:.1}", row.freeze_ms),
            format!("{:.1}", row.took_ms),
            if row.ok() { "yes" } else { "NO" }.to_owned(),
        ]);
    }
    table
}

/// Returns a line for each run with losses, which says where the packets were lost.
pub(crate) fn losses(rows: &[RunRow]) -> impl Iterator<Item = String> {
    let lost = (1..).zip(rows).filter(|(_, row)| row.lost > 0);
    lost.map(|(number, row)| {
        let places = row.lost_at.iter();
        let places: Vec<String> = places
            .map(|it| format!("{} {}", it.frames, it.place.as_str()))
            .collect();
        format!("move {number}: {} lost: {}", row.lost, places.join("; "))
    })
}

/// Renders one line per run, for people.
pub(crate) fn table(rows: &[RunRow]) -> Table {
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::UTF8_FULL_CONDENSED);
    let mut header = vec![
        "site",
        "by",
        "Mbit/s",
        "MiB",
        "sent",
        "lost",
        "doubled",
        "reordered",
        "loss ms",
        "freeze ms",
        "stall ms",
        "pause ms",
        "signalling ms",
        "copy ms",
        "total ms",
        "mode",
    ];
    let transport = rows.iter().any(|row| row.continuity_errors.is_some());
    if transport {
        header.push("continuity errors");
    }
    let unicast = rows.iter().any(|row| row.tcp_resets.is_some());
    if unicast {
        header.extend(["tcp in ms", "tcp out ms", "resets", "ping ms", "ping lost"]);
    }
    header.push("ok");
    table.set_header(header);
    for row in rows {
        let ms = |value: f64| format!("{value:.1}");
        let mut cells = vec![
            row.site.clone(),
            if row.baseline { "libvirt" } else { "roamcast" }.to_owned(),
            format!("{}", row.rate_mbps),
            row.memory_mib.to_string(),
            row.sent.to_string(),
            row.lost.to_string(),
            row.duplicated.to_string(),
            row.reordered.to_string(),
            ms(row.loss_ms),
            ms(row.freeze_ms),
            ms(row.stall_ms),
            ms(row.vm_pause_ms),
            ms(row.signalling_ms),
            ms(row.copy_ms),
            ms(row.total_ms),
            row.mode.clone().unwrap_or_default(),
        ];
        if transport {
            cells.push(
                row.continuity_errors
                    .map_or_else(String::new, |count| count.to_string()),
            );
        }
        if unicast {
            let gap = |value: Option<f64>| value.map_or_else(String::new, ms);
            let count =
                |value: Option<u64>| value.map_or_else(String::new, |count| count.to_string());
            cells.extend([
                gap(row.tcp_in_gap_ms),
                gap(row.tcp_out_gap_ms),
                count(row.tcp_resets),
                gap(row.ping_gap_ms),
                count(row.ping_lost),
            ]);
        }
        cells.push(if row.ok { "yes" } else { "NO" }.to_owned());
        table.add_row(cells.into_iter().enumerate().map(|(column, text)| {
            let alignment = if column < 2 {
                CellAlignment::Left
            } else {
                CellAlignment::Right
            };
            Cell::new(text).set_alignment(alignment)
        }));
    }
    table
}
