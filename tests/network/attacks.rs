//! Attacks by VMs, neighbours and peers on the service of others. VMs and neighbours send crafted
//! frames over real TAPs and the kernel's bridge; peers send messages to the program `roamcast
//! agent`.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

mod asking;
mod connections;
mod flood;
mod flows;
mod gate;
mod jobs;
mod libvirt;
mod log;
mod neighbour;
mod peers;
mod pins;
mod port;
mod reports;
mod roles;
mod signalling;
mod squat;

use common::maps::BridgeNumber;
use std::path::Path;

use common::counter::Counter;
use common::testing::frame::{Frame, address};
use roamcast::datapath::Datapath;
use roamcast::net::mdb::Mdb;
use roamcast::net::snooping;
use support::host::{LIMITS, config};
use support::hostile::{forbidden, group, report};
use support::netns::{Namespace, privileged, wait_for};
use support::tap::Guest;
use support::wire::Wire;

/// Runs an attack on a bridge with one guest and a wire on the guest's NIC, without Roamcast.
fn undefended(attack: impl FnOnce(&Namespace, &Guest, &Wire)) {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    let guest = Guest::start(&host, "br0", "vnet0", 0);
    let inner = guest.namespace.ifindex("eth0");
    let wire = guest.namespace.run(|| Wire::new(inner));
    attack(&host, &guest, &wire);
}

/// Runs an attack like [`undefended`], with the data path on the guest's TAP.
fn with_attacker(attack: impl FnOnce(&Namespace, &Guest, &Datapath, &Wire) + Send) {
    undefended(|host, guest, wire| {
        host.run_with_bpffs(|bpffs: &Path| {
            let datapath = Datapath::load(&config(bpffs)).unwrap();
            datapath
                .attach_port(guest.ifindex, "vnet0", &LIMITS)
                .unwrap();
            attack(host, guest, &datapath, wire);
        });
    });
}

fn count(datapath: &Datapath, counter: Counter) -> u64 {
    let counters = datapath.counters().unwrap();
    counters
        .iter()
        .find(|(name, _)| *name == counter.as_str())
        .map_or(0, |(_, count)| *count)
}

/// Returns the bridge's MDB: groups by port, and the ports of multicast routers.
fn mdb(host: &Namespace) -> String {
    host.bridge("-d mdb show")
}

/// Sends the Report of a group, and waits until the bridge has processed it and everything sent
/// before.
fn send_last(host: &Namespace, wire: &Wire, number: usize) {
    wire.send(&report(number).bytes());
    wait_for("the last Report in the bridge", || {
        has(&mdb(host), number).then_some(())
    });
}

fn has(mdb: &str, number: usize) -> bool {
    mdb.contains(&format!("grp {} ", group(number)))
}

#[test]
fn mld_that_breaks_the_rfc_is_neither_in_the_bridge_nor_in_the_maps() {
    let broken = forbidden();
    let attack = |host: &Namespace, wire: &Wire| {
        for frame in &broken {
            wire.send(&frame.bytes());
        }
        send_last(host, wire, broken.len());
    };
    undefended(|host, guest, wire| {
        guest.namespace.ip("link set eth0 mtu 9000");
        attack(host, wire);
        for (number, frame) in broken.iter().enumerate() {
            assert!(has(&mdb(host), number), "no attack: {frame:?}");
        }
    });
    with_attacker(|host, guest, datapath, wire| {
        guest.namespace.ip("link set eth0 mtu 9000");
        attack(host, wire);
        let known = mdb(host);
        let listeners = datapath.listeners().unwrap();
        for (number, frame) in broken.iter().enumerate() {
            assert!(!has(&known, number), "{frame:?}\n{known}");
            let group = address(&group(number));
            assert!(
                listeners
                    .iter()
                    .all(|(key, _)| key.multicast_address != group),
                "{frame:?}"
            );
        }
        let usage = datapath.usage(guest.ifindex).unwrap();
        assert_eq!(usage.malformed, broken.len() as u64);
    });
}

#[test]
fn query_of_a_vm_does_not_make_its_port_one_of_a_multicast_router() {
    let attack = |wire: &Wire| {
        wire.send(&Frame::query("::", 1000, Some((2, 125))).bytes());
        wire.send(&Frame::query("::", 1000, None).bytes());
    };
    undefended(|host, _, wire| {
        attack(wire);
        send_last(host, wire, 1);
        assert!(mdb(host).contains("router"), "no attack: {}", mdb(host));
    });
    with_attacker(|host, _, datapath, wire| {
        attack(wire);
        send_last(host, wire, 1);
        assert!(!mdb(host).contains("router"), "{}", mdb(host));
        assert_eq!(count(datapath, Counter::GuestQueries), 2);
    });
}

#[test]
fn router_advertisement_of_a_vm_does_not_make_its_port_one_of_a_multicast_router() {
    /// RFC 4286 §3: type 151, advertisement interval, checksum, query interval, robustness.
    const ADVERTISEMENT: [u8; 8] = [151, 20, 0, 0, 0, 125, 0, 2];
    let attack = |host: &Namespace, wire: &Wire| {
        let frame = Frame::icmpv6(ADVERTISEMENT.to_vec(), "ff02::6a");
        wire.send(&frame.bytes());
        send_last(host, wire, 1);
        mdb(host)
    };
    undefended(|host, _, wire| {
        let known = attack(host, wire);
        assert!(known.contains("router"), "no attack: {known}");
    });
    with_attacker(|host, guest, _, wire| {
        assert!(snooping::learn_no_router(guest.ifindex).unwrap());
        let known = attack(host, wire);
        assert!(!known.contains("router"), "{known}");
        assert!(!snooping::learn_no_router(guest.ifindex).unwrap());
    });
}

#[test]
fn port_that_the_operator_gives_to_a_multicast_router_stays_one() {
    with_attacker(|host, guest, _, _| {
        host.ip("link set vnet0 type bridge_slave mcast_router 2");
        assert!(!snooping::learn_no_router(guest.ifindex).unwrap());
        assert!(mdb(host).contains("router"), "{}", mdb(host));
    });
}

#[test]
fn bridge_takes_as_many_groups_as_the_maps() {
    with_attacker(|host, _, _, wire| {
        host.ip("link set br0 type bridge mcast_hash_max 4");
        assert_eq!(
            Mdb::open("br0", BridgeNumber::FIRST)
                .unwrap()
                .snooping()
                .hash_max,
            4
        );
        snooping::set_hash_max(host.ifindex("br0"), 131_072).unwrap();
        for number in 0..50 {
            wire.send(&report(number).bytes());
        }
        send_last(host, wire, 50);
        let snooping = Mdb::open("br0", BridgeNumber::FIRST).unwrap().snooping();
        assert_eq!((snooping.enabled, snooping.hash_max), (true, 131_072));
    });
}
