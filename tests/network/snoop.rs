//! `snoop` on real TAPs: the maps contain the Reports of real kernel listeners, per port.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::path::Path;
use std::time::{Duration, Instant};

use common::event::Change;
use common::maps::{BridgeNumber, FilterMode, Listener, ListenerKey, Origins, SourceKey};
use roamcast::datapath::events::Events;
use roamcast::datapath::{Datapath, DatapathConfig, DatapathError, Hook, Limits};
use roamcast::net::links::{LinkEvent, Links, LinksError, PortRules};
use roamcast::proto::{DatapathEvent, PortEvent, Timestamp};
use support::host::{
    self, LIMITS, any_source, config, group, join, key, listener, listeners, managed, membership,
    source, wait_for_sources,
};
use support::netns::{self, Namespace, command, privileged, wait_for};
use support::tap::Guest;

fn attached(bpffs: &Path, guest: &Guest, limits: &Limits) -> Datapath {
    let datapath = Datapath::load(&config(bpffs)).unwrap();
    let name = nix::net::if_::if_indextoname(guest.ifindex).unwrap();
    datapath
        .attach_port(guest.ifindex, name.to_str().unwrap(), limits)
        .unwrap();
    datapath
}

/// Runs a test in a host namespace with a bridge, one guest and the data path on its TAP.
fn with_guest(version: u8, limits: Limits, test: impl FnOnce(&Guest, &Datapath) + Send) {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    let guest = Guest::start(&host, "br0", "vnet0", version);
    host.run_with_bpffs(|bpffs| test(&guest, &attached(bpffs, &guest, &limits)));
}

#[test]
fn an_mldv1_listener_is_found_and_leaves() {
    with_guest(1, LIMITS, |guest, datapath| {
        let mut sockets = listeners(guest);
        join(guest, &mut sockets, &any_source(1));
        let found = listener(datapath, &key(guest, 1), |_| true);
        assert_eq!(found.mld_version, 1);
        assert_eq!(
            FilterMode::from_u8(found.filter_mode),
            Some(FilterMode::Exclude)
        );
        sockets.leave(&managed(1));
        wait_for("done", || {
            datapath
                .listener(&key(guest, 1))
                .unwrap()
                .is_none()
                .then_some(())
        });
        assert_eq!(datapath.usage(guest.ifindex).unwrap().listeners, 0);
    });
}

#[test]
fn mldv2_filters_follow_the_guests_sockets() {
    with_guest(0, LIMITS, |guest, datapath| {
        let mut sockets = listeners(guest);
        let key = key(guest, 2);
        let steps: [(FilterMode, &[u16]); 5] = [
            (FilterMode::Include, &[1, 2]),
            (FilterMode::Include, &[2, 3]),
            (FilterMode::Exclude, &[4]),
            (FilterMode::Exclude, &[]),
            (FilterMode::Include, &[5]),
        ];
        for (filter_mode, sources) in steps {
            join(guest, &mut sockets, &membership(2, filter_mode, sources));
            listener(datapath, &key, |listener| {
                listener.filter_mode == filter_mode as u8 && listener.mld_version == 2
            });
            wait_for_sources(datapath, &key, sources);
        }
        sockets.leave(&managed(2));
        wait_for("left", || {
            datapath.listener(&key).unwrap().is_none().then_some(())
        });
    });
}

#[test]
fn a_source_specific_listener_is_found_with_its_sources() {
    with_guest(0, LIMITS, |guest, datapath| {
        let mut sockets = listeners(guest);
        let mut wanted = membership(0, FilterMode::Include, &[1, 2, 3]);
        let address: std::net::Ipv6Addr = "ff3e::1234:1".parse().unwrap();
        wanted.key.multicast_address = address.octets();
        join(guest, &mut sockets, &wanted);
        let mut key = key(guest, 0);
        key.multicast_address = address.octets();
        wait_for_sources(datapath, &key, &[1, 2, 3]);
    });
}

#[test]
fn a_thousand_addresses_are_found_and_left() {
    with_guest(0, LIMITS, |guest, datapath| {
        let mut sockets = listeners(guest);
        for number in 0..1000 {
            join(guest, &mut sockets, &any_source(number));
        }
        let ours = || {
            let all = datapath.listeners().unwrap();
            all.iter()
                .filter(|(key, _)| key.multicast_address[..14] == group(0).octets()[..14])
                .count()
        };
        // The reader of the events completes the Reports that the program passes to userspace.
        block_on(async {
            let mut events = datapath.events().unwrap();
            event(&mut events, |_| ours() == 1000).await;
            assert!(datapath.usage(guest.ifindex).unwrap().listeners >= 1000);
            drop(sockets);
            event(&mut events, |_| ours() == 0).await;
        });
    });
}

