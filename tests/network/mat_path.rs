//! Two nodes of MAT over real interfaces and a router: the view of applications on their HoAs, and
//! the packets on the wire.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::io::ErrorKind;
use std::net::{Ipv6Addr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::thread;

use common::mat::counter::Counter;
use migkick::datapath::Datapath;
use support::capture::{Capture, Mld, Record};
use support::mat_app::{
    self, PATIENCE, echo, exchange, listen_on, offload, path_mtu, receive, send_all, snmp,
    transfer, udp,
};
use support::mat_net::{C, HOA_A, HOA_B, Moas, Net, possible};
use support::netns::{self, wait_for};
use support::tcpdump::Tcpdump;

const BOTH: [Moas; 2] = [Moas::Neutral, Moas::Given];
const PORT: u16 = 6000;
/// Record types in Reports (RFC 9777 §5.2.12).
const IS_INCLUDE: u8 = 1;
const IS_EXCLUDE: u8 = 2;
const TO_INCLUDE: u8 = 3;
const BLOCK: u8 = 6;

#[test]
fn echo_goes_both_ways_and_only_moas_are_on_the_wire() {
    if !possible() {
        return;
    }
    for moas in BOTH {
        let net = Net::new(moas);
        let wire = Tcpdump::start(&net.router, "to-a", "icmp6");
        let mat0 = Tcpdump::start(&net.b.namespace, "mat0", "icmp6");
        for number in 0..3 {
            assert_eq!(echo(&net.a.namespace, HOA_B, number), HOA_B);
            assert_eq!(echo(&net.b.namespace, HOA_A, number), HOA_A);
        }
        let lines = wire.packets();
        assert!(lines.iter().any(|it| it.contains("echo reply")));
        assert!(!lines.iter().any(|it| it.contains("fd5e:")), "{lines:#?}");
        assert!(!lines.iter().any(|it| it.contains("bad icmp6 cksum")));
        let lines = mat0.packets();
        let received = format!("{HOA_A} > {HOA_B}");
        assert!(lines.iter().any(|it| it.contains(&received)), "{lines:#?}");
    }
}

#[test]
fn tcp_and_udp_go_both_ways_whoever_finishes_checksums() {
    if !possible() {
        return;
    }
    for moas in BOTH {
        for on in [true, false] {
            let net = Net::new(moas);
            // The router completes partial checksums and cuts aggregates, and the receiver verifies
            // every packet.
            for port in ["to-a", "to-b0"] {
                offload(&net.router, port, false);
            }
            for node in [&net.a, &net.b] {
                offload(&node.namespace, "eth0", on);
                offload(&node.namespace, "mat0", on);
            }
            let errors = || {
                [&net.a, &net.b].map(|node| {
                    [
                        "TcpExt InCsumErrors",
                        "Udp6InCsumErrors",
                        "Icmp6InCsumErrors",
                    ]
                    .map(|name| snmp(&node.namespace, name))
                })
            };
            let before = errors();
            for (from, to) in [(&net.a, &net.b), (&net.b, &net.a)] {
                transfer(&from.namespace, &to.namespace, to.hoa, 3_000_000);
                for bytes in [1, 1400, 5000, 20_000] {
                    let socket = udp(&to.namespace, (to.hoa, PORT));
                    let sender = udp(&from.namespace, (from.hoa, 0));
                    assert_eq!(
                        exchange(&sender, &socket, bytes),
                        from.hoa,
                        "{moas:?} {on} {bytes}"
                    );
                }
            }
            assert_eq!(errors(), before, "{moas:?} {on}");
        }
    }
}

#[test]
fn a_socket_bound_to_mat0_receives() {
    if !possible() {
        return;
    }
    let net = Net::new(Moas::Neutral);
    let bound = net
        .b
        .namespace
        .run(|| listen_on("mat0", (Ipv6Addr::UNSPECIFIED, PORT)));
    let sender = udp(&net.a.namespace, (HOA_A, 0));
    sender.connect((HOA_B, PORT)).unwrap();
    sender.send(b"x").unwrap();
    assert_eq!(receive(&bound).unwrap().1.ip(), &HOA_A);
}

#[test]
fn packet_too_big_reaches_the_socket_and_is_forgotten_with_the_path() {
    if !possible() {
        return;
    }
    for moas in BOTH {
        let net = Net::new(moas);
        // Only the path to B gets a smaller MTU: a veth with a smaller MTU would silently drop what
        // comes from B, unless aggregated.
        net.router
            .ip("-6 route replace 2001:db8:b0::/64 dev to-b0 metric 256 mtu lock 1300");
        let socket = udp(&net.a.namespace, (HOA_A, 0));
        socket.connect((HOA_B, PORT)).unwrap();
        mat_app::never_fragment(&socket);
        assert_eq!(path_mtu(&socket), 1500);
        wait_for("path MTU", || {
            match socket.send(&[0; 1400]) {
                Ok(_) => {}
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE)),
            }
            (path_mtu(&socket) == 1300).then_some(())
        });
        transfer(&net.a.namespace, &net.b.namespace, HOA_B, 1_000_000);
        assert!(net.a.counter(Counter::InErrors) > 0);
        net.a.with(Datapath::path_changed).unwrap();
        let socket = udp(&net.a.namespace, (HOA_A, 0));
        socket.connect((HOA_B, PORT)).unwrap();
        assert_eq!(path_mtu(&socket), 1500);
    }
}

