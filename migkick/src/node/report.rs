//! What `migkick node status` shows.

use std::collections::BTreeMap;

use crate::interface::Interface;
use common::mat::counter::Counter;
use serde_json::{Value, json};

use super::core::Status;

/// The node's status as JSON: that of the core, the active NIC's name and the counters of the data
/// path.
pub(super) fn status(status: &Status, nics: &[Interface], counters: Vec<(Counter, u64)>) -> Value {
    let active = nics.iter().find(|it| Some(it.ifindex) == status.ifindex);
    let counters: BTreeMap<&str, u64> = counters
        .into_iter()
        .map(|(counter, count)| (counter.as_str(), count))
        .collect();
    let mut value = serde_json::to_value(status).unwrap_or_default();
    if let Some(object) = value.as_object_mut() {
        object.insert("interface".to_owned(), json!(active.map(|it| &it.name)));
        object.insert("datapath".to_owned(), json!(counters));
    }
    value
}

/// The same for a person.
pub(super) fn rows(status: &Value) -> Vec<(String, String)> {
    let row = |label: &str, value: String| (label.to_owned(), value);
    let mut rows = vec![
        row("HoA", text(status, "hoa")),
        row("active NIC", text(status, "interface")),
        row("MoA", text(status, "moa")),
    ];
    if !status["standby"].is_null() {
        let stage = text(status, "stage");
        rows.push(row(
            "standby",
            format!("{}, {stage}", text(status, "standby")),
        ));
    }
    for left in items(&status["left"]) {
        rows.push(row("left", left.as_str().unwrap_or_default().to_owned()));
    }
    for server in items(&status["servers"]) {
        let round_trip = match server["round_trip_ms"].as_f64() {
            Some(ms) => format!(", {ms:.1} ms"),
            None => String::new(),
        };
        let address = text(server, "address");
        rows.push(row(
            "server",
            format!("{address}  {}{round_trip}", text(server, "state")),
        ));
    }
    for peer in items(&status["peers"]) {
        let age = match peer["age_s"].as_u64() {
            Some(age) => format!(", read {age} s ago"),
            None => String::new(),
        };
        let (hoa, state, to) = (text(peer, "hoa"), text(peer, "state"), text(peer, "to"));
        let (packets, bytes) = (&peer["packets"], &peer["bytes"]);
        rows.push(row(
            "peer",
            format!("{hoa}  {state}, to {to}, {packets} packets, {bytes} bytes{age}"),
        ));
    }
    for group in ["counters", "datapath"] {
        let counters = status[group].as_object().into_iter().flatten();
        for (name, count) in counters.filter(|(_, count)| count.as_u64() != Some(0)) {
            rows.push((name.replace('_', " "), count.to_string()));
        }
    }
    rows
}

fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value, key: &str) -> String {
    match &value[key] {
        Value::String(text) => text.clone(),
        Value::Null => "none".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::core::*;
    use common::mat::entropy::Entropy;
    use std::time::Duration;

    #[test]
    fn status_names_node_servers_and_what_was_counted() {
        let identity = Identity {
            hoa: "fd5e:6d61:74::5".parse().unwrap(),
            home: ("fd5e:6d61:74::".parse().unwrap(), 48),
            key: common::mat::key::Key([1; 32]),
            servers: vec!["[2001:db8::1]:47413".parse().unwrap()],
        };
        let mut core = Core::new(
            identity,
            Timing::default(),
            Saved::default(),
            0,
            Entropy::new(|_| true),
        );
        let moa = "2001:db8:1::7".parse().unwrap();
        let nics = vec![NicState {
            ifindex: 3,
            addresses: vec![moa],
        }];
        core.handle_nics(Duration::ZERO, nics);
        let nics = [Interface {
            ifindex: 3,
            name: "eth0".to_owned(),
            mac: [2; 6],
            up: true,
        }];
        let counters = vec![(Counter::OutTranslated, 5), (Counter::Held, 0)];
        let status = status(&core.status(Duration::ZERO), &nics, counters);
        let rows = rows(&status);
        let has =
            |label: &str, value: &str| rows.iter().any(|(l, v)| l == label && v.contains(value));
        assert!(
            has("HoA", "fd5e:6d61:74::5") && has("active NIC", "eth0"),
            "{rows:?}"
        );
        assert!(
            has("MoA", "2001:db8:1::7") && has("server", "waiting"),
            "{rows:?}"
        );
        assert!(has("out translated", "5") && !has("held", "0"), "{rows:?}");
    }
}
