//! The complete path of a relayed stream over real interfaces: multicast from the sender to the
//! relay, unicast through a router to the agent's host, and multicast again to a guest that joined
//! with the true source.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::time::Duration;

use common::counter::Counter;
use common::maps::{Origins, RelayStream, SubscriberKey};
use roamcast::clock::now;
use roamcast::datapath::{Datapath, Hook, Program, UplinkHook};
use support::host;
use support::netns::{self, privileged, wait_for};
use support::path::{AGENT, GROUP, JUMBO, PORTS, Path, RELAY, Receiver, SENDER, snmp6};
use support::relay::Relayed;
use support::tcpdump::Tcpdump;

/// Fewer than the capacity of a TAP.
const PACKETS: u32 = 300;
const STREAM: (&str, u16) = (SENDER, PORTS.0);
const LEASE: Duration = Duration::from_secs(600);

fn uplink_hook(datapath: &Datapath) -> Hook {
    let attachments = datapath.attachments();
    let mut uplinks = attachments
        .iter()
        .filter(|attachment| attachment.program == Program::Uplink);
    uplinks.next().unwrap().hook
}

fn subscribe(relay: &Datapath, relayed: &[Relayed], lease: Duration) {
    let lease_end_ns = now().0 + u64::try_from(lease.as_nanos()).unwrap();
    for (index, relayed) in (0..).zip(relayed) {
        let key = SubscriberKey { flow: 1, index };
        relay
            .subscriber_set(&key, &relayed.subscriber(lease_end_ns))
            .unwrap();
    }
    let served = RelayStream {
        flow: 1,
        subscribers: relayed.len() as u32,
    };
    relay.relay_stream_set(&relayed[0].stream, &served).unwrap();
}

/// Sends a stream to the guest and checks delivery, counters and side effects.
fn deliver(path: &Path, hook: Option<UplinkHook>, expected: Hook) {
    let relayed = Path::relayed(AGENT);
    path.host.run_with_bpffs(|agent_bpffs| {
        let agent = path.agent(agent_bpffs, hook, &relayed);
        assert_eq!(uplink_hook(&agent), expected);
        path.relay.run_with_bpffs(|relay_bpffs| {
            let relay = path.relay(relay_bpffs, &relayed);
            subscribe(&relay, &[relayed], LEASE);
            let mut receiver = path.listen();
            let before = snmp6(&path.guest.namespace, "Udp6InCsumErrors");
            let of_stream = format!("dst host {GROUP}");
            let guest = Tcpdump::start(&path.guest.namespace, "eth0", &of_stream);
            let bystander = Tcpdump::start(&path.bystander.namespace, "eth0", &of_stream);
            let neighbour = Tcpdump::start(&path.neighbour, "n0", &of_stream);
            let transit = Tcpdump::start(&path.transit, "t1", &of_stream);

            path.send(0, PACKETS);
            receiver.expect(PACKETS as usize, STREAM);
            receiver.drain(STREAM);
            assert_eq!(receiver.numbers(), (0..PACKETS).collect::<Vec<_>>());

            let errors = snmp6(&path.guest.namespace, "Udp6InCsumErrors");
            assert_eq!(errors, before, "checksums, by the guest's kernel");
            let lines = guest.lines();
            let with = |text: &str| lines.iter().filter(|line| line.contains(text)).count();
            assert_eq!(with("[udp sum ok]"), PACKETS as usize, "{lines:#?}");
            assert_eq!(with("hlim 1,"), PACKETS as usize);
            for (place, capture) in [
                ("a guest that has not joined", bystander),
                ("another port", neighbour),
                ("the network", transit),
            ] {
                let lines = capture.lines();
                assert!(lines.is_empty(), "{place} got {lines:#?}");
            }
            let sent = u64::from(PACKETS);
            assert_eq!(relay.counter(Counter::ReplicatedPackets).unwrap(), sent);
            assert_eq!(agent.counter(Counter::RelayedPackets).unwrap(), sent);
            assert_eq!(agent.counter(Counter::RelayLeaks).unwrap(), sent);
            let (key, usage) = relay.subscriber_usages().unwrap()[0];
            assert_eq!(key, SubscriberKey { flow: 1, index: 0 });
            assert_eq!((usage.packets, usage.dropped), (sent, 0));
            assert_eq!(usage.bytes, sent * (62 + (1400 + 100) / 2));
            let streams = agent.all_streams().unwrap();
            assert_eq!(streams.len(), 1);
            assert_eq!(streams[0].0, relayed.stream);
            assert_eq!(streams[0].1.relay.packets, sent);
            assert_eq!(streams[0].1.relay.bytes, usage.bytes);
        });
    });
}

