//! `roamcast status` of a migration control server: its registered agents and relays.

use std::fmt::Write;

use comfy_table::Cell;

use super::status::{counters, section};
use super::{duration, new_table, number, or_dash};
use crate::control::report::{McsStatus, RegistrationRow, Role};

/// Renders `roamcast status` of a migration control server.
pub fn mcs_status(status: &McsStatus) -> String {
    let mut text = String::new();
    // Writing to a `String` cannot fail.
    let _ = writeln!(
        text,
        "{:<12} {}, version {}, process {}, up {}",
        "mcs",
        status.mcs,
        status.version,
        status.pid,
        duration(status.uptime_ms)
    );
    let _ = writeln!(text, "{:<12} {}", "leases", duration(status.lease_ms));
    let known = &status.registrations;
    section(&mut text, "Registered", registrations(known), known.len());
    section(
        &mut text,
        "Counters",
        counters(&status.counters),
        status.counters.len(),
    );
    text
}

fn registrations(rows: &[RegistrationRow]) -> String {
    let mut table = new_table(&[
        "name",
        "role",
        "address",
        "site",
        "serves",
        "since",
        "lease left",
    ]);
    for row in rows {
        let serves = match (row.role, row.serves.as_slice()) {
            (Role::Agent, _) => "-".to_owned(),
            (Role::Relay, []) => "all".to_owned(),
            (Role::Relay, ranges) => ranges.join(", "),
        };
        table.add_row([
            Cell::new(&row.name),
            Cell::new(match row.role {
                Role::Agent => "agent",
                Role::Relay => "relay",
            }),
            Cell::new(row.address),
            Cell::new(or_dash(row.site.as_deref())),
            Cell::new(serves),
            number(duration(row.age_ms)),
            number(duration(row.lease_left_ms)),
        ]);
    }
    table.to_string()
}
