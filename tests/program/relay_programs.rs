//! The programs of the relay by program test-run: resulting frames, counters and verdicts, at both
//! hooks of `uplink`, and by the same rule in userspace.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::net::Ipv6Addr;

use common::counter::Counter;
use common::event::Kind;
use common::maps::{BridgeNumber, Copies, Origins};
use common::relay::restore;
use common::testing::frame::{self, Frame};
use common::wire::datagram::{HEADER_BYTES, Header};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use roamcast::proto::Stream;
use support::kernel::{Kernel, PASS, SHOT};
use support::relay::{Relayed, checksum_is_right};
use support::test_run;

const GROUP: &str = "ff3e::1234";
const PAYLOAD: &[u8] = &[7; 100];

/// Hook of `uplink`, with the hook's verdicts.
#[derive(Clone, Copy, Debug)]
struct At {
    program: &'static str,
    pass: i32,
    drop: i32,
}

const TC: At = At {
    program: "uplink",
    pass: PASS,
    drop: SHOT,
};
const XDP: At = At {
    program: "uplink_xdp",
    pass: 2,
    drop: 1,
};
const HOOKS: [At; 2] = [TC, XDP];

/// The programs with one relayed flow.
struct Agent {
    kernel: Kernel,
    at: At,
    relayed: Relayed,
}

impl Agent {
    fn start(at: At, origins: Origins) -> Option<Self> {
        let mut agent = Self {
            kernel: Kernel::load()?,
            at,
            relayed: Relayed::usual(),
        };
        agent.kernel.manage_as(GROUP, 0, origins);
        agent.add(&Relayed::usual());
        Some(agent)
    }

    fn add(&mut self, relayed: &Relayed) {
        let kernel = &mut self.kernel;
        kernel.insert("RELAY_FLOWS", relayed.flow_key(), relayed.entry());
        kernel.insert("RELAYS", relayed.relay_key(), 1_u32);
    }

    fn run(&mut self, frame: &[u8]) -> (i32, Vec<u8>) {
        self.kernel.run_frame(self.at.program, frame)
    }

    /// Returns true if the frame passes.
    fn passes(&mut self, frame: &[u8]) -> bool {
        match self.run(frame).0 {
            verdict if verdict == self.at.pass => true,
            verdict if verdict == self.at.drop => false,
            verdict => panic!("verdict {verdict}"),
        }
    }

    fn native(&mut self, payload: &[u8]) -> bool {
        self.passes(&self.relayed.native(payload))
    }

    fn relay(&mut self, payload: &[u8]) -> bool {
        self.passes(&self.relayed.datagram(payload))
    }

    fn stream(&mut self) -> Stream {
        let streams = self.kernel.streams();
        assert_eq!(streams.len(), 1, "{streams:?}");
        assert_eq!(streams[0].0, self.relayed.stream);
        streams[0].1
    }
}

/// Runs a test at both hooks.
fn at_both_hooks(origins: Origins, test: impl Fn(Agent)) {
    for at in HOOKS {
        let Some(agent) = Agent::start(at, origins) else {
            return;
        };
        test(agent);
    }
}

#[test]
fn relayed_datagram_becomes_the_multicast_packet_that_it_was() {
    at_both_hooks(Origins::Relay, |mut agent| {
        for length in [0, 1, 2, 100, 1399, 1400] {
            let payload: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
            let (verdict, restored) = agent.run(&agent.relayed.datagram(&payload));
            assert_eq!(verdict, agent.at.pass);
            assert_eq!(restored, agent.relayed.restored(&payload));
            assert!(checksum_is_right(&restored));
        }
        assert_eq!(agent.kernel.counted(), [(Counter::RelayedPackets, 6)]);
        let stream = agent.stream();
        assert_eq!((stream.relay.packets, stream.native.packets), (6, 0));
        assert_eq!(stream.relay.bytes, 6 * 62 + 1 + 2 + 100 + 1399 + 1400);
        assert!(stream.relay.first_ns > 0 && stream.relay.last_ns > stream.relay.first_ns);
        assert!(stream.relay.interarrival_ns > 0);
        assert_eq!(agent.kernel.events(), [Kind::FirstPacket as u32]);
    });
}