#[test]
fn every_packet_arrives_once_with_a_right_checksum_whoever_finishes_it() {
    if !privileged() {
        return;
    }
    for sender in [true, false] {
        for relay in [true, false] {
            let path = Path::new();
            Path::offload(&path.sender, "s0", sender);
            Path::offload(&path.relay, "r1", relay);
            deliver(&path, Some(UplinkHook::Tc), host::tc_hook());
        }
    }
}

#[test]
fn tc_is_chosen_where_checksums_may_not_be_finished() {
    if !privileged() {
        return;
    }
    deliver(&Path::new(), None, host::tc_hook());
}

#[test]
fn xdp_delivers_too_what_has_finished_checksums() {
    if !privileged() {
        return;
    }
    for (hook, expected) in [
        (UplinkHook::XdpGeneric, Hook::XdpGeneric),
        (UplinkHook::XdpNative, Hook::XdpNative),
    ] {
        let path = Path::new();
        Path::offload(&path.transit, "t1", false);
        deliver(&path, Some(hook), expected);
    }
}

#[test]
fn xdp_keeps_to_its_hook_when_the_mtu_is_raised_and_restores_jumbo_packets() {
    restore_jumbo_packets_by_xdp(|path, attach| {
        let agent = attach();
        path.raise_mtu();
        agent
    });
}

#[test]
fn xdp_is_attached_to_an_uplink_with_jumbo_frames_and_restores_them() {
    restore_jumbo_packets_by_xdp(|path, attach| {
        path.raise_mtu();
        attach()
    });
}

/// Restores packets of 9000 bytes by XDP. `start` raises the MTU, and attaches the programs.
fn restore_jumbo_packets_by_xdp(start: impl Fn(&Path, &dyn Fn() -> Datapath) -> Datapath + Sync) {
    if !privileged() {
        return;
    }
    let path = Path::new();
    Path::offload(&path.transit, "t1", false);
    let relayed = Path::relayed(AGENT);
    path.host.run_with_bpffs(|agent_bpffs| {
        let attach = || path.agent(agent_bpffs, Some(UplinkHook::XdpNative), &relayed);
        let agent = start(&path, &attach);
        assert_eq!(uplink_hook(&agent), Hook::XdpNative);
        path.relay.run_with_bpffs(|relay_bpffs| {
            let relay = path.relay(relay_bpffs, &relayed);
            subscribe(&relay, &[relayed], LEASE);
            let mut receiver = path.listen();
            path.send(JUMBO, 10);
            receiver.expect(10, STREAM);
            assert_eq!(receiver.numbers(), (JUMBO..JUMBO + 10).collect::<Vec<_>>());
            assert_eq!(agent.counter(Counter::RelayedPackets).unwrap(), 10);
            let usage = agent.all_streams().unwrap()[0].1.relay;
            assert_eq!((usage.packets, usage.bytes), (10, 10 * (62 + 8900)));
        });
    });
}

#[test]
fn several_subscribers_get_copies_and_the_relay_keeps_the_original() {
    if !privileged() {
        return;
    }
    for offload in [true, false] {
        let path = Path::new();
        Path::offload(&path.sender, "s0", offload);
        // The relay's kernel completes the checksums, which the receiver verifies.
        Path::offload(&path.relay, "r1", false);
        path.host.ip("addr add 2001:db8:9::2/64 dev br0 nodad");
        path.host.ip("addr add 2001:db8:9::3/64 dev br0 nodad");
        let subscribers = ["2001:db8:9::2", "2001:db8:9::3"].map(Path::relayed);
        path.relay.run_with_bpffs(|bpffs| {
            let relay = path.relay(bpffs, &subscribers[0]);
            subscribe(&relay, &subscribers, LEASE);
            let mut original = Receiver::join(&path.relay, "r0");
            let mut copies = subscribers.map(|subscriber| {
                let endpoints = subscriber.endpoints;
                let address = std::net::Ipv6Addr::from(endpoints.agent_address).to_string();
                let port = endpoints.agent_port;
                let receiver = Receiver::bind(&path.host, (&address, port));
                (receiver, endpoints.relay_port)
            });
            path.send(0, PACKETS);
            let all: Vec<u32> = (0..PACKETS).collect();
            original.expect(PACKETS as usize, STREAM);
            assert_eq!(original.numbers(), all);
            for (copy, port) in &mut copies {
                copy.expect(PACKETS as usize, (RELAY, *port));
            }
            for (copy, _) in copies {
                assert_eq!(copy.numbers(), all);
            }
            for namespace in [&path.relay, &path.host] {
                assert_eq!(snmp6(namespace, "Udp6InCsumErrors"), 0);
            }
        });
    }
}

