//! Forwarding by program test-run: packets to an address that its VM left, at both hooks of
//! `uplink` and at a TAP, and packets from that address at the VM's own TAP. Routes and next hops
//! come from a namespace.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::net::Ipv6Addr;

use common::counter::Counter;
use common::forward;
use common::maps::{
    BridgeNumber, Forward, ForwardKey, Gate, GateUsage, Translation, TranslationKey,
};
use common::mat::neutral::neutral;
use common::wire::neighbour;
use etherparse::{
    Icmpv6Type, IpFragOffset, Ipv6FragmentHeader, NetSlice, PacketBuilder, SlicedPacket,
    TransportSlice,
};
use support::kernel::{IFINDEX, Kernel, PASS, SHOT};
use support::netns::{Namespace, privileged};
use support::test_run;

const ROUTER_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const VM_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
const NEXT_HOP_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];
const CORRESPONDENT: &str = "2001:db8:5::1";
const OLD: &str = "2001:db8:1::77";
const NEW: &str = "2001:db8:2::88";
const HOA: &str = "fd5e:6d61:74::1";
const HOP_LIMIT: u8 = 61;
const REDIRECT: i32 = 7;
const XDP_REDIRECT: i32 = 4;
const XDP_TX: i32 = 3;

/// Hook of a program, with the hook's verdicts.
#[derive(Clone, Copy, Debug)]
struct At {
    program: &'static str,
    pass: i32,
    drop: i32,
    sent: i32,
}

const HOOKS: [At; 3] = [
    At {
        program: "uplink",
        pass: PASS,
        drop: SHOT,
        sent: REDIRECT,
    },
    At {
        program: "snoop",
        pass: PASS,
        drop: SHOT,
        sent: REDIRECT,
    },
    At {
        program: "uplink_xdp",
        pass: 2,
        drop: 1,
        sent: XDP_REDIRECT,
    },
];

fn address(text: &str) -> [u8; 16] {
    text.parse::<Ipv6Addr>().unwrap().octets()
}

/// Returns two addresses that are checksum-neutral to one HoA, chosen as a node chooses them.
fn neutral_pair() -> ([u8; 16], [u8; 16]) {
    let hoa = address(HOA);
    (neutral(address(OLD), hoa), neutral(address(NEW), hoa))
}

fn any_pair() -> ([u8; 16], [u8; 16]) {
    (address(OLD), address(NEW))
}

/// A host with a route to the new address.
struct Host {
    kernel: Kernel,
    at: At,
    old: [u8; 16],
    new: [u8; 16],
}

impl Host {
    fn forward(&mut self, change: impl FnOnce(&mut Forward)) {
        let mut value = Forward {
            until_ns: u64::MAX,
            destination: self.new,
            difference: forward::difference(&self.old, &self.new),
            bridge: 4711,
            ..Forward::default()
        };
        change(&mut value);
        let key = self.key();
        self.kernel.insert("FORWARDS", key, value);
        self.kernel.set_array("FORWARDING", 0, 1_u32);
    }

    /// Installs the translation for an arrived VM that may still send from the old address.
    fn translate(&mut self, change: impl FnOnce(&mut TranslationKey, &mut Translation)) {
        let mut key = self.translation_key();
        let mut value = Translation {
            until_ns: u64::MAX,
            source: self.new,
            difference: forward::difference(&self.old, &self.new),
            ..Translation::default()
        };
        change(&mut key, &mut value);
        self.kernel.insert("TRANSLATIONS", key, value);
        self.kernel.set_array("FORWARDING", 0, 1_u32);
    }

    fn translation_key(&self) -> TranslationKey {
        TranslationKey {
            address: self.old,
            ifindex: IFINDEX,
            vlan: 0,
            bridge: BridgeNumber::FIRST,
        }
    }

    fn translation(&mut self) -> Translation {
        let key = self.translation_key();
        self.kernel.entry("TRANSLATIONS", key).unwrap()
    }