#[test]
fn unreachable_reaches_the_socket() {
    if !possible() {
        return;
    }
    for moas in BOTH {
        let net = Net::new(moas);
        // Send from the peer itself.
        let socket = udp(&net.a.namespace, (HOA_A, 0));
        socket.connect((HOA_B, PORT)).unwrap();
        socket.send(b"x").unwrap();
        let error = receive(&socket).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
        let refused = net.a.namespace.run(|| TcpStream::connect((HOA_B, PORT)));
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        // Send from a router.
        let moa = net.b.moas[0];
        net.router
            .ip(&format!("-6 route add unreachable {moa}/128"));
        let failed = net.a.namespace.run(|| TcpStream::connect((HOA_B, PORT)));
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::NetworkUnreachable);
    }
}

#[test]
fn nothing_is_lost_when_the_nic_is_switched_under_traffic() {
    if !possible() {
        return;
    }
    const COUNT: u32 = 3000;
    for moas in BOTH {
        let net = Net::new(moas);
        let (a, b) = (
            udp(&net.a.namespace, (HOA_A, PORT)),
            udp(&net.b.namespace, (HOA_B, PORT)),
        );
        a.connect((HOA_B, PORT)).unwrap();
        b.connect((HOA_A, PORT)).unwrap();
        let second = Tcpdump::start(&net.router, "to-b1", "udp");
        thread::scope(|scope| {
            for socket in [&a, &b] {
                scope.spawn(|| send_all(socket, COUNT));
            }
            let halfway = || net.b.counter(Counter::InTranslated) > 1000;
            wait_for("half of the packets", || halfway().then_some(()));
            net.b.switch(1);
            net.a.knows(&net.b, 1);
            for socket in [&a, &b] {
                mat_app::expect_all(socket, COUNT);
            }
        });
        let lines = second.packets();
        let moa = net.b.moas[1].to_string();
        assert!(lines.iter().any(|it| it.contains(&format!("{moa}.6000 >"))));
        assert!(lines.iter().any(|it| it.contains(&format!("> {moa}.6000"))));
    }
}

#[test]
fn packets_go_another_way_when_routes_change() {
    if !possible() {
        return;
    }
    let net = Net::new(Moas::Neutral);
    // A second router on the same link, which differs only in its position.
    net.router
        .ip("link add other link to-a type macvlan mode bridge");
    net.router.ip("link set other up");
    net.router.ip("addr add 2001:db8:a::fe/64 dev other nodad");
    let came = || {
        let text = net.router.run(|| {
            let path = "/proc/thread-self/net/dev";
            std::fs::read_to_string(path).unwrap()
        });
        let line = text.lines().find_map(|it| it.trim().strip_prefix("other:"));
        let packets = line.unwrap().split_whitespace().nth(1).unwrap();
        packets.parse::<u64>().unwrap()
    };
    let mut number = 0;
    let mut echoes = |count| {
        for _ in 0..count {
            number += 1;
            assert_eq!(echo(&net.a.namespace, HOA_B, number), HOA_B);
        }
    };
    echoes(10);
    net.a
        .namespace
        .ip("-6 route replace default via 2001:db8:a::fe dev eth0");
    net.a.with(|datapath| datapath.follow_routes().unwrap());
    wait_for("the other router", || {
        let before = came();
        echoes(10);
        (came() >= before + 10).then_some(())
    });
}

