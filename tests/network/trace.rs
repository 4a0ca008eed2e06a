//! `roamcast trace` on real interfaces: reports along a packet's path, exchange of programs while
//! packets flow, and operators who read slowly, send nonsense or are killed.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use aya::programs::{SchedClassifier, TcAttachType};
use common::counter::Counter;
use common::maps::{BridgeNumber, DeliveredKey, ManagedKey, Origins, RelayStream, SubscriberKey};
use common::testing::frame;
use common::trace::Filter;
use nix::sys::signal::Signal;
use roamcast::clock::now;
use roamcast::datapath::{Datapath, DatapathConfig, Hook, UplinkHook};
use roamcast::proto::{GateCommand, Timestamp};
use support::bridged::{Bridged, GROUP, SOURCE, stream, udp};
use support::host::{LIMITS, config, pins};
use support::kernel::Kernel;
use support::netns::{self, privileged, wait_for};
use support::path::{self, Path};
use support::tap;
use support::tracing::{Agent, Program, Tracer, asked};

/// Returns true if the kernel reports the programs attached to an interface. Otherwise prints why
/// the test is skipped.
fn attached_is_told() -> bool {
    let is_told = SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok();
    if !is_told {
        println!("skipped: this kernel has no TCX to ask what is attached");
    }
    is_told
}

/// Returns the instruction bytes of the programs on the TAP, after verification.
fn attached() -> BTreeMap<String, u32> {
    [TcAttachType::Ingress, TcAttachType::Egress]
        .into_iter()
        .flat_map(|direction| SchedClassifier::query_tcx("vnet0", direction).unwrap().1)
        .map(|program| {
            let name = program.name_as_str().unwrap().to_owned();
            (name, program.size_translated().unwrap())
        })
        .collect()
}

/// Returns the same for the usual programs, as the kernel reports them without attachment.
fn usual() -> BTreeMap<String, u32> {
    let mut bytes = Kernel::load().unwrap().translated_bytes();
    bytes.retain(|name, _| name == "snoop" || name == "gate");
    bytes
}

fn wait_until_usual(datapath: &Datapath) {
    wait_for("the usual programs", || {
        (!datapath.is_traced()).then_some(())
    });
}

#[test]
fn held_replayed_dropped_and_restored_packets_are_explained() {
    if !privileged() {
        return;
    }
    let path = Path::new();
    let relayed = Path::relayed(path::AGENT);
    path.host.run_with_bpffs(|agent_bpffs| {
        let datapath = path.agent(agent_bpffs, Some(UplinkHook::Tc), &relayed);
        let vnet0 = path.guest.ifindex;
        datapath.attach_port(vnet0, "vnet0", &LIMITS).unwrap();
        path.relay.run_with_bpffs(|relay_bpffs| {
            let relay = path.relay(relay_bpffs, &relayed);
            let key = SubscriberKey { flow: 1, index: 0 };
            let subscriber = relayed.subscriber(u64::MAX);
            relay.subscriber_set(&key, &subscriber).unwrap();
            let served = RelayStream {
                flow: 1,
                subscribers: 1,
            };
            relay.relay_stream_set(&relayed.stream, &served).unwrap();
            let mut receiver = path.listen();

            let agent = path.host.run(|| Agent::start(&datapath));
            let at_relay = path.relay.run(|| Agent::start(&relay));
            let tracer = agent.trace();
            let copies = at_relay.trace();
            let program = Program::start(&agent.socket(), &["--address", path::GROUP]);
            program.expect(&["time", "decision", "destination"]);

            agent.gate(GateCommand::Hold { ifindex: vnet0 });
            wait_for("the gate", || datapath.gate(vnet0).unwrap());
            path.send(0, 1);
            let copied = copies.expect("replicate", "copied");
            assert_eq!(copied["destination"], path::GROUP);
            assert_eq!(copied["number"], 0);
            let restored = tracer.expect("uplink", "restored");
            let held = tracer.expect("gate", "held");
            assert_eq!(
                (&restored["port"], &held["port"]),
                (&"up0".into(), &"vnet0".into())
            );
            agent.gate(GateCommand::ReplayBlind {
                ifindex: vnet0,
                since: Timestamp(0),
            });
            let replayed = tracer.expect("agent", "replayed");
            for line in [&restored, &held, &replayed] {
                assert_eq!(line["source"], path::SENDER, "{line}");
                assert_eq!(line["source_port"], path::PORTS.0, "{line}");
                assert_eq!(line["destination"], path::GROUP, "{line}");
                assert_eq!(line["destination_port"], path::PORTS.1, "{line}");
                assert_eq!(line["length_bytes"], 62 + 1400, "{line}");
                assert!(line["time"].as_str().unwrap().ends_with('Z'), "{line}");
            }
            assert_eq!(
                (&held["number"], &replayed["number"]),
                (&1.into(), &1.into())
            );
            receiver.expect(1, (path::SENDER, path::PORTS.0));

            let managed = relayed.stream.managed();
            datapath.manage(&managed, now(), Origins::Native).unwrap();
            path.send(2, 1);
            let dropped = wait_for("the dropped packet", || {
                let lines = tracer.decisions();
                lines.into_iter().find(|it| it["reason"] == "other_origin")
            });
            assert_eq!(dropped["program"], "uplink");
            assert_eq!(dropped["decision"], "dropped");
            assert_eq!(dropped["destination"], path::GROUP);
            program.expect(&["uplink", "restored", "up0"]);
            program.expect(&["gate", "held", "vnet0", "1"]);
            program.expect(&["agent", "replayed", "vnet0", "1"]);
            program.expect(&["uplink", "dropped", "other_origin"]);
        });
    });
}

