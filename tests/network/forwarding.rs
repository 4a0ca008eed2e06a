//! Unicast addresses of moving VMs on real kernels: duplicate address detection, answers to a
//! router on behalf of a VM that does not run yet, forwarding from an old address to the new one,
//! and translation of packets that an arrived VM still sends from its old address.
//!
//! ```text
//!   guest or bare TAP -- br0 (host) -- up0 -- r0 (router) r1 -- d0 (destination)
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use common::counter::Counter;
use common::forward;
use common::maps::{Forward, ForwardKey, NO_BRIDGE, Translation, TranslationKey};
use common::wire::neighbour::{self, Audience};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use roamcast::datapath::{Datapath, DatapathConfig, Limits, UplinkHook};
use roamcast::net::link_addresses::LinkAddresses;
use roamcast::net::neighbour::Neighbours;
use roamcast::proto::{AddressCommand, AddressEvent, Mac, Said, mac_text};
use support::netns::{DEADLINE, Namespace, command, privileged, wait_for};
use support::tap::{self, Guest};
use support::two_links::{self, Net, moa};

const VM_MAC: Mac = [0x52, 0x54, 0, 0, 0, 7];

/// Runs `work` with the link's addresses, in the host's namespace and an async runtime.
fn with_addresses<T: Send>(net: &Net, work: impl AsyncFnOnce(LinkAddresses) -> T + Send) -> T {
    let ifindex = net.host.ifindex("br0");
    net.host.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async { work(LinkAddresses::open("br0", ifindex).unwrap()).await })
    })
}

/// Waits for an event that satisfies a condition.
async fn event<T>(addresses: &mut LinkAddresses, wanted: impl Fn(&AddressEvent) -> Option<T>) -> T {
    tokio::time::timeout(DEADLINE, async {
        loop {
            let event = addresses.next().await.expect("an event");
            if let Some(found) = wanted(&event) {
                return found;
            }
        }
    })
    .await
    .expect("an event within the deadline")
}

/// Answers Solicitations, as the protocol does, until the asker is satisfied.
async fn answer(addresses: &mut LinkAddresses, owner: Option<Mac>) {
    let (address, to) = event(addresses, |event| match event {
        AddressEvent::Heard {
            address,
            said: Said::Asks(from),
            by,
        } => Some((*address, (*from, *by))),
        _ => None,
    })
    .await;
    addresses.perform(&AddressCommand::Advertise {
        address,
        owner,
        overrides: true,
        to: Some(to),
    });
}

fn mac_of(namespace: &Namespace, interface: &str) -> Mac {
    let name = namespace.name();
    let text = command(
        "ip",
        &[
            "netns",
            "exec",
            name,
            "cat",
            &format!("/sys/class/net/{interface}/address"),
        ],
    );
    let bytes: Vec<u8> = text
        .trim()
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    bytes.try_into().unwrap()
}

fn known_neighbour(router: &Namespace, address: Ipv6Addr) -> String {
    let address = address.to_string();
    command("ip", &["-n", router.name(), "neigh", "show", &address])
}

fn udp_payload(frame: &[u8], to: Ipv6Addr) -> Option<Vec<u8>> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let (Some(NetSlice::Ipv6(ip)), Some(TransportSlice::Udp(udp))) =
        (&packet.net, &packet.transport)
    else {
        return None;
    };
    let header = ip.header().to_header();
    (header.destination == to.octets()).then(|| udp.payload().to_vec())
}

#[test]
fn owner_of_an_address_answers_the_probe() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    let taken = moa(1);
    net.router.ip(&format!("addr add {taken}/64 dev r0 nodad"));
    let mac = mac_of(&net.router, "r0");
    with_addresses(&net, async |mut addresses| {
        addresses.perform(&AddressCommand::Watch { address: taken });
        // The bridge drops probes until its port forwards.
        let found = tokio::time::timeout(DEADLINE, async {
            loop {
                addresses.perform(&AddressCommand::Probe { address: taken });
                let waited = Duration::from_millis(200);
                if let Ok(Some(event)) = tokio::time::timeout(waited, addresses.next()).await {
                    return event;
                }
            }
        })
        .await
        .unwrap();
        let expected = AddressEvent::Heard {
            address: taken,
            said: Said::Has,
            by: mac,
        };
        assert_eq!(found, expected);
    });
}

