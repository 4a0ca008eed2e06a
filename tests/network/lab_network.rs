//! The lab's network: multicast trees grow and disappear as configured per site, and switches
//! forward by membership.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test panics rather than returning an error"
)]

use std::io::ErrorKind;
use std::net::{Ipv6Addr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use lab::mroute::event::{Event, LoggedEvent};
use lab::node::Node;
use lab::probe::clock;
use lab::probe::metrics::Window;
use lab::probe::path::{Direction, PathWatch};
use lab::probe::payload::Stamp;
use lab::{Lab, LabConfig, Site, netns, wait};
use nix::net::if_::if_nametoindex;
use socket2::{Domain, SockAddr, Socket, Type};

const PORT: u16 = 5001;
const DEADLINE: Duration = Duration::from_secs(10);

/// Makes a lab without libvirtd, for tests of the network only.
fn network(name: &str, second: Site) -> Lab {
    let config = LabConfig::new(name);
    Lab::up(LabConfig {
        sites: [Site::Multicast, second],
        libvirtd: false,
        ..config
    })
    .unwrap()
}

fn address(last: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xff3e, 0, 0, 0, 0, 0, 1, last)
}

/// Joins in the node's namespace; dropping the sockets leaves.
fn join(node: &Node, interface: &str, addresses: &[Ipv6Addr]) -> Vec<UdpSocket> {
    node.within(|| {
        let ifindex = if_nametoindex(interface).unwrap();
        addresses
            .iter()
            .map(|address| {
                let socket = Socket::new(Domain::IPV6, Type::DGRAM, None).unwrap();
                socket.set_only_v6(true).unwrap();
                socket
                    .bind(&SockAddr::from(SocketAddrV6::new(*address, PORT, 0, 0)))
                    .unwrap();
                socket.join_multicast_v6(address, ifindex).unwrap();
                socket
                    .set_read_timeout(Some(Duration::from_millis(1)))
                    .unwrap();
                UdpSocket::from(socket)
            })
            .collect()
    })
    .unwrap()
}

fn sender(lab: &Lab) -> UdpSocket {
    lab.sender()
        .within(|| {
            let socket = Socket::new(Domain::IPV6, Type::DGRAM, None).unwrap();
            socket.set_multicast_hops_v6(32).unwrap();
            socket
                .set_multicast_if_v6(if_nametoindex("eth0").unwrap())
                .unwrap();
            UdpSocket::from(socket)
        })
        .unwrap()
}

/// Sends to an address until the listener receives a packet.
fn wait_for_packet(sender: &UdpSocket, listener: &UdpSocket, address: Ipv6Addr) {
    wait::until("a packet", DEADLINE, || {
        sender.send_to(b"x", (address, PORT)).unwrap();
        listener.recv(&mut [0; 16]).ok()
    })
    .unwrap();
}

fn time_of(events: &[LoggedEvent], wanted: &Event) -> u64 {
    let found = events.iter().find(|logged| logged.event == *wanted);
    found
        .unwrap_or_else(|| panic!("No {wanted:?} in {events:?}"))
        .at_ns
}

/// Returns the number of entries for an address in the switch's MDB.
fn entries(lab: &Lab, site: usize, address: Ipv6Addr) -> usize {
    let switch = lab.switch(site);
    let said = switch
        .output(switch.command("bridge").args(["mdb", "show"]))
        .unwrap();
    said.lines()
        .filter(|line| line.contains(&address.to_string()))
        .count()
}

#[test]
fn tree_grows_on_a_kernel_join_and_is_pruned_after_the_leave() {
    if !lab::requirements::met() {
        return;
    }
    let lab = network("testgrow", Site::Multicast);
    let sender = sender(&lab);
    for (last, force_version) in [(1, "2"), (2, "1")] {
        lab.vms2()
            .within(|| netns::sysctl("net/ipv6/conf/br0/force_mld_version", force_version))
            .unwrap()
            .unwrap();
        let listener = join(lab.vms2(), "br0", &[address(last)]);
        wait_for_packet(&sender, &listener[0], address(last));
        assert!(lab.router().forwards(address(last), 2).unwrap());
        assert!(!lab.router().forwards(address(last), 1).unwrap());
        assert_eq!(entries(&lab, 2, address(last)), 1);

        drop(listener);
        wait::until("the prune", DEADLINE, || {
            (!lab.router().forwards(address(last), 2).ok()?).then_some(())
        })
        .unwrap();
        let flows = lab.router().status().unwrap().flows;
        assert!(flows.iter().all(|flow| flow.sites.is_empty()), "{flows:?}");
    }
    lab.down().unwrap();
}

