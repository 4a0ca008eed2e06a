//! libvirt's bandwidth limits on a VM's NICs together with the agent's programs on the same TAPs,
//! in any order of attachment: the domain starts, the limits work, and each program is on its side.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::process::Command;
use std::time::Duration;

use common::maps::LAYOUT_VERSION;
use lab::guest::domain::Bandwidth;
use lab::scenario::agents::AgentOptions;
use lab::scenario::stream::{self, RECEIVER, Stream, StreamConfig, StreamKind};
use lab::scenario::{STREAM_ADDRESS, Testbed, virsh};
use lab::vms::Vms;
use lab::{LabConfig, requirements, wait};
use serde_json::Value;

const STREAM: StreamConfig = StreamConfig {
    rate_mbps: 2.0,
    flows: 1,
    kind: StreamKind::Probe,
};
/// Half of the stream's rate inbound, and less than a packet per second outbound.
const LIMITS: Bandwidth = Bandwidth {
    inbound: 125,
    outbound: 1,
};
/// Multicast address to which the guest sends.
const OWN: &str = "ff1e::4000:99";
const DEADLINE: Duration = Duration::from_secs(120);

/// The `tc` commands that libvirt runs, in a separate network namespace.
const LIMITED: &str = "
    ip link set lo up
    tc qdisc add dev lo root handle 1: htb default 1
    tc class add dev lo parent 1: classid 1:1 htb rate 125kbps
    tc qdisc add dev lo parent 1:1 handle 2: sfq perturb 10
    tc filter add dev lo parent 1:0 protocol all prio 1 handle 1 fw flowid 1
    tc qdisc add dev lo ingress
    tc filter add dev lo parent ffff: protocol all u32 match u32 0 0 \
        police rate 1kbps burst 1kb mtu 64kb drop flowid :1";