#[test]
fn address_of_the_host_itself_is_told_at_once() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    with_addresses(&net, async |mut addresses| {
        let address = "2001:db8:1::10".parse().unwrap();
        addresses.perform(&AddressCommand::Watch { address });
        assert_eq!(addresses.next().await, Some(AddressEvent::Own { address }));
    });
}

#[test]
fn router_is_given_the_vms_mac_and_its_packets_wait_in_the_tap_until_the_vm_speaks() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    let address = moa(1);
    let mut vm = net.host.run(|| tap::open("vnet0"));
    let _other = net.host.run(|| tap::open("vnet1"));
    net.host.ip("link set vnet0 master br0 up");
    let ifindex = net.host.ifindex("vnet0");
    with_addresses(&net, async |mut addresses| {
        addresses.perform(&AddressCommand::Watch { address });
        addresses.perform(&AddressCommand::Expect {
            address,
            mac: VM_MAC,
            ifindex,
        });
        let fdb = net.host.bridge("fdb show br br0");
        let entry = format!("{} dev vnet0 master br0 static", mac_text(&VM_MAC));
        assert!(fdb.contains(&entry), "{fdb}");
        let sender = net.router.run(|| UdpSocket::bind("[::]:0").unwrap());
        sender.send_to(b"early", (address, 5004)).unwrap();
        answer(&mut addresses, Some(VM_MAC)).await;
        wait_for("the router to know the VM", || {
            known_neighbour(&net.router, address)
                .contains(&mac_text(&VM_MAC))
                .then_some(())
        });
        wait_for("the packet in the TAP", || {
            read_frames(&mut vm)
                .iter()
                .find_map(|frame| udp_payload(frame, address))
                .filter(|payload| payload == b"early")
        });
        // The VM runs and sends any frame.
        let hello = neighbour::advertisement(
            &address.octets(),
            VM_MAC,
            true,
            &address.octets(),
            VM_MAC,
            Audience::Everybody,
        );
        vm.write_all(&hello).unwrap();
        let spoke = AddressEvent::Spoke { address };
        event(&mut addresses, |event| (*event == spoke).then_some(())).await;
        let spoken = true;
        addresses.perform(&AddressCommand::Forget { address, spoken });
        let fdb = net.host.bridge("fdb show br br0");
        let learnt = format!("{} dev vnet0 master br0", mac_text(&VM_MAC));
        assert!(fdb.contains(&learnt) && !fdb.contains(&entry), "{fdb}");
    });
}

fn read_frames(tap: &mut File) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let mut frame = vec![0; 65_536];
    while let Ok(length) = tap.read(&mut frame) {
        frames.push(frame[..length].to_vec());
    }
    frames
}

/// Sends to the old address until a packet arrives at the new one.
fn arrives(net: &Net, from: &Namespace, what: &[u8]) {
    let new = moa(2);
    let receiver = net
        .destination
        .run(|| UdpSocket::bind((new, 5004)).unwrap());
    receiver
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let sender = from.run(|| UdpSocket::bind("[::]:0").unwrap());
    wait_for("a packet that was sent on", || {
        let _ = sender.send_to(what, (moa(1), 5004));
        let mut buffer = [0; 64];
        let length = receiver.recv(&mut buffer).ok()?;
        assert_eq!(&buffer[..length], what);
        Some(())
    });
}

fn checksum_errors(namespace: &Namespace) -> String {
    let text = namespace.run(|| fs::read_to_string("/proc/thread-self/net/snmp6").unwrap());
    let line = |it: &&str| it.starts_with("Udp6InCsumErrors");
    text.lines().find(line).unwrap().to_owned()
}

