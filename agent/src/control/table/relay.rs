//! `roamcast status` of a relay: its interfaces, sessions and memberships.

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::report::{FilterMode, Hook, RelayedFlowRow, UplinkRow};

    fn example() -> RelayStatus {
        RelayStatus {
            relay: "relay1".to_owned(),
            version: "0.1.0".to_owned(),
            pid: 7,
            uptime_ms: 61_000,
            address: "2001:db8:5::5".parse().unwrap(),
            lease_ms: 30_000,
            pin_path: "/sys/fs/bpf/roamcast-relay/v2".to_owned(),
            interfaces: vec![UplinkRow {
                name: "eth0".to_owned(),
                ifindex: 2,
                hooks: vec![Hook {
                    program: "replicate".to_owned(),
                    mode: "tcx".to_owned(),
                    side: "ingress".to_owned(),
                    qdisc: None,
                    before: Vec::new(),
                    is_there: true,
                }],
            }],
            agents: vec!["vms1".to_owned()],
            memberships: vec![MembershipRow {
                multicast_address: "ff0e::1".parse().unwrap(),
                filter_mode: FilterMode::Exclude,
                sources: vec!["2001:db8:9::3".parse().unwrap()],
                holder: Holder::Socket,
            }],
            sessions: vec![SessionRow {
                agent: None,
                transaction: None,
                multicast_address: "ff0e::1".parse().unwrap(),
                filter_mode: FilterMode::Include,
                sources: vec!["2001:db8:9::2".parse().unwrap()],
                agent_address: "2001:db8:2::2".parse().unwrap(),
                age_ms: 5000,
                lease_left_ms: 21_000,
                flows: vec![RelayedFlowRow {
                    source: "2001:db8:9::2".parse().unwrap(),
                    source_port: 4000,
                    destination_port: 5004,
                    relay_port: 25_007,
                    agent_port: 54_776,
                    bits_per_second: 20_000_000,
                    packets: 4711,
                    bytes: 6_900_000,
                    dropped: 3,
                }],
            }],
            counters: [("replicate_no_route".to_owned(), 3)].into(),
        }
    }

    #[test]
    fn status_shows_sessions_flows_and_joins() {
        let text = relay_status(&example());
        for expected in [
            "relay        relay1, version 0.1.0, process 7, up 1 min 1 s",
            "address      2001:db8:5::5, leases of 30.0 s",
            "interface    eth0 (replicate by tcx)",
            "agents       vms1",
            "(adopted)",
            "21.0 s",
            "4000 -> 5004",
            "25007 -> 54776",
            "20.0 Mbit/s",
            "4711",
            "any but 2001:db8:9::3",
            "socket",
            "replicate_no_route",
        ] {
            assert!(text.contains(expected), "{expected}: {text}");
        }
    }

    #[test]
    fn idle_relay_has_no_empty_tables() {
        let status = RelayStatus {
            agents: Vec::new(),
            memberships: Vec::new(),
            sessions: Vec::new(),
            counters: std::collections::BTreeMap::new(),
            ..example()
        };
        let text = relay_status(&status);
        assert!(text.contains("none is connected"), "{text}");
        assert!(!text.contains("Sessions"), "{text}");
    }

    #[test]
    fn status_in_json_is_read_back_whole() {
        let text = serde_json::to_string(&example()).unwrap();
        assert_eq!(
            serde_json::from_str::<RelayStatus>(&text).unwrap(),
            example()
        );
    }
}
