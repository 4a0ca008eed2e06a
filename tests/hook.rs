//! Moves that somebody else asks libvirt for: handed over by libvirt's hook, and never held up by it.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::time::{Duration, Instant};

use lab::scenario::agents::AgentOptions;
use lab::scenario::measure::Mover;
use lab::scenario::shuttle::{self, Shuttle};
use lab::scenario::stream::{StreamConfig, StreamKind};
use lab::scenario::{Testbed, ensure_runs_only_on, virsh};
use lab::{LabConfig, requirements, wait};

/// The paper's stream.
const STREAM: StreamConfig = StreamConfig {
    rate_mbps: 20.0,
    flows: 1,
    kind: StreamKind::Probe,
};
const NAMES: [&str; 2] = ["vms1", "vms2"];
/// How long an agent may take to leave its name with a domain that it has just seen.
const NAMED: Duration = Duration::from_secs(20);
/// How long a move may take with a hook that finds nobody.
const UNAIDED: Duration = Duration::from_secs(60);

#[test]
fn virsh_migrate_loses_doubles_and_reorders_nothing_and_works_without_agents() {
    if !requirements::met() {
        return;
    }
    let lab = LabConfig::new("hook");
    let mut testbed = Testbed::up(lab, 128, Some(AgentOptions::DEFAULT)).unwrap();
    let lab = lab::Lab::attach(&testbed.lab().config().name).unwrap();
    testbed.agents().unwrap().install_hooks(&lab).unwrap();
    let mut shuttle = Shuttle::begin(&mut testbed, STREAM).unwrap();
    let mut records = Vec::new();
    for (to, mover) in [
        (1, Mover::Virsh),
        (0, Mover::VirshDirect),
        (1, Mover::VirshDirect),
        (0, Mover::Virsh),
    ] {
        wait_named(shuttle.testbed(), 1 - to);
        shuttle.go(mover).unwrap();
        records.push([0, 1].map(|host| shuttle::last_record(shuttle.testbed(), host).unwrap()));
    }
    let moves = shuttle.finish().unwrap();
    for (number, (row, records)) in moves.rows.iter().zip(&records).enumerate() {
        eprintln!("{row:?}");
        let told = format!("move {}: {row:?}\n{records:#?}", number + 1);
        assert_eq!(
            (row.lost, row.duplicated, row.reordered),
            (0, 0, 0),
            "{told}"
        );
        let to = 1 - number % 2;
        for (host, record) in records.iter().enumerate() {
            let direction = ["outgoing", "incoming"][usize::from(host == to)];
            assert_eq!(record["direction"], direction, "{told}");
            assert_eq!(record["peer"], NAMES[1 - host], "{told}");
            assert_eq!(record["outcome"]["state"], "completed", "{told}");
        }
        let [flow] = records[to]["handover"].as_array().unwrap().as_slice() else {
            panic!("not one flow: {told}");
        };
        assert_eq!(flow["placed"], "exact", "{told}");
    }
    works_without_agents(&mut testbed);
}

/// Waits until the agent of a VM host has left its name with the guest.
fn wait_named(testbed: &mut Testbed, host: usize) {
    let (vms, name) = (&testbed.lab().vms()[host], testbed.domain_name());
    let what = format!("{} to leave its name with {name}", NAMES[host]);
    wait::until(&what, NAMED, || {
        let metadata = virsh(vms, &["metadata", name, "urn:roamcast:agent:1"]).ok()?;
        metadata.contains(NAMES[host]).then_some(())
    })
    .unwrap();
}

fn works_without_agents(testbed: &mut Testbed) {
    wait_named(testbed, 0);
    for index in 0..2 {
        testbed.agents().unwrap().kill(index);
    }
    let hosts = testbed.lab().vms().clone();
    for (from, to) in [(0, 1), (1, 0)] {
        let started = Instant::now();
        let memory = format!("tcp://[{}]", hosts[to].address());
        let arguments = [
            "migrate",
            "--live",
            "--persistent",
            "--undefinesource",
            testbed.domain_name(),
            &hosts[to].uri(),
            &memory,
        ];
        virsh(&hosts[from], &arguments).unwrap();
        eprintln!("without agents: {:?}", started.elapsed());
        assert!(started.elapsed() < UNAIDED);
        ensure_runs_only_on(testbed, NAMES[to]).unwrap();
    }
}