fn forwards(net: &Net, hook: UplinkHook, offload: bool) {
    let (old, new) = (moa(1), moa(2));
    let state = if offload { "on" } else { "off" };
    let name = net.router.name();
    command(
        "ip",
        &["netns", "exec", name, "ethtool", "-K", "r0", "tx", state],
    );
    let guest = Guest::start(&net.host, "br0", "vnet9", 0);
    guest
        .namespace
        .ip("addr add 2001:db8:1::99/64 dev eth0 nodad");
    let (up0, br0) = (net.host.ifindex("up0"), net.host.ifindex("br0"));
    let errors = checksum_errors(&net.destination);
    net.host.run_with_bpffs(|bpffs: &Path| {
        let config = DatapathConfig {
            pin_root: bpffs.join("roamcast"),
            uplink_hook: Some(hook),
            ..DatapathConfig::default()
        };
        let datapath = Datapath::load(&config).unwrap();
        datapath.attach_uplink(up0, "up0").unwrap();
        let limits = Limits {
            listeners: 10,
            sources: 10,
            reports_per_second: 100,
            datagrams_per_second: 50,
            flows: 4096,
        };
        datapath
            .attach_port(guest.ifindex, "vnet9", &limits)
            .unwrap();
        let key = ForwardKey {
            address: old.octets(),
            vlan: 0,
            bridge: NO_BRIDGE,
        };
        let value = Forward {
            until_ns: u64::MAX,
            destination: new.octets(),
            difference: forward::difference(&old.octets(), &new.octets()),
            bridge: br0,
            ..Forward::default()
        };
        datapath.forward_set(&key, &value).unwrap();
        let mut neighbours = Neighbours::open().unwrap();
        wait_for("the next hop", || {
            neighbours.resolve(new).ok().filter(|known| *known)
        });
        with_addresses(net, async |mut addresses| {
            addresses.uplink_added(up0);
            addresses.perform(&AddressCommand::Watch { address: old });
            addresses.perform(&AddressCommand::Replace { address: old });
            let sender = net.router.run(|| UdpSocket::bind("[::]:0").unwrap());
            sender.send_to(b"who is it", (old, 5004)).unwrap();
            answer(&mut addresses, None).await;
            // The bridge takes the packets in place of the VM.
            let mac = mac_text(&mac_of(&net.host, "br0"));
            wait_for("the router to know the bridge", || {
                known_neighbour(&net.router, old)
                    .contains(&mac)
                    .then_some(())
            });
        });
        arrives(net, &net.router, b"from the network");
        let entry = format!("neigh replace {old} lladdr 52:54:00:00:00:07 dev eth0");
        guest.namespace.ip(&entry);
        arrives(net, &guest.namespace, b"from a VM next to it");
        let (_, value) = datapath.forwards().unwrap()[0];
        assert!(value.packets >= 2, "{value:?}");
        let counted = datapath.counter(Counter::ForwardedPackets).unwrap();
        assert_eq!(counted, value.packets);
        assert_eq!(value.dropped, 0);
        let removed = datapath.forward_remove(&key).unwrap().unwrap();
        assert_eq!(removed.packets, value.packets);
    });
    assert_eq!(checksum_errors(&net.destination), errors);
}

/// Sends to an address of a namespace until a packet arrives. Returns the packet's source.
fn comes_from(to: &Namespace, address: Ipv6Addr, from: &Namespace, what: &[u8]) -> Ipv6Addr {
    let receiver = to.run(|| UdpSocket::bind((address, 5004)).unwrap());
    receiver
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let sender = from.run(|| UdpSocket::bind((moa(7), 0)).unwrap());
    wait_for("a packet that was translated", || {
        let _ = sender.send_to(what, (address, 5004));
        let mut buffer = [0; 64];
        let (length, by) = receiver.recv_from(&mut buffer).ok()?;
        assert_eq!(&buffer[..length], what);
        match by.ip() {
            std::net::IpAddr::V6(by) => Some(by),
            std::net::IpAddr::V4(_) => None,
        }
    })
}