/// Exchanges of both sets of programs.
const EXCHANGES: u32 = 5;
/// Limit of packets waiting in the TAP.
const WINDOW: u32 = 200;

#[test]
fn no_packet_is_lost_or_missed_while_programs_are_exchanged() {
    if !privileged() {
        return;
    }
    for uplink_hook in [
        UplinkHook::Tc,
        UplinkHook::XdpGeneric,
        UplinkHook::XdpNative,
    ] {
        let setup = Bridged::new();
        setup.host.run_with_bpffs(|bpffs| {
            let datapath = setup.attach(&DatapathConfig {
                uplink_hook: Some(uplink_hook),
                ..config(bpffs)
            });
            let up0 = nix::net::if_::if_nametoindex("up0").unwrap();
            datapath.attach_uplink(up0, "up0").unwrap();
            let managed = ManagedKey {
                vlan: 0,
                bridge: BridgeNumber::FIRST,
                multicast_address: frame::address(GROUP),
            };
            datapath.manage(&managed, now(), Origins::Native).unwrap();
            let is_over = AtomicBool::new(false);
            let (sent, received) = std::thread::scope(|scope| {
                let sending = scope.spawn(|| send_until(&setup, &is_over));
                for _ in 0..EXCHANGES {
                    drop(datapath.trace_start(&Filter::everything(1)).unwrap());
                    datapath.trace_stop().unwrap();
                }
                is_over.store(true, Ordering::Relaxed);
                sending.join().unwrap()
            });
            println!("{uplink_hook:?}: {sent} packets");
            assert!(sent > WINDOW);
            assert_eq!(received, (0..sent).collect::<Vec<_>>());
            let key = DeliveredKey {
                ifindex: setup.ifindex,
                stream: stream(0),
            };
            let delivered = datapath.delivered_of(&key).unwrap().unwrap();
            assert_eq!(delivered.packets, u64::from(sent), "gate saw each once");
            let native = datapath.counter(Counter::NativePackets).unwrap();
            assert_eq!(native, u64::from(sent), "uplink saw each once");
        });
    }
}

/// Sends numbered packets one after the other. Returns their number, and the numbers that came out
/// of the TAP.
fn send_until(setup: &Bridged, is_over: &AtomicBool) -> (u32, Vec<u32>) {
    let mut received = Vec::new();
    let mut sent = 0_u32;
    while !is_over.load(Ordering::Relaxed) {
        setup.sender.send(&udp(&sent.to_be_bytes()));
        sent += 1;
        wait_for("room in the TAP", || {
            received.extend(numbers(setup));
            (received.len() as u32 + WINDOW > sent).then_some(())
        });
    }
    wait_for("the last packet", || {
        received.extend(numbers(setup));
        (received.last() == Some(&(sent - 1))).then_some(())
    });
    (sent, received)
}

/// Returns the numbers of the packets that came out of the TAP.
fn numbers(setup: &Bridged) -> Vec<u32> {
    let frames = setup.received().into_iter();
    frames
        .filter(|frame| frame.get(38..54) == Some(&frame::address(GROUP)))
        .map(|frame| u32::from_be_bytes(frame[62..66].try_into().unwrap()))
        .collect()
}

#[test]
fn programs_are_the_usual_ones_before_and_after_a_trace() {
    if !privileged() || !attached_is_told() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let usual = usual();
        assert_eq!(attached(), usual, "not an instruction more");
        let agent = Agent::start(&datapath);
        for _ in 0..2 {
            let tracer = agent.trace();
            assert!(datapath.is_traced());
            let traced = attached();
            for (program, bytes) in &usual {
                assert!(traced[program] > *bytes, "{program}");
            }
            drop(tracer);
            wait_until_usual(&datapath);
            assert_eq!(attached(), usual);
        }
        let tracer = agent.trace();
        drop(agent);
        assert_eq!(
            attached(),
            usual,
            "an agent that stops leaves the usual ones"
        );
        drop(tracer);
    });
}

