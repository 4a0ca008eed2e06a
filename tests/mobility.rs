//! Unicast mobility: a real guest is moved by real libvirt, and its sessions by its permanent address
//! go on.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::time::Duration;

use lab::probe::report::RunRow;
use lab::scenario::Testbed;
use lab::scenario::agents::AgentOptions;
use lab::scenario::measure::Mover;
use lab::scenario::shuttle::Shuttle;
use lab::scenario::stream::{StreamConfig, Streams};
use lab::{LabConfig, requirements, wait};

/// The paper's rate, Mbit/s.
const RATE_MBPS: f64 = 20.0;
/// How long something may take to be known everywhere.
const KNOWN: Duration = Duration::from_secs(20);

fn testbed(name: &str) -> Testbed {
    let mut lab = LabConfig::new(name);
    lab.mobility = true;
    Testbed::up(lab, 128, Some(AgentOptions::DEFAULT)).unwrap()
}

fn streams() -> Streams {
    StreamConfig::probe(RATE_MBPS).into()
}

/// No session broke, and none stood still for long.
fn assert_kept(row: &RunRow) {
    eprintln!("{row:?}");
    assert!(row.tcp_resets.is_some(), "{row:?}");
    assert!(row.keeps_sessions(), "{row:?}");
}

/// No packet was lost, doubled or reordered.
fn assert_exact(row: &RunRow) {
    let found = (row.lost, row.duplicated, row.reordered);
    assert_eq!(found, (0, 0, 0), "{row:?}");
}

#[test]
fn sessions_survive_moves_to_and_fro() {
    if !requirements::met() {
        return;
    }
    let mut testbed = testbed("mobile");
    let mut shuttle = Shuttle::begin(&mut testbed, streams()).unwrap();
    for _ in 0..4 {
        shuttle.go(Mover::Migkick).unwrap();
    }
    assert_eq!(shuttle.sessions().unwrap().broken(), [""; 0]);
    let status = shuttle.testbed().guest_node().unwrap().status().unwrap();
    assert_eq!(status["counters"]["moves"], 4, "{status}");
    assert_eq!(status["interface"], "eth0", "{status}");
    for row in shuttle.finish().unwrap().rows {
        assert_kept(&row);
        assert_exact(&row);
    }
}

#[test]
fn multicast_joined_on_mat0_is_handed_over_as_on_a_nic() {
    if !requirements::met() {
        return;
    }
    let mut testbed = testbed("mobmulti");
    let mut shuttle = Shuttle::begin(&mut testbed, streams().on("mat0")).unwrap();
    for _ in 0..2 {
        shuttle.go(Mover::Migkick).unwrap();
    }
    for row in shuttle.finish().unwrap().rows {
        assert_exact(&row);
        assert_kept(&row);
    }
}

#[test]
fn move_without_a_mapping_server_keeps_sessions_and_is_registered_later() {
    if !requirements::met() {
        return;
    }
    let mut testbed = testbed("mobims");
    let mut shuttle = Shuttle::begin(&mut testbed, streams()).unwrap();
    shuttle.testbed().mobility().unwrap().kill_ims();
    shuttle.go(Mover::Migkick).unwrap();
    assert_eq!(shuttle.sessions().unwrap().broken(), [""; 0]);
    let node = shuttle.testbed().guest_node().unwrap();
    let status = node.status().unwrap();
    assert_eq!(status["registered"], false, "{status}");
    shuttle.testbed().mobility().unwrap().restart_ims().unwrap();
    let node = shuttle.testbed().guest_node().unwrap();
    wait::until("the guest to be registered", KNOWN, || {
        let status = node.status().ok()?;
        (status["registered"] == true).then_some(())
    })
    .unwrap();
    assert_eq!(shuttle.sessions().unwrap().broken(), [""; 0]);
    let rows = shuttle.finish().unwrap().rows;
    assert_eq!(rows[0].tcp_resets, Some(0), "{:?}", rows[0]);
}