#[test]
fn what_an_arrived_vm_still_sends_from_the_old_address_comes_from_its_new_one_everywhere() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    let (old, new) = (moa(7), moa(1));
    let guest = Guest::start(&net.host, "br0", "vnet9", 0);
    let other = Guest::start(&net.host, "br0", "vnet8", 0);
    let neighbour: Ipv6Addr = "2001:db8:1::98".parse().unwrap();
    other
        .namespace
        .ip(&format!("addr add {neighbour}/64 dev eth0 nodad"));
    // The state from the old link: the VM's address, and a router that does not exist here.
    for arguments in [
        format!("addr add {old}/64 dev eth0 nodad"),
        "neigh add 2001:db8:7::fe lladdr 02:00:00:00:00:77 dev eth0".to_owned(),
        "route add default via 2001:db8:7::fe dev eth0".to_owned(),
    ] {
        guest.namespace.ip(&arguments);
    }
    let errors = checksum_errors(&net.destination);
    net.host.run_with_bpffs(|bpffs: &Path| {
        let config = DatapathConfig {
            pin_root: bpffs.join("roamcast"),
            ..DatapathConfig::default()
        };
        let limits = Limits {
            listeners: 10,
            sources: 10,
            reports_per_second: 100,
            datagrams_per_second: 50,
            flows: 4096,
        };
        let key = TranslationKey {
            address: old.octets(),
            ifindex: guest.ifindex,
            vlan: 0,
            bridge: NO_BRIDGE,
        };
        let value = Translation {
            until_ns: u64::MAX,
            source: new.octets(),
            difference: forward::difference(&old.octets(), &new.octets()),
            ..Translation::default()
        };
        {
            let datapath = Datapath::load(&config).unwrap();
            let ports = [(guest.ifindex, "vnet9"), (other.ifindex, "vnet8")];
            for (ifindex, name) in ports {
                datapath.attach_port(ifindex, name, &limits).unwrap();
            }
            datapath.translation_set(&key, &value).unwrap();
        }
        // A new agent replaces the old one.
        let datapath = Datapath::load(&config).unwrap();
        let pinned = datapath.translations().unwrap();
        assert_eq!(pinned.len(), 1);
        assert_eq!(pinned[0].0, key);
        for (to, address) in [(&net.destination, moa(2)), (&other.namespace, neighbour)] {
            let by = comes_from(to, address, &guest.namespace, b"still from there");
            assert_eq!(by, new, "to {address}");
        }
        let (_, value) = datapath.translations().unwrap()[0];
        let counted = datapath.counter(Counter::TranslatedPackets).unwrap();
        assert!(value.packets >= 2, "{value:?}");
        assert_eq!((counted, value.dropped), (value.packets, 0));
        let removed = datapath.translation_remove(&key).unwrap().unwrap();
        assert_eq!(removed.packets, value.packets);
    });
    assert_eq!(checksum_errors(&net.destination), errors);
}

#[test]
fn packets_for_the_old_address_reach_the_new_one_whoever_finishes_their_checksums() {
    if !privileged() {
        return;
    }
    for offload in [true, false] {
        forwards(&Net::new(), UplinkHook::Tc, offload);
    }
}

#[test]
fn packets_are_sent_on_at_xdp_too() {
    if !privileged() {
        return;
    }
    forwards(&Net::new(), UplinkHook::XdpGeneric, false);
}

#[test]
fn next_hop_that_the_kernel_forgets_is_asked_for_again_at_once() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    let router = two_links::ROUTER.parse().unwrap();
    let is_known = || known_neighbour(&net.host, router).contains("lladdr");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    net.host.run(|| {
        let mut neighbours = Neighbours::open().unwrap();
        wait_for("the next hop", || {
            neighbours.resolve(moa(2)).ok().filter(|known| *known)
        });
        let (heard, mut told) = tokio::sync::mpsc::channel(1);
        runtime.block_on(async {
            let keep = async {
                loop {
                    let _ = neighbours.keep().await.unwrap();
                    let _ = heard.try_send(());
                }
            };
            let change = async {
                told.recv().await.expect("that notices are heard");
                // A new TAP with the lowest MAC has this effect.
                net.host.ip("link set br0 address 02:00:00:00:00:99");
                assert!(!is_known(), "the kernel keeps what it knew");
                while !is_known() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::select! {
                () = keep => {}
                done = tokio::time::timeout(DEADLINE, change) => done.expect("the next hop again"),
            }
        });
        neighbours.forget(moa(2));
    });
}

#[test]
fn neighbours_learn_the_new_mac_of_a_host_at_once() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    let own: Ipv6Addr = "2001:db8:1::1".parse().unwrap();
    net.host.ip(&format!("addr add {own}/64 dev br0 nodad"));
    let sender = net.router.run(|| UdpSocket::bind("[::]:0").unwrap());
    wait_for("the router to know the host", || {
        sender.send_to(b"who is it", (own, 5004)).unwrap();
        known_neighbour(&net.router, own)
            .contains("REACHABLE")
            .then_some(())
    });
    with_addresses(&net, async |mut addresses| {
        addresses.perform(&AddressCommand::Watch { address: moa(1) });
        net.host.ip("link set br0 address 02:00:00:00:00:99");
        addresses.announce();
        wait_for("the router to know the new MAC", || {
            known_neighbour(&net.router, own)
                .contains("02:00:00:00:00:99")
                .then_some(())
        });
    });
}
