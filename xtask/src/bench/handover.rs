//! `bench handover`: consecutive migrations, each of which must be exact.

use anyhow::{Result, ensure};
use clap::Args;
use comfy_table::{Cell, CellAlignment, Table, presets};
use lab::bench::handover::{self, Case, HandoverCase, HandoverConfig, HandoverReport, RATE_MBPS};
use lab::bench::sessions::{Sessions, Spread};
use lab::guest::domain::NicDriver;
use lab::probe::report::RunRow;
use lab::scenario::agents::AgentOptions;

use super::machine::Place;
use super::{with_bar, write_json};
use crate::demo::losses;
use crate::run::go_on_delivered;

/// Options of `bench handover`.
#[derive(Debug, Args)]
pub(crate) struct HandoverArgs {
    /// Cases [default: all]
    #[arg(long, value_name = "CASE,..", value_delimiter = ',', value_enum)]
    cases: Vec<Case>,
    /// Migrations per case [default: 20 for native and relay, 10 for dense and unicast, 5 for the
    /// others]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    moves: Option<u32>,
    /// Rate of the stream in cases with a single stream, Mbit/s
    #[arg(long, value_name = "MBPS", default_value_t = RATE_MBPS, value_parser = crate::demo::rate)]
    rate: f64,
    /// Queues of each NIC of the guest, and number of the guest's CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    queues: u8,
    /// Let QEMU read the TAPs itself, instead of vhost-net
    #[arg(long)]
    without_vhost: bool,
    /// Print the results as JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    output: super::Output,
}

/// Runs `cargo xtask bench handover`.
pub(super) fn handover(arguments: &HandoverArgs) -> Result<()> {
    let chosen: Vec<Case> = match &arguments.cases[..] {
        [] => Case::ALL.to_vec(),
        cases => cases.to_vec(),
    };
    let cases: Vec<(Case, u32)> = chosen
        .into_iter()
        .map(|case| (case, arguments.moves.unwrap_or(case.moves())))
        .collect();
    let moves = cases.iter().map(|(_, moves)| u64::from(*moves)).sum();
    let report = match arguments.place.run_there(moves)? {
        Some(report) => report,
        None => here(arguments, cases, moves)?,
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{}", table(&report));
        for case in &report.cases {
            for line in losses(&case.runs) {
                println!("{}, {line}", case.case.name());
            }
        }
        if report.cases.iter().any(|case| case.sessions.is_some()) {
            println!("{}", sessions(&report));
        }
    }
    if let Some(path) = &arguments.output.report {
        write_json(path, &report)?;
    }
    let inexact: Vec<&str> = report
        .cases
        .iter()
        .filter(|case| !case.is_exact())
        .map(|case| case.case.name())
        .collect();
    ensure!(
        inexact.is_empty(),
        "Moves lost, doubled or reordered packets, or sessions did not go on: {}",
        inexact.join(", ")
    );
    Ok(())
}

fn here(arguments: &HandoverArgs, cases: Vec<(Case, u32)>, moves: u64) -> Result<HandoverReport> {
    go_on_delivered()?;
    let config = HandoverConfig {
        cases,
        rate_mbps: arguments.rate,
        driver: NicDriver {
            queues: arguments.queues,
            without_vhost: arguments.without_vhost,
        },
        agents: AgentOptions::DEFAULT,
    };
    with_bar(moves, |tell| handover::run(&config, tell))
}

/// Renders one line per case: sums of packets and medians of times.
fn table(report: &HandoverReport) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "case",
        "moves",
        "sent",
        "lost",
        "doubled",
        "reordered",
        "freeze ms",
        "pause ms",
        "freeze - pause ms",
        "freeze - stall ms",
        "agent MiB",
        "placed",
        "exact",
    ]);
    for case in &report.cases {
        table.add_row(line(case).into_iter().enumerate().map(|(column, text)| {
            let alignment = match column {
                1..=9 => CellAlignment::Right,
                _ => CellAlignment::Left,
            };
            Cell::new(text).set_alignment(alignment)
        }));
    }
    table
}

fn line(case: &HandoverCase) -> [String; 13] {
    let sum = |of: fn(&RunRow) -> u64| case.runs.iter().map(of).sum::<u64>().to_string();
    let middle = |of: fn(&RunRow) -> f64| {
        let values: Vec<f64> = case.runs.iter().map(of).collect();
        format!("{:.1}", super::median(&values))
    };
    let placed = case.placed.iter();
    let placed: Vec<String> = placed
        .map(|(word, count)| format!("{count} {word}"))
        .collect();
    [
        case.case.name().to_owned(),
        case.runs.len().to_string(),
        sum(|row| row.sent),
        sum(|row| row.lost),
        sum(|row| row.duplicated),
        sum(|row| row.reordered),
        middle(|row| row.freeze_ms),
        middle(|row| row.vm_pause_ms),
        format!("{:.1}", case.freeze_over_pause_ms),
        format!("{:.1}", case.freeze_over_stall_ms),
        format!("{:.0}", case.agent_mib),
        placed.join(", "),
        if case.is_exact() { "yes" } else { "NO" }.to_owned(),
    ]
}

/// Renders the sessions by permanent addresses: median and maximum of each time.
fn sessions(report: &HandoverReport) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "sessions",
        "moves",
        "TCP in gap ms",
        "TCP out gap ms",
        "ping gap ms",
        "gap - pause ms",
        "gap - max(pause, stall) ms",
        "pings lost in a move",
        "resets",
        "kept",
    ]);
    for case in &report.cases {
        let Some(sessions) = &case.sessions else {
            continue;
        };
        let cells = session_line(case.case, sessions).into_iter().enumerate();
        table.add_row(cells.map(|(column, text)| {
            let alignment = match column {
                1..=8 => CellAlignment::Right,
                _ => CellAlignment::Left,
            };
            Cell::new(text).set_alignment(alignment)
        }));
    }
    table
}

fn session_line(case: Case, sessions: &Sessions) -> [String; 10] {
    let spread = |it: Spread| format!("{:.1}, most {:.1}", it.median, it.most);
    [
        case.name().to_owned(),
        sessions.moves.to_string(),
        spread(sessions.tcp_in_gap_ms),
        spread(sessions.tcp_out_gap_ms),
        spread(sessions.ping_gap_ms),
        spread(sessions.beyond_pause_ms),
        spread(sessions.beyond_stall_ms),
        sessions.ping_lost.to_string(),
        sessions.tcp_resets.to_string(),
        format!("{} of {}", sessions.kept, sessions.moves),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_told_with_their_median_and_worst_move() {
        let spread = |median, most| Spread { median, most };
        let sessions = Sessions {
            moves: 10,
            kept: 9,
            tcp_in_gap_ms: spread(60.0, 61.04),
            tcp_out_gap_ms: spread(62.0, 63.0),
            ping_gap_ms: spread(64.0, 65.0),
            beyond_pause_ms: spread(14.0, 15.0),
            beyond_stall_ms: spread(-1.0, 5.0),
            ping_lost: 1,
            tcp_resets: 2,
        };
        assert_eq!(
            session_line(Case::Unicast, &sessions),
            [
                "unicast",
                "10",
                "60.0, most 61.0",
                "62.0, most 63.0",
                "64.0, most 65.0",
                "14.0, most 15.0",
                "-1.0, most 5.0",
                "1",
                "2",
                "9 of 10",
            ]
        );
    }
}
