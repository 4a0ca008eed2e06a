//! `roamcast status` of a mapping server, and `roamcast ims list`.

use std::fmt::Write;

use comfy_table::Cell;

use super::status::{counters, section};
use super::{duration, new_table, number};
use crate::control::report::{ImsStatus, NodeRow};

/// Renders `roamcast status` of a mapping server.
pub fn ims_status(status: &ImsStatus) -> String {
    let mut text = String::new();
    let mut line = |label: &str, value: String| {
        // Writing to a `String` cannot fail.
        let _ = writeln!(text, "{label:<12} {value}");
    };
    line(
        "ims",
        format!(
            "{}, version {}, process {}, up {}",
            status.listen,
            status.version,
            status.pid,
            duration(status.uptime_ms)
        ),
    );
    line("home", status.home.clone());
    line(
        "nodes",
        format!("{}, {} with a mapping", status.nodes, status.mappings),
    );
    let state = match &status.store_error {
        None => format!("longest transaction {}", duration(status.longest_commit_ms)),
        Some(reason) => format!("updates are refused: {reason}"),
    };
    line("store", format!("{}, {state}", status.store));
    section(
        &mut text,
        "Counters",
        counters(&status.counters),
        status.counters.len(),
    );
    text
}

/// Renders `roamcast ims list`.
pub fn nodes(rows: &[NodeRow]) -> String {
    let mut table = new_table(&[
        "HoA",
        "generation",
        "sequence",
        "MoAs (priority)",
        "lifetime left",
        "quarantine",
    ]);
    for row in rows {
        let moas: Vec<String> = row
            .moas
            .iter()
            .map(|moa| format!("{} ({})", moa.address, moa.priority))
            .collect();
        let moas = if moas.is_empty() {
            "-".to_owned()
        } else {
            moas.join(" ")
        };
        table.add_row([
            Cell::new(row.hoa),
            number(row.generation),
            number(row.sequence),
            Cell::new(moas),
            number(
                row.lifetime_left_ms
                    .map_or_else(|| "-".to_owned(), duration),
            ),
            Cell::new(super::sources(&row.quarantine)),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::MoaRow;

    #[test]
    fn status_says_why_updates_are_refused() {
        let mut status = ImsStatus {
            listen: "[::]:47413".to_owned(),
            home: "fd5e:6d61:74::/48".to_owned(),
            store: "/x/ims.redb".to_owned(),
            version: "1".to_owned(),
            pid: 7,
            uptime_ms: 1500,
            nodes: 3,
            mappings: 2,
            longest_commit_ms: 12,
            store_error: None,
            counters: [("forged".to_owned(), 9)].into(),
        };
        let text = ims_status(&status);
        assert!(text.contains("3, 2 with a mapping"), "{text}");
        assert!(text.contains("longest transaction 12 ms"), "{text}");
        assert!(text.contains("forged"), "{text}");
        status.store_error = Some("no room".to_owned());
        assert!(ims_status(&status).contains("updates are refused: no room"));
    }

    #[test]
    fn node_has_its_addresses_with_priorities_in_one_row() {
        let address = |text: &str| text.parse().unwrap();
        let moa = |text, priority| MoaRow {
            address: address(text),
            priority,
        };
        let rows = [NodeRow {
            hoa: address("fd5e:6d61:74::1"),
            generation: 2,
            sequence: 9,
            moas: vec![moa("2001:db8::1", 1), moa("2001:db8::2", 2)],
            lifetime_left_ms: Some(61_000),
            quarantine: vec![address("2001:db8::3")],
        }];
        let text = nodes(&rows);
        for part in [
            "fd5e:6d61:74::1",
            "2001:db8::1 (1)",
            "(2)",
            "1 min 1 s",
            "2001:db8::3",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