    /// Asserts that the frame is sent from the new address, with a correct checksum if it has one.
    /// The kernel writes the MACs later.
    fn sends_from_new(&mut self, what: &str, frame: &[u8]) {
        let (verdict, sent) = self.run(frame);
        assert_eq!(verdict, REDIRECT, "{what}");
        assert_eq!(sent[14..21], frame[14..21], "{what}");
        assert_eq!(sent[21], HOP_LIMIT - 1, "{what}");
        assert_eq!(sent[22..38], self.new, "{what}");
        assert_eq!(sent[38..54], frame[38..54], "{what}");
        assert_ne!(checksum_is_right(&sent), Some(false), "{what}");
    }

    fn key(&self) -> ForwardKey {
        ForwardKey {
            address: self.old,
            vlan: 0,
            bridge: BridgeNumber::FIRST,
        }
    }

    fn value(&mut self) -> Forward {
        let key = self.key();
        self.kernel.entry("FORWARDS", key).unwrap()
    }

    fn run(&mut self, frame: &[u8]) -> (i32, Vec<u8>) {
        self.kernel.run_frame(self.at.program, frame)
    }

    /// Asserts that the frame is forwarded, with a correct checksum if it has one.
    fn sends_on(&mut self, what: &str, frame: &[u8]) {
        let (verdict, sent) = self.run(frame);
        let at = self.at;
        assert_eq!(verdict, at.sent, "{what} at {at:?}");
        assert_eq!(sent[..6], NEXT_HOP_MAC, "{what} at {at:?}");
        assert_eq!(sent[14..21], frame[14..21], "{what} at {at:?}");
        assert_eq!(sent[21], HOP_LIMIT - 1, "{what} at {at:?}");
        assert_eq!(sent[22..38], frame[22..38], "{what} at {at:?}");
        assert_eq!(sent[38..54], self.new, "{what} at {at:?}");
        assert_ne!(checksum_is_right(&sent), Some(false), "{what} at {at:?}");
    }
}

/// Checks the checksum with another library; `None` if that library finds no checksum.
fn checksum_is_right(frame: &[u8]) -> Option<bool> {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(NetSlice::Ipv6(ip)) = &packet.net else {
        panic!("not IPv6");
    };
    let header = ip.header().to_header();
    match packet.transport? {
        TransportSlice::Udp(udp) => {
            let sum = udp
                .to_header()
                .calc_checksum_ipv6(&header, udp.payload())
                .unwrap();
            Some(udp.checksum() == sum && sum != 0)
        }
        TransportSlice::Tcp(tcp) => {
            let sum = tcp.calc_checksum_ipv6(header.source, header.destination);
            Some(tcp.checksum() == sum.unwrap())
        }
        TransportSlice::Icmpv6(icmp) => {
            Some(icmp.is_checksum_valid(header.source, header.destination))
        }
        other => panic!("not {other:?}"),
    }
}

/// Runs a test at every hook, on a host with a resolved next hop unless the test changes that.
fn at_every_hook(
    pair: ([u8; 16], [u8; 16]),
    prepare: impl Fn(&Namespace) + Sync,
    test: impl Fn(&mut Host) + Sync,
) {
    at_hooks(&HOOKS, pair, prepare, test);
}

/// Runs a test at the TAP's hook only.
fn at_the_tap(
    pair: ([u8; 16], [u8; 16]),
    prepare: impl Fn(&Namespace) + Sync,
    test: impl Fn(&mut Host) + Sync,
) {
    let [_, tap, _] = HOOKS;
    at_hooks(&[tap], pair, prepare, test);
}

