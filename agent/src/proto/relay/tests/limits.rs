//! Each limit, and its sentence of refusal.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::FilterMode;
use common::signal::{PeerMessage, RelayRelease};

use super::fixture::*;
use crate::proto::PeerEvent;

#[test]
fn fields_out_of_range_are_named() {
    let mut bench = Bench::new();
    let asked = request(group(1), agent_address(1));
    let cases = [
        (
            "ff02::1",
            "ff02::1 is no multicast address of more than link scope",
        ),
        (
            "2001:db8::1",
            "2001:db8::1 is no multicast address of more than link scope",
        ),
        (
            "ff3e::8000:1",
            "ff3e::8000:1 is source-specific; ask for it with the sources wanted (INCLUDE)",
        ),
    ];
    for (multicast_address, sentence) in cases {
        let mut asked = asked.clone();
        asked.multicast_address = address(multicast_address).octets().into();
        assert_eq!(bench.refused("vms1", &asked), sentence);
    }
    let mut empty = asked.clone();
    empty.filter_mode = FilterMode::Include as u8;
    assert_eq!(
        bench.refused("vms1", &empty),
        "The request for ff0e::77:1 wants no source"
    );
    let mut mode = asked.clone();
    mode.filter_mode = 7;
    assert!(bench.refused("vms1", &mode).contains("filter mode"));
    for bad in [
        Ipv6Addr::LOCALHOST,
        address("fe80::1"),
        address("2001:db8:5::5"),
        group(1),
    ] {
        let mut asked = asked.clone();
        asked.agent_address = bad.octets().into();
        assert!(
            bench
                .refused("vms1", &asked)
                .contains("address of the agent")
        );
    }
    let mut many = asked.clone();
    many.sources = (0..65).map(|n| source(n).octets().into()).collect();
    assert_eq!(
        bench.refused("vms1", &many),
        "The request names 65 sources; relay relay1 takes 64 in one request"
    );
    assert_eq!(bench.relay.counters().refused_requests, 10);
}

#[test]
fn policy_decides_who_gets_what_and_where() {
    let mut bench = Bench::new();
    assert_eq!(
        bench.refused("edge1", &request(group(1), agent_address(1))),
        "The policy of relay relay1 does not let agent edge1 have ff0e::77:1"
    );
    assert_eq!(
        bench.refused("vms1", &request(group(1), address("2001:db8:7::1"))),
        "The policy of relay relay1 does not let agent vms1 have streams sent to 2001:db8:7::1; \
         connect from there, or name its prefix in `agent_addresses`"
    );
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    assert_eq!(
        bench.refused("vms2", &request(group(2), agent_address(1))),
        "Relay relay1 sends to 2001:db8:2::1 for another agent already"
    );
}

#[test]
fn streams_are_sent_where_the_agent_connects_from_unless_the_policy_names_a_prefix() {
    let mut config = config();
    config.policy[0].agent_addresses.clear();
    let mut bench = Bench::with(config);
    let connect = |bench: &mut Bench, agent: &str, from: Option<u16>| {
        let from = from.map(|number| agent_address(number).into());
        let now = bench.now;
        bench.relay.handle_peer(now, agent, PeerEvent::Up { from });
    };
    let third_party = request(group(1), agent_address(9));
    assert!(bench.refused("vms1", &third_party).contains("vms1"));
    for from in [Some(1), None] {
        connect(&mut bench, "vms1", from);
        let refusal = bench.refused("vms1", &third_party);
        assert!(refusal.contains("sent to 2001:db8:2::9"), "{refusal}");
    }
    connect(&mut bench, "vms1", Some(1));
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    // A later request is judged by the agent's address at that time.
    connect(&mut bench, "vms1", Some(9));
    bench.refused("vms1", &request(group(1), agent_address(1)));
    bench.serve("vms1", 1, &third_party);
}

#[test]
fn agent_that_connects_from_its_address_displaces_who_only_asked_for_it() {
    let mut bench = Bench::new();
    bench.serve("vms9", 1, &request(group(1), agent_address(1)));
    bench.serve("vms9", 2, &request(group(2), agent_address(1)));
    let from = Some(agent_address(1).into());
    let now = bench.now;
    bench.relay.handle_peer(now, "vms1", PeerEvent::Up { from });
    bench.frames.clear();
    bench.ask("vms1", 3, &request(group(1), agent_address(1)));
    let told: Vec<(&str, u64)> = bench
        .frames
        .iter()
        .map(|it| (it.0.as_str(), it.1))
        .collect();
    assert_eq!(told, [("vms9", 1), ("vms9", 2), ("vms1", 3)]);
    let PeerMessage::RelayRelease(RelayRelease(reason)) = &bench.frames[0].2 else {
        panic!("{:?}", bench.frames);
    };
    assert_eq!(
        reason.text,
        "Relay relay1 sends to 2001:db8:2::1 for the agent that connects from there"
    );
    assert!(matches!(bench.frames[2].2, PeerMessage::RelayResponse(_)));
    // Two agents that connect from the same address do not displace each other.
    bench.relay.handle_peer(now, "vms2", PeerEvent::Up { from });
    for agent in ["vms2", "vms9"] {
        let refusal = bench.refused(agent, &request(group(1), agent_address(1)));
        assert!(refusal.contains("for another agent already"), "{refusal}");
    }
}