#[test]
fn next_agent_attaches_the_usual_programs_in_place_of_traced_ones() {
    if !privileged() || !attached_is_told() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let usual = attached();
        // Nobody stops the trace, as when an agent is killed.
        drop(datapath.trace_start(&Filter::everything(1)).unwrap());
        assert_ne!(attached(), usual);
        drop(datapath);
        assert_ne!(attached(), usual);
        setup.attach(&config(bpffs));
        assert_eq!(attached(), usual);
    });
}

#[test]
fn port_that_comes_during_a_trace_is_traced_and_one_that_goes_is_no_failure() {
    if !privileged() || !attached_is_told() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        let usual = usual();
        let agent = Agent::start(&datapath);
        let tracer = agent.trace();
        let ifindex = setup.ifindex;
        datapath.attach_port(ifindex, "vnet0", &LIMITS).unwrap();
        for (program, bytes) in attached() {
            assert!(bytes > usual[&program], "{program}");
        }
        setup.sender.send(&udp(b"hello"));
        tracer.expect("gate", "passed");
        let other = tap::open("vnet9");
        let vnet9 = nix::net::if_::if_nametoindex("vnet9").unwrap();
        datapath.attach_port(vnet9, "vnet9", &LIMITS).unwrap();
        drop(other);
        drop(tracer);
        wait_until_usual(&datapath);
        assert_eq!(attached(), usual);
    });
}

#[test]
fn failed_exchange_leaves_the_usual_programs_everywhere_and_is_said() {
    if !privileged() || !attached_is_told() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let usual = attached();
        let agent = Agent::start(&datapath);
        // Programs are exchanged in a fixed order, and `gate` follows `snoop`.
        let links = pins(&config(bpffs)).join("links");
        let gate = links.join(format!("gate-{}", setup.ifindex));
        let hidden = links.join("gate-0");
        std::fs::rename(&gate, &hidden).unwrap();
        let tracer = Tracer::ask(
            &agent.socket(),
            roamcast::control::trace::TraceRequest {
                programs: Vec::new(),
                port: None,
                address: None,
                rate: 1,
            },
        );
        let refusal = wait_for("a refusal", || tracer.refusal());
        assert!(refusal.contains("gate"), "{refusal}");
        assert!(refusal.contains("vnet0"), "{refusal}");
        assert_eq!(attached(), usual);
        assert!(!datapath.is_traced());
        std::fs::rename(&hidden, &gate).unwrap();
        agent.trace();
    });
}

#[test]
fn operators_get_what_each_asked_for_and_the_rest_is_filtered() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let up0 = nix::net::if_::if_nametoindex("up0").unwrap();
        datapath.attach_uplink(up0, "up0").unwrap();
        let agent = Agent::start(&datapath);
        let gate = agent.trace_with(|request| request.programs = vec!["gate".to_owned()]);
        let uplink = agent.trace_with(|request| request.port = Some("up0".to_owned()));
        let other = agent.trace_with(|request| request.address = Some("ff3e::9".parse().unwrap()));
        setup.sender.send(&udp(b"hello"));
        gate.expect("gate", "passed");
        uplink.expect("uplink", "passed");
        let wanted = |tracer: &Tracer, key: &str, value: &str| {
            tracer.decisions().iter().all(|line| line[key] == value)
        };
        assert!(wanted(&gate, "program", "gate"), "{:?}", gate.decisions());
        assert!(wanted(&uplink, "port", "up0"), "{:?}", uplink.decisions());
        let last = udp(b"last");
        setup.sender.send(&last);
        setup.received_up_to(&last);
        let count = |tracer: &Tracer| tracer.decisions().len();
        wait_for("both", || {
            (count(&gate) == 2 && count(&uplink) == 2).then_some(())
        });
        assert_eq!(other.decisions(), Vec::<serde_json::Value>::new());
        // The other operators still get lines after one leaves.
        drop(uplink);
        setup.sender.send(&udp(b"again"));
        wait_for("one more", || (count(&gate) == 3).then_some(()));
    });
}

#[test]
fn lines_beyond_the_rate_are_counted() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let agent = Agent::start(&datapath);
        let tracer = agent.trace_with(|request| request.rate = 5);
        let packets = 200;
        for number in 0..packets {
            setup.sender.send(&udp(&[number; 4]));
        }
        setup.received_up_to(&udp(&[packets - 1; 4]));
        wait_for("all packets, told or counted", || {
            let told = tracer.decisions().len() as u64;
            (told + tracer.left_out() == u64::from(packets)).then_some(())
        });
        assert!(tracer.left_out() > 0);
    });
}

