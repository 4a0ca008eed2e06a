//! Refusals by the agents: migkick prints the reason in one sentence, and everything stays
//! unchanged.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::net::SocketAddr;
use std::time::Duration;

use common::signal::{AgentRequest, PORT};
use lab::guest::control::Control;
use lab::guest::wire::{Content, Filter, Join, ReceiverConfig};
use lab::scenario::agents::AgentOptions;
use lab::scenario::stream::{self, RECEIVER, Stream, StreamConfig, StreamKind};
use lab::scenario::{Testbed, ensure_runs_only_on};
use lab::vms::Vms;
use lab::{Lab, LabConfig, netns, requirements, wait};
use roamcast::net::tls::TlsFiles;
use serde_json::Value;
use support::liar::Liar;

/// Limit of multicast addresses per NIC, including its solicited-node addresses.
const LISTENERS: u32 = 16;
/// The copy of the whole guest takes several seconds.
const OPTIONS: AgentOptions = AgentOptions {
    bandwidth_mib: 12,
    listeners: Some(LISTENERS),
    ..AgentOptions::DEFAULT
};
const STREAM: StreamConfig = StreamConfig {
    rate_mbps: 2.0,
    flows: 1,
    kind: StreamKind::Probe,
};
/// Port of a receiver that exceeds its limit.
const GREEDY: u16 = 2;
const DEADLINE: Duration = Duration::from_secs(60);

fn streaming_testbed(name: &str, options: AgentOptions) -> (Testbed, Stream) {
    let mut testbed = Testbed::up(LabConfig::new(name), 128, Some(options)).unwrap();
    testbed.boot().unwrap();
    let stream = Stream::start(testbed.lab(), &STREAM).unwrap();
    let guest = testbed.guest().unwrap().clone();
    guest
        .start_receiver(RECEIVER, stream::receiver(&STREAM))
        .unwrap();
    guest.wait_arrivals(RECEIVER, 1, DEADLINE).unwrap();
    stream::wait_snooped(&mut testbed, 1).unwrap();
    (testbed, stream)
}

#[test]
fn each_refusal_is_one_sentence_and_leaves_the_guest_unharmed() {
    if !requirements::met() {
        return;
    }
    let (mut testbed, stream) = streaming_testbed("refuse", OPTIONS);
    let said = refused(&mut testbed, &["go", "vms2", "--domain", "other"]);
    assert!(
        said.contains("domain \"guest1\"") && said.contains("\"other\""),
        "{said}"
    );
    let said = refused(&mut testbed, &["go", "nowhere"]);
    assert!(
        said.contains("no destination \"nowhere\"") && said.contains("vms2"),
        "{said}"
    );
    let said = refused(&mut testbed, &["go", "vms1"]);
    assert!(said.contains("guest1 is on vms1 already"), "{said}");

    a_destination_that_is_down_is_named(&mut testbed);
    too_many_addresses_are_refused_and_named(&mut testbed);
    a_second_move_is_refused_during_the_first(&mut testbed);
    stream.stop().unwrap();
}

#[test]
fn guest_whose_tap_a_lying_peer_waits_for_gets_its_streams_from_the_start() {
    if !requirements::met() {
        return;
    }
    let mut testbed = Testbed::up(LabConfig::new("lie"), 128, Some(OPTIONS)).unwrap();
    testbed.agents().unwrap().kill(1);
    let [vms1, vms2] = testbed.lab().vms().clone();
    let file = |name| vms2.shared_directory().join(name);
    let files = TlsFiles {
        ca: file("cacert.pem"),
        certificate: file("cert.pem"),
        key: file("key.pem"),
        crl: file("crl.pem"),
    };
    let to = SocketAddr::from((vms1.address(), PORT));
    let request = AgentRequest {
        domain_uuid: [0xee; 16].into(),
        domain_name: "nobody".to_owned(),
        macs: testbed
            .domain()
            .macs
            .iter()
            .map(|mac| (*mac).into())
            .collect(),
        listeners: vec![],
        vm_transaction: None,
    };
    let liar = netns::within(vms2.namespace(), || {
        let mut liar = Liar::connect(to, "vms1", &files.ca, &files);
        liar.say(1, request);
        liar.answer(1);
        liar
    });
    testbed.boot().unwrap();
    let stream = Stream::start(testbed.lab(), &STREAM).unwrap();
    let guest = testbed.guest().unwrap().clone();
    guest
        .start_receiver(RECEIVER, stream::receiver(&STREAM))
        .unwrap();
    guest.wait_arrivals(RECEIVER, 1, DEADLINE).unwrap();
    let said = log(&mut testbed, &vms1);
    assert!(
        said.contains("A TAP that was kept for an arriving domain is another's"),
        "{said}"
    );
    drop(liar);
    stream.stop().unwrap();
}