fn at_hooks(
    hooks: &[At],
    pair: ([u8; 16], [u8; 16]),
    prepare: impl Fn(&Namespace) + Sync,
    test: impl Fn(&mut Host) + Sync,
) {
    if !privileged() {
        return;
    }
    for at in hooks.iter().copied() {
        let namespace = Namespace::new("forward");
        namespace.ip("link add up0 type veth peer name far");
        namespace.ip("link set far up");
        namespace.ip("link set up0 mtu 1400 up");
        namespace.ip("addr add 2001:db8:1::10/64 dev up0 nodad");
        namespace.ip("route add default via 2001:db8:1::fe dev up0");
        namespace.ip("neigh add 2001:db8:1::fe lladdr 02:00:00:00:00:fe dev up0");
        prepare(&namespace);
        namespace.run(|| {
            std::fs::write("/proc/sys/net/ipv6/conf/lo/forwarding", "1").unwrap();
            let mut host = Host {
                kernel: Kernel::load().unwrap(),
                at,
                old: pair.0,
                new: pair.1,
            };
            test(&mut host);
        });
    }
}

fn nothing(_: &Namespace) {}

fn ip(destination: [u8; 16]) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    PacketBuilder::ethernet2(ROUTER_MAC, VM_MAC).ipv6(
        address(CORRESPONDENT),
        destination,
        HOP_LIMIT,
    )
}

fn udp(destination: [u8; 16], payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = ip(destination).udp(5000, 5004);
    builder.write(&mut frame, payload).unwrap();
    frame
}

fn tcp(destination: [u8; 16], payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = ip(destination).tcp(40_000, 22, 12_345, 6000).ack(77);
    builder.write(&mut frame, payload).unwrap();
    frame
}

fn echo(destination: [u8; 16], payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = ip(destination).icmpv6_echo_request(7, 8);
    builder.write(&mut frame, payload).unwrap();
    frame
}

/// Returns an ICMPv6 Packet Too Big error about a packet of the VM.
fn too_big(destination: [u8; 16]) -> Vec<u8> {
    let inner = udp(destination, &[1; 100]);
    let mut frame = Vec::new();
    let error = Icmpv6Type::PacketTooBig { mtu: 1280 };
    ip(destination)
        .icmpv6(error)
        .write(&mut frame, &inner[14..])
        .unwrap();
    frame
}

/// Returns a non-first fragment, which carries no checksum.
fn fragment(destination: [u8; 16]) -> Vec<u8> {
    let offset = IpFragOffset::try_new(100).unwrap();
    let header = Ipv6FragmentHeader::new(17.into(), offset, false, 99);
    let mut bytes = Vec::new();
    header.write(&mut bytes).unwrap();
    bytes.extend([9; 64]);
    let mut frame = Vec::new();
    ip(destination)
        .write(&mut frame, 44.into(), &bytes)
        .unwrap();
    frame
}

#[test]
fn packets_of_every_kind_are_sent_on_with_right_checksums() {
    for pair in [neutral_pair(), any_pair()] {
        at_every_hook(pair, nothing, |host| {
            host.forward(|_| {});
            let old = host.old;
            let mut packets = 0;
            let mut bytes = 0;
            for length in [0, 1, 2, 100, 1200] {
                let payload: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
                for (what, frame) in [
                    ("UDP", udp(old, &payload)),
                    ("TCP", tcp(old, &payload)),
                    ("echo", echo(old, &payload)),
                    ("error", too_big(old)),
                ] {
                    host.sends_on(&format!("{what}, {length} bytes"), &frame);
                    packets += 1;
                    bytes += frame.len() as u64;
                }
            }
            let value = host.value();
            assert_eq!(
                (value.packets, value.bytes, value.dropped),
                (packets, bytes, 0)
            );
            let forwarded = host.kernel.counter(Counter::ForwardedPackets);
            assert_eq!(forwarded, packets);
        });
    }
}

#[test]
fn neutral_addresses_leave_all_but_the_destination_as_it_was() {
    at_every_hook(neutral_pair(), nothing, |host| {
        assert_eq!(forward::difference(&host.old, &host.new), 0);
        host.forward(|_| {});
        let frame = tcp(host.old, &[3; 100]);
        let (_, sent) = host.run(&frame);
        assert_eq!(sent[54..], frame[54..]);
        host.sends_on("fragment", &fragment(host.old));
    });
}

