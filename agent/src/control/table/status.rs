//! `roamcast status` of an agent: the bridge, the hypervisor and the connections, then a table for
//! each kind of row that exists.

use std::collections::BTreeMap;
use std::fmt::Write;

use comfy_table::Cell;

use super::{duration, migrations, new_table, number, or_dash, reception, vlan};
use crate::control::report::{Hook, JoinRow, LinkState, Status, WaitingRow};

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
            "none has queried since this agent started (they do every 125 s by default); \
             without one, bridges and switches flood or drop"
                .to_owned(),
        );
    }
    let libvirt = &status.hypervisor;
    line(
        "hypervisor",
        format!(
            "{} {}, {}{}",
            libvirt.uri,
            link_state(libvirt.state),
            counted(libvirt.domains, "domain"),
            reason(libvirt.reason.as_deref())
        ),
    );
    if !status.relays.is_empty() || !status.modes.is_empty() {
        line("relays", relay_line(status));
    }
    for problem in &status.relay_problems {
        line("", problem.clone());
    }
    if let Some(days) = status.certificate_ends_in_days {
        line(
            "problem",
            format!(
                "the certificate of this host ends in {days} days; make another one with `roamcast pki renew`"
            ),
        );
    }
    for problem in status.port_problems.iter().chain(&status.memory_problems) {
        line("problem", problem.clone());
    }
    section(&mut text, "Peers", peers(status), status.peers.len());
    section(&mut text, "Ports", ports(status), status.ports.len());
    section(
        &mut text,
        "Joined by proxy",
        joins(&status.receptions),
        status.receptions.len(),
    );
    section(
        &mut text,
        "Migrations",
        migrations(&status.migrations),
        status.migrations.len(),
    );
    section(
        &mut text,
        "Waiting for a place",
        waiting(&status.waiting),
        status.waiting.len(),
    );
    section(
        &mut text,
        "Counters",
        counters(&status.counters),
        status.counters.len(),
    );
    text
}

fn waiting(rows: &[WaitingRow]) -> String {
    let mut table = new_table(&["domain", "from", "for"]);
    for row in rows {
        table.add_row([
            Cell::new(&row.domain),
            Cell::new(&row.source),
            number(duration(row.waited_ms)),
        ]);
    }
    table.to_string()
}

pub(super) fn counters(counters: &BTreeMap<String, u64>) -> String {
    let mut table = new_table(&["counter", "count"]);
    for (name, count) in counters {
        table.add_row([Cell::new(name), number(count)]);
    }
    table.to_string()
}

pub(super) fn section(text: &mut String, title: &str, table: String, rows: usize) {
    if rows > 0 {
        let _ = write!(text, "\n{title}\n{table}\n");
    }
}

/// Renders the number of relays, and the number of addresses for each reception path.
fn relay_line(status: &Status) -> String {
    let up = status
        .relays
        .iter()
        .filter(|relay| relay.relay.is_some() && relay.state == LinkState::Up)
        .count();
    let known = status.relays.iter().filter(|it| it.relay.is_some()).count();
    let modes: Vec<String> = status
        .modes
        .iter()
        .map(|(mode, count)| format!("{count} {mode}"))
        .collect();
    let modes = if modes.is_empty() {
        "none".to_owned()
    } else {
        modes.join(", ")
    };
    format!("{up} of {known} connected; addresses received: {modes}")
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
        "forged",
        "unread",
    ]);
    for port in &status.ports {
        let refused = port
            .refused_reports
            .saturating_add(port.refused_listeners)
            .saturating_add(port.refused_sources)
            .saturating_add(port.refused_datagrams);
        table.add_row([
            Cell::new(&port.name),
            Cell::new(or_dash(port.domain.as_deref())),
            Cell::new(hooks(&port.hooks)),
            number(format!("{}/{}", port.listeners, port.max_listeners)),
            number(format!("{}/{}", port.sources, port.max_sources)),
            number(port.reports),
            number(refused),
            number(port.malformed),
            number(port.forged_datagrams),
            number(port.tap_full),
        ]);
    }
    table.to_string()
}

fn joins(rows: &[JoinRow]) -> String {
    let mut table = new_table(&[
        "multicast address",
        "VLAN",
        "reception",
        "after",
        "for",
        "until",
    ]);
    for row in rows {
        table.add_row([
            Cell::new(row.multicast_address),
            number(vlan(row.vlan)),
            Cell::new(reception(row.mode)),
            number(duration(row.waited_ms)),
            Cell::new(row.domains.join(", ")),
            Cell::new(if row.held {
                "answer to a Query"
            } else {
                "arrival"
            }),
        ]);
    }
    table.to_string()
}

fn reason(reason: Option<&str>) -> String {
    reason
        .map(|reason| format!(" ({reason})"))
        .unwrap_or_default()
}

fn counted(count: u32, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

pub(super) fn link_state(state: LinkState) -> &'static str {
    match state {
        LinkState::Up => "up",
        LinkState::Connecting => "connecting",
        LinkState::Down => "down",
    }
}

pub(super) fn hooks(hooks: &[Hook]) -> String {
    if hooks.is_empty() {
        return "no program attached".to_owned();
    }
    let hooks: Vec<String> = hooks.iter().map(hook).collect();
    hooks.join(", ")
}

fn hook(hook: &Hook) -> String {
    if !hook.is_there {
        return format!("{} taken away", hook.program);
    }
    let place = match &hook.qdisc {
        Some(qdisc) => format!(" at {} of {qdisc}", hook.side),
        None => String::new(),
    };
    let before = match hook.before.as_slice() {
        [] => String::new(),
        before => format!(" after {}", before.join(" and ")),
    };
    format!("{} by {}{place}{before}", hook.program, hook.mode)
}