#[test]
fn watch_lists_the_interfaces_that_a_packet_passed_and_where_it_was_overtaken() {
    if !lab::requirements::met() {
        return;
    }
    let lab = network("testorder", Site::Multicast);
    let sender = sender(&lab);
    let listener = join(lab.vms2(), "br0", &[address(1)]);
    wait_for_packet(&sender, &listener[0], address(1));
    let from_ns = clock::now_ns();
    let watch = PathWatch::start(lab.path()).unwrap();
    for sequence in [0, 1, 3, 2, 4] {
        let stamp = Stamp {
            flow: 7,
            sequence,
            sent_ns: 0,
        };
        sender
            .send_to(&stamp.to_bytes(), (address(1), PORT))
            .unwrap();
    }
    let place = |node: &str, interface: &str, direction| {
        (node.to_owned(), interface.to_owned(), direction, 7, 2, 3)
    };
    let mut wanted = vec![
        place("router", "sender", Direction::In),
        place("router", "site2", Direction::Out),
        place("switch2", "router", Direction::In),
        place("switch2", "vms2", Direction::Out),
        place("vms2", "eth0", Direction::In),
        place("vms2", "br0", Direction::In),
    ];
    wanted.sort();
    let found = wait::until("the watch to see all packets", DEADLINE, || {
        let window = Window {
            from_ns,
            to_ns: clock::now_ns(),
        };
        // The switch's bridge itself receives the packet only while the bridge counts as a
        // multicast router, for some time after its own Query.
        let found = watch.overtaken(window).unwrap().into_iter();
        let mut found: Vec<_> = found
            .filter(|it| (it.node.as_str(), it.interface.as_str()) != ("switch2", "br0"))
            .map(|it| {
                (
                    it.node,
                    it.interface,
                    it.direction,
                    it.flow,
                    it.sequence,
                    it.highest,
                )
            })
            .collect();
        found.sort();
        (found.len() >= wanted.len()).then_some(found)
    });
    assert_eq!(found.unwrap(), wanted);
    let mut passed = watch.passed(7, 2).unwrap();
    passed.retain(|place| place != "switch2 br0 in");
    assert_eq!(
        passed,
        [
            "router sender in",
            "router site2 out",
            "switch2 router in",
            "switch2 vms2 out",
            "vms2 br0 in",
            "vms2 eth0 in",
        ]
    );
    assert!(watch.passed(7, 5).unwrap().is_empty());
    lab.down().unwrap();
}

#[test]
fn a_thousand_addresses_joined_at_once_all_get_their_branch() {
    if !lab::requirements::met() {
        return;
    }
    let lab = network("testmany", Site::Multicast);
    let addresses: Vec<Ipv6Addr> = (1..=1000).map(address).collect();
    let listeners = join(lab.vms2(), "br0", &addresses);
    wait::until("all branches", DEADLINE, || {
        let status = lab.router().status().ok()?;
        (status.sites[1].grown.len() == addresses.len()).then_some(())
    })
    .unwrap();
    let sender = sender(&lab);
    for (listener, address) in listeners.iter().zip(&addresses) {
        wait_for_packet(&sender, listener, *address);
    }
    let events = lab.router().events().unwrap();
    for multicast_address in addresses {
        let listener = time_of(
            &events,
            &Event::Listener {
                site: 2,
                multicast_address,
            },
        );
        let grown = time_of(
            &events,
            &Event::Grown {
                site: 2,
                multicast_address,
            },
        );
        assert!(grown >= listener);
    }
}

#[test]
fn late_site_gets_its_branch_not_before_the_delay() {
    if !lab::requirements::met() {
        return;
    }
    let lab = network("testlate", Site::Late(400));
    let sender = sender(&lab);
    let listener = join(lab.vms2(), "br0", &[address(2)]);
    wait_for_packet(&sender, &listener[0], address(2));
    let events = lab.router().events().unwrap();
    let multicast_address = address(2);
    let listener = time_of(
        &events,
        &Event::Listener {
            site: 2,
            multicast_address,
        },
    );
    let grown = time_of(
        &events,
        &Event::Grown {
            site: 2,
            multicast_address,
        },
    );
    assert!(grown - listener >= 400_000_000, "{} ns", grown - listener);
}