#[test]
fn operator_who_reads_nothing_loses_lines_and_keeps_nobody_waiting() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let agent = Agent::start(&datapath);
        let everything = || roamcast::control::trace::TraceRequest {
            programs: Vec::new(),
            port: None,
            address: None,
            rate: 100_000,
        };
        let slow = asked(&agent.socket(), everything());
        let quick = agent.trace();
        // More than the queue and socket of the slow operator hold.
        let packets: u32 = 6000;
        for number in 0..packets {
            setup.sender.send(&udp(&number.to_be_bytes()));
            if number % 100 == 99 {
                setup.received_up_to(&udp(&number.to_be_bytes()));
            }
        }
        wait_for("all lines of the quick one", || {
            let told = quick.decisions().len() as u64;
            (told + quick.left_out() == u64::from(packets)).then_some(())
        });
        assert!(agent.is_alive());
        // Read what waits for the slow operator; it reports the missing lines.
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(slow));
        let mut told = 0;
        let left_out = lines.find_map(|line| {
            let reply: serde_json::Value = serde_json::from_str(&line.unwrap()).unwrap();
            let left_out = reply["data"]["left_out"].as_u64();
            told += u32::from(left_out.is_none());
            left_out
        });
        assert!(told < packets, "{told}");
        assert!(left_out.unwrap() > 0);
        drop(lines);
        drop(quick);
        wait_until_usual(&datapath);
    });
}

#[test]
fn agent_goes_on_after_an_operator_is_killed_or_stops() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let agent = Agent::start(&datapath);
        for (signal, code) in [
            (Signal::SIGKILL, None),
            (Signal::SIGINT, Some(0)),
            (Signal::SIGTERM, Some(0)),
        ] {
            let mut program = Program::start(&agent.socket(), &[]);
            program.expect(&["time", "program", "port"]);
            assert!(datapath.is_traced());
            setup.sender.send(&udp(b"hello"));
            program.expect(&["gate", "passed", "vnet0", "[ff3e:1::1234]:5004"]);
            program.signal(signal);
            let (status, errors) = program.end();
            assert_eq!(status.code(), code, "{errors}");
            assert_eq!(errors, "");
            wait_until_usual(&datapath);
            assert!(agent.is_alive());
        }
        let json = Program::start(&agent.socket(), &["--json"]);
        wait_for("the traced programs", || datapath.is_traced().then_some(()));
        wait_for("a line of JSON", || {
            setup.sender.send(&udp(b"hello"));
            let line = json.expect_any()?;
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert_eq!(line["source"], SOURCE);
            Some(())
        });
    });
}

#[test]
fn nonsense_is_refused_in_one_sentence() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let agent = Agent::start(&datapath);
        for (arguments, code, words) in [
            (
                ["--port", "vnet77"],
                1,
                "No program is attached to \"vnet77\"",
            ),
            (["--address", "nonsense"], 2, "nonsense"),
            (["--address", "192.0.2.1"], 2, "192.0.2.1"),
            (["--program", "nonsense"], 2, "nonsense"),
            (["--rate", "0"], 2, "--rate"),
        ] {
            let mut program = Program::start(&agent.socket(), &arguments);
            let (status, errors) = program.end();
            assert_eq!(status.code(), Some(code), "{arguments:?}: {errors}");
            assert!(errors.contains(words), "{arguments:?}: {errors}");
        }
        let unknown = roamcast::control::trace::TraceRequest {
            programs: vec!["nonsense".to_owned()],
            port: None,
            address: None,
            rate: 1,
        };
        let tracer = Tracer::ask(&agent.socket(), unknown);
        let refusal = wait_for("a refusal", || tracer.refusal());
        assert!(refusal.contains("nonsense"), "{refusal}");
        assert!(!datapath.is_traced());
    });
}

#[test]
fn filters_of_qdiscs_are_exchanged_too() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&DatapathConfig {
            hook: Some(Hook::Filter),
            ..config(bpffs)
        });
        let agent = Agent::start(&datapath);
        for round in 0..2 {
            let tracer = agent.trace();
            setup.sender.send(&udp(&[round; 8]));
            tracer.expect("gate", "passed");
            drop(tracer);
            wait_until_usual(&datapath);
        }
        let filters = netns::command("tc", &["filter", "show", "dev", "vnet0"]);
        assert_eq!(filters.matches("direct-action").count(), 1, "{filters}");
    });
}
