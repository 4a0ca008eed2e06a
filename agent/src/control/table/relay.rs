//! `roamcast status` of a relay: where it works, whom it serves, what it has joined.

use std::fmt::Write;

use comfy_table::Cell;

use super::status::{counters, hooks, section};
use super::{bytes, duration, filter, new_table, number, or_dash};
use crate::control::report::{Holder, MembershipRow, RelayStatus, SessionRow};

/// Renders `roamcast status` of a relay.
pub fn relay_status(status: &RelayStatus) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "{label:<12} {value}");
    };
    line(
        "relay",
        format!(
            "{}, version {}, process {}, up {}",
            status.relay,
            status.version,
            status.pid,
            duration(status.uptime_ms)
        ),
    );
    line(
        "address",
        format!(
            "{}, leases of {}",
            status.address,
            duration(status.lease_ms)
        ),
    );
    line("maps", status.pin_path.clone());
    for interface in &status.interfaces {
        line(
            "interface",
            format!("{} ({})", interface.name, hooks(&interface.hooks)),
        );
    }
    line(
        "agents",
        if status.agents.is_empty() {
            "none is connected".to_owned()
        } else {
            status.agents.join(", ")
        },
    );
    let sessions = &status.sessions;
    section(
        &mut text,
        "Sessions",
        self::sessions(sessions),
        sessions.len(),
    );
    let flows = sessions.iter().map(|session| session.flows.len()).sum();
    section(&mut text, "Flows", self::flows(sessions), flows);
    let joined = &status.memberships;
    section(&mut text, "Joined", memberships(joined), joined.len());
    section(
        &mut text,
        "Counters",
        counters(&status.counters),
        status.counters.len(),
    );
    text
}

fn sessions(rows: &[SessionRow]) -> String {
    let mut table = new_table(&[
        "agent",
        "multicast address",
        "sources",
        "sent to",
        "flows",
        "since",
        "lease left",
    ]);
    for row in rows {
        table.add_row([
            Cell::new(row.agent.as_deref().unwrap_or("(adopted)")),
            Cell::new(row.multicast_address),
            Cell::new(filter(row.filter_mode, &row.sources)),
            Cell::new(row.agent_address),
            number(row.flows.len()),
            number(duration(row.age_ms)),
            number(duration(row.lease_left_ms)),
        ]);
    }
    table.to_string()
}

fn flows(rows: &[SessionRow]) -> String {
    let mut table = new_table(&[
        "agent",
        "multicast address",
        "source",
        "ports",
        "sent by ports",
        "rate",
        "packets",
        "bytes",
        "dropped",
    ]);
    for row in rows {
        for flow in &row.flows {
            table.add_row([
                Cell::new(or_dash(row.agent.as_deref())),
                Cell::new(row.multicast_address),
                Cell::new(flow.source),
                Cell::new(format!("{} -> {}", flow.source_port, flow.destination_port)),
                Cell::new(format!("{} -> {}", flow.relay_port, flow.agent_port)),
                number(format!("{:.1} Mbit/s", flow.bits_per_second as f64 / 1e6)),
                number(flow.packets),
                number(bytes(flow.bytes)),
                number(flow.dropped),
            ]);
        }
    }
    table.to_string()
}

fn memberships(rows: &[MembershipRow]) -> String {
    let mut table = new_table(&["multicast address", "sources", "held by"]);
    for row in rows {
        table.add_row([
            Cell::new(row.multicast_address),
            Cell::new(filter(row.filter_mode, &row.sources)),
            Cell::new(match row.holder {
                Holder::Kernel => "kernel",
                Holder::Socket => "socket",
            }),
        ]);
    }
    table.to_string()
}