#[test]
fn first_packets_wait_for_the_peer() {
    if !possible() {
        return;
    }
    for moas in BOTH {
        let net = Net::strangers(moas);
        net.b.knows(&net.a, 0);
        let listener = net
            .b
            .namespace
            .run(|| TcpListener::bind((HOA_B, PORT)).unwrap());
        let receiver = udp(&net.b.namespace, (HOA_B, PORT));
        let sender = udp(&net.a.namespace, (HOA_A, 0));
        sender.connect((HOA_B, PORT)).unwrap();
        sender.send(b"held").unwrap();
        thread::scope(|scope| {
            let connecting = scope.spawn(|| {
                net.a
                    .namespace
                    .run(|| TcpStream::connect((HOA_B, PORT)).unwrap())
            });
            let mut frames = Vec::new();
            wait_for("both frames", || {
                frames.extend(net.a.with(Datapath::take_held));
                (frames.len() >= 2).then_some(())
            });
            assert!(frames.iter().all(|it| it.peer == HOA_B));
            net.a.knows(&net.b, 0);
            net.a.with(move |it| {
                for held in &frames {
                    it.release(&held.frame).unwrap();
                }
            });
            drop(listener.accept().unwrap());
            connecting.join().unwrap();
        });
        assert_eq!(receive(&receiver).unwrap().0, b"held");
        for name in ["TcpExt InCsumErrors", "Udp6InCsumErrors"] {
            assert_eq!(snmp(&net.b.namespace, name), 0);
        }
    }
}

#[test]
fn an_application_is_told_that_its_peer_is_not_found() {
    if !possible() {
        return;
    }
    let net = Net::strangers(Moas::Neutral);
    thread::scope(|scope| {
        let connecting = scope.spawn(|| net.a.namespace.run(|| TcpStream::connect((HOA_B, PORT))));
        let frames = wait_for("the frame", || {
            let frames = net.a.with(Datapath::take_held);
            (!frames.is_empty()).then_some(frames)
        });
        net.a.with(move |it| it.refuse(&frames[0].frame).unwrap());
        let error = connecting.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::HostUnreachable, "{error}");
    });
}

#[test]
fn multicast_joined_on_mat0_comes_once() {
    if !possible() {
        return;
    }
    let net = Net::new(Moas::Neutral);
    let group: Ipv6Addr = "ff3e::1234".parse().unwrap();
    let wire = Tcpdump::start(&net.router, "to-b0", "ip6 and ip6[40]==58");
    let other = Tcpdump::start(&net.router, "to-b1", "ip6 and ip6[40]==58");
    let listener = net.b.namespace.run(|| {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT)).unwrap();
        let mat0 = nix::net::if_::if_nametoindex("mat0").unwrap();
        socket.join_multicast_v6(&group, mat0).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    });
    wire.wait_until_it_says("ff3e::1234");
    net.router.run(|| {
        for port in ["to-b0", "to-b1"] {
            let ifindex = nix::net::if_::if_nametoindex(port).unwrap();
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
            mat_app::multicast_by(&socket, ifindex);
            for number in 0..100_u32 {
                let to = SocketAddrV6::new(group, PORT, 0, ifindex);
                socket.send_to(&number.to_be_bytes(), to).unwrap();
            }
        }
    });
    mat_app::expect_all(&listener, 100);
    listener.set_nonblocking(true).unwrap();
    assert_eq!(
        receive(&listener).unwrap_err().kind(),
        ErrorKind::WouldBlock
    );
    drop(listener);
    let link_local = mat_app::link_local(&net.b.namespace, "eth0");
    let reports: Vec<_> = wire
        .packets()
        .into_iter()
        .filter(|line| line.contains("ff3e::1234"))
        .collect();
    assert!(!reports.is_empty());
    assert!(
        reports.iter().all(|it| it.contains(&link_local)),
        "{reports:#?} {link_local}"
    );
    assert!(!reports.iter().any(|it| it.contains("bad")), "{reports:#?}");
    let lines = other.packets();
    assert!(!lines.iter().any(|it| it.contains("ff3e::1234")));
}

