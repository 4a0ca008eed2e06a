//! Tables for people: each function renders the rows of one command as text.

mod handover;
mod ims;
mod mcs;
mod relay;
mod relays;
mod status;
mod trace;
mod unicast;

use std::net::Ipv6Addr;

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

use super::report::{
    Direction, FilterMode, HandoverRow, ListenerRow, MemoryWay, MigrationRow, Outcome, Reception,
    ReceptionRow, StreamRow,
};

pub use ims::{ims_status, nodes};
pub use mcs::mcs_status;
pub use relay::relay_status;
pub use relays::relays;
pub use status::status;
pub use trace::{trace_header, trace_line};

/// Renders `roamcast listeners`.
pub fn listeners(rows: &[ListenerRow]) -> String {
    let mut table = new_table(&[
        "domain",
        "port",
        "VLAN",
        "multicast address",
        "mode",
        "sources",
        "MLD",
        "age",
        "MAC",
    ]);
    for row in rows {
        table.add_row([
            Cell::new(or_dash(row.domain.as_deref())),
            Cell::new(&row.port),
            number(vlan(row.vlan)),
            Cell::new(row.multicast_address),
            Cell::new(match row.filter_mode {
                FilterMode::Include => "include",
                FilterMode::Exclude => "exclude",
            }),
            Cell::new(sources(&row.sources)),
            Cell::new(format!("v{}", row.mld_version)),
            number(duration(row.age_ms)),
            Cell::new(row.guest_mac),
        ]);
    }
    table.to_string()
}

/// Renders `roamcast streams`.
pub fn streams(rows: &[StreamRow]) -> String {
    let mut table = new_table(&[
        "multicast address",
        "VLAN",
        "source",
        "ports",
        "mode",
        "native",
        "relayed",
        "dropped",
        "bytes",
        "packets/s",
        "last packet",
    ]);
    for row in rows {
        table.add_row([
            Cell::new(row.multicast_address),
            number(vlan(row.vlan)),
            Cell::new(row.source),
            Cell::new(format!("{} -> {}", row.source_port, row.destination_port)),
            Cell::new(row.mode.as_deref().unwrap_or("not watched")),
            number(row.native_packets),
            number(row.relay_packets),
            number(row.dropped),
            number(bytes(row.bytes)),
            number(format!("{:.1}", row.packets_per_second)),
            number(duration(row.age_ms)),
        ]);
    }
    table.to_string()
}

/// Renders `roamcast migrations`.
pub fn migrations(rows: &[MigrationRow]) -> String {
    let mut table = new_table(&[
        "#",
        "domain",
        "way",
        "peer",
        "state",
        "began",
        "signalling",
        "copy",
        "pause",
        "total",
        "memory",
        "addresses",
        "handover",
        "unicast",
    ]);
    for row in rows {
        table.add_row([
            number(row.migration),
            Cell::new(&row.domain),
            Cell::new(match row.direction {
                Direction::Outgoing => "out",
                Direction::Incoming => "in",
            }),
            Cell::new(&row.peer),
            Cell::new(match &row.outcome {
                Outcome::Running => row.phase.as_str().to_owned(),
                Outcome::Completed => "completed".to_owned(),
                Outcome::Failed { .. } => "failed".to_owned(),
            }),
            Cell::new(format!("{} ago", duration(row.age_ms))),
            number(span(row.signalling_ms)),
            number(span(row.copy_ms)),
            number(span(row.vm_pause_ms)),
            number(span(row.total_ms)),
            number(memory(row)),
            Cell::new(addresses(&row.receptions)),
            Cell::new(handover::cell(row)),
            Cell::new(unicast::cell(row.unicast.as_ref())),
        ]);
    }
    // A sentence in a cell would make the table wider than any terminal.
    let failures = rows.iter().filter_map(|row| match &row.outcome {
        Outcome::Failed { reason, .. } => Some(format!("\n{} failed: {reason}", row.migration)),
        _ => None,
    });
    let clear = rows.iter().filter_map(|row| match row.memory {
        Some(MemoryWay::Clear(reason)) => {
            let (number, reason) = (row.migration, reason.as_str());
            Some(format!(
                "\n{number}: memory is copied in the clear: {reason}"
            ))
        }
        _ => None,
    });
    let handovers = rows.iter().flat_map(handover::sentences);
    std::iter::once(table.to_string())
        .chain(failures)
        .chain(clear)
        .chain(handovers)
        .collect()
}

fn sources(sources: &[Ipv6Addr]) -> String {
    let sources: Vec<String> = sources.iter().map(ToString::to_string).collect();
    if sources.is_empty() {
        "-".to_owned()
    } else {
        sources.join(" ")
    }
}

/// Renders a filter for one cell: `any`, `2001:db8::1`, `any but 2001:db8::1`.
fn filter(mode: FilterMode, list: &[Ipv6Addr]) -> String {
    match mode {
        FilterMode::Include => sources(list),
        FilterMode::Exclude if list.is_empty() => "any".to_owned(),
        FilterMode::Exclude => format!("any but {}", sources(list)),
    }
}

/// Renders the copied memory; during the copy also the memory of the domain.
fn memory(row: &MigrationRow) -> String {
    let copied = bytes(row.processed_bytes);
    if row.outcome == Outcome::Running && row.total_bytes > 0 {
        format!("{copied} of {}", bytes(row.total_bytes))
    } else {
        copied
    }
}

fn reception(mode: Reception) -> &'static str {
    match mode {
        Reception::Native => "native",
        Reception::Idle => "idle",
        Reception::Unreachable => "unreachable",
        Reception::Refused => "refused",
        Reception::Relay => "relay",
        Reception::Probing => "probing",
    }
}

/// Renders the number of addresses for each kind of reception: `998 native, 2 idle`.
fn addresses(rows: &[ReceptionRow]) -> String {
    let modes = [
        Reception::Native,
        Reception::Relay,
        Reception::Idle,
        Reception::Unreachable,
        Reception::Refused,
        Reception::Probing,
    ];
    let counts: Vec<String> = modes
        .into_iter()
        .filter_map(
            |mode| match rows.iter().filter(|row| row.mode == mode).count() {
                0 => None,
                count => Some(format!("{count} {}", reception(mode))),
            },
        )
        .collect();
    if counts.is_empty() {
        return "-".to_owned();
    }
    counts.join(", ")
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_BORDERS_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header);
    table
}

fn number(value: impl ToString) -> Cell {
    Cell::new(value.to_string()).set_alignment(CellAlignment::Right)
}

fn or_dash(text: Option<&str>) -> &str {
    text.unwrap_or("-")
}

fn vlan(vlan: u16) -> String {
    if vlan == 0 {
        "-".to_owned()
    } else {
        vlan.to_string()
    }
}

fn span(milliseconds: Option<f64>) -> String {
    milliseconds.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.0} ms"))
}

/// Renders a duration in its two largest units.
pub fn duration(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    match seconds {
        0 => format!("{milliseconds} ms"),
        1..60 => format!("{seconds}.{} s", milliseconds % 1000 / 100),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// Renders a size in the unit that keeps it short.
pub fn bytes(bytes: u64) -> String {
    let mut size = bytes as f64;
    let mut unit = "B";
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if size < 1024.0 {
            break;
        }
        size /= 1024.0;
        unit = larger;
    }
    if unit == "B" {
        format!("{bytes} B")
    } else {
        format!("{size:.1} {unit}")
    }
}

#[cfg(test)]
mod tests;