#[test]
fn unicast_only_site_gets_nothing_until_multicast_is_given_to_it() {
    if !lab::requirements::met() {
        return;
    }
    let lab = network("testucast", Site::UnicastOnly);
    let sender = sender(&lab);
    let remote = join(lab.vms2(), "br0", &[address(3)]);
    // The other site shows that packets flow.
    let control = join(lab.vms1(), "br0", &[address(3)]);
    let site = || lab.router().status().unwrap().sites.remove(1);
    wait::until("the router to know the listener", DEADLINE, || {
        (site().listening == [address(3)]).then_some(())
    })
    .unwrap();
    for _ in 0..50 {
        wait_for_packet(&sender, &control[0], address(3));
    }
    let site = site();
    assert_eq!((site.listening, site.grown), (vec![address(3)], vec![]));
    remote[0].recv(&mut [0; 16]).unwrap_err();

    lab.router().set_site(2, Site::Multicast).unwrap();
    wait_for_packet(&sender, &remote[0], address(3));
    lab.router().set_site(2, Site::UnicastOnly).unwrap();
    assert!(!lab.router().forwards(address(3), 2).unwrap());
    lab.router().set_site(3, Site::Multicast).unwrap_err();
}

#[test]
fn source_specific_join_gets_a_branch_for_that_source_only() {
    if !lab::requirements::met() {
        return;
    }
    let lab = network("testssm", Site::Multicast);
    let sender = sender(&lab);
    let multicast_address = address(4);
    let source = lab::topology::SENDER_ADDRESS;
    let socket = lab
        .vms2()
        .within(|| join_source(multicast_address, source))
        .unwrap();
    wait_for_packet(&sender, &socket, multicast_address);
    let other = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x99);
    let stranger = lab
        .vms1()
        .within(|| join_source(multicast_address, other))
        .unwrap();
    wait::until("the other branch", DEADLINE, || {
        lab.router()
            .forwards(multicast_address, 1)
            .ok()?
            .then_some(())
    })
    .unwrap();
    wait_for_packet(&sender, &socket, multicast_address);
    let flows = lab.router().status().unwrap().flows;
    let flow = flows
        .iter()
        .find(|flow| flow.flow.multicast_address == multicast_address);
    assert_eq!(flow.unwrap().sites, [2]);
    drop(stranger);
}

/// Joins (source, address) on br0 of the calling thread's namespace.
fn join_source(multicast_address: Ipv6Addr, source: Ipv6Addr) -> UdpSocket {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, None).unwrap();
    socket
        .bind(&SockAddr::from(SocketAddrV6::new(
            multicast_address,
            PORT,
            0,
            0,
        )))
        .unwrap();
    lab::listener::join_source(&socket, "br0", multicast_address, source).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(1)))
        .unwrap();
    UdpSocket::from(socket)
}

#[test]
fn switch_forwards_only_to_ports_that_joined() {
    if !lab::requirements::met() {
        return;
    }
    let lab = network("testsnoop", Site::Multicast);
    // A second host at the switch, which never joins.
    let switch = lab.switch(2);
    netns::ip(
        switch.namespace(),
        "link add spare type veth peer name stranger\n\
         link set spare master br0\n\
         link set spare up\n\
         link set stranger up\n",
    )
    .unwrap();
    let sender = sender(&lab);
    let listener = join(lab.vms2(), "br0", &[address(5)]);
    wait_for_packet(&sender, &listener[0], address(5));
    // A bridge floods until it has been a querier for the Max Response Time of its first Query.
    // Afterwards Queries and neighbour discovery may pass, but not 200 kB of the stream.
    let snooping = Duration::from_secs(30);
    wait::until(
        "the switch to forward to joined ports only",
        snooping,
        || {
            let before = received_bytes(&switch, "stranger");
            send_all(&sender, &listener[0], 200);
            let passed = received_bytes(&switch, "stranger") - before;
            (passed < 10_000).then_some(())
        },
    )
    .unwrap();
}

/// Sends packets of 1,000 bytes to address 5, and waits until the listener receives one.
fn send_all(sender: &UdpSocket, listener: &UdpSocket, count: usize) {
    let payload = [0; 1000];
    for _ in 0..count {
        sender.send_to(&payload, (address(5), PORT)).unwrap();
    }
    wait::until("the stream", DEADLINE, || {
        let length = listener.recv(&mut [0; 2000]).ok()?;
        (length == payload.len()).then_some(())
    })
    .unwrap();
}

fn received_bytes(node: &Node, interface: &str) -> u64 {
    let mut ip = node.command("ip");
    let said = node
        .output(ip.args(["-s", "-j", "link", "show", "dev", interface]))
        .unwrap();
    let links: serde_json::Value = serde_json::from_str(&said).unwrap();
    links[0]["stats64"]["rx"]["bytes"].as_u64().unwrap()
}