#[test]
fn all_that_is_joined_on_mat0_is_reported_anew_and_nothing_is_left_for_it() {
    if !possible() {
        return;
    }
    let net = Net::new(Moas::Neutral);
    let [any_source, specific] =
        ["ff3e::1234", "ff3e::5678"].map(|it| it.parse::<Ipv6Addr>().unwrap());
    let source: Ipv6Addr = C.parse().unwrap();
    let mut capture = Capture::start(&net.router);
    let socket = net.b.namespace.run(|| {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT)).unwrap();
        let mat0 = nix::net::if_::if_nametoindex("mat0").unwrap();
        socket.join_multicast_v6(&any_source, mat0).unwrap();
        let socket = socket2::Socket::from(socket);
        lab::listener::join_source(&socket, "mat0", specific, source).unwrap();
        socket
    });
    // A State Change Report lists no current state.
    let mut changes = 0;
    wait_for("the joins", || {
        let records = records(&capture.message()?, &[any_source, specific]);
        changes += records.iter().filter(|it| it.kind > IS_EXCLUDE).count();
        (changes >= 2).then_some(())
    });
    net.b.with(Datapath::report_memberships).unwrap();
    let (current, sources) = ([IS_EXCLUDE, IS_INCLUDE], [vec![], vec![source]]);
    let answered = wait_for("the answer", || {
        let mut found = records(&capture.message()?, &[any_source, specific]);
        let is_leave = |it: &Record| matches!(it.kind, TO_INCLUDE | BLOCK);
        assert!(!found.iter().any(is_leave), "{found:?}");
        found.retain(|it| it.kind <= IS_EXCLUDE);
        found.sort_by_key(|it| it.multicast_address);
        (!found.is_empty()).then_some(found)
    });
    assert_eq!(
        answered.iter().map(|it| it.kind).collect::<Vec<_>>(),
        current
    );
    let listed = answered.into_iter().map(|it| it.sources);
    assert_eq!(listed.collect::<Vec<_>>(), sources);
    assert_eq!(net.b.counter(Counter::OutRefused), 0);
    drop(socket);
}

/// Returns a Report's records for the given addresses. There are no Queries, because no node here
/// sends any.
fn records(message: &Mld, addresses: &[Ipv6Addr]) -> Vec<Record> {
    let Mld::Report(records) = message else {
        panic!("{message:?}");
    };
    let named = records
        .iter()
        .filter(|it| addresses.contains(&it.multicast_address));
    named.cloned().collect()
}

#[test]
fn plain_traffic_by_the_moa_goes_on() {
    if !possible() {
        return;
    }
    let net = Net::new(Moas::Neutral);
    transfer(&net.c, &net.b.namespace, net.b.moas[0], 100_000);
    let c: Ipv6Addr = C.parse().unwrap();
    transfer(&net.b.namespace, &net.c, c, 100_000);
    assert_eq!(
        net.b
            .counted()
            .iter()
            .filter(|it| it.0.starts_with("in_t"))
            .count(),
        0
    );
}

#[test]
fn a_daemon_that_ends_leaves_all_at_work_and_the_next_adopts_it() {
    if !possible() {
        return;
    }
    let net = Net::new(Moas::Neutral);
    let sent = net.a.counter(Counter::OutTranslated);
    net.a.slot(|slot| drop(slot.take()));
    transfer(&net.a.namespace, &net.b.namespace, HOA_B, 100_000);
    net.a.attach();
    assert!(net.a.counter(Counter::OutTranslated) > sent);
    let used = net.a.with(|it| it.peers_used()).unwrap();
    let (hoa, usage) = used[0];
    assert_eq!((used.len(), hoa), (1, HOA_B));
    assert!(usage.packets > 0 && usage.idle.is_some());
    transfer(&net.b.namespace, &net.a.namespace, HOA_A, 100_000);
    net.a.slot(|slot| slot.take().unwrap().detach().unwrap());
    let links = netns::command("ip", &["-n", net.a.namespace.name(), "link"]);
    assert!(
        !links.contains("mat0") && !links.contains("ALLMULTI"),
        "{links}"
    );
    net.a.attach();
    assert!(net.a.with(|it| it.peers_used()).unwrap().is_empty());
}