#[test]
fn a_flood_is_limited_while_another_vm_is_untouched() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    let flooding = Guest::start(&host, "br0", "vnet0", 0);
    let quiet = Guest::start(&host, "br0", "vnet1", 0);
    host.run_with_bpffs(|bpffs| {
        let limits = Limits {
            listeners: 10,
            ..LIMITS
        };
        let datapath = attached(bpffs, &flooding, &limits);
        datapath
            .attach_port(quiet.ifindex, "vnet1", &limits)
            .unwrap();
        let mut sockets = listeners(&flooding);
        for number in 0..200 {
            join(&flooding, &mut sockets, &any_source(number));
        }
        wait_for("refusals", || {
            let usage = datapath.usage(flooding.ifindex).unwrap();
            (usage.listeners == 10 && usage.refused_listeners > 0).then_some(())
        });
        let mut others = listeners(&quiet);
        join(&quiet, &mut others, &any_source(1));
        listener(&datapath, &key(&quiet, 1), |_| true);
        assert_eq!(datapath.usage(quiet.ifindex).unwrap().refused_listeners, 0);
        let counters = datapath.counters().unwrap();
        assert!(
            counters
                .iter()
                .any(|(name, _)| *name == "refused_listeners"),
            "{counters:?}"
        );
    });
}

#[test]
fn expired_listeners_give_their_room_back_and_fresh_ones_stay() {
    with_guest(0, LIMITS, |guest, datapath| {
        let mut sockets = listeners(guest);
        join(
            guest,
            &mut sockets,
            &membership(1, FilterMode::Include, &[1, 2]),
        );
        let key = key(guest, 1);
        wait_for_sources(datapath, &key, &[1, 2]);
        let found = datapath.listener(&key).unwrap().unwrap();
        let before = datapath.usage(guest.ifindex).unwrap();
        let stale = [(key, found.last_report_ns - 1)];
        assert_eq!(datapath.expire(&stale).unwrap(), []);
        let source = SourceKey {
            listener: key,
            source: source(1).octets(),
        };
        assert!(datapath.expire_source(&source, u64::MAX).unwrap());
        assert_eq!(datapath.expire(&[(key, u64::MAX)]).unwrap(), [key]);
        let after = datapath.usage(guest.ifindex).unwrap();
        assert_eq!(after.listeners, before.listeners - 1);
        assert_eq!(after.sources, before.sources - 2);
        assert!(
            datapath
                .sources()
                .unwrap()
                .iter()
                .all(|(k, _)| k.listener != key)
        );
    });
}

#[test]
fn an_unplugged_tap_leaves_nothing_behind() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    let guest = Guest::start(&host, "br0", "vnet0", 0);
    host.run_with_bpffs(|bpffs| {
        let datapath = attached(bpffs, &guest, &LIMITS);
        let mut sockets = listeners(&guest);
        join(
            &guest,
            &mut sockets,
            &membership(1, FilterMode::Include, &[1]),
        );
        wait_for_sources(&datapath, &key(&guest, 1), &[1]);
        let ifindex = guest.ifindex;
        drop(guest);
        for _ in 0..2 {
            datapath.detach_port(ifindex).unwrap();
        }
        assert!(datapath.listeners().unwrap().is_empty());
        assert!(datapath.sources().unwrap().is_empty());
        assert!(matches!(
            datapath.usage(ifindex),
            Err(DatapathError::NoPort(_))
        ));
        assert!(datapath.attachments().is_empty());
        let error = datapath.attach_port(ifindex, "vnet0", &LIMITS).unwrap_err();
        assert!(error.to_string().contains("it is gone"), "{error}");
    });
}

/// Runs a future on a runtime of this thread, which is in the test's namespace.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(async { tokio::time::timeout(netns::DEADLINE, future).await })
        .expect("deadline")
}

async fn event(events: &mut Events, mut wanted: impl FnMut(&DatapathEvent) -> bool) {
    while !wanted(&events.next().await.unwrap()) {}
}

