//! Migrations without loss, duplication or reordering: libvirt moves real guests.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use lab::scenario::Testbed;
use lab::scenario::agents::AgentOptions;
use lab::scenario::measure::Mover;
use lab::scenario::shuttle::Shuttle;
use lab::scenario::stream::{StreamConfig, StreamKind};
use lab::{LabConfig, Site, requirements};

/// Stream of the paper.
const STREAM: StreamConfig = StreamConfig {
    rate_mbps: 20.0,
    flows: 1,
    kind: StreamKind::Probe,
};

/// Moves a guest back and forth. Each handover is exact and ends in its destination's reception
/// mode.
fn moves_are_exact(lab: LabConfig, count: usize, modes: [&str; 2]) {
    if !requirements::met() {
        return;
    }
    let mut testbed = Testbed::up(lab, 128, Some(AgentOptions::DEFAULT)).unwrap();
    let mut shuttle = Shuttle::begin(&mut testbed, STREAM).unwrap();
    for _ in 0..count {
        shuttle.go(Mover::Operator).unwrap();
    }
    let moves = shuttle.finish().unwrap();
    for ((number, row), [_, record]) in (0..).zip(&moves.rows).zip(&moves.records) {
        eprintln!("{row:?}");
        let told = format!("move {}: {row:?}\n{record}", number + 1);
        assert_eq!(
            (row.lost, row.duplicated, row.reordered),
            (0, 0, 0),
            "{told}"
        );
        assert_eq!(row.mode.as_deref(), Some(modes[1 - number % 2]), "{told}");
        let [flow] = record["handover"].as_array().unwrap().as_slice() else {
            panic!("not one flow: {told}");
        };
        assert_eq!(flow["placed"], "exact", "{told}");
        for count in ["lost", "duplicated_at_most"] {
            assert_eq!(flow[count], 0, "{count}: {told}");
        }
        assert!(flow["replayed"].as_u64() > Some(0), "{told}");
        assert!(flow["delivered"].as_u64() > Some(0), "{told}");
    }
}

#[test]
fn moves_between_multicast_sites_lose_double_and_reorder_nothing() {
    let lab = LabConfig::new("handover");
    moves_are_exact(lab, 4, ["native", "native"]);
}

#[test]
fn moves_between_multicast_and_a_relay_lose_double_and_reorder_nothing() {
    let mut lab = LabConfig::new("handrelay");
    lab.sites = [Site::Multicast, Site::UnicastOnly];
    lab.relays = 1;
    moves_are_exact(lab, 4, ["native", "relay"]);
}
