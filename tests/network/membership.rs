//! The host's memberships on the bridge and the bridge's MDB, on real kernels. A capture behind the
//! bridge's uplink sees the Reports.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::net::Ipv6Addr;

use common::maps::{BridgeNumber, FilterMode, ManagedKey};
use roamcast::net::mdb::{Mdb, MdbError};
use roamcast::net::membership::Memberships;
use roamcast::proto::{MdbEntry, Membership};
use support::capture::{Capture, Mld, Record};
use support::netns::{Namespace, privileged, wait_for};

const TO_INCLUDE: u8 = 3;
const TO_EXCLUDE: u8 = 4;
const ALLOW: u8 = 5;
const BLOCK: u8 = 6;

fn group(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0x1234, number)
}

fn source(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0, 9, 0, 0, 0, number)
}

fn key(address: Ipv6Addr) -> ManagedKey {
    ManagedKey {
        vlan: 0,
        bridge: BridgeNumber::FIRST,
        multicast_address: address.octets(),
    }
}

fn membership(address: Ipv6Addr, filter_mode: FilterMode, sources: &[u16]) -> Membership {
    Membership {
        key: key(address),
        filter_mode,
        sources: sources.iter().map(|&number| source(number)).collect(),
    }
}

fn any_source(address: Ipv6Addr) -> Membership {
    membership(address, FilterMode::Exclude, &[])
}

/// Makes a bridge with one uplink, and the namespace at its other end.
fn host_and_peer() -> (Namespace, Namespace) {
    let host = Namespace::new("host");
    let peer = Namespace::new("peer");
    host.add_bridge("br0");
    host.add_peer("br0", "up0", &peer, "eth0");
    wait_for("forwarding uplink", || {
        host.bridge("link show dev up0")
            .contains("state forwarding")
            .then_some(())
    });
    (host, peer)
}

fn memberships(host: &Namespace) -> Memberships {
    let ifindex = host.ifindex("br0");
    host.run(|| Memberships::new(ifindex))
}

/// Returns true if a record of that type names the address with exactly these sources.
fn has(records: &[Record], kind: u8, address: Ipv6Addr, sources: &[u16]) -> bool {
    records.iter().any(|record| {
        let mut listed = record.sources.clone();
        listed.sort_unstable();
        let wanted: Vec<Ipv6Addr> = sources.iter().map(|&number| source(number)).collect();
        record.kind == kind && record.multicast_address == address && listed == wanted
    })
}

#[test]
fn an_any_source_join_and_leave_are_reported() {
    if !privileged() {
        return;
    }
    let (host, peer) = host_and_peer();
    let mut capture = Capture::start(&peer);
    let mut memberships = memberships(&host);
    host.run(|| memberships.join(&any_source(group(1))))
        .unwrap();
    capture.report("join", |r| has(r, TO_EXCLUDE, group(1), &[]));
    host.run(|| memberships.leave(&key(group(1))));
    capture.report("leave", |r| has(r, TO_INCLUDE, group(1), &[]));
}

#[test]
fn a_source_specific_join_never_reports_any_source() {
    if !privileged() {
        return;
    }
    let (host, peer) = host_and_peer();
    let mut capture = Capture::start(&peer);
    let mut memberships = memberships(&host);
    let address = Ipv6Addr::new(0xff3e, 0, 0, 0, 0, 0, 0x1234, 1);
    host.run(|| memberships.join(&membership(address, FilterMode::Include, &[1, 2, 3])))
        .unwrap();
    // The kernel may report the first source before the others.
    let mut reported = std::collections::BTreeSet::new();
    wait_for("all sources allowed", || {
        if let Some(Mld::Report(records)) = capture.message() {
            for record in records {
                if record.multicast_address == address {
                    assert_eq!(record.kind, ALLOW, "{record:?}");
                    reported.extend(record.sources);
                }
            }
        }
        (reported.len() == 3).then_some(())
    });
}

#[test]
fn replacing_a_filter_never_leaves_in_between() {
    if !privileged() {
        return;
    }
    let (host, peer) = host_and_peer();
    let mut capture = Capture::start(&peer);
    let mut memberships = memberships(&host);
    let steps: [(&[u16], FilterMode, u8, &[u16]); 4] = [
        (&[1, 2], FilterMode::Include, BLOCK, &[3]),
        (&[], FilterMode::Exclude, TO_EXCLUDE, &[]),
        (&[4, 5], FilterMode::Exclude, BLOCK, &[4, 5]),
        (&[6], FilterMode::Include, TO_INCLUDE, &[6]),
    ];
    let first = membership(group(2), FilterMode::Include, &[1, 2, 3]);
    host.run(|| memberships.join(&first)).unwrap();
    capture.report("first", |r| {
        r.iter().any(|record| record.multicast_address == group(2))
    });
    for (sources, filter_mode, kind, reported) in steps {
        host.run(|| memberships.join(&membership(group(2), filter_mode, sources)))
            .unwrap();
        capture.report(&format!("{filter_mode:?} {sources:?}"), |records| {
            assert!(
                !has(records, TO_INCLUDE, group(2), &[]),
                "left in between: {records:?}"
            );
            // While the kernel repeats a change of mode, it reports the next change of the list as
            // the whole list (RFC 9777 §6.1).
            has(records, kind, group(2), reported) || has(records, TO_EXCLUDE, group(2), sources)
        });
    }
}