#[test]
fn relays_receive_at_a_site_of_their_own_and_reach_the_vm_hosts() {
    if !lab::requirements::met() {
        return;
    }
    let lab = Lab::up(LabConfig {
        sites: [Site::Multicast, Site::UnicastOnly],
        libvirtd: false,
        relays: 2,
        ..LabConfig::new("testrelays")
    })
    .unwrap();
    let sender = sender(&lab);
    for relay in lab.relays() {
        let listeners = join(relay, "eth0", &[address(1)]);
        wait_for_packet(&sender, &listeners[0], address(1));
        let there = (lab.vms2().address(), 0);
        let listener = lab.vms2().within(|| TcpListener::bind(there)).unwrap();
        let to = listener.unwrap().local_addr().unwrap();
        // Nobody listens any more; the host's own refusal shows that packets reach the host.
        let refused = relay.within(|| TcpStream::connect_timeout(&to, DEADLINE));
        let error = refused.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
    assert_eq!(lab.node("relay2").unwrap().name(), "relay2");
}

#[test]
fn hosts_for_mobility_reach_the_vm_hosts_and_have_files_of_their_own() {
    if !lab::requirements::met() {
        return;
    }
    let lab = Lab::up(LabConfig {
        libvirtd: false,
        mobility: true,
        ..LabConfig::new("testmobility")
    })
    .unwrap();
    for host in [lab.ims().unwrap(), lab.peer().unwrap()] {
        let listener = host.within(|| TcpListener::bind((host.address(), 0)));
        let listener = listener.unwrap().unwrap();
        let to = listener.local_addr().unwrap();
        for vms in lab.vms() {
            let connected = vms.within(|| TcpStream::connect_timeout(&to, DEADLINE));
            connected.unwrap().unwrap();
        }
        let mut touch = host.command("touch");
        host.output(touch.arg("/run/mine")).unwrap();
        assert!(host.run_directory().join("mine").exists());
    }
    assert_eq!(lab.node("peer1").unwrap().name(), "peer1");
    assert!(lab.relays().is_empty());
}

#[test]
fn hosts_of_one_subnet_share_a_switch_and_listen_apart() {
    if !lab::requirements::met() {
        return;
    }
    let lab = Lab::up(LabConfig {
        libvirtd: false,
        same_subnet: true,
        ..LabConfig::new("testsubnet")
    })
    .unwrap();
    let (first, second) = (lab.vms1(), lab.vms2());
    assert_eq!(
        first.address().segments()[..4],
        second.address().segments()[..4]
    );
    let server = first.within(|| TcpListener::bind((first.address(), 0)));
    let server = server.unwrap().unwrap();
    let to = server.local_addr().unwrap();
    let connected = second.within(|| TcpStream::connect_timeout(&to, DEADLINE));
    connected.unwrap().unwrap();

    let sender = sender(&lab);
    let listeners = [first, second].map(|host| join(host, "br0", &[address(1)]));
    for listener in &listeners {
        wait_for_packet(&sender, &listener[0], address(1));
    }
    // A switch without any known listener floods.
    wait::until("both entries", DEADLINE, || {
        (entries(&lab, 1, address(1)) == 2).then_some(())
    })
    .unwrap();
    let [stays, leaves] = listeners;
    drop(leaves);
    wait::until("the entry to go", DEADLINE, || {
        (entries(&lab, 1, address(1)) == 1).then_some(())
    })
    .unwrap();
    wait_for_packet(&sender, &stays[0], address(1));
    assert_eq!(
        lab.config().nodes(),
        ["sender", "router", "switch1", "vms1", "vms2"]
    );
}

#[test]
fn forgotten_listeners_get_nothing_until_they_report_again() {
    if !lab::requirements::met() {
        return;
    }
    let lab = network("testforget", Site::Multicast);
    let sender = sender(&lab);
    let listener = join(lab.vms2(), "br0", &[address(1), address(2)]);
    for (last, socket) in (1..).zip(&listener) {
        wait_for_packet(&sender, socket, address(last));
    }
    // The kernel repeats its Reports some time in the first second.
    wait::until("the listener to be forgotten", DEADLINE, || {
        lab.forget_listeners(&[address(1)]).ok()?;
        let grown = lab.router().forwards(address(1), 2).ok()?;
        (entries(&lab, 2, address(1)) == 0 && !grown).then_some(())
    })
    .unwrap();
    assert!(lab.router().forwards(address(2), 2).unwrap());
    // The kernel reports anew after a new join.
    drop(listener);
    let listener = join(lab.vms2(), "br0", &[address(1)]);
    wait_for_packet(&sender, &listener[0], address(1));
}
