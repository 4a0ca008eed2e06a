//! The lab's own promises: trees grow and go as the sites say, hosts reach each other's libvirtd,
//! and nothing stays behind.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test panics rather than returning an error"
)]

use std::fs;
use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lab::mroute::event::{Event, LoggedEvent};
use lab::node::Node;
use lab::{Lab, LabConfig, Site, netns, registry, wait};
use nix::net::if_::if_nametoindex;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use socket2::{Domain, SockAddr, Socket, Type};

const PORT: u16 = 5001;
const DEADLINE: Duration = Duration::from_secs(10);

/// Returns false, having said why, where the lab can't be built; fails in CI.
fn lab_is_possible() -> bool {
    let reason = if !nix::unistd::Uid::effective().is_root() {
        "not root"
    } else if Command::new("libvirtd").arg("--version").output().is_err() {
        "libvirtd is not installed"
    } else {
        return true;
    };
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "The lab is not possible: {reason}"
    );
    eprintln!("skipped: {reason}");
    false
}

/// A lab without libvirtd, for what needs only the network.
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

/// Joins in the node's namespace; leaves when dropped.
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

/// Sends to an address until the listener gets something.
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

/// How many entries the switch's multicast database has for an address.
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
    if !lab_is_possible() {
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
fn a_thousand_addresses_joined_at_once_all_get_their_branch() {
    if !lab_is_possible() {
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
    if !lab_is_possible() {
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
    if !lab_is_possible() {
        return;
    }
    let lab = network("testucast", Site::UnicastOnly);
    let sender = sender(&lab);
    let remote = join(lab.vms2(), "br0", &[address(3)]);
    // The other site shows that packets do flow.
    let control = join(lab.vms1(), "br0", &[address(3)]);
    for _ in 0..50 {
        wait_for_packet(&sender, &control[0], address(3));
    }
    let site = lab.router().status().unwrap().sites.remove(1);
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
    if !lab_is_possible() {
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
    if !lab_is_possible() {
        return;
    }
    let lab = network("testsnoop", Site::Multicast);
    // A second host at the switch that never joins.
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
    let before = received_bytes(&switch, "stranger");
    let payload = [0; 1000];
    for _ in 0..200 {
        sender.send_to(&payload, (address(5), PORT)).unwrap();
    }
    wait::until("the last packet", DEADLINE, || {
        let length = listener[0].recv(&mut [0; 2000]).ok()?;
        (length == payload.len()).then_some(())
    })
    .unwrap();
    // Queries and neighbour discovery may pass, 200 kB of the stream may not.
    let passed = received_bytes(&switch, "stranger") - before;
    assert!(passed < 10_000, "{passed} bytes");
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
fn domain_moves_live_between_the_hosts() {
    if !lab_is_possible() {
        return;
    }
    let lab = Lab::up(LabConfig::new("testmove")).unwrap();
    let (source, destination) = (lab.vms1(), lab.vms2());
    // Without a disk the firmware runs for ever, and that is enough to be moved.
    let domain = lab.vms1().shared_directory().join("domain.xml");
    let kind = if lab::kvm::usable() { "kvm" } else { "qemu" };
    let xml = format!(
        "<domain type='{kind}'><name>idle</name><memory unit='MiB'>64</memory>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os>\
         <devices><interface type='bridge'><source bridge='br0'/><model type='virtio'/>\
         </interface></devices></domain>"
    );
    fs::write(domain, xml).unwrap();
    source
        .output(
            source
                .virsh()
                .args(["create", "/run/roamcast-lab/domain.xml"]),
        )
        .unwrap();
    let mut migrate = source.virsh();
    migrate.args(["migrate", "--live", "--p2p", "idle", &destination.uri()]);
    migrate.args([
        "--migrateuri",
        &format!("tcp://[{}]", destination.address()),
    ]);
    source.output(&mut migrate).unwrap();
    let state = destination
        .output(destination.virsh().args(["domstate", "idle"]))
        .unwrap();
    assert_eq!(state.trim(), "running");
    assert_eq!(
        source
            .output(source.virsh().args(["list", "--name"]))
            .unwrap()
            .trim(),
        ""
    );
    // The guest outlives its libvirtd, which finds it again.
    destination.kill_libvirtd().unwrap();
    destination.wait_libvirtd().unwrap();
    let state = destination
        .output(destination.virsh().args(["domstate", "idle"]))
        .unwrap();
    assert_eq!(state.trim(), "running");
}

#[test]
fn hosts_reach_each_others_libvirtd_and_a_killed_one_comes_back() {
    if !lab_is_possible() {
        return;
    }
    let lab = Lab::up(LabConfig::new("testvirt")).unwrap();
    for (own, peer) in [(lab.vms1(), lab.vms2()), (lab.vms2(), lab.vms1())] {
        let mut virsh = own.command("virsh");
        let name = own
            .output(virsh.args(["--connect", &peer.uri(), "hostname"]))
            .unwrap();
        assert_eq!(name.trim(), peer.name());
    }
    let first = lab.vms1().libvirtd().unwrap();
    lab.vms1().kill_libvirtd().unwrap();
    lab.vms1().wait_libvirtd().unwrap();
    assert_ne!(lab.vms1().libvirtd(), Some(first));

    lab.vms2().stop_libvirtd().unwrap();
    lab.vms2()
        .output(lab.vms2().virsh().arg("hostname"))
        .unwrap_err();
    lab.vms2().start_libvirtd().unwrap();
    lab.vms2()
        .output(lab.vms2().virsh().arg("hostname"))
        .unwrap();
}

#[test]
fn removed_lab_leaves_no_namespace_process_mount_or_directory() {
    if !lab_is_possible() {
        return;
    }
    let lab = Lab::up(LabConfig::new("testdown")).unwrap();
    let sleeper = lab.vms1().command("sleep");
    let mut sleeper = lab
        .vms1()
        .spawn("sleep", with_argument(sleeper, "600"))
        .unwrap();
    // One router, two hosts with a libvirtd each, and the sleeper once it is inside.
    let pids = wait::until("the sleeper in its namespace", DEADLINE, || {
        let found = registry::processes("testdown");
        let pids: Vec<i32> = found.iter().map(|found| found.pid).collect();
        pids.iter()
            .any(|pid| u32::try_from(*pid) == Ok(sleeper.id()))
            .then_some(pids)
    })
    .unwrap();
    assert!(pids.len() >= 6, "{pids:?}");
    lab.down().unwrap();
    sleeper.wait(DEADLINE).unwrap();
    assert_nothing_left("testdown");
    wait::until("the processes to be reaped", DEADLINE, || {
        pids.iter()
            .all(|pid| !fs::exists(format!("/proc/{pid}")).unwrap())
            .then_some(())
    })
    .unwrap();
}

fn with_argument(mut command: Command, argument: &str) -> Command {
    command.arg(argument);
    command
}

fn assert_nothing_left(name: &str) {
    assert_eq!(netns::list(&format!("rc{name}-")), Vec::<String>::new());
    assert!(registry::processes(name).is_empty());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&format!("rc{name}-")), "{mounts}");
    assert!(
        !mounts.contains(&registry::directory(name).display().to_string()),
        "{mounts}"
    );
    assert!(!registry::directory(name).exists());
}

/// Not a test by itself: the process that `killed_lab_is_removed_by_the_next_one` and
/// `interrupted_lab_is_removed` end.
#[test]
#[ignore = "started by other tests"]
fn helper_holds_a_lab() {
    let Ok(name) = std::env::var("LAB_NAME") else {
        return;
    };
    let lab = network(&name, Site::Multicast);
    fs::write(registry::directory(&name).join("held"), "").unwrap();
    let _ = wait::until("the end", Duration::from_secs(60), || None::<()>);
    drop(lab);
}

fn hold_lab(name: &str) -> Child {
    let helper = start_helper(name);
    let held = registry::directory(name).join("held");
    wait::until("the helper's lab", DEADLINE, || held.exists().then_some(())).unwrap();
    helper
}

fn interrupt(helper: &Child) {
    let pid = Pid::from_raw(i32::try_from(helper.id()).unwrap());
    kill(pid, Signal::SIGINT).unwrap();
}

fn start_helper(name: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "helper_holds_a_lab", "--ignored"])
        .env("LAB_NAME", name)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn killed_lab_is_removed_by_the_next_one() {
    if !lab_is_possible() {
        return;
    }
    let mut helper = hold_lab("testkilled");
    Lab::up(LabConfig::new("testkilled")).map(drop).unwrap_err();
    helper.kill().unwrap();
    helper.wait().unwrap();
    assert!(!registry::processes("testkilled").is_empty());
    let other = network("testnext", Site::Multicast);
    assert_nothing_left("testkilled");
    other.down().unwrap();
}

#[test]
fn lab_interrupted_while_it_is_built_is_removed() {
    if !lab_is_possible() {
        return;
    }
    let mut helper = start_helper("testearly");
    let router = netns::path("rctestearly-router");
    wait::until("the first namespaces", DEADLINE, || {
        router.exists().then_some(())
    })
    .unwrap();
    interrupt(&helper);
    assert_eq!(helper.wait().unwrap().code(), Some(130));
    assert_nothing_left("testearly");
}

#[test]
fn interrupted_lab_is_removed() {
    if !lab_is_possible() {
        return;
    }
    let mut helper = hold_lab("testint");
    interrupt(&helper);
    assert_eq!(helper.wait().unwrap().code(), Some(130));
    assert_nothing_left("testint");
}

#[test]
fn second_lab_of_the_same_name_replaces_the_first() {
    if !lab_is_possible() {
        return;
    }
    let first = network("testtwice", Site::Multicast);
    first.keep().unwrap();
    let attached = Lab::attach("testtwice").unwrap();
    drop(attached);
    assert!(!registry::processes("testtwice").is_empty());
    let second = network("testtwice", Site::Late(7));
    assert_eq!(
        second.router().status().unwrap().sites[1].kind,
        Site::Late(7)
    );
    second.down().unwrap();
    assert_nothing_left("testtwice");
    Lab::attach("testtwice").unwrap_err();
}

#[test]
fn bad_lab_names_are_refused() {
    for name in ["", "Upper", "with-dash", "../etc", "averyverylongname"] {
        Lab::up(LabConfig::new(name)).map(drop).unwrap_err();
    }
}