#[test]
fn a_source_list_beyond_one_sockets_limit_is_joined_whole() {
    if !privileged() {
        return;
    }
    let (host, peer) = host_and_peer();
    let mut capture = Capture::start(&peer);
    let mut memberships = memberships(&host);
    let numbers: Vec<u16> = (1..=150).collect();
    host.run(|| memberships.join(&membership(group(3), FilterMode::Include, &numbers)))
        .unwrap();
    let mut reported = std::collections::BTreeSet::new();
    wait_for("150 sources", || {
        if let Some(Mld::Report(records)) = capture.message() {
            for record in records.iter().filter(|r| r.multicast_address == group(3)) {
                reported.extend(record.sources.iter().copied());
            }
        }
        (reported.len() == 150).then_some(())
    });
}

#[test]
fn a_thousand_addresses_are_joined_and_left() {
    if !privileged() {
        return;
    }
    let (host, _peer) = host_and_peer();
    let mut memberships = memberships(&host);
    let joined = || {
        host.run(|| std::fs::read_to_string("/proc/thread-self/net/igmp6").unwrap())
            .lines()
            .filter(|line| line.contains("ff0e0000000000000000000012"))
            .count()
    };
    let started = std::time::Instant::now();
    host.run(|| {
        for number in 0..1000 {
            memberships.join(&any_source(group(number))).unwrap();
        }
    });
    println!("joined 1,000 addresses in {:?}", started.elapsed());
    assert_eq!(joined(), 1000);
    assert_eq!(memberships.keys().count(), 1000);
    for number in 0..1000 {
        memberships.leave(&key(group(number)));
    }
    assert_eq!(joined(), 0);
}

#[test]
fn a_join_on_an_interface_that_is_gone_is_one_clear_sentence() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    let error = host
        .run(|| Memberships::new(4711).join(&any_source(group(1))))
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with("Cannot join ff0e::1234:1 on interface 4711"),
        "{text}"
    );
}

#[test]
fn a_prune_makes_the_querier_ask_and_drop_the_port() {
    if !privileged() {
        return;
    }
    let (host, peer) = host_and_peer();
    // The other end becomes an access switch and querier.
    peer.ip("link set eth0 down");
    peer.ip(
        "link add sw0 type bridge mcast_snooping 1 mcast_mld_version 2 mcast_querier 1 \
         mcast_last_member_count 2 mcast_last_member_interval 20 mcast_startup_query_interval 10",
    );
    peer.ip("link set sw0 up");
    peer.ip("link set eth0 master sw0 up");
    wait_for("forwarding switch port", || {
        peer.bridge("link show dev eth0")
            .contains("state forwarding")
            .then_some(())
    });
    let mut capture = Capture::start(&host);
    wait_for("querier", || {
        (capture.message() == Some(Mld::Query(Ipv6Addr::UNSPECIFIED))).then_some(())
    });
    // A leftover entry of a VM that moved away.
    peer.bridge(&format!("mdb add dev sw0 port eth0 grp {} temp", group(7)));
    let mut memberships = memberships(&host);
    host.run(|| memberships.prune(&key(group(7)))).unwrap();
    wait_for("query for the address", || {
        (capture.message() == Some(Mld::Query(group(7)))).then_some(())
    });
    wait_for("port dropped", || {
        (!peer.bridge("mdb show").contains("1234:7")).then_some(())
    });
}

