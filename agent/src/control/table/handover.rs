//! Handovers in `roamcast migrations`: a cell for each migration, a sentence for each fault.

use super::{HandoverRow, MigrationRow};
use crate::control::report::Placement;

/// Renders all flows of a migration for one cell: `exact, 44 replayed`.
pub(super) fn cell(migration: &MigrationRow) -> String {
    let rows = &migration.handover;
    let ungated = migration.without_gate.len();
    match (rows.len(), ungated) {
        (0, 0) => return "-".to_owned(),
        (0, _) => return "not held".to_owned(),
        _ => {}
    }
    let sum = |of: fn(&HandoverRow) -> u64| rows.iter().map(of).sum::<u64>();
    let mut parts = Vec::new();
    let is_exact = |row: &HandoverRow| row.placed == Some(Placement::Exact);
    let inexact = rows.iter().filter(|row| !is_exact(row) && row.replayed > 0);
    match inexact.count() {
        0 => parts.push("exact".to_owned()),
        some => parts.push(format!("{some} of {} flows not exact", rows.len())),
    }
    parts.push(format!("{} replayed", sum(|row| row.replayed)));
    if ungated > 0 {
        parts.push(format!("{ungated} NICs not held"));
    }
    let (lost, doubled) = (sum(|row| row.lost), sum(|row| row.duplicated_at_most));
    let lost = lost + migration.nics.iter().map(|nic| nic.not_held).sum::<u64>();
    if lost > 0 {
        parts.push(format!("{lost} lost"));
    }
    if doubled > 0 {
        parts.push(format!("at most {doubled} doubled"));
    }
    parts.join(", ")
}

/// Returns a sentence for each flow and NIC that has, or may have, lost packets.
pub(super) fn sentences(migration: &MigrationRow) -> impl Iterator<Item = String> {
    let number = migration.migration;
    let ungated = migration.without_gate.iter().map(move |nic| {
        let (mac, reason) = (nic.mac, nic.reason.as_str());
        format!("\n{number} {mac}: its streams may have lost packets; it had no gate: {reason}")
    });
    let flows = migration
        .handover
        .iter()
        .filter(|row| row.lost > 0 || row.duplicated_at_most > 0 || row.overflow)
        .map(move |row| {
            let (address, source) = (row.multicast_address, row.source);
            let placed = row.placed.map_or("never placed", Placement::as_str);
            let room = if row.overflow {
                "; there was too little room for the pause, raise held_mib and held_ms of [handover]"
            } else {
                ""
            };
            format!(
                "\n{number} {address} from {source}: {placed}, {} lost, at most {} doubled{room}",
                row.lost, row.duplicated_at_most
            )
        });
    let nics = migration.nics.iter().map(move |row| {
        let (nic, at_source, here) = (row.nic, row.tap_full_at_source, row.tap_full);
        let lapsed = if row.has_lapsed {
            "; some have passed the gate and may have come twice, because this host kept the agent from running"
        } else {
            ""
        };
        format!(
            "\n{number} NIC {nic}: {} frames could not be held; {at_source} at the source and {here} here found \
             the queue of the TAP full, because the VM did not read{lapsed}",
            row.not_held
        )
    });
    let thrown_away = migration.thrown_away_at_most;
    let runs_on = (thrown_away > 0).then(|| {
        format!(
            "\n{number}: the VM ran on here after it had stopped; at most {thrown_away} frames that QEMU had read \
             are lost"
        )
    });
    flows.chain(nics).chain(ungated).chain(runs_on)
}
