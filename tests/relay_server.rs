//! `roamcast relay` against the kernel: a stream is asked for over TLS, comes by unicast with the
//! announced ports, outlives `kill -9` of the relay, and ends when it is released.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

#[path = "support/capture.rs"]
mod capture;
#[path = "support/netns.rs"]
mod netns;
#[path = "support/relay_net.rs"]
mod relay_net;

use std::net::Ipv6Addr;

use capture::{Capture, Mld, Record};
use common::maps::StreamKey;
use common::relay::{Endpoints, is_neutral};
use common::signal::{AnnouncedFlow, KnownFlow, RelayRelease};
use netns::{privileged, wait_for};
use relay_net::{
    AGENT, Client, DESTINATION_PORT, Net, RELAY, Received, Relay, SOURCE, SOURCE_PORT, Sender,
    request,
};

const TO_INCLUDE: u8 = 3;
const TO_EXCLUDE: u8 = 4;
const ALLOW: u8 = 5;
const BLOCK: u8 = 6;

fn group(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0x4321, number)
}

fn release() -> RelayRelease {
    RelayRelease {
        reason: "no listener left".to_owned(),
    }
}

fn known() -> KnownFlow {
    KnownFlow {
        source: SOURCE.octets().into(),
        source_port: SOURCE_PORT,
        destination_port: DESTINATION_PORT,
    }
}

/// Whether the sum of the announced ports is that of the stream.
fn announced_right(group: Ipv6Addr, flow: &AnnouncedFlow) -> bool {
    let stream = StreamKey {
        multicast_address: group.octets(),
        source: *flow.source,
        source_port: flow.source_port,
        destination_port: flow.destination_port,
        vlan: 0,
        pad: 0,
    };
    let endpoints = Endpoints {
        relay_address: RELAY.octets(),
        relay_port: flow.relay_port,
        agent_address: AGENT.octets(),
        agent_port: flow.agent_port,
    };
    is_neutral(&stream, &endpoints)
}

fn of(records: &[Record], address: Ipv6Addr, kinds: &[u8]) -> bool {
    records
        .iter()
        .any(|record| record.multicast_address == address && kinds.contains(&record.kind))
}

/// Panics unless the numbers are all of those from the first to the last, in order.
fn assert_gapless(numbers: &[u32]) {
    for pair in numbers.windows(2) {
        assert_eq!(pair[1], pair[0] + 1, "after {} datagrams", numbers.len());
    }
}

#[test]
fn stream_outlives_kill_9_and_a_restart_without_a_gap_and_ends_when_released() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    net.relay.run_with_bpffs(|bpffs| {
        std::thread::scope(|scope| {
            let mut capture = Capture::start(&net.source);
            let config = net.configure(bpffs, "");
            let mut relay = Relay::start(&net, &config);
            let client = Client::start(scope, &net, "vms1");
            client.connect();
            let mut asked = request(group(1), &[]);
            asked.flows = vec![known()];
            client.send(1, asked.clone());
            let response = client.response(1);
            capture.report("join", |it| of(it, group(1), &[TO_EXCLUDE]));
            let flow = response
                .flows
                .first()
                .expect("the flow that was named")
                .clone();
            assert!(announced_right(group(1), &flow));

            let received = Received::start(scope, &net, flow.relay_port, flow.agent_port);
            let sender = Sender::start(scope, &net, group(1), SOURCE_PORT);
            received.more(500);
            assert_eq!(received.numbers()[0], 0, "the first packet is relayed");

            relay.kill();
            // More than two seconds of a stream that nobody is there for.
            received.more(4000);
            assert!(net.is_joined(group(1)));
            drop(relay);
            let relay = Relay::start(&net, &config);
            let status = net.status();
            assert_eq!(status["sessions"][0]["agent"], serde_json::Value::Null);
            assert_eq!(status["memberships"][0]["holder"], "kernel");
            received.more(500);
            client.connect();
            client.send(2, asked);
            let adopted = client.response(2);
            assert_eq!(adopted.flows, response.flows, "the same ports");
            received.more(500);

            let second = Sender::start(scope, &net, group(1), SOURCE_PORT + 1);
            let response = client.response(2);
            assert_eq!(response.flows.len(), 2, "a new port is announced");
            assert!(
                response
                    .flows
                    .iter()
                    .all(|it| announced_right(group(1), it))
            );
            second.stop();

            let sent = sender.stop();
            wait_for("the last datagram", || {
                (received.numbers().last() == Some(&(sent - 1))).then_some(())
            });
            let numbers = received.numbers();
            assert_gapless(&numbers);
            assert_eq!(numbers.len(), sent as usize, "none lost, none doubled");

            let status = net.status();
            let session = &status["sessions"][0];
            assert_eq!(session["agent"], "vms1");
            let shown = session["flows"]
                .as_array()
                .unwrap()
                .iter()
                .find(|it| it["source_port"] == SOURCE_PORT)
                .unwrap();
            assert_eq!(shown["packets"], sent);
            assert_eq!(shown["dropped"], 0);
            for message in capture.drain() {
                if let Mld::Report(records) = message {
                    assert!(
                        !of(&records, group(1), &[TO_INCLUDE, BLOCK]),
                        "left in between"
                    );
                }
            }
            client.send(2, release());
            capture.report("leave", |it| of(it, group(1), &[TO_INCLUDE]));
            assert!(!net.is_joined(group(1)));
            assert_eq!(net.status()["sessions"].as_array().unwrap().len(), 0);
            drop((client, received, relay));
        });
    });
}