#[test]
fn checksum_of_all_ones_does_not_become_none() {
    // The last two bytes make the checksum 0, which is sent as 0xffff.
    let relayed = Relayed::usual();
    let mut payload = [0; 64];
    let bytes = relayed.datagram(&payload);
    payload[62..].copy_from_slice(&bytes[60..62]);
    let datagram = relayed.datagram(&payload);
    assert_eq!(datagram[60..62], [0xff, 0xff]);
    at_both_hooks(Origins::Relay, |mut agent| {
        let (verdict, restored) = agent.run(&datagram);
        assert_eq!(verdict, agent.at.pass);
        assert_eq!(restored, relayed.restored(&payload));
    });
}

#[test]
fn wrong_checksum_stays_wrong() {
    at_both_hooks(Origins::Relay, |mut agent| {
        let mut datagram = agent.relayed.datagram(PAYLOAD);
        datagram[61] ^= 0x40;
        let (verdict, restored) = agent.run(&datagram);
        assert_eq!(verdict, agent.at.pass);
        assert!(!checksum_is_right(&restored));
    });
}

#[test]
fn sum_over_the_packet_that_a_card_delivers_is_brought_up_to_date() {
    let Some(mut agent) = Agent::start(TC, Origins::Relay) else {
        return;
    };
    let datagram = agent.relayed.datagram(PAYLOAD);
    let program = agent.kernel.program_fd(TC.program);
    // The kernel then compares that sum with the packet.
    let Some(restored) = test_run::with_sum(program, &datagram) else {
        eprintln!("Skipped: this kernel does not run programs on such packets");
        return;
    };
    assert_eq!(restored.unwrap(), agent.relayed.restored(PAYLOAD));
    assert_eq!(agent.kernel.counter(Counter::RelayedPackets), 1);
}