#[test]
fn mdb_entries_carry_mode_and_sources() {
    if !privileged() {
        return;
    }
    let (host, _peer) = host_and_peer();
    let port = host.ifindex("up0");
    let entries = [
        any_source(group(1)),
        membership(group(2), FilterMode::Include, &[1, 2]),
        membership(group(3), FilterMode::Exclude, &[3]),
        membership(group(4), FilterMode::Include, &(1..=40).collect::<Vec<_>>()),
    ];
    let mut mdb = host.run(|| Mdb::open("br0", BridgeNumber::FIRST)).unwrap();
    let added: Vec<_> = entries.iter().map(|entry| (port, entry)).collect();
    for outcome in mdb.add(&added).unwrap() {
        outcome.unwrap();
    }
    // Adding an existing entry replaces it.
    for outcome in mdb.add(&added).unwrap() {
        outcome.unwrap();
    }
    let shown = host.bridge("-d mdb show dev br0");
    let line = |number: u16, with: &str| {
        assert!(
            shown
                .lines()
                .any(|line| line.contains(&group(number).to_string()) && line.contains(with)),
            "{number} {with}: {shown}"
        );
    };
    for number in 1..=4 {
        line(number, "temp");
    }
    if kernel_is_since(6, 2) {
        line(1, "filter_mode exclude");
        line(2, "filter_mode include");
        line(2, &source(2).to_string());
        line(3, "filter_mode exclude");
        line(3, &source(3).to_string());
        line(4, "filter_mode exclude");
    } else {
        println!("for any source only: this kernel's bridge takes no source lists");
    }

    let entry_of = |key, source| MdbEntry {
        ifindex: port,
        key,
        source,
    };
    if kernel_is_since(6, 2) {
        let one = entry_of(entries[1].key, Some(source(2).octets()));
        mdb.delete(&[one]).unwrap().remove(0).unwrap();
        let shown = host.bridge("-d mdb show dev br0");
        assert!(!shown.contains(&format!("src {}", source(2))), "{shown}");
        assert!(shown.contains(&group(2).to_string()), "{shown}");
    }

    let deleted: Vec<_> = entries
        .iter()
        .map(|entry| entry_of(entry.key, None))
        .collect();
    for _ in 0..2 {
        for outcome in mdb.delete(&deleted).unwrap() {
            outcome.unwrap();
        }
    }
    assert!(!host.bridge("mdb show dev br0").contains("1234"));
}

#[test]
fn mdb_entry_that_would_end_soon_lasts_as_long_as_a_new_one_once_it_is_added_again() {
    if !privileged() {
        return;
    }
    let (host, _peer) = host_and_peer();
    let port = host.ifindex("up0");
    let mut mdb = host.run(|| Mdb::open("br0", BridgeNumber::FIRST)).unwrap();
    let entry = any_source(group(1));
    let mut add = || {
        for outcome in mdb.add(&[(port, &entry)]).unwrap() {
            outcome.unwrap();
        }
    };
    let seconds_left = || {
        let shown = host.bridge("-s mdb show dev br0");
        let line = shown.lines().find(|line| line.contains("1234"));
        let line = line.unwrap_or_else(|| panic!("no entry: {shown}"));
        let timer = line.split_whitespace().last().unwrap();
        timer.parse::<f64>().unwrap_or_else(|_| panic!("{line}"))
    };
    host.ip("link set br0 type bridge mcast_membership_interval 3000");
    add();
    assert!(seconds_left() <= 30.0);
    host.ip("link set br0 type bridge mcast_membership_interval 26000");
    add();
    assert!(seconds_left() > 200.0, "{}", seconds_left());
}

/// Returns true if the kernel has at least this version.
fn kernel_is_since(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|it| it.parse().ok());
    (numbers.next().unwrap(), numbers.next().unwrap()) >= (major, minor)
}

#[test]
fn a_thousand_mdb_entries_are_added_in_one_call() {
    if !privileged() {
        return;
    }
    let (host, _peer) = host_and_peer();
    let port = host.ifindex("up0");
    let entries: Vec<_> = (0..1000).map(|number| any_source(group(number))).collect();
    let added: Vec<_> = entries.iter().map(|entry| (port, entry)).collect();
    let mut mdb = host.run(|| Mdb::open("br0", BridgeNumber::FIRST)).unwrap();
    let started = std::time::Instant::now();
    assert!(mdb.add(&added).unwrap().iter().all(Result::is_ok));
    println!("added 1,000 entries in {:?}", started.elapsed());
    let known = host.bridge("mdb show dev br0");
    let missing = (0..1000).find(|number| !known.contains(&format!("grp {} ", group(*number))));
    assert_eq!(missing, None, "{known}");
}

#[test]
fn a_bridge_that_does_not_snoop_is_named_with_the_remedy() {
    if !privileged() {
        return;
    }
    let (host, _peer) = host_and_peer();
    let port = host.ifindex("up0");
    host.ip("link set br0 type bridge mcast_snooping 0 mcast_mld_version 1");
    let mut mdb = host.run(|| Mdb::open("br0", BridgeNumber::FIRST)).unwrap();
    assert_eq!(mdb.snooping().advice("br0").len(), 2);
    let entry = any_source(group(1));
    let error = host.run(|| mdb.add(&[(port, &entry)])).unwrap_err();
    assert!(matches!(error, MdbError::NoSnooping(_)), "{error}");
    assert!(matches!(
        host.run(|| Mdb::open("br7", BridgeNumber::FIRST)),
        Err(MdbError::Links(_))
    ));
}
