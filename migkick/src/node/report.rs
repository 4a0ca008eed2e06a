//! Output of `migkick node status`.

use std::collections::BTreeMap;
use std::fmt::Display;

use common::mat::counter::Counter;
use serde::{Deserialize, Serialize};

use super::core::Status;
use crate::interface::Interface;

/// Status of the node: the core, the name of the active NIC, and the counters of the data path.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct NodeStatus {
    #[serde(flatten)]
    pub(crate) core: Status,
    /// Name of the active NIC.
    pub(crate) interface: Option<String>,
    /// Counters of the data path by name, frames.
    pub(crate) datapath: BTreeMap<String, u64>,
}

impl NodeStatus {
    pub(super) fn new(core: Status, nics: &[Interface], counters: Vec<(Counter, u64)>) -> Self {
        let active = nics.iter().find(|it| Some(it.ifindex) == core.ifindex);
        Self {
            interface: active.map(|it| it.name.clone()),
            datapath: counters
                .into_iter()
                .map(|(counter, count)| (counter.as_str().to_owned(), count))
                .collect(),
            core,
        }
    }

    /// Returns labels and values for a terminal.
    pub(super) fn rows(&self) -> Vec<(String, String)> {
        let core = &self.core;
        let row = |label: &str, value: String| (label.to_owned(), value);
        let mut rows = vec![
            row("HoA", core.hoa.to_string()),
            row("active NIC", or_none(self.interface.as_ref())),
            row("MoA", or_none(core.moa)),
        ];
        if let Some(standby) = core.standby {
            rows.push(row(
                "standby",
                format!("{standby}, {}", or_none(core.stage)),
            ));
        }
        rows.extend(core.left.iter().map(|left| row("left", left.to_string())));
        for server in &core.servers {
            let round_trip = match server.round_trip_ms {
                Some(ms) => format!(", {ms:.1} ms"),
                None => String::new(),
            };
            rows.push(row(
                "server",
                format!("{}  {}{round_trip}", server.address, server.state),
            ));
        }
        for peer in &core.peers {
            let age = match peer.age_s {
                Some(age) => format!(", read {age} s ago"),
                None => String::new(),
            };
            rows.push(row(
                "peer",
                format!(
                    "{}  {}, to {}, {} packets, {} bytes{age}",
                    peer.hoa,
                    peer.state,
                    or_none(peer.to),
                    peer.packets,
                    peer.bytes
                ),
            ));
        }
        let of_core = core.counters.iter();
        let counters = of_core.map(|(name, count)| (name.to_owned(), count));
        for (name, count) in counters.chain(self.datapath.clone()) {
            if count != 0 {
                rows.push((name.replace('_', " "), count.to_string()));
            }
        }
        rows
    }
}

fn or_none(value: Option<impl Display>) -> String {
    value.map_or_else(|| "none".to_owned(), |it| it.to_string())
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
        let status = NodeStatus::new(core.status(Duration::ZERO), &nics, counters);
        let rows = status.rows();
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