#[test]
fn events_begin_with_a_snapshot_and_follow_the_guest() {
    with_guest(0, LIMITS, |guest, datapath| {
        let mut sockets = listeners(guest);
        join(guest, &mut sockets, &any_source(1));
        listener(datapath, &key(guest, 1), |_| true);
        block_on(async {
            let mut events = datapath.events().unwrap();
            assert!(datapath.events().is_err(), "a second stream");
            let first = events.next().await.unwrap();
            assert!(
                matches!(&first, DatapathEvent::Snapshot { listeners, .. }
                    if listeners.iter().any(|(k, _)| *k == key(guest, 1))),
                "{first:?}"
            );
            join(guest, &mut sockets, &any_source(2));
            event(&mut events, |event| {
                matches!(event, DatapathEvent::Listener { change: Change::Updated, key: k, .. }
                    if *k == key(guest, 2))
            })
            .await;
            sockets.leave(&managed(1));
            event(&mut events, |event| {
                matches!(event, DatapathEvent::Listener { change: Change::Removed, key: k, .. }
                    if *k == key(guest, 1))
            })
            .await;
        });
    });
}

#[test]
fn lost_events_are_made_up_for_by_a_snapshot() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    let guest = Guest::start(&host, "br0", "vnet0", 0);
    host.run_with_bpffs(|bpffs| {
        let mut config = config(bpffs);
        config.capacities.events_bytes = 4096;
        let datapath = Datapath::load(&config).unwrap();
        datapath
            .attach_port(guest.ifindex, "vnet0", &LIMITS)
            .unwrap();
        block_on(async {
            let mut events = datapath.events().unwrap();
            assert!(matches!(
                events.next().await,
                Ok(DatapathEvent::Snapshot { .. })
            ));
            let mut sockets = listeners(&guest);
            for number in 0..60 {
                join(&guest, &mut sockets, &any_source(number));
            }
            listener(&datapath, &key(&guest, 59), |_| true);
            event(&mut events, |event| {
                matches!(event, DatapathEvent::Snapshot { listeners, .. }
                    if listeners.len() >= 60)
            })
            .await;
        });
    });
}

#[test]
fn ports_come_and_go_with_their_taps() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    let peer = Namespace::new("peer");
    host.add_bridge("br0");
    host.add_peer("br0", "up0", &peer, "eth0");
    let first = Guest::start(&host, "br0", "vnet0", 0);
    let rules = PortRules {
        bridge: "br0".to_owned(),
        ..PortRules::default()
    };
    let missing = PortRules {
        bridge: "br7".to_owned(),
        ..PortRules::default()
    };
    host.run(|| {
        block_on(async {
            assert!(matches!(
                Links::watch(missing),
                Err(LinksError::NoBridge(_))
            ));
            let mut links = Links::watch(rules).unwrap();
            let mut seen = Vec::new();
            loop {
                match links.next().await.unwrap() {
                    LinkEvent::Complete => break,
                    LinkEvent::Port(PortEvent::Added(port)) => seen.push(port.name),
                    LinkEvent::UplinkAdded(port) => seen.push(port.name),
                    other => panic!("{other:?}"),
                }
            }
            seen.sort();
            assert_eq!(seen, ["up0", "vnet0"]);
            let second = Guest::start(&host, "br0", "vnet1", 0);
            let (first_ifindex, second_ifindex) = (first.ifindex, second.ifindex);
            loop {
                match links.next().await.unwrap() {
                    LinkEvent::Port(PortEvent::Added(port)) if port.ifindex == second_ifindex => {
                        break;
                    }
                    _ => {}
                }
            }
            host.ip("link set vnet0 nomaster");
            drop(second);
            let mut removed = Vec::new();
            while removed.len() < 2 {
                if let LinkEvent::Port(PortEvent::Removed { ifindex }) = links.next().await.unwrap()
                {
                    removed.push(ifindex);
                }
            }
            assert_eq!(removed, [first_ifindex, second_ifindex]);
            host.ip("link del br0");
            let error = loop {
                if let Err(error) = links.next().await {
                    break error;
                }
            };
            assert!(matches!(error, LinksError::Removed(_)), "{error}");
        });
    });
}

