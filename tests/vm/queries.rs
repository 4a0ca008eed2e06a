//! A moved VM receives before anybody sends a Query, and its proxy join lasts until its own answer
//! to a Query. The test observes the MLD messages of VMS 2.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::LAYOUT_VERSION;
use lab::guest::control::Control;
use lab::scenario::agents::AgentOptions;
use lab::scenario::stream::{self, RECEIVER, Stream, StreamConfig, StreamKind};
use lab::scenario::{STREAM_ADDRESS, Testbed, ensure_runs_only_on, virsh};
use lab::vms::Vms;
use lab::{LabConfig, requirements, wait};
use serde_json::Value;
use support::mld::{self, MldCapture, Seen};

const STREAM: StreamConfig = StreamConfig {
    rate_mbps: 2.0,
    flows: 1,
    kind: StreamKind::Probe,
};
const DEADLINE: Duration = Duration::from_secs(30);
const MOVE: Duration = Duration::from_secs(90);

#[test]
fn the_stream_needs_no_query_and_the_proxy_join_waits_for_the_answer_to_one() {
    if !requirements::met() {
        return;
    }
    let mut config = LabConfig::new("query");
    // Nobody sends Queries unless the test makes the switch do so.
    config.query_interval = Duration::from_secs(600);
    let mut testbed = Testbed::up(config, 128, Some(AgentOptions::DEFAULT)).unwrap();
    testbed.boot().unwrap();
    let stream = Stream::start(testbed.lab(), &STREAM).unwrap();
    let guest = testbed.guest().unwrap().clone();
    guest
        .start_receiver(RECEIVER, stream::receiver(&STREAM))
        .unwrap();
    guest.wait_arrivals(RECEIVER, 1, DEADLINE).unwrap();
    stream::wait_snooped(&mut testbed, 1).unwrap();
    assert_map_is_readable(testbed.lab().vms1());

    let vms2 = testbed.lab().vms2().clone();
    let capture = MldCapture::start(&vms2);
    let output = guest.run("migkick", &["go", "vms2"], MOVE).unwrap();
    output.into_success().unwrap();
    ensure_runs_only_on(&testbed, "vms2").unwrap();
    wait_received_at_destination(&guest, 300);
    let seen = capture.seen();
    assert!(
        !seen.iter().any(Seen::is_query),
        "a Query was sent: {seen:?}"
    );

    let host = link_local(&vms2);
    let tap = tap(&vms2, testbed.domain_name());
    let by_host = |seen: &Seen| seen.source == host && seen.record(STREAM_ADDRESS).is_some();
    let joined = seen.iter().position(|seen| {
        by_host(seen) && seen.record(STREAM_ADDRESS).is_some_and(mld::Record::joins)
    });
    assert!(
        joined.is_some(),
        "VMS 2 joins by proxy, from {host}: {seen:?}"
    );
    assert!(
        !seen.iter().any(|seen| is_leave(seen, host)),
        "and does not leave: {seen:?}"
    );
    assert_eq!(receptions(&mut testbed), [STREAM_ADDRESS.to_string()]);

    // A switch sends a Query when it becomes the querier.
    let switch = testbed.lab().switch(2);
    for querier in ["0", "1"] {
        let mut command = switch.command("ip");
        command.args([
            "link",
            "set",
            "br0",
            "type",
            "bridge",
            "mcast_querier",
            querier,
        ]);
        switch.output(&mut command).unwrap();
    }
    wait::until("VMS 2 to leave", DEADLINE, || {
        capture
            .seen()
            .iter()
            .any(|seen| is_leave(seen, host))
            .then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}", capture.seen()));
    let seen = capture.seen();
    let first = |what: &str, wanted: &dyn Fn(&Seen) -> bool, from: usize| -> usize {
        let found = seen.iter().skip(from).position(wanted);
        found.map_or_else(|| panic!("{what} is not in {seen:?}"), |at| from + at)
    };
    let query = first(
        "a Query to the VM",
        &|seen| seen.is_query() && seen.interface == tap,
        0,
    );
    let answered = first(
        "the VM's answer",
        &|seen| {
            let record = seen.record(STREAM_ADDRESS);
            seen.interface == tap && seen.source != host && record.is_some_and(mld::Record::joins)
        },
        query,
    );
    let left = first("the leave", &|seen| is_leave(seen, host), 0);
    assert!(
        answered < left,
        "answered at {answered}, left at {left}: {seen:?}"
    );

    wait::until("the agent to hold nothing", DEADLINE, || {
        receptions(&mut testbed).is_empty().then_some(())
    })
    .unwrap();
    // Longer than the querier waits for other listeners after a leave: 2 s, 340 packets.
    wait_received_at_destination(&guest, guest.arrivals(RECEIVER).len() + 700);
    drop(capture);
    stream.stop().unwrap();
}

fn is_leave(seen: &Seen, host: Ipv6Addr) -> bool {
    seen.source == host && seen.record(STREAM_ADDRESS).is_some_and(mld::Record::leaves)
}

/// Waits until a number of packets have arrived, the last hundred of them on VMS 2.
fn wait_received_at_destination(guest: &Control, count: usize) {
    wait::until("the stream at the destination", DEADLINE, || {
        let arrivals = guest.arrivals(RECEIVER);
        let there = arrivals
            .iter()
            .rev()
            .take_while(|arrival| arrival.host == 1)
            .count();
        (there >= 100 && arrivals.len() >= count).then_some(())
    })
    .unwrap();
}

/// Returns the addresses that VMS 2 holds for VMs.
fn receptions(testbed: &mut Testbed) -> Vec<String> {
    let vms2 = testbed.lab().vms2().clone();
    let status = testbed.agents().unwrap().query(&vms2, "status").unwrap();
    let rows = status["receptions"].as_array().unwrap();
    rows.iter()
        .map(|row| row["multicast_address"].as_str().unwrap().to_owned())
        .collect()
}

fn link_local(vms: &Vms) -> Ipv6Addr {
    let mut command = vms.command("ip");
    command.args([
        "-json", "-6", "address", "show", "dev", "br0", "scope", "link",
    ]);
    let text = vms.output(&mut command).unwrap();
    let value: Value = serde_json::from_str(&text).unwrap();
    let rows = value.as_array().unwrap();
    let mut addresses = rows
        .iter()
        .filter_map(|row| row["addr_info"].as_array())
        .flatten();
    let address = addresses.find_map(|address| address["local"].as_str());
    address.unwrap_or_else(|| panic!("{text}")).parse().unwrap()
}

/// Returns the TAP of the domain's first NIC.
fn tap(vms: &Vms, domain: &str) -> String {
    let text = virsh(vms, &["domiflist", domain]).unwrap();
    let name = text
        .split_whitespace()
        .find(|word| word.starts_with("vnet"));
    name.unwrap_or_else(|| panic!("{text}")).to_owned()
}

/// Asserts that bpftool names the fields of keys and values, from the map's BTF types.
fn assert_map_is_readable(vms: &Vms) {
    let mut command = vms.command("bpftool");
    command.args([
        "--json",
        "map",
        "dump",
        "pinned",
        &format!("/sys/fs/bpf/roamcast/v{LAYOUT_VERSION}/LISTENERS"),
    ]);
    let text = vms.output(&mut command).unwrap();
    let dump: Value = serde_json::from_str(&text).unwrap();
    let entries: Vec<&Value> = dump
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| &entry["formatted"])
        .collect();
    assert!(!entries.is_empty(), "{text}");
    for entry in &entries {
        for field in ["ifindex", "vlan", "multicast_address"] {
            assert!(
                !entry["key"][field].is_null(),
                "{field} of the key: {entry}"
            );
        }
        for field in [
            "filter_mode",
            "source_count",
            "mld_version",
            "last_report_ns",
            "guest_mac",
        ] {
            assert!(
                !entry["value"][field].is_null(),
                "{field} of the value: {entry}"
            );
        }
    }
    let bytes = STREAM_ADDRESS.octets().map(u64::from);
    let stream = entries.iter().any(|entry| {
        let address = entry["key"]["multicast_address"].as_array();
        address.is_some_and(|found| found.iter().map(Value::as_u64).eq(bytes.map(Some)))
    });
    assert!(stream, "the stream's address is among them: {text}");
}