#[test]
fn copies_end_with_the_lease_and_go_on_when_it_is_renewed() {
    if !privileged() {
        return;
    }
    let path = Path::new();
    let relayed = Path::relayed(AGENT);
    path.relay.run_with_bpffs(|bpffs| {
        let relay = path.relay(bpffs, &relayed);
        subscribe(&relay, &[relayed], Duration::from_millis(200));
        let port = relayed.endpoints.relay_port;
        let mut receiver = Receiver::bind(&path.host, (AGENT, relayed.endpoints.agent_port));
        path.send(0, 1);
        receiver.expect(1, (RELAY, port));
        let ended = || relay.counter(Counter::ReplicateLeaseEnded).unwrap();
        let mut number = 1;
        wait_for("end of the lease", || {
            path.send(number, 1);
            number += 1;
            (ended() > 0).then_some(())
        });
        let sent = relay.counter(Counter::ReplicatedPackets).unwrap();
        path.send(number, 10);
        assert_eq!(relay.counter(Counter::ReplicatedPackets).unwrap(), sent);
        assert_eq!(ended(), 11);
        subscribe(&relay, &[relayed], LEASE);
        path.send(number + 10, 5);
        receiver.expect(sent as usize + 5, (RELAY, port));
        let key = SubscriberKey { flow: 1, index: 0 };
        assert!(relay.subscriber_remove(&key).unwrap());
        path.send(number + 15, 5);
        assert_eq!(relay.counter(Counter::ReplicatedPackets).unwrap(), sent + 5);
    });
}

#[test]
fn copies_that_cannot_be_sent_are_counted_by_reason() {
    if !privileged() {
        return;
    }
    let path = Path::new();
    let relayed = Path::relayed(AGENT);
    path.relay.run_with_bpffs(|bpffs| {
        let relay = path.relay(bpffs, &relayed);
        subscribe(&relay, &[relayed], LEASE);
        let counter = |counter| relay.counter(counter).unwrap();
        // Even packets have 1400 bytes, odd ones 100.
        path.relay.ip("link set r1 mtu 1300");
        path.send(0, 2);
        assert_eq!(counter(Counter::ReplicateTooBig), 1);
        assert_eq!(counter(Counter::ReplicatedPackets), 1);
        path.relay.ip("-6 route del default");
        path.send(0, 1);
        assert_eq!(counter(Counter::ReplicateNoRoute), 1);
        path.relay.ip("-6 route add default via 2001:db8:7::77");
        path.send(1, 1);
        assert_eq!(counter(Counter::ReplicateNoNeighbour), 1);
        path.relay.run(|| {
            std::fs::write("/proc/sys/net/ipv6/conf/lo/forwarding", "0").unwrap();
        });
        path.send(1, 1);
        assert_eq!(counter(Counter::ReplicateNoForwarding), 1);
        let (_, usage) = relay.subscriber_usages().unwrap()[0];
        assert_eq!((usage.packets, usage.dropped), (1, 4));
        let key = SubscriberKey { flow: 1, index: 0 };
        relay.subscriber_usage_reset(&key).unwrap();
        assert!(relay.subscriber_usages().unwrap().is_empty());
    });
}

