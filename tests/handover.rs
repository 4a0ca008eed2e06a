//! Moves that lose, double and reorder nothing: real guests, moved by real libvirt.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use lab::probe::report::RunRow;
use lab::scenario::Testbed;
use lab::scenario::agents::AgentOptions;
use lab::scenario::measure::Mover;
use lab::scenario::shuttle::{self, Shuttle};
use lab::scenario::stream::{StreamConfig, StreamKind};
use lab::{LabConfig, requirements};

/// The paper's stream.
const STREAM: StreamConfig = StreamConfig {
    rate_mbps: 20.0,
    flows: 1,
    kind: StreamKind::Probe,
};

fn assert_exact(number: usize, row: &RunRow) {
    assert_eq!(
        (row.lost, row.duplicated, row.reordered),
        (0, 0, 0),
        "move {number}: {row:?}"
    );
}

#[test]
fn moves_to_and_fro_lose_double_and_reorder_nothing() {
    if !requirements::met() {
        return;
    }
    let mut testbed =
        Testbed::up(LabConfig::new("handover"), 128, Some(AgentOptions::DEFAULT)).unwrap();
    let mut shuttle = Shuttle::begin(&mut testbed, STREAM).unwrap();
    for number in 0..6 {
        shuttle.go(Mover::Operator).unwrap();
        let record = shuttle::last_record(shuttle.testbed(), 1 - number % 2).unwrap();
        eprintln!("{record}");
    }
    let moves = shuttle.finish().unwrap();
    for row in &moves.rows {
        eprintln!("{row:?}");
    }
    for (number, row) in moves.rows.iter().enumerate() {
        assert_exact(number + 1, row);
    }
}
