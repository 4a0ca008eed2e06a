//! Tests of packets that an arrived VM still sends from its old addresses.

use common::signal::AddressClaim;
use common::signal::{MigrationProgress, Phase};

use super::*;
use crate::proto::arrival::tests::request;
use crate::proto::tests::fixture::{BRIDGE, Bench, MAC, OTHER_MAC, UUID, on_link};
use crate::proto::{
    AddressEvent, Dispute, Domain, DomainInterface, HypervisorEvent, Output, PeerEvent, Port,
    PortEvent, Said,
};

const S: Duration = Duration::from_secs(1);
const MIGRATION: u64 = 9;
const CLAIM: u64 = 77;
/// TAPs of the NIC with the new address, and of the NIC with the old address.
const NEW_TAP: u32 = 20;
const OLD_TAP: u32 = 21;

fn old() -> Ipv6Addr {
    "2001:db8:2::88".parse().unwrap()
}

fn new() -> Ipv6Addr {
    "2001:db8:1::77".parse().unwrap()
}

fn claim(left: &[Ipv6Addr], translate_s: u32) -> AddressClaim {
    AddressClaim {
        migration: MIGRATION,
        address: new().octets().into(),
        mac: MAC.into(),
        quarantine_s: 20,
        translate: left.iter().map(|it| it.octets().into()).collect(),
        translate_s,
    }
}

/// Returns an agent that expects `viewer` with two NICs and has the claim; its outputs are the outputs
/// of the claim.
fn claimed(left: &[Ipv6Addr], translate_s: u32) -> Bench {
    let mut bench = Bench::empty();
    bench.peer(PeerEvent::Up { from: None });
    let mut body = request(UUID, vec![]);
    body.macs = vec![MAC.into(), OTHER_MAC.into()];
    bench.frame(MIGRATION, body);
    bench.outputs();
    bench.frame(CLAIM, claim(left, translate_s));
    bench
}

fn port(bench: &mut Bench, ifindex: u32, mac: [u8; 6]) {
    let [_, rest @ ..] = mac;
    let [b, c, d, e, f] = rest;
    let port = Port {
        bridge: BRIDGE,
        ifindex,
        name: format!("vnet{ifindex}"),
        mac: [0xfe, b, c, d, e, f],
    };
    bench.agent.handle_port(bench.now, PortEvent::Added(port));
}

fn ports(bench: &mut Bench) {
    port(bench, NEW_TAP, MAC);
    port(bench, OLD_TAP, OTHER_MAC);
}

fn runs(bench: &mut Bench) {
    let interface = |ifindex: u32, mac| DomainInterface {
        target_dev: format!("vnet{ifindex}"),
        mac,
        vhost: false,
    };
    bench.hypervisor(HypervisorEvent::Domain(Domain {
        uuid: UUID,
        name: "viewer".to_owned(),
        running: true,
        interfaces: vec![interface(NEW_TAP, MAC), interface(OLD_TAP, OTHER_MAC)],
    }));
}

fn commands(bench: &mut Bench) -> Vec<TranslateCommand> {
    let command = |output: Output| match output {
        Output::Translate(TranslateCommand::Read) => None,
        Output::Translate(command) => Some(command),
        _ => None,
    };
    bench.outputs().into_iter().filter_map(command).collect()
}

fn set(until: Timestamp) -> TranslateCommand {
    TranslateCommand::Set {
        ifindex: OLD_TAP,
        address: on_link(old()),
        to: new(),
        until,
        uuid: UUID,
    }
}

fn removed(address: Ipv6Addr) -> TranslateCommand {
    TranslateCommand::Remove {
        ifindex: OLD_TAP,
        address: on_link(address),
    }
}

#[test]
fn old_address_is_translated_at_the_tap_of_the_other_nic_as_soon_as_it_is_there() {
    let mut bench = claimed(&[old()], 10);
    assert_eq!(commands(&mut bench), []);
    ports(&mut bench);
    let until = bench.now + 10 * S;
    assert_eq!(commands(&mut bench), [set(until)]);
}

#[test]
fn time_that_was_asked_for_counts_from_the_switch_and_is_bounded() {
    for (asked, lasting) in [(10, 10), (u32::MAX, 60)] {
        let mut bench = claimed(&[old()], asked);
        ports(&mut bench);
        bench.outputs();
        bench.pass(5 * S);
        let progress = MigrationProgress {
            phase: Phase::Switching,
            processed_bytes: 0,
            total_bytes: 0,
            elapsed_ms: 0,
            vm_pause_ms: None,
            clock_ns: None,
        };
        bench.frame(MIGRATION, progress);
        assert_eq!(commands(&mut bench), [set(bench.now + lasting * S)]);
        bench.pass(S / 10);
        runs(&mut bench);
        let until = bench.now + lasting * S;
        assert_eq!(commands(&mut bench), [set(until)]);
        bench.pass(lasting * S - S / 1000);
        assert_eq!(commands(&mut bench), []);
        bench.pass(S / 1000);
        assert_eq!(commands(&mut bench), [removed(old())]);
        // No further output follows.
        bench.pass(S);
        port(&mut bench, 50, [2; 6]);
        assert_eq!(commands(&mut bench), []);
    }
}

