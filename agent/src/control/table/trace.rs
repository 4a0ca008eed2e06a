//! Lines of `roamcast trace`. Lines are printed one by one, so the columns have fixed widths.

use std::net::Ipv6Addr;

use super::{or_dash, vlan};
use crate::control::trace::{TraceLine, TraceRow};

/// Returns the names of the columns.
pub fn trace_header() -> String {
    columns([
        "time",
        "program",
        "port",
        "decision",
        "reason",
        "number",
        "bytes",
        "VLAN",
        "source",
        "destination",
    ])
}

/// Renders one line of a trace.
pub fn trace_line(line: &TraceLine) -> String {
    match line {
        TraceLine::LeftOut { left_out } => format!("... {left_out} lines left out"),
        TraceLine::Decision(row) => decision(row),
    }
}

fn decision(row: &TraceRow) -> String {
    let number = row.number.map(|number| number.to_string());
    columns([
        clock_time(&row.time),
        &row.program,
        &row.port,
        &row.decision,
        or_dash(row.reason.as_deref()),
        or_dash(number.as_deref()),
        &row.length_bytes.to_string(),
        &vlan(row.vlan),
        &endpoint(row.source, row.source_port),
        &endpoint(row.destination, row.destination_port),
    ])
}

fn columns(cells: [&str; 10]) -> String {
    let [
        time,
        program,
        port,
        decision,
        reason,
        number,
        bytes,
        vlan,
        source,
        destination,
    ] = cells;
    let line = format!(
        "{time:<15} {program:<9} {port:<15} {decision:<11} {reason:<23} {number:>8} {bytes:>5} \
         {vlan:>4} {source:<30} {destination}"
    );
    line.trim_end().to_owned()
}

/// Returns the time of day in an RFC 3339 time, with microseconds.
fn clock_time(time: &str) -> &str {
    time.split_once('T')
        .map_or(time, |(_, clock)| clock.get(..15).unwrap_or(clock))
}

fn endpoint(address: Option<Ipv6Addr>, port: Option<u16>) -> String {
    match (address, port) {
        (Some(address), Some(port)) if port != 0 => format!("[{address}]:{port}"),
        (Some(address), _) => address.to_string(),
        (None, _) => "-".to_owned(),
    }
}