/// Returns the reason why this kernel cannot limit, if it cannot.
fn cannot_limit() -> Option<String> {
    let script = format!("set -e\n{LIMITED}");
    let output = Command::new("unshare")
        .args(["--net", "sh", "-c", &script])
        .output()
        .unwrap();
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

#[test]
fn limits_of_libvirt_and_the_agents_programs_bear_each_other_in_any_order() {
    if !requirements::met() {
        return;
    }
    if let Some(reason) = cannot_limit() {
        eprintln!("skipped: this kernel has not all that libvirt's limits need: {reason}");
        return;
    }
    let agents = Some(AgentOptions::DEFAULT);
    let mut testbed = Testbed::up(LabConfig::new("limits"), 128, agents).unwrap();
    testbed.limit(Some(LIMITS));
    // The domain starts while the agent looks for new TAPs.
    for start in 1..=2 {
        eprintln!("start {start}");
        testbed.boot().unwrap();
        programs_are_on_their_sides(&mut testbed);
    }
    let vms1 = testbed.lab().vms1().clone();
    let stream = Stream::start(testbed.lab(), &STREAM).unwrap();
    listen(&mut testbed);
    limits_limit(&testbed);
    gate_counts_what_comes_in(&vms1);

    let name = testbed.domain_name().to_owned();
    let tune = |inbound: &str, outbound: &str| {
        let tap = tap(&vms1, &name);
        let arguments = ["--inbound", inbound, "--outbound", outbound];
        virsh(
            &vms1,
            &[&["domiftune", &name, &tap], &arguments[..]].concat(),
        )
        .unwrap();
    };
    eprintln!("cleared");
    tune("0", "0");
    programs_are_on_their_sides(&mut testbed);
    let unlimited = qdiscs(&vms1, &tap(&vms1, &name));
    // Without TCX, the agent itself has a root qdisc of that kind.
    assert!(!unlimited.contains("htb 1:"), "{unlimited}");

    eprintln!("set again");
    tune("125", "1");
    programs_are_on_their_sides(&mut testbed);
    limits_limit(&testbed);
    gate_counts_what_comes_in(&vms1);
    eprintln!("changed");
    tune("120", "2");
    programs_are_on_their_sides(&mut testbed);
    limits_limit(&testbed);
    gate_counts_what_comes_in(&vms1);

    // The limits exist both when the agent restarts and when it starts for the first time.
    eprintln!("agent started again");
    testbed.agents().unwrap().kill(0);
    testbed.restart_agent(0).unwrap();
    programs_are_on_their_sides(&mut testbed);
    limits_limit(&testbed);
    gate_counts_what_comes_in(&vms1);
    eprintln!("agent gone, and new");
    testbed.agents().unwrap().kill(0);
    let cleanup = testbed.agents().unwrap().command(&vms1, &["cleanup"]);
    vms1.output(&mut { cleanup }).unwrap();
    limits_limit(&testbed);
    testbed.restart_agent(0).unwrap();
    programs_are_on_their_sides(&mut testbed);
    limits_limit(&testbed);
    gate_counts_what_comes_in(&vms1);
    stream.stop().unwrap();
}

/// Returns the TAP of the guest's first NIC.
fn tap(vms: &Vms, domain: &str) -> String {
    let list = virsh(vms, &["domiflist", domain]).unwrap();
    // Some versions print no table head.
    let tap = list.lines().find_map(|row| {
        let mut columns = row.split_whitespace();
        let tap = columns.next()?;
        (columns.next() == Some("bridge")).then(|| tap.to_owned())
    });
    tap.unwrap_or_else(|| panic!("no NIC of {domain}: {list:?}"))
}

fn qdiscs(vms: &Vms, tap: &str) -> String {
    vms.output(vms.command("tc").args(["qdisc", "show", "dev", tap]))
        .unwrap()
}

/// Makes the guest listen to the stream.
fn listen(testbed: &mut Testbed) {
    let guest = testbed.guest().unwrap().clone();
    guest
        .start_receiver(RECEIVER, stream::receiver(&STREAM))
        .unwrap();
    guest.wait_arrivals(RECEIVER, 1, DEADLINE).unwrap();
    stream::wait_snooped(testbed, 1).unwrap();
}

/// Asserts that both programs of both TAPs are attached on their sides and run first, except for
/// libvirt's filter, which is first on its root qdisc.
fn programs_are_on_their_sides(testbed: &mut Testbed) {
    let vms1 = testbed.lab().vms1().clone();
    let agents = testbed.agents().unwrap();
    let sides = |row: &Value| {
        let hooks = row["hooks"].as_array().unwrap().iter();
        let is_first = |hook: &Value| {
            let before = hook["before"].as_array().unwrap();
            before.iter().all(|it| it == "fw (preference 1)")
        };
        let mut sides: Vec<String> = hooks
            .filter(|hook| hook["is_there"] == true && is_first(hook))
            .map(|hook| format!("{} {}", hook["program"], hook["side"]).replace('"', ""))
            .collect();
        sides.sort();
        sides == ["gate egress", "snoop ingress"]
    };
    let mut status = Value::Null;
    let attached = wait::until("both programs of both TAPs", DEADLINE, || {
        status = agents.query(&vms1, "status").ok()?;
        let ports = status["ports"].as_array()?;
        (ports.len() == 2 && ports.iter().all(sides)).then_some(())
    });
    attached.unwrap_or_else(|error| panic!("{error}: {status:#}"));
}

/// Asserts that excess traffic is dropped on both sides.
fn limits_limit(testbed: &Testbed) {
    let vms1 = testbed.lab().vms1();
    let guest = testbed.guest().unwrap();
    let tap = tap(vms1, testbed.domain_name());
    let dropped = |what: &[&str]| {
        let arguments = [&["-s"], what, &["dev", &tap]].concat();
        let text = vms1.output(vms1.command("tc").args(arguments)).unwrap();
        let (_, rest) = text.split_once("dropped ")?;
        let digits = rest.split(|character: char| !character.is_ascii_digit());
        digits.into_iter().next()?.parse::<u64>().ok()
    };
    eprintln!("    drops on the way in");
    wait::until("drops on the way in", DEADLINE, || {
        (dropped(&["qdisc", "show", "root"])? > 0).then_some(())
    })
    .unwrap();
    // The fragments leave together, because a limit lets a burst of one second pass.
    let ping = ["-6", "-I", "eth0", "-c", "3", "-W", "1", "-s", "8000", OWN];
    eprintln!("    drops on the way out");
    wait::until("drops on the way out", DEADLINE, || {
        let output = guest.run("ping", &ping, DEADLINE).unwrap();
        // No node answers.
        let sent = "3 packets transmitted, 0";
        assert!(output.stdout().contains(sent), "{output:?}");
        (dropped(&["filter", "show", "ingress"])? > 0).then_some(())
    })
    .unwrap();
}

/// Asserts that `gate` counts what enters the TAP, and nothing else.
fn gate_counts_what_comes_in(vms: &Vms) {
    let delivered = delivered(vms);
    let own: std::net::Ipv6Addr = OWN.parse().unwrap();
    assert!(!delivered.contains(&own), "{delivered:?}");
    assert!(delivered.contains(&STREAM_ADDRESS), "{delivered:?}");
}

/// Returns the multicast addresses that `gate` counted.
fn delivered(vms: &Vms) -> Vec<std::net::Ipv6Addr> {
    let pin = format!("/sys/fs/bpf/roamcast/v{LAYOUT_VERSION}/DELIVERED");
    let dump = vms
        .output(
            vms.command("bpftool")
                .args(["-j", "map", "dump", "pinned", &pin]),
        )
        .unwrap();
    let entries: Vec<Value> = serde_json::from_str(&dump).unwrap();
    let address = |entry: &Value| {
        let bytes = &entry["formatted"]["key"]["stream"]["multicast_address"];
        let bytes: [u8; 16] = serde_json::from_value(bytes.clone()).unwrap();
        bytes.into()
    };
    entries.iter().map(address).collect()
}