#[test]
fn the_first_packet_of_a_watched_address_is_told_and_counted() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    let peer = Namespace::new("peer");
    host.add_bridge("br0");
    host.add_peer("br0", "up0", &peer, "eth0");
    peer.ip("addr add 2001:db8:1::99/64 dev eth0 nodad");
    host.run_with_bpffs(|bpffs| {
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        let uplink = host.ifindex("up0");
        datapath.attach_uplink(uplink, "up0").unwrap();
        datapath
            .manage(&managed(1), Timestamp(0), Origins::Native)
            .unwrap();
        block_on(async {
            let mut events = datapath.events().unwrap();
            assert!(matches!(
                events.next().await,
                Ok(DatapathEvent::Snapshot { .. })
            ));
            let ifindex = peer.ifindex("eth0");
            let send = || {
                peer.run(|| {
                    let socket = std::net::UdpSocket::bind("[2001:db8:1::99]:0").unwrap();
                    socket2::SockRef::from(&socket)
                        .set_multicast_if_v6(ifindex)
                        .unwrap();
                    socket.send_to(b"stream", (group(1), 5004)).unwrap();
                });
            };
            send();
            event(&mut events, |event| {
                matches!(event, DatapathEvent::FirstPacket { key, .. }
                    if key.multicast_address == group(1).octets() && key.destination_port == 5004)
            })
            .await;
            send();
        });
        wait_for("stream", || {
            let mut streams = datapath.all_streams().unwrap();
            streams.retain(|(key, _)| key.managed() == managed(1));
            (streams.iter().map(|(_, s)| s.native.packets).sum::<u64>() == 2).then_some(())
        });
        datapath.unmanage(&managed(1)).unwrap();
        let collected = datapath
            .collect(Timestamp(u64::MAX), Duration::MAX)
            .unwrap();
        // Each packet came from a separate socket with a separate port.
        assert_eq!(collected.streams, 2);
        assert!(datapath.all_streams().unwrap().is_empty());
    });
}

#[test]
fn filters_work_where_tcx_is_not_used() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    let guest = Guest::start(&host, "br0", "vnet0", 0);
    host.run_with_bpffs(|bpffs| {
        let config = DatapathConfig {
            hook: Some(Hook::Filter),
            ..config(bpffs)
        };
        let mut sockets = listeners(&guest);
        for (number, adopted) in [(1, false), (2, true)] {
            let datapath = Datapath::load(&config).unwrap();
            assert_eq!(datapath.hook(), Hook::Filter);
            let attachment = datapath
                .attach_port(guest.ifindex, "vnet0", &LIMITS)
                .unwrap();
            assert_eq!(attachment.adopted, adopted);
            join(&guest, &mut sockets, &any_source(number));
            listener(&datapath, &key(&guest, number), |_| true);
            let filters = command("tc", &["filter", "show", "dev", "vnet0", "ingress"]);
            assert_eq!(filters.matches("direct-action").count(), 1, "{filters}");
        }
        let datapath = Datapath::load(&config).unwrap();
        datapath
            .attach_port(guest.ifindex, "vnet0", &LIMITS)
            .unwrap();
        datapath.detach_port(guest.ifindex).unwrap();
        let filters = command("tc", &["filter", "show", "dev", "vnet0", "ingress"]);
        assert!(!filters.contains("snoop"), "{filters}");
        let qdiscs = command("tc", &["qdisc", "show", "dev", "vnet0"]);
        assert!(
            !qdiscs.contains("ingress") && !qdiscs.contains("htb"),
            "{qdiscs}"
        );
    });
}

#[test]
fn bpftool_shows_named_fields() {
    with_guest(0, LIMITS, |guest, datapath| {
        let mut sockets = listeners(guest);
        join(guest, &mut sockets, &any_source(1));
        listener(datapath, &key(guest, 1), |_| true);
        let dump = command("bpftool", &["map", "dump", "name", "LISTENERS"]);
        for field in [
            "multicast_address",
            "filter_mode",
            "guest_mac",
            "last_report_ns",
        ] {
            assert!(dump.contains(field), "{field}: {dump}");
        }
    });
}

#[test]
fn sixty_four_thousand_listeners_are_read_in_well_under_a_second() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.run_with_bpffs(|bpffs| {
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        let pin = host::pins(&config(bpffs)).join("LISTENERS");
        let map = aya::maps::Map::HashMap(aya::maps::MapData::from_pin(pin).unwrap());
        let mut map: aya::maps::HashMap<_, ListenerKey, Listener> = map.try_into().unwrap();
        let value = Listener {
            first_report_ns: 1,
            last_report_ns: 1,
            last_answer_ns: 0,
            generation: 0,
            source_count: 0,
            filter_mode: FilterMode::Exclude as u8,
            mld_version: 2,
            guest_mac: [2; 6],
        };
        for ifindex in 1..=64u32 {
            for number in 0..1000 {
                let key = ListenerKey {
                    ifindex,
                    vlan: 0,
                    bridge: BridgeNumber::FIRST,
                    multicast_address: group(number).octets(),
                };
                map.insert(key, value, 0).unwrap();
            }
        }
        let started = Instant::now();
        let all = datapath.listeners().unwrap();
        println!("read {} listeners in {:?}", all.len(), started.elapsed());
        let keys: std::collections::BTreeSet<_> = all.iter().map(|(key, _)| *key).collect();
        assert_eq!(keys.len(), 64_000);
        assert_eq!(all.len(), 64_000);
    });
}