#[test]
fn sessions_are_limited_for_each_agent_and_for_all() {
    let mut config = config();
    config.limits.sessions = 3;
    config.limits.sessions_per_agent = 2;
    let mut bench = Bench::with(config);
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    bench.serve("vms1", 2, &request(group(2), agent_address(1)));
    assert_eq!(
        bench.refused("vms1", &request(group(3), agent_address(1))),
        "Agent vms1 has 2 sessions with relay relay1 already; release one"
    );
    bench.serve("vms2", 3, &request(group(1), agent_address(2)));
    assert_eq!(
        bench.refused("vms3", &request(group(1), agent_address(3))),
        "Relay relay1 has 3 sessions already; release one, or use another relay"
    );
    // Existing sessions continue.
    bench.serve("vms1", 2, &request(group(2), agent_address(1)));
}

#[test]
fn bandwidth_is_limited_for_each_agent_and_for_all() {
    let mut config = config();
    config.limits.bits_per_second = 50_000_000;
    config.limits.bits_per_second_per_agent = 25_000_000;
    let mut bench = Bench::with(config);
    let flow = stream(group(1), source(1), 4000);
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    bench.packet(&flow);
    bench.read(&[(flow, bench.flowing(20))]);
    bench.serve("vms2", 1, &request(group(1), agent_address(2)));
    // Another 20 Mbit/s exceed the limit of all agents together.
    assert_eq!(
        bench.refused("vms3", &request(group(1), agent_address(3))),
        "Relay relay1 may send 50.0 Mbit/s in all, and 40.0 are in use; use another relay"
    );
    // The rate of another address is unknown, so the request is accepted, unless the limit is reached
    // already.
    bench.serve("vms1", 2, &request(group(2), agent_address(1)));
    let second = stream(group(2), source(1), 4000);
    bench.packet(&second);
    bench.release("vms2", 1);
    bench.read(&[(second, bench.flowing(8))]);
    assert_eq!(
        bench.refused("vms1", &request(group(3), agent_address(1))),
        "Relay relay1 may send 25.0 Mbit/s to agent vms1, and 28.0 are in use; release a session"
    );
    assert_eq!(bench.relay.sessions().count(), 2, "nobody is cut off");
}

#[test]
fn rate_is_that_of_the_time_between_two_readings() {
    let mut bench = Bench::new();
    let flow = stream(group(1), source(1), 4000);
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    bench.packet(&flow);
    let mut counted = bench.flowing(20);
    bench.read(&[(flow, counted)]);
    bench.wait(Duration::from_secs(5));
    counted.native.bytes += 5_000_000;
    bench.read(&[(flow, counted)]);
    let session = bench.relay.sessions().next().unwrap();
    assert_eq!(session.flows[0].bits_per_second, 8_000_000);
}

#[test]
fn sender_that_makes_up_ports_does_not_lock_out_a_flow_for_long() {
    let mut config = config();
    config.limits.flows_per_session = 4;
    let mut bench = Bench::with(config);
    bench.serve("vms1", 1, &request(group(1), agent_address(1)));
    let real = stream(group(1), source(1), 4000);
    bench.packet(&real);
    for port in 1..100 {
        bench.packet(&stream(group(1), source(2), port));
    }
    assert_eq!(bench.relay.counters().refused_flows, 96);
    bench.wait(Duration::from_secs(11));
    bench.read(&[(real, bench.flowing(10))]);
    bench.frames.clear();
    let late = stream(group(1), source(1), 4001);
    bench.packet(&late);
    let session = bench.relay.sessions().next().unwrap();
    let ports: Vec<u16> = session
        .flows
        .iter()
        .map(|flow| flow.stream.source_port)
        .collect();
    assert!(ports.contains(&4000) && ports.contains(&4001), "{ports:?}");
}

#[test]
fn flows_that_an_agent_only_names_give_way_to_those_that_are_there() {
    let mut config = config();
    config.limits.flows_per_session = 4;
    let mut bench = Bench::with(config);
    let mut asked = request(group(1), agent_address(1));
    asked.flows = (1..10)
        .map(|port| known(&stream(group(1), source(1), port)))
        .collect();
    assert_eq!(bench.serve("vms1", 1, &asked).flows.len(), 4);
    bench.packet(&stream(group(1), source(1), 4000));
    let response = bench.response("vms1", 1);
    assert_eq!(response.flows.len(), 4);
    assert!(response.flows.iter().any(|flow| flow.source_port == 4000));
}