/// Requests a migration that the agent refuses. Returns the sentence with the reason.
fn refused(testbed: &mut Testbed, arguments: &[&str]) -> String {
    let guest = testbed.guest().unwrap().clone();
    let output = guest.run("migkick", arguments, DEADLINE).unwrap();
    let said = output.stderr();
    eprintln!("migkick {}: {}", arguments.join(" "), said.trim());
    assert_eq!(output.code, Some(1), "{arguments:?}: {said}");
    let sentences: Vec<&str> = said.lines().filter(|line| !STEPS.contains(line)).collect();
    let [sentence] = sentences[..] else {
        panic!("{arguments:?} should say one sentence: {said}");
    };
    assert_unharmed(testbed, &guest);
    sentence.to_owned()
}

/// Lines with progress.
const STEPS: [&str; 3] = [
    "Searching for the agent",
    "Asking for the move",
    "The destination joins the VM's multicast addresses",
];

fn assert_unharmed(testbed: &mut Testbed, guest: &Control) {
    ensure_runs_only_on(testbed, "vms1").unwrap();
    let seen = guest.arrivals(RECEIVER).len();
    guest.wait_arrivals(RECEIVER, seen + 50, DEADLINE).unwrap();
    let status = status(testbed);
    assert_eq!(status["migrations"], Value::Array(Vec::new()), "{status}");
    assert_eq!(status["hypervisor"]["state"], "up", "{status}");
}

fn status(testbed: &mut Testbed) -> Value {
    let vms1 = testbed.lab().vms1().clone();
    testbed.agents().unwrap().query(&vms1, "status").unwrap()
}

fn a_destination_that_is_down_is_named(testbed: &mut Testbed) {
    testbed.agents().unwrap().kill(1);
    let said = refused(testbed, &["go", "vms2"]);
    assert!(said.contains("Destination vms2 is down"), "{said}");
    let lab = Lab::attach(&testbed.lab().config().name).unwrap();
    testbed.agents().unwrap().restart(&lab, 1).unwrap();
}

fn too_many_addresses_are_refused_and_named(testbed: &mut Testbed) {
    let guest = testbed.guest().unwrap().clone();
    let joins = vec![Join {
        multicast_address: "ff1e::5000:1".parse().unwrap(),
        count: 4 * LISTENERS,
        filter: Filter::Any,
    }];
    let config = ReceiverConfig {
        interface: "eth0".to_owned(),
        port: 5006,
        joins,
        content: Content::Stamped,
    };
    guest.start_receiver(GREEDY, config).unwrap();
    let port = wait::until("listeners to be refused", DEADLINE, || {
        let status = status(testbed);
        let ports = status["ports"].as_array()?.clone();
        ports
            .into_iter()
            .find(|port| port["refused_listeners"].as_u64() > Some(0))
    })
    .unwrap();
    assert_eq!(port["domain"], "guest1", "{port}");
    assert_eq!(port["max_listeners"], LISTENERS, "{port}");
    assert_eq!(port["listeners"], LISTENERS, "{port}");
    let vms1 = testbed.lab().vms1().clone();
    wait::until("the guest to be named in the log", DEADLINE, || {
        log(testbed, &vms1)
            .lines()
            .any(|line| line.contains("over its limits") && line.contains("guest1"))
            .then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", log(testbed, &vms1)));
    assert_unharmed(testbed, &guest);
    guest.stop_receiver(GREEDY).unwrap();
}

fn log(testbed: &mut Testbed, vms: &Vms) -> String {
    testbed.agents().unwrap().log(vms)
}

fn a_second_move_is_refused_during_the_first(testbed: &mut Testbed) {
    let guest = testbed.guest().unwrap().clone();
    let first = guest.spawn("migkick", &["go", "vms2"]).unwrap();
    wait::until("the copy's progress", DEADLINE, || {
        let row = status(testbed)["migrations"][0].clone();
        (row["phase"] == "copying" && row["processed_bytes"].as_u64() > Some(0)).then_some(())
    })
    .unwrap();
    show_tables(testbed);
    let second = guest.run("migkick", &["go", "vms2"], DEADLINE).unwrap();
    let said = second.stderr();
    eprintln!("second: {}", said.trim());
    assert_eq!(second.code, Some(1), "{said}");
    assert!(
        said.contains("guest1 is already being moved to vms2"),
        "{said}"
    );
    // The first migration continues and completes.
    let output = first.wait(DEADLINE).unwrap();
    assert_eq!(output.code, Some(0), "{}", output.stderr());
    ensure_runs_only_on(testbed, "vms2").unwrap();
    let seen = guest.arrivals(RECEIVER).len();
    guest.wait_arrivals(RECEIVER, seen + 100, DEADLINE).unwrap();
    show_tables(testbed);
}

/// Prints the operator's tables for the reader of the test's output.
fn show_tables(testbed: &mut Testbed) {
    for vms in testbed.lab().vms().clone() {
        for table in ["status", "listeners", "streams", "migrations"] {
            let agents = testbed.agents().unwrap();
            let text = vms.output(&mut agents.command(&vms, &[table])).unwrap();
            eprintln!("--- {} {table}\n{text}", vms.name());
        }
    }
}
