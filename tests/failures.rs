//! Whatever dies while a guest is moved, it goes on running and receiving, on exactly one host.

use std::time::Duration;

use lab::scenario::agents::AgentOptions;
use lab::scenario::stream::{self, RECEIVER, Stream, StreamConfig, StreamKind};
use lab::scenario::Testbed;
use lab::{LabConfig, Site, wait};

/// Slow enough that every phase can be hit: the tree needs a while, and so does the copy.
const TREE_MS: u64 = 1500;
const OPTIONS: AgentOptions = AgentOptions { bandwidth_mib: 16, tree_budget_ms: Some(4000) };
const STREAM: StreamConfig = StreamConfig { rate_mbps: 2.0, flows: 1, kind: StreamKind::Probe };
const SETTLED: Duration = Duration::from_secs(90);

#[derive(Clone, Copy, Debug)]
enum Victim {
    Agent(usize),
    Libvirtd(usize),
}

const VICTIMS: [Victim; 4] =
    [Victim::Agent(0), Victim::Agent(1), Victim::Libvirtd(0), Victim::Libvirtd(1)];

/// Phases by the source agent's record, in their order.
const PHASES: [&str; 2] = ["preparing", "copying"];

fn phase(testbed: &mut Testbed) -> Option<String> {
    let vms1 = testbed.lab().vms1().clone();
    let migrations = testbed.agents().ok()?.query(&vms1, "migrations").ok()?;
    let last = migrations.as_array()?.last()?;
    (last["outcome"]["state"] == "running").then(|| last["phase"].as_str().map(str::to_owned))?
}

#[test]
fn whatever_dies_the_guest_runs_and_receives_on_exactly_one_host() {
    let mut config = LabConfig::new("fail");
    config.sites = [Site::Multicast, Site::Late(TREE_MS)];
    let mut testbed = Testbed::up(config, 128, Some(OPTIONS)).unwrap();
    for phase in PHASES {
        for victim in VICTIMS {
            eprintln!("{victim:?} dies while the migration is {phase}");
            kill_in_phase(&mut testbed, victim, phase);
        }
    }
}

fn kill_in_phase(testbed: &mut Testbed, victim: Victim, wanted: &str) {
    testbed.boot().unwrap();
    let stream = Stream::start(testbed.lab(), &STREAM).unwrap();
    let receiver = stream::receiver(&STREAM);
    testbed.guest().unwrap().start_receiver(RECEIVER, receiver).unwrap();
    testbed.guest().unwrap().wait_arrivals(RECEIVER, 1, Duration::from_secs(20)).unwrap();
    stream::wait_snooped(testbed, 1).unwrap();

    let vms1 = testbed.lab().vms1().clone();
    let name = testbed.domain_name().to_owned();
    let command = testbed.agents().unwrap().command(&vms1, &["migrate", &name, "vms2"]);
    let mut operator = vms1.spawn("migrate", command).unwrap();
    wait::until(&format!("the phase {wanted}"), Duration::from_secs(30), || {
        (phase(testbed).as_deref() == Some(wanted)).then_some(())
    })
    .unwrap();
    match victim {
        Victim::Agent(index) => testbed.agents().unwrap().kill(index),
        // It is started again within a second, as by systemd.
        Victim::Libvirtd(index) => testbed.lab().vms()[index].kill_libvirtd().unwrap(),
    }
    operator.wait(SETTLED).unwrap();
    if let Victim::Agent(index) = victim {
        let lab = lab::Lab::attach(&testbed.lab().config().name).unwrap();
        testbed.agents().unwrap().restart(&lab, index).unwrap();
    }

    let host = wait::until("the guest to run on exactly one host", SETTLED, || {
        match testbed.running_on()[..] {
            [host] => Some(host.to_owned()),
            _ => None,
        }
    })
    .unwrap_or_else(|error| panic!("{victim:?} in {wanted}: {error:#}"));
    let seen = testbed.guest().unwrap().arrivals(RECEIVER).len();
    testbed
        .guest()
        .unwrap()
        .wait_arrivals(RECEIVER, seen + 100, SETTLED)
        .unwrap_or_else(|error| panic!("{victim:?} in {wanted}, guest on {host}: {error:#}"));
    wait::until("both agents to have ended the migration", SETTLED, || {
        let hosts = testbed.lab().vms().clone();
        let agents = testbed.agents().ok()?;
        hosts
            .iter()
            .all(|vms| {
                agents.query(vms, "status").is_ok_and(|status| {
                    status["migrations"].as_array().is_some_and(Vec::is_empty)
                })
            })
            .then_some(())
    })
    .unwrap_or_else(|error| panic!("{victim:?} in {wanted}: {error:#}"));
    assert_eq!(testbed.running_on(), [host], "{victim:?} in {wanted}");
    stream.stop().unwrap();
}