#[test]
fn programs_and_flows_outlive_the_agent_and_the_relay() {
    if !privileged() {
        return;
    }
    let path = Path::new();
    Path::offload(&path.transit, "t1", false);
    let relayed = Path::relayed(AGENT);
    path.host.run_with_bpffs(|agent_bpffs| {
        path.relay.run_with_bpffs(|relay_bpffs| {
            let mut hook = Some(UplinkHook::XdpNative);
            drop(path.host.run(|| path.agent(agent_bpffs, hook, &relayed)));
            let relay = path.relay(relay_bpffs, &relayed);
            subscribe(&relay, &[relayed], LEASE);
            drop(relay);
            let mut receiver = path.listen();
            path.send(0, 10);
            receiver.expect(10, STREAM);

            // The hook with the restored flows stays, and changes only when another one is
            // configured.
            for expected in [Hook::XdpNative, Hook::XdpGeneric, host::tc_hook()] {
                hook = match expected {
                    Hook::XdpGeneric => Some(UplinkHook::XdpGeneric),
                    Hook::Tcx | Hook::Filter => Some(UplinkHook::Tc),
                    _ => None,
                };
                let mut config = host::config(agent_bpffs);
                config.uplink_hook = hook;
                let up0 = path.host.ifindex("up0");
                let (agent, attachment) = path.host.run(|| {
                    let agent = Datapath::load(&config).unwrap();
                    let attachment = agent.attach_uplink(up0, "up0").unwrap();
                    (agent, attachment)
                });
                assert_eq!(attachment.hook, expected);
                assert_eq!(attachment.adopted, expected == Hook::XdpNative);
                assert_eq!(
                    agent.relay_flows().unwrap(),
                    [(relayed.flow_key(), relayed.flow())]
                );
                let managed = agent.managed().unwrap();
                assert_eq!(managed[0].1.origins, Origins::Relay as u8);
                let pins = std::fs::read_dir(host::pins(&config).join("links")).unwrap();
                let pins: Vec<_> = pins.map(|pin| pin.unwrap().file_name()).collect();
                let uplinks = pins
                    .iter()
                    .filter_map(|pin| pin.to_str())
                    .filter(|pin| pin.starts_with("uplink") && pin.ends_with(&format!("-{up0}")))
                    .count();
                let pinned = usize::from(expected != Hook::Filter);
                assert_eq!(uplinks, pinned, "{pins:?}");
                let before = agent.counter(Counter::RelayedPackets).unwrap();
                path.send(100, 10);
                wait_for("restored packets", || {
                    let after = agent.counter(Counter::RelayedPackets).unwrap();
                    (after == before + 10).then_some(())
                });
            }
            let relay = Datapath::load(&host::config(relay_bpffs)).unwrap();
            let r0 = path.relay.ifindex("r0");
            assert!(relay.attach_replicate(r0, "r0").unwrap().adopted);
            assert_eq!(relay.subscribers().unwrap().len(), 1);
            assert_eq!(relay.relay_streams().unwrap().len(), 1);
            relay.retain_replicate(&[]).unwrap();
            let sent = relay.counter(Counter::ReplicatedPackets).unwrap();
            path.send(200, 10);
            assert_eq!(relay.counter(Counter::ReplicatedPackets).unwrap(), sent);
        });
    });
}

#[test]
fn relays_of_flows_are_known_as_long_as_they_have_flows() {
    if !privileged() {
        return;
    }
    let namespace = netns::Namespace::new("flows");
    namespace.run_with_bpffs(|bpffs| {
        let relayed = [AGENT, "2001:db8:9::2"].map(Path::relayed);
        let datapath = Datapath::load(&host::config(bpffs)).unwrap();
        for relayed in &relayed {
            datapath
                .relay_flow_set(&relayed.flow_key(), &relayed.flow())
                .unwrap();
        }
        drop(datapath);
        let datapath = Datapath::load(&host::config(bpffs)).unwrap();
        assert_eq!(datapath.relay_flows().unwrap().len(), 2);
        for relayed in &relayed {
            assert!(datapath.relay_flow_remove(&relayed.flow_key()).unwrap());
            assert!(!datapath.relay_flow_remove(&relayed.flow_key()).unwrap());
        }
        let pin = host::pins(&host::config(bpffs)).join("RELAYS");
        let text = netns::command("bpftool", &["map", "dump", "pinned", pin.to_str().unwrap()]);
        assert!(!text.contains("relay_address"), "{text}");
    });
}
