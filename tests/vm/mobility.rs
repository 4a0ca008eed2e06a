//! Unicast mobility: libvirt moves a real guest, and the sessions on its permanent address
//! continue.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::time::Duration;

use lab::probe::report::RunRow;
use lab::scenario::agents::AgentOptions;
use lab::scenario::measure::Mover;
use lab::scenario::shuttle::Shuttle;
use lab::scenario::stream::{StreamConfig, Streams};
use lab::scenario::{STREAM_ADDRESS, Testbed};
use lab::{LabConfig, requirements, wait};
use serde_json::Value;

/// Rate of the paper, Mbit/s.
const RATE_MBPS: f64 = 20.0;
/// Timeout for information to reach every node.
const KNOWN: Duration = Duration::from_secs(20);
/// Timeout for an arrived VM to report its listeners to the agent.
const ANNOUNCED: Duration = Duration::from_secs(5);

fn testbed(name: &str) -> Testbed {
    let mut lab = LabConfig::new(name);
    lab.mobility = true;
    Testbed::up(lab, 128, Some(AgentOptions::DEFAULT)).unwrap()
}

fn streams() -> Streams {
    StreamConfig::probe(RATE_MBPS).into()
}

/// Asserts that no session broke and no ping was lost. `bench handover` measures the interruption.
fn assert_kept(rows: &[RunRow]) {
    for row in rows {
        eprintln!("{row:?}");
        assert_eq!(
            (row.tcp_resets, row.ping_lost),
            (Some(0), Some(0)),
            "{row:?}"
        );
    }
}

/// Asserts that no packet was lost, duplicated or reordered.
fn assert_exact(row: &RunRow) {
    let found = (row.lost, row.duplicated, row.reordered);
    assert_eq!(found, (0, 0, 0), "{row:?}");
}

/// Waits until the agent of a VM host knows, by MLD, the arrived VM's listeners.
fn wait_known(testbed: &mut Testbed, host: usize) {
    let (domain, vms) = (
        testbed.domain_name().to_owned(),
        testbed.lab().vms()[host].clone(),
    );
    let agents = testbed.agents().unwrap();
    wait::until("the destination to know the listener", ANNOUNCED, || {
        let listeners = agents.query(&vms, "listeners").ok()?;
        let is_stream = |row: &Value| {
            row["domain"] == domain && row["multicast_address"] == STREAM_ADDRESS.to_string()
        };
        listeners.as_array()?.iter().any(is_stream).then_some(())
    })
    .unwrap();
}

#[test]
fn sessions_survive_moves_to_and_fro() {
    if !requirements::met() {
        return;
    }
    let mut testbed = testbed("mobile");
    let mut shuttle = Shuttle::begin(&mut testbed, streams()).unwrap();
    for _ in 0..10 {
        shuttle.go(Mover::Migkick).unwrap();
    }
    assert_eq!(shuttle.sessions().unwrap().broken(), [""; 0]);
    let status = shuttle.testbed().guest_node().unwrap().status().unwrap();
    assert_eq!(status["counters"]["moves"], 10, "{status}");
    assert_eq!(status["interface"], "eth0", "{status}");
    let rows = shuttle.finish().unwrap().rows;
    assert_kept(&rows);
    rows.iter().for_each(assert_exact);
}

#[test]
fn multicast_joined_on_mat0_is_handed_over_as_on_a_nic() {
    if !requirements::met() {
        return;
    }
    let mut testbed = testbed("mobmulti");
    assert!(ANNOUNCED < testbed.lab().config().query_interval);
    let mut shuttle = Shuttle::begin(&mut testbed, streams().on("mat0")).unwrap();
    for destination in [1, 0] {
        shuttle.go(Mover::Migkick).unwrap();
        wait_known(shuttle.testbed(), destination);
    }
    let rows = shuttle.finish().unwrap().rows;
    assert_kept(&rows);
    rows.iter().for_each(assert_exact);
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
    let sessions = shuttle.sessions().unwrap();
    let answered = sessions.wait_answered();
    assert_eq!(sessions.broken(), [""; 0]);
    answered.unwrap();
    for row in shuttle.finish().unwrap().rows {
        assert_eq!(row.tcp_resets, Some(0), "{row:?}");
        assert_exact(&row);
    }
}

#[test]
fn address_that_somebody_else_has_is_not_taken_and_the_next_move_takes_another() {
    if !requirements::met() {
        return;
    }
    let mut testbed = testbed("mobtaken");
    let mut shuttle = Shuttle::begin(&mut testbed, streams()).unwrap();
    shuttle.go(Mover::Migkick).unwrap();
    let moa = |shuttle: &mut Shuttle| {
        let status = shuttle.testbed().guest_node().unwrap().status().unwrap();
        status["moa"].as_str().unwrap().to_owned()
    };
    let taken = moa(&mut shuttle);
    shuttle.go(Mover::Migkick).unwrap();
    // The switch of the destination's link has the address now.
    let switch = shuttle.testbed().lab().switch(2);
    let address = format!("{taken}/64");
    let mut ip = switch.command("ip");
    let take = ip.args(["addr", "add", &address, "dev", "br0", "nodad"]);
    switch.output(take).unwrap();

    let guest = shuttle.testbed().guest().unwrap().clone();
    let output = guest.run("migkick", &["go", "vms2"], KNOWN).unwrap();
    assert_eq!(output.code, Some(1), "{}", output.stdout());
    assert!(output.stderr().contains(&taken), "{}", output.stderr());
    assert_eq!(shuttle.testbed().running_on(), ["vms1"]);
    shuttle.go(Mover::Migkick).unwrap();
    assert_ne!(moa(&mut shuttle), taken);
    assert_eq!(shuttle.sessions().unwrap().broken(), [""; 0]);
    assert_kept(&shuttle.finish().unwrap().rows);
}