#[test]
fn nothing_is_translated_where_nothing_is_to_be_or_the_address_is_one_of_this_link() {
    let on_link = ["2001:db8:1::5", "ff02::1", "fe80::1"].map(|it| it.parse().unwrap());
    for (left, translate_s) in [
        (&[][..], 10),
        (&[old()][..], 0),
        (&on_link[..], 10),
        (&[new()][..], 10),
    ] {
        let mut bench = claimed(left, translate_s);
        ports(&mut bench);
        runs(&mut bench);
        assert_eq!(commands(&mut bench), [], "{left:?} for {translate_s} s");
    }
}

#[test]
fn more_addresses_than_a_vm_can_have_are_not_listened_to() {
    let many: Vec<Ipv6Addr> = (1..100)
        .map(|number| Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, number))
        .collect();
    let mut bench = claimed(&many, 10);
    ports(&mut bench);
    assert_eq!(commands(&mut bench), []);
    assert_eq!(bench.agent.view().counters().malformed_frames, 1);
}

#[test]
fn address_that_turns_out_to_be_somebody_elses_is_translated_no_more() {
    let mut bench = claimed(&[old()], 10);
    ports(&mut bench);
    bench.outputs();
    bench.frame(CLAIM, claim(&[], 10));
    assert_eq!(commands(&mut bench), [removed(old())]);
}

#[test]
fn end_of_the_claim_or_of_the_tap_or_the_vm_ends_it() {
    let taken = AddressEvent::Heard {
        address: new(),
        said: Said::Has,
        by: [2, 0, 0, 0, 0, 5],
    };
    let ends: [&dyn Fn(&mut Bench); 3] = [
        &|bench| bench.agent.handle_address(bench.now, BRIDGE, taken.clone()),
        &|bench| bench.unplug(OLD_TAP),
        &|bench| {
            runs(bench);
            bench.hypervisor(HypervisorEvent::Gone(UUID));
        },
    ];
    for (number, end) in ends.into_iter().enumerate() {
        let mut bench = claimed(&[old()], 10);
        bench.agent.machines.cx.config.unicast.disputed = Dispute::Refuse;
        ports(&mut bench);
        bench.outputs();
        end(&mut bench);
        let commands = commands(&mut bench);
        assert_eq!(
            commands.last(),
            Some(&removed(old())),
            "{number}: {commands:?}"
        );
    }
}

#[test]
fn what_was_counted_is_in_the_record_of_the_arrival() {
    let mut bench = claimed(&[old()], 10);
    ports(&mut bench);
    bench.agent.handle_address(
        bench.now,
        BRIDGE,
        AddressEvent::Translated {
            ifindex: OLD_TAP,
            address: old(),
            packets: 3,
            bytes: 300,
            dropped: 1,
        },
    );
    let record = bench.agent.view().migrations().last().unwrap();
    let expected = TranslationRecord {
        ifindex: OLD_TAP,
        address: old(),
        packets: 3,
        bytes: 300,
        dropped: 1,
    };
    assert_eq!(record.unicast.as_ref().unwrap().translations, [expected]);
}

#[test]
fn pinned_translations_are_adopted_and_end_by_themselves_or_with_their_vm() {
    for gone in [false, true] {
        let mut bench = Bench::empty();
        let key = TranslationKey {
            address: old().octets(),
            ifindex: OLD_TAP,
            vlan: 0,
            bridge: BRIDGE,
        };
        let value = Translation {
            until_ns: (bench.now + 5 * S).0,
            source: new().octets(),
            domain_uuid: UUID.0,
            ..Translation::default()
        };
        let over = Translation {
            until_ns: bench.now.0,
            ..value
        };
        let other_key = TranslationKey {
            address: [9; 16],
            ..key
        };
        let pinned = vec![(key, value), (other_key, over)];
        bench.agent.handle_translations(bench.now, pinned);
        assert_eq!(commands(&mut bench), [removed([9; 16].into())]);
        if gone {
            bench.hypervisor(HypervisorEvent::Gone(UUID));
        } else {
            bench.pass(5 * S);
        }
        assert_eq!(commands(&mut bench), [removed(old())]);
    }
}