#[test]
fn fragment_whose_checksum_would_have_to_change_elsewhere_is_dropped_and_counted() {
    at_every_hook(any_pair(), nothing, |host| {
        host.forward(|_| {});
        let frame = fragment(host.old);
        assert_eq!(host.run(&frame).0, host.at.drop);
        assert_eq!(host.kernel.counted(), [(Counter::ForwardHeaders, 1)]);
        assert_eq!(host.value().dropped, 1);
    });
}

#[test]
fn packet_of_others_or_after_the_time_or_of_this_link_passes_unchanged() {
    at_every_hook(neutral_pair(), nothing, |host| {
        let old = host.old;
        let passes = |host: &mut Host, what: &str, frame: &[u8]| {
            let (verdict, after) = host.run(frame);
            assert_eq!(verdict, host.at.pass, "{what}");
            assert_eq!(after, frame, "{what}");
        };
        passes(host, "nothing is sent on", &udp(old, b"x"));
        host.forward(|_| {});
        passes(host, "another address", &udp(address(NEW), b"x"));
        let asks = neighbour::probe(&old, ROUTER_MAC, [0; 6]);
        passes(host, "a Solicitation to a group", &asks);
        let mut asks_one = asks;
        asks_one[38..54].copy_from_slice(&old);
        passes(host, "a Solicitation to the VM", &asks_one);
        let mut link_local = udp(old, b"x");
        link_local[22..38].copy_from_slice(&address("fe80::1"));
        passes(host, "a link-local sender", &link_local);
        host.forward(|value| value.until_ns = 1);
        passes(host, "too late", &udp(old, b"x"));
        assert_eq!(host.value().packets, 0);
    });
}

#[test]
fn packet_goes_into_the_tap_while_others_wait_there_that_came_before() {
    at_every_hook(neutral_pair(), nothing, |host| {
        let packet = udp(host.old, b"x");
        let waits = |host: &mut Host, what: &str| {
            let (verdict, after) = host.run(&packet);
            assert_eq!(verdict, host.at.pass, "{what}");
            assert_eq!(after, packet, "{what}");
        };
        let gate = |host: &mut Host, gate: Gate, held: u64| {
            let usage = GateUsage {
                held,
                ..GateUsage::default()
            };
            host.kernel.insert("GATE_USAGE", IFINDEX, usage);
            host.kernel.insert("GATES", IFINDEX, gate);
        };
        let sent_on = |replayed: u64| Gate {
            replayed,
            ..Gate::record(0, false, u64::MAX)
        };
        host.forward(|value| (value.ifindex, value.unread_until_ns) = (IFINDEX, u64::MAX));
        host.sends_on("without a gate", &packet);
        gate(host, Gate::record(0, false, u64::MAX), 0);
        waits(host, "before the cut");
        gate(host, sent_on(4), 5);
        waits(host, "while one waits");
        gate(host, sent_on(5), 5);
        host.sends_on("when none waits", &packet);
        gate(host, Gate::hold(u64::MAX), 5);
        host.sends_on("when a VM arrives there", &packet);
        gate(host, sent_on(4), 5);
        host.forward(|value| (value.ifindex, value.unread_until_ns) = (IFINDEX, 1));
        host.sends_on("after the time", &packet);
    });
}

