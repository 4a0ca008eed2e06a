//! Tables for people.

use std::fmt::Write;

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};

use super::report::{
    Direction, FilterMode, Hook, LinkState, ListenerRow, MigrationRow, Outcome, Reception,
    ReceptionRow, Status, StreamRow,
};

/// Renders `roamcast status`.
pub fn status(status: &Status) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "{label:<12} {value}");
    };
    line(
        "agent",
        format!(
            "{}, version {}, process {}, up {}",
            status.agent,
            status.version,
            status.pid,
            duration(status.uptime_ms)
        ),
    );
    let home = match (&status.address, &status.prefix) {
        (Some(address), Some(prefix)) => format!(", {address} in {prefix}"),
        (Some(address), None) => format!(", {address}"),
        (None, Some(prefix)) => format!(", {prefix}"),
        (None, None) => String::new(),
    };
    line("bridge", format!("{}{home}", status.bridge));
    line("maps", status.pin_path.clone());
    for uplink in &status.uplinks {
        line(
            "uplink",
            format!("{} ({})", uplink.name, hooks(&uplink.hooks)),
        );
    }
    for querier in &status.queriers {
        let vlan = match querier.vlan {
            0 => String::new(),
            vlan => format!(" VLAN {vlan}"),
        };
        line(
            "querier",
            format!(
                "{} on {}{vlan}, MLDv{}, every {}, last Query {} ago",
                querier.address,
                querier.interface,
                querier.mld_version,
                duration(querier.query_interval_ms),
                duration(querier.age_ms)
            ),
        );
    }
    if status.queriers.is_empty() {
        line(
            "querier",
            "none seen; bridges and switches may flood or drop".to_owned(),
        );
    }
    let libvirt = &status.hypervisor;
    line(
        "hypervisor",
        format!(
            "{} {}, {} domains{}",
            libvirt.uri,
            link_state(libvirt.state),
            libvirt.domains,
            reason(libvirt.reason.as_deref())
        ),
    );
    section(&mut text, "Peers", peers(status), status.peers.len());
    section(&mut text, "Ports", ports(status), status.ports.len());
    section(
        &mut text,
        "Joined for arriving VMs",
        receptions(&status.receptions),
        status.receptions.len(),
    );
    section(
        &mut text,
        "Migrations",
        migrations(&status.migrations),
        status.migrations.len(),
    );
    let mut counters = new_table(&["counter", "packets"]);
    for (name, count) in &status.counters {
        counters.add_row([Cell::new(name), number(count)]);
    }
    section(
        &mut text,
        "Counters",
        counters.to_string(),
        status.counters.len(),
    );
    text
}

fn section(text: &mut String, title: &str, table: String, rows: usize) {
    if rows > 0 {
        let _ = write!(text, "\n{title}\n{table}\n");
    }
}

fn peers(status: &Status) -> String {
    let mut table = new_table(&["peer", "address", "connection"]);
    for peer in &status.peers {
        table.add_row([
            peer.name.clone(),
            peer.address.clone().unwrap_or_else(|| "-".to_owned()),
            format!(
                "{}{}",
                link_state(peer.state),
                reason(peer.reason.as_deref())
            ),
        ]);
    }
    table.to_string()
}

fn ports(status: &Status) -> String {
    let mut table = new_table(&[
        "port",
        "domain",
        "programs",
        "listeners",
        "sources",
        "reports",
        "refused",
        "malformed",
    ]);
    for port in &status.ports {
        let refused = port
            .refused_reports
            .saturating_add(port.refused_listeners)
            .saturating_add(port.refused_sources);
        table.add_row([
            Cell::new(&port.name),
            Cell::new(or_dash(port.domain.as_deref())),
            Cell::new(hooks(&port.hooks)),
            number(format!("{}/{}", port.listeners, port.max_listeners)),
            number(format!("{}/{}", port.sources, port.max_sources)),
            number(port.reports),
            number(refused),
            number(port.malformed),
        ]);
    }
    table.to_string()
}

fn receptions(rows: &[ReceptionRow]) -> String {
    let mut table = new_table(&["multicast address", "VLAN", "reception", "after"]);
    for row in rows {
        table.add_row([
            Cell::new(row.multicast_address),
            number(vlan(row.vlan)),
            Cell::new(match row.mode {
                Reception::Native => "native",
                Reception::Idle => "idle",
                Reception::Unreachable => "unreachable",
                Reception::Refused => "refused",
                Reception::Probing => "probing",
            }),
            number(duration(row.waited_ms)),
        ]);
    }
    table.to_string()
}

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
        let sources: Vec<String> = row.sources.iter().map(ToString::to_string).collect();
        table.add_row([
            Cell::new(or_dash(row.domain.as_deref())),
            Cell::new(&row.port),
            number(vlan(row.vlan)),
            Cell::new(row.multicast_address),
            Cell::new(match row.filter_mode {
                FilterMode::Include => "include",
                FilterMode::Exclude => "exclude",
            }),
            Cell::new(if sources.is_empty() {
                "-".to_owned()
            } else {
                sources.join(" ")
            }),
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
        "packets",
        "bytes",
        "packets/s",
        "last packet",
        "watched",
    ]);
    for row in rows {
        table.add_row([
            Cell::new(row.multicast_address),
            number(vlan(row.vlan)),
            Cell::new(row.source),
            Cell::new(format!("{} -> {}", row.source_port, row.destination_port)),
            number(row.packets),
            number(bytes(row.bytes)),
            number(format!("{:.1}", row.packets_per_second)),
            number(duration(row.age_ms)),
            Cell::new(if row.managed { "yes" } else { "no" }),
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
    ]);
    for row in rows {
        let native = row
            .receptions
            .iter()
            .filter(|r| r.mode == Reception::Native)
            .count();
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
                Outcome::Failed(reason) => format!("failed: {reason}"),
            }),
            Cell::new(format!("{} ago", duration(row.age_ms))),
            number(span(row.signalling_ms)),
            number(span(row.copy_ms)),
            number(span(row.vm_pause_ms)),
            number(span(row.total_ms)),
            number(bytes(row.processed_bytes)),
            Cell::new(format!("{native}/{} native", row.receptions.len())),
        ]);
    }
    table.to_string()
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

fn reason(reason: Option<&str>) -> String {
    reason
        .map(|reason| format!(" ({reason})"))
        .unwrap_or_default()
}

fn link_state(state: LinkState) -> &'static str {
    match state {
        LinkState::Up => "up",
        LinkState::Connecting => "connecting",
        LinkState::Down => "down",
    }
}

fn hooks(hooks: &[Hook]) -> String {
    if hooks.is_empty() {
        return "no program attached".to_owned();
    }
    let hooks: Vec<String> = hooks
        .iter()
        .map(|hook| format!("{} by {}", hook.program, hook.mode))
        .collect();
    hooks.join(", ")
}

fn span(milliseconds: Option<f64>) -> String {
    milliseconds.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.0} ms"))
}

/// A duration in the two largest units that say something.
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

/// A size in the unit that keeps it short.
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
