//! `roamcast relays`: each relay, and the agent's sessions with it.

use comfy_table::{Cell, Table};

use super::status::link_state;
use super::{bytes, duration, new_table, number, or_dash};
use crate::control::report::{RelayRow, RelaySessionRow};

/// Renders `roamcast relays`.
pub fn relays(rows: &[RelayRow]) -> String {
    let mut table = new_table(&[
        "relay",
        "found by",
        "connection",
        "multicast address",
        "session",
        "sends from",
        "flows",
        "packets",
        "bytes",
        "lease left",
        "why",
    ]);
    for row in rows {
        if row.sessions.is_empty() {
            add(&mut table, row, None);
        }
        for session in &row.sessions {
            add(&mut table, row, Some(session));
        }
    }
    // A sentence in a cell would make the table wider than any terminal.
    let reasons = rows.iter().filter_map(|row| {
        let reason = row.reason.as_deref()?;
        Some(format!("\n{}: {reason}", or_dash(row.relay.as_deref())))
    });
    std::iter::once(table.to_string()).chain(reasons).collect()
}

fn add(table: &mut Table, row: &RelayRow, session: Option<&RelaySessionRow>) {
    let cell = |value: Option<String>| Cell::new(value.as_deref().unwrap_or("-"));
    let amount = |value: Option<String>| number(value.unwrap_or_else(|| "-".to_owned()));
    table.add_row([
        Cell::new(row.relay.as_deref().unwrap_or("(looked for)")),
        Cell::new(or_dash(row.found_by.as_deref())),
        Cell::new(link_state(row.state)),
        cell(session.map(|it| it.multicast_address.to_string())),
        cell(session.map(|it| it.state.as_str().to_owned())),
        cell(session.and_then(|it| it.address).map(|it| it.to_string())),
        amount(session.map(|it| it.flows.to_string())),
        amount(session.map(|it| it.packets.to_string())),
        amount(session.map(|it| bytes(it.bytes))),
        amount(session.map(|it| duration(it.lease_left_ms))),
        cell(session.map(|it| it.why.clone())),
    ]);
}