#[test]
fn packet_that_cannot_be_sent_on_is_dropped_with_its_reason() {
    let spent = |old| {
        let mut frame = udp(old, b"x");
        frame[21] = 1;
        frame
    };
    at_every_hook(neutral_pair(), nothing, |host| {
        host.forward(|_| {});
        let (old, drop) = (host.old, host.at.drop);
        assert_eq!(host.run(&spent(old)).0, drop);
        assert_eq!(host.run(&udp(old, &[0; 1400])).0, drop);
        assert_eq!(
            host.kernel.counted(),
            [(Counter::ForwardHopLimit, 1), (Counter::ForwardTooBig, 1)]
        );
        assert_eq!(host.value().dropped, 2);
    });
    let unknown = |namespace: &Namespace| {
        namespace.ip("neigh del 2001:db8:1::fe dev up0");
    };
    at_every_hook(neutral_pair(), unknown, |host| {
        host.forward(|_| {});
        let frame = udp(host.old, b"x");
        assert_eq!(host.run(&frame).0, host.at.drop);
        assert_eq!(host.kernel.counted(), [(Counter::ForwardNoNeighbour, 1)]);
    });
    let no_route = |namespace: &Namespace| namespace.ip("-6 route del default");
    at_every_hook(neutral_pair(), no_route, |host| {
        host.forward(|_| {});
        let frame = udp(host.old, b"x");
        assert_eq!(host.run(&frame).0, host.at.drop);
        assert_eq!(host.kernel.counted(), [(Counter::ForwardNoRoute, 1)]);
    });
}

#[test]
fn what_goes_to_the_bridge_goes_back_by_its_own_port_where_nothing_is_sent_to_bridges() {
    at_every_hook(neutral_pair(), nothing, |host| {
        let up0 = nix::net::if_::if_nametoindex("up0").unwrap();
        host.forward(|value| value.bridge = up0);
        if host.at.program == "uplink_xdp" {
            host.at.sent = XDP_TX;
        }
        let frame = udp(host.old, b"x");
        host.sends_on("back", &frame);
    });
}

#[test]
fn sum_over_the_whole_packet_that_a_card_delivers_stays_right() {
    for pair in [neutral_pair(), any_pair()] {
        at_every_hook(pair, nothing, |host| {
            if host.at.program == "uplink_xdp" {
                return;
            }
            host.forward(|_| {});
            let fd = host.kernel.program_fd(host.at.program);
            for frame in [
                udp(host.old, &[5; 99]),
                tcp(host.old, &[5; 99]),
                echo(host.old, &[5; 99]),
            ] {
                let Some(sent) = test_run::with_sum(fd, &frame) else {
                    return;
                };
                let sent = sent.expect("the sum over the packet");
                assert_eq!(checksum_is_right(&sent), Some(true));
            }
        });
    }
}

/// Returns the packet as the VM sends it: from the address to which the tests above send, to a
/// router of the link that the VM left.
fn from_vm(mut frame: Vec<u8>) -> Vec<u8> {
    let (source, destination) = (frame[22..38].to_vec(), frame[38..54].to_vec());
    frame[22..38].copy_from_slice(&destination);
    frame[38..54].copy_from_slice(&source);
    frame[..12].rotate_left(6);
    frame
}

#[test]
fn what_a_vm_still_sends_from_an_address_that_it_has_left_is_sent_from_its_new_one() {
    for pair in [neutral_pair(), any_pair()] {
        at_the_tap(pair, nothing, |host| {
            host.translate(|_, _| {});
            let old = host.old;
            let mut packets = 0;
            let mut bytes = 0;
            for length in [0, 1, 2, 100, 1200] {
                let payload: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
                for (what, frame) in [
                    ("UDP", udp(old, &payload)),
                    ("TCP", tcp(old, &payload)),
                    ("echo", echo(old, &payload)),
                    ("error", too_big(old)),
                ] {
                    bytes += frame.len() as u64;
                    host.sends_from_new(&format!("{what}, {length} bytes"), &from_vm(frame));
                    packets += 1;
                }
            }
            let value = host.translation();
            assert_eq!(
                (value.packets, value.bytes, value.dropped),
                (packets, bytes, 0)
            );
            let translated = host.kernel.counter(Counter::TranslatedPackets);
            assert_eq!(translated, packets);
        });
    }
    at_the_tap(neutral_pair(), nothing, |host| {
        host.translate(|_, _| {});
        let old = host.old;
        host.sends_from_new("fragment", &from_vm(fragment(old)));
    });
}