#[test]
fn kernel_restores_any_flow_as_userspace_does() {
    for at in HOOKS {
        let Some(mut agent) = Agent::start(at, Origins::Relay) else {
            return;
        };
        let mut runner = TestRunner::new(Config {
            cases: 300,
            failure_persistence: None,
            ..Config::default()
        });
        let group = any::<u128>().prop_map(|bits| Ipv6Addr::from(bits | 0xff << 120));
        let unicast = any::<u128>().prop_map(|bits| Ipv6Addr::from(bits & !(0xff << 120) | 1));
        let strategy = (
            (unicast.clone(), any::<u16>()),
            (group, any::<u16>()),
            unicast.clone(),
            unicast,
            prop::collection::vec(any::<u8>(), 0..300),
        );
        let agent = std::cell::RefCell::new(&mut agent);
        runner
            .run(&strategy, |(source, group, relay, host, payload)| {
                let mut agent = agent.borrow_mut();
                let relayed = Relayed::new(source, group, relay, host);
                agent.add(&relayed);
                let kernel = &mut agent.kernel;
                kernel.manage_as(&group.0.to_string(), 0, Origins::Relay);
                let mut expected = relayed.datagram(&payload);
                let mut header = Header::read(&expected[..]).unwrap();
                restore(&mut header, &relayed.flow());
                expected[..HEADER_BYTES].copy_from_slice(&header.bytes());
                let (verdict, restored) = agent.run(&relayed.datagram(&payload));
                prop_assert_eq!(verdict, agent.at.pass);
                prop_assert!(checksum_is_right(&restored));
                prop_assert_eq!(&restored, &expected);
                prop_assert_eq!(&restored, &relayed.restored(&payload));
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn broken_datagrams_of_a_flow_are_dropped_and_counted() {
    at_both_hooks(Origins::Relay, |mut agent| {
        let whole = agent.relayed.datagram(PAYLOAD);
        let mut no_checksum = whole.clone();
        no_checksum[60..62].fill(0);
        let mut short_udp = whole.clone();
        short_udp[59] -= 1;
        let mut short_ip = whole.clone();
        short_ip[19] -= 1;
        let mut tiny = whole.clone();
        tiny[18..20].copy_from_slice(&[0, 7]);
        tiny[58..60].copy_from_slice(&[0, 7]);
        let truncated = whole[..whole.len() - 1].to_vec();
        for (number, frame) in [no_checksum, short_udp, short_ip, tiny, truncated]
            .iter()
            .enumerate()
        {
            let (verdict, after) = agent.run(frame);
            assert_eq!(verdict, agent.at.drop, "{number}");
            assert_eq!(&after, frame);
            let counted = agent.kernel.counted();
            assert_eq!(counted, [(Counter::RelayMalformed, number as u64 + 1)]);
        }
        assert!(agent.kernel.streams().is_empty());
    });
}

#[test]
fn what_is_no_established_flow_passes_untouched() {
    at_both_hooks(Origins::Relay, |mut agent| {
        let whole = agent.relayed.datagram(PAYLOAD);
        let change = |at: usize| {
            let mut frame = whole.clone();
            frame[at] ^= 1;
            frame
        };
        let mut uncounted = vec![change(37), change(53), change(20), change(14 + 6)];
        let mut low_port = whole.clone();
        low_port[56] = 0x7f;
        uncounted.push(low_port);
        let mut tagged = whole.clone();
        tagged.splice(12..12, [0x81, 0, 0, 7]);
        uncounted.push(tagged);
        uncounted.push(whole[..60].to_vec());
        for frame in uncounted {
            assert_eq!(agent.run(&frame), (agent.at.pass, frame.clone()));
        }
        assert_eq!(
            agent.kernel.counted(),
            [],
            "not from the relay to this host"
        );
        for frame in [change(55), change(57)] {
            assert_eq!(agent.run(&frame), (agent.at.pass, frame.clone()));
        }
        assert_eq!(agent.kernel.counted(), [(Counter::RelayUnknownFlow, 2)]);
        assert!(agent.kernel.streams().is_empty());
    });
}

#[test]
fn flow_is_restored_for_the_address_it_was_announced_to_only() {
    at_both_hooks(Origins::Relay, |mut agent| {
        let mut entry = agent.relayed.entry();
        entry.flow.agent_address[15] ^= 1;
        let key = agent.relayed.flow_key();
        agent.kernel.insert("RELAY_FLOWS", key, entry);
        assert!(agent.relay(PAYLOAD));
        assert_eq!(agent.kernel.counted(), [(Counter::RelayUnknownFlow, 1)]);
    });
}

#[test]
fn fragment_of_a_relay_is_dropped_and_of_others_not() {
    at_both_hooks(Origins::Relay, |mut agent| {
        let mut fragment = agent.relayed.datagram(PAYLOAD);
        fragment[20] = 44;
        assert!(!agent.passes(&fragment));
        assert_eq!(agent.kernel.counted(), [(Counter::RelayFragment, 1)]);
        fragment[30] ^= 1;
        assert!(agent.passes(&fragment));
        assert_eq!(agent.kernel.counted(), [(Counter::RelayFragment, 1)]);
    });
}

#[test]
fn flow_of_an_address_that_nobody_watches_is_dropped() {
    at_both_hooks(Origins::Relay, |mut agent| {
        agent
            .kernel
            .clear::<common::maps::ManagedKey, common::maps::Managed>("MANAGED");
        assert!(!agent.relay(PAYLOAD));
        assert_eq!(agent.kernel.counted(), [(Counter::OtherOrigin, 1)]);
    });
}

#[test]
fn origins_that_do_not_pass_are_dropped_but_seen() {
    for (origins, native, relay) in [
        (Origins::Native, true, false),
        (Origins::Relay, false, true),
    ] {
        at_both_hooks(origins, |mut agent| {
            for _ in 0..2 {
                assert_eq!(agent.native(PAYLOAD), native);
                assert_eq!(agent.relay(PAYLOAD), relay);
            }
            let stream = agent.stream();
            assert_eq!((stream.native.packets, stream.relay.packets), (2, 2));
            assert_eq!(stream.dropped(), 2);
            assert_eq!(agent.kernel.counter(Counter::OtherOrigin), 2);
            assert_eq!(agent.kernel.counter(Counter::NativePackets), 2);
            let relayed = agent.kernel.counter(Counter::RelayedPackets);
            assert_eq!(relayed, if relay { 2 } else { 0 });
            assert_eq!(agent.kernel.events().len(), 2, "one for each origin");
            let copies = agent.kernel.read::<u64, Copies>("FINGERPRINTS");
            assert!(copies.is_empty());
        });
    }
}

#[test]
fn first_copy_passes_while_both_origins_are_live() {
    at_both_hooks(Origins::Both, |mut agent| {
        for (number, length) in [0, 1, 20, 63, 64, 65, 200, 1400].into_iter().enumerate() {
            let payload = vec![number as u8; length];
            if number % 2 == 0 {
                assert!(agent.native(&payload));
                assert!(!agent.relay(&payload));
            } else {
                assert!(agent.relay(&payload));
                assert!(!agent.native(&payload));
            }
        }
        assert!(agent.native(&[0; 1400]));
        assert!(agent.native(&[0; 1400]), "a second packet of one content");
        assert!(!agent.relay(&[0; 1400]));
        assert!(!agent.relay(&[0; 1400]));
        assert!(agent.relay(&[0; 1400]));
        assert_eq!(agent.kernel.counter(Counter::SecondCopies), 10);
        assert_eq!(agent.stream().dropped(), 10);
        assert_eq!(agent.kernel.counter(Counter::OtherOrigin), 0);
    });
}

#[test]
fn copies_of_long_ago_are_other_packets() {
    at_both_hooks(Origins::Both, |mut agent| {
        assert!(agent.native(PAYLOAD));
        assert!(!agent.relay(PAYLOAD));
        for (key, copies) in agent.kernel.read::<u64, Copies>("FINGERPRINTS") {
            let old = Copies {
                last_ns: copies.last_ns.saturating_sub(3_000_000_000),
                ..copies
            };
            agent.kernel.insert("FINGERPRINTS", key, old);
        }
        assert!(agent.relay(PAYLOAD));
        assert!(!agent.native(PAYLOAD));
    });
}

#[test]
fn change_from_relay_to_native_passes_each_packet_once() {
    at_both_hooks(Origins::RelayRecorded, |mut agent| {
        let packet = |number: u8| [number; 100];
        assert!(!agent.native(&packet(1)), "counted only");
        assert!(agent.relay(&packet(1)));
        assert!(agent.relay(&packet(2)));
        assert_eq!(agent.kernel.counter(Counter::OtherOrigin), 1);
        agent.kernel.manage_as(GROUP, 0, Origins::Both);
        assert!(!agent.native(&packet(2)));
        assert!(agent.native(&packet(3)));
        assert!(!agent.relay(&packet(3)));
        assert!(agent.relay(&packet(4)));
        agent.kernel.manage_as(GROUP, 0, Origins::NativeAfterRelay);
        assert!(!agent.native(&packet(4)));
        assert!(!agent.relay(&packet(5)));
        assert!(agent.native(&packet(5)));
        assert_eq!(agent.kernel.counter(Counter::SecondCopies), 3);
        assert_eq!(agent.kernel.counter(Counter::OtherOrigin), 2);
    });
}

#[test]
fn packets_that_no_relay_carries_pass_natively_always() {
    at_both_hooks(Origins::Relay, |mut agent| {
        let fragment = Frame::udp("2001:db8::1", GROUP, (0, 0), &[0; 40]).with(|f| f.protocol = 44);
        assert!(agent.passes(&fragment.bytes()));
        let tagged = Frame::udp("2001:db8::1", GROUP, (1, 2), PAYLOAD).with(|f| f.vlan = Some(7));
        assert!(agent.passes(&tagged.bytes()), "its address is not watched");
        assert_eq!(agent.kernel.counter(Counter::NativePackets), 1);
    });
}

#[test]
fn restored_packet_is_no_native_one() {
    at_both_hooks(Origins::Relay, |mut agent| {
        assert!(agent.passes(&agent.relayed.restored(PAYLOAD)));
        assert_eq!(agent.kernel.counted(), []);
    });
}

#[test]
fn tagged_native_packets_are_watched_in_their_vlan() {
    at_both_hooks(Origins::Native, |mut agent| {
        let managed = common::maps::ManagedKey {
            vlan: 7,
            bridge: BridgeNumber::FIRST,
            multicast_address: frame::address(GROUP),
        };
        let value = common::maps::Managed::new(0, Origins::Native, u16::MAX);
        agent.kernel.insert("MANAGED", managed, value);
        let tagged = Frame::udp("2001:db8::1", GROUP, (1, 2), PAYLOAD).with(|f| f.vlan = Some(7));
        assert!(agent.passes(&tagged.bytes()));
        let (key, stream) = agent.kernel.streams().pop().unwrap();
        assert_eq!((key.vlan, key.source_port, key.destination_port), (7, 1, 2));
        assert_eq!(stream.native.packets, 1);
    });
}

#[test]
fn what_was_restored_here_does_not_leave() {
    let Some(mut kernel) = Kernel::load() else {
        return;
    };
    let relayed = Relayed::usual();
    let run = |kernel: &mut Kernel, frame: &[u8]| kernel.run_frame("leak", frame).0;
    assert_eq!(run(&mut kernel, &relayed.restored(PAYLOAD)), SHOT);
    assert_eq!(kernel.counted(), [(Counter::RelayLeaks, 1)]);
    assert_eq!(run(&mut kernel, &relayed.native(PAYLOAD)), PASS);
    assert_eq!(run(&mut kernel, &relayed.datagram(PAYLOAD)), PASS);
    assert_eq!(kernel.counted(), [(Counter::RelayLeaks, 1)]);
}