#[test]
fn next_hop_that_is_not_known_yet_is_found_by_the_kernel() {
    let unknown = |namespace: &Namespace| {
        namespace.ip("neigh del 2001:db8:1::fe dev up0");
    };
    at_the_tap(neutral_pair(), unknown, |host| {
        host.translate(|_, _| {});
        let frame = from_vm(udp(host.old, b"x"));
        host.sends_from_new("unknown next hop", &frame);
    });
}

#[test]
fn nothing_else_that_comes_from_a_vm_is_translated() {
    at_the_tap(neutral_pair(), nothing, |host| {
        let old = host.old;
        let passes = |host: &mut Host, what: &str, frame: &[u8]| {
            let (verdict, after) = host.run(frame);
            assert_eq!(verdict, PASS, "{what}");
            assert_eq!(after, frame, "{what}");
        };
        let frame = from_vm(udp(old, b"x"));
        passes(host, "nothing is translated", &frame);
        host.translate(|key, _| key.ifindex = IFINDEX + 1);
        passes(host, "by another VM's TAP", &frame);
        host.translate(|key, _| key.vlan = 7);
        passes(host, "of another VLAN", &frame);
        host.translate(|_, value| value.until_ns = 1);
        passes(host, "too late", &frame);
        host.translate(|_, _| {});
        passes(host, "another address", &from_vm(udp(address(NEW), b"x")));
        passes(host, "for it", &udp(old, b"x"));
        let mut asks = from_vm(neighbour::probe(&old, ROUTER_MAC, [0; 6]).to_vec());
        asks[22..38].copy_from_slice(&old);
        asks[38..54].copy_from_slice(&address(CORRESPONDENT));
        passes(host, "a Solicitation", &asks);
        for (what, destination) in [("a group", "ff1e::1"), ("a link-local address", "fe80::1")] {
            let mut other = frame.clone();
            other[38..54].copy_from_slice(&address(destination));
            passes(host, what, &other);
        }
        assert_eq!(host.translation().packets, 0);
        assert_eq!(host.kernel.counter(Counter::TranslatedPackets), 0);
    });
}

#[test]
fn packet_that_cannot_be_sent_from_the_new_address_is_dropped_with_its_reason() {
    at_the_tap(neutral_pair(), nothing, |host| {
        host.translate(|_, _| {});
        let old = host.old;
        let mut spent = from_vm(udp(old, b"x"));
        spent[21] = 1;
        assert_eq!(host.run(&spent).0, SHOT);
        assert_eq!(host.run(&from_vm(udp(old, &[0; 1400]))).0, SHOT);
        assert_eq!(
            host.kernel.counted(),
            [(Counter::ForwardHopLimit, 1), (Counter::ForwardTooBig, 1)]
        );
        assert_eq!(host.translation().dropped, 2);
    });
    at_the_tap(any_pair(), nothing, |host| {
        host.translate(|_, _| {});
        let frame = from_vm(fragment(host.old));
        assert_eq!(host.run(&frame).0, SHOT);
        assert_eq!(host.kernel.counted(), [(Counter::ForwardHeaders, 1)]);
    });
    let no_route = |namespace: &Namespace| namespace.ip("-6 route del default");
    at_the_tap(neutral_pair(), no_route, |host| {
        host.translate(|_, _| {});
        let frame = from_vm(udp(host.old, b"x"));
        assert_eq!(host.run(&frame).0, SHOT);
        assert_eq!(host.kernel.counted(), [(Counter::ForwardNoRoute, 1)]);
    });
}

#[test]
fn packets_that_are_not_sent_on_cost_little() {
    if !privileged() {
        return;
    }
    let mut kernel = Kernel::load().unwrap();
    let frame = udp(address(OLD), &[0; 1000]);
    let off = kernel.repeatedly("uplink", &frame, 200_000).as_nanos() / 200_000;
    kernel.set_array("FORWARDING", 0, 1_u32);
    let on = kernel.repeatedly("uplink", &frame, 200_000).as_nanos() / 200_000;
    println!("unicast packet of others at uplink: {off} ns, {on} ns while something is sent on");
}
