use super::*;
use std::collections::BTreeMap;

use common::maps::{NO_BRIDGE, StreamUsage};

use crate::control::report::{
    ClaimState, ForwardRow, Hook, HypervisorStatus, JoinRow, LinkState, Mac, MigrationPhase,
    NicRow, PeerRow, Placement, PortRow, RelayRow, RelaySessionRow, RelaySessionState, Status,
    TranslationRow, UngatedReason, UngatedRow, UnicastRow, UnreadRow, UplinkRow, WaitingRow,
};
use crate::proto::Stream;

fn example() -> Status {
    let hook = |program: &str| Hook {
        program: program.to_owned(),
        mode: "tcx".to_owned(),
        side: "ingress".to_owned(),
        qdisc: None,
        before: Vec::new(),
        is_there: true,
    };
    Status {
        agent: "vms1".to_owned(),
        version: "0.1.0".to_owned(),
        pid: 7,
        uptime_ms: 3_723_000,
        longest_stall_ms: 12,
        stalls: 0,
        bridge: "br0".to_owned(),
        prefix: Some("2001:db8:1::/64".to_owned()),
        address: Some("2001:db8:1::10".parse().unwrap()),
        pin_path: "/sys/fs/bpf/roamcast/v2".to_owned(),
        uplinks: vec![UplinkRow {
            name: "eth0".to_owned(),
            ifindex: 2,
            hooks: vec![hook("uplink")],
        }],
        queriers: Vec::new(),
        peers: vec![PeerRow {
            name: "vms2".to_owned(),
            address: Some("[2001:db8:2::10]:47411".to_owned()),
            state: LinkState::Down,
            reason: Some("Connection refused".to_owned()),
        }],
        hypervisor: HypervisorStatus {
            uri: "qemu:///system".to_owned(),
            state: LinkState::Up,
            reason: None,
            domains: 1,
        },
        ports: vec![PortRow {
            name: "vnet0".to_owned(),
            ifindex: 5,
            domain: Some("viewer".to_owned()),
            hooks: vec![hook("snoop")],
            listeners: 3,
            max_listeners: 1024,
            sources: 0,
            max_sources: 4096,
            reports: 17,
            refused_reports: 1,
            refused_listeners: 2,
            refused_sources: 3,
            malformed: 9,
            datagrams: 4,
            refused_datagrams: 0,
            forged_datagrams: 0,
            withheld_datagrams: 0,
            tap_full: 0,
        }],
        port_problems: vec!["vnet1: gate waits".to_owned()],
        certificate_ends_in_days: Some(12),
        memory_problems: vec!["QEMU cannot encrypt".to_owned()],
        receptions: vec![JoinRow {
            vlan: 0,
            multicast_address: "ff1e::1".parse().unwrap(),
            mode: Reception::Native,
            waited_ms: 11,
            domains: vec!["player".to_owned()],
            held: true,
        }],
        modes: BTreeMap::from([("native".to_owned(), 7), ("relay".to_owned(), 2)]),
        relays: vec![relay()],
        relay_problems: vec!["Relay name relays.example has no IPv6 address".to_owned()],
        migrations: Vec::new(),
        waiting: vec![WaitingRow {
            domain: "tv-9".to_owned(),
            source: "vms3".to_owned(),
            waited_ms: 4000,
        }],
        counters: BTreeMap::from([("bad_checksum".to_owned(), 9)]),
    }
}

fn relay() -> RelayRow {
    RelayRow {
        relay: Some("relay1@[2001:db8:9::1]:47411".to_owned()),
        found_by: Some("servers".to_owned()),
        state: LinkState::Up,
        reason: Some("It refuses".to_owned()),
        sessions: vec![RelaySessionRow {
            multicast_address: "ff3e::77".parse().unwrap(),
            state: RelaySessionState::Serving,
            address: Some("2001:db8:9::2".parse().unwrap()),
            flows: 3,
            packets: 12_345,
            bytes: 5 << 20,
            lease_left_ms: 20_500,
            why: "native is silent".to_owned(),
        }],
    }
}

fn listener() -> ListenerRow {
    ListenerRow {
        domain: Some("viewer".to_owned()),
        port: "vnet0".to_owned(),
        vlan: 12,
        multicast_address: "ff3e::1".parse().unwrap(),
        filter_mode: FilterMode::Include,
        sources: vec!["2001:db8::1".parse().unwrap()],
        mld_version: 2,
        age_ms: 1500,
        first_report_age_ms: 61_000,
        guest_mac: Mac([0x52, 0x54, 0, 1, 2, 0xff]),
    }
}

#[test]
fn status_shows_what_an_operator_looks_for() {
    let text = status(&example());
    for expected in [
        "vms1, version 0.1.0, process 7, up 1 h 2 min",
        "br0, 2001:db8:1::10 in 2001:db8:1::/64",
        "eth0 (uplink by tcx)",
        "none has queried since this agent started",
        "qemu:///system up, 1 domain",
        "down (Connection refused)",
        "3/1024",
        "ff1e::1",
        "player",
        "answer to a Query",
        "1 of 1 connected; addresses received: 7 native, 2 relay",
        "Relay name relays.example has no IPv6 address",
        "bad_checksum",
        "Waiting for a place",
        "tv-9",
    ] {
        assert!(text.contains(expected), "{expected} is missing in\n{text}");
    }
    assert!(!text.contains("Migrations"), "an empty section in\n{text}");
}

#[test]
fn status_survives_json() {
    let json = serde_json::to_string(&example()).unwrap();
    assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), example());
}

#[test]
fn listener_shows_its_filter_and_mac() {
    let text = listeners(&[listener()]);
    for expected in [
        "ff3e::1",
        "include",
        "2001:db8::1",
        "12",
        "52:54:00:01:02:ff",
        "1.5 s",
    ] {
        assert!(text.contains(expected), "{expected} is missing in\n{text}");
    }
    let json = serde_json::to_string(&listener()).unwrap();
    assert!(
        json.contains(r#""guest_mac":"52:54:00:01:02:ff""#),
        "{json}"
    );
    assert_eq!(
        serde_json::from_str::<ListenerRow>(&json).unwrap(),
        listener()
    );
}

#[test]
fn relay_shows_its_sessions_and_why() {
    let mut idle = relay();
    idle.relay = Some("relay2@r2:1".to_owned());
    idle.sessions.clear();
    let rows = [relay(), idle];
    let text = relays(&rows);
    for expected in [
        "ff3e::77",
        "serving",
        "2001:db8:9::2",
        "12345",
        "5.0 MiB",
        "20.5 s",
        "native is silent",
        "relay2@r2:1",
        "\nrelay1@[2001:db8:9::1]:47411: It refuses",
    ] {
        assert!(text.contains(expected), "{expected} is missing in\n{text}");
    }
    let json = serde_json::to_string(&rows[0]).unwrap();
    assert!(json.contains(r#""state":"serving""#), "{json}");
    assert_eq!(serde_json::from_str::<RelayRow>(&json).unwrap(), rows[0]);
}

#[test]
fn stream_shows_both_ways_and_its_mode() {
    let key = common::maps::StreamKey {
        multicast_address: [0xff; 16],
        source: [0x20; 16],
        source_port: 5004,
        destination_port: 5005,
        vlan: 0,
        bridge: NO_BRIDGE,
    };
    let value = Stream {
        native: StreamUsage {
            packets: 11,
            last_ns: 1_000_000_000,
            interarrival_ns: 1_000_000,
            dropped: 33,
            ..StreamUsage::default()
        },
        relay: StreamUsage {
            packets: 222,
            last_ns: 9_999_000_000,
            interarrival_ns: 2_000_000,
            ..StreamUsage::default()
        },
    };
    let now = crate::proto::Timestamp(10_000_000_000);
    let row = StreamRow::new(&key, &value, Some("relay"), now);
    assert_eq!((row.packets, row.age_ms, row.managed), (233, 1, true));
    let text = streams(&[row]);
    for expected in ["relay", "11", "222", "33", "500.0"] {
        assert!(text.contains(expected), "{expected} is missing in\n{text}");
    }
}

fn completed(handover: Vec<HandoverRow>) -> MigrationRow {
    MigrationRow {
        migration: 4,
        direction: Direction::Incoming,
        domain: "viewer".to_owned(),
        domain_uuid: "u".to_owned(),
        peer: "vms2".to_owned(),
        phase: MigrationPhase::Completed,
        age_ms: 5000,
        signalling_ms: None,
        copy_ms: None,
        memory: None,
        vm_pause_ms: None,
        total_ms: None,
        processed_bytes: 0,
        total_bytes: 0,
        receptions: vec![],
        handover,
        nics: vec![],
        without_gate: vec![],
        thrown_away_at_most: 0,
        unicast: None,
        outcome: Outcome::Completed,
    }
}

#[test]
fn failed_migration_shows_its_reason() {
    let row = MigrationRow {
        direction: Direction::Outgoing,
        phase: MigrationPhase::Copying,
        signalling_ms: Some(12.4),
        total_ms: Some(900.0),
        processed_bytes: 3 << 20,
        total_bytes: 128 << 20,
        receptions: [Reception::Native, Reception::Relay, Reception::Native]
            .map(|mode| ReceptionRow {
                vlan: 0,
                multicast_address: "ff1e::1".parse().unwrap(),
                mode,
                waited_ms: 3,
            })
            .to_vec(),
        handover: vec![HandoverRow {
            nic: 0,
            vlan: 0,
            multicast_address: "ff1e::1".parse().unwrap(),
            source: "2001:db8::1".parse().unwrap(),
            source_port: 5004,
            destination_port: 5004,
            placed: Some(Placement::Time),
            delivered: 1700,
            held: 900,
            dropped: 800,
            replayed: 97,
            lost: 3,
            duplicated_at_most: 2,
            longest_held_ms: 30.5,
            overflow: true,
        }],
        unicast: Some(UnicastRow {
            address: "2001:db8:2::88".parse().unwrap(),
            claim: ClaimState::Spoken,
            forwards: vec![ForwardRow {
                address: "2001:db8:1::77".parse().unwrap(),
                to: "2001:db8:2::88".parse().unwrap(),
                packets: 41,
                bytes: 4100,
                dropped: 2,
            }],
            unread: UnreadRow {
                packets: 3,
                dropped: 1,
            },
            translations: vec![TranslationRow {
                ifindex: 12,
                address: "2001:db8:1::77".parse().unwrap(),
                packets: 9,
                bytes: 900,
                dropped: 1,
            }],
        }),
        outcome: Outcome::Failed {
            reason: "libvirtd is gone".to_owned(),
            code: "hypervisor".to_owned(),
        },
        ..completed(vec![])
    };
    let text = migrations(std::slice::from_ref(&row));
    for expected in [
        "\n4 failed: libvirtd is gone",
        "12 ms",
        "900 ms",
        "3.0 MiB",
        "2 native, 1 relay",
        "spoken, 44 forwarded, 9 translated, 4 dropped",
        "1 of 1 flows not exact, 97 replayed, 3 lost, at most 2 doubled",
        "\n4 ff1e::1 from 2001:db8::1: by time, 3 lost, at most 2 doubled; there was too little room",
    ] {
        assert!(text.contains(expected), "{expected} is missing in\n{text}");
    }
    let json = serde_json::to_string(&row).unwrap();
    assert_eq!(serde_json::from_str::<MigrationRow>(&json).unwrap(), row);
}

#[test]
fn nic_whose_gate_has_only_lapsed_is_not_well() {
    let nic = 3;
    let well = NicRow {
        nic,
        ..NicRow::default()
    };
    let lapsed = NicRow {
        has_lapsed: true,
        ..well
    };
    assert_eq!((well.is_well(), lapsed.is_well()), (true, false));
}

#[test]
fn place_where_frames_were_lost_is_named() {
    let row = MigrationRow {
        nics: vec![NicRow {
            nic: 0,
            not_held: 3,
            has_lapsed: true,
            tap_full: 5,
            tap_full_at_source: 7,
        }],
        ..completed(vec![])
    };
    let text = migrations(std::slice::from_ref(&row));
    for expected in [
        "\n4 NIC 0: 3 frames could not be held; 7 at the source and 5 here found the queue",
        "some have passed the gate",
    ] {
        assert!(text.contains(expected), "{expected} is missing in\n{text}");
    }
}

#[test]
fn nic_whose_streams_nothing_held_is_named_with_the_reason() {
    let row = MigrationRow {
        without_gate: vec![UngatedRow {
            mac: Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]),
            reason: UngatedReason::RanAlready,
        }],
        ..completed(vec![])
    };
    let text = migrations(std::slice::from_ref(&row));
    for expected in [
        "not held",
        "\n4 52:54:00:12:34:56: its streams may have lost packets; it had no gate: the VM ran",
    ] {
        assert!(text.contains(expected), "{expected} is missing in\n{text}");
    }
    let json = serde_json::to_string(&row).unwrap();
    assert!(json.contains("\"reason\":\"ran-already\""), "{json}");
}

#[test]
fn what_a_vm_that_ran_on_has_lost_is_named() {
    let row = MigrationRow {
        thrown_away_at_most: 2,
        ..completed(vec![])
    };
    let text = migrations(std::slice::from_ref(&row));
    let expected = "\n4: the VM ran on here after it had stopped; at most 2 frames";
    assert!(text.contains(expected), "{expected} is missing in\n{text}");
    let json = serde_json::to_string(&row).unwrap();
    assert!(json.contains("\"thrown_away_at_most\":2"), "{json}");
}

#[test]
fn exact_handover_takes_few_words() {
    let row = HandoverRow {
        nic: 0,
        vlan: 0,
        multicast_address: "ff1e::1".parse().unwrap(),
        source: "2001:db8::1".parse().unwrap(),
        source_port: 5004,
        destination_port: 5004,
        placed: Some(Placement::Exact),
        delivered: 1700,
        held: 900,
        dropped: 856,
        replayed: 44,
        lost: 0,
        duplicated_at_most: 0,
        longest_held_ms: 30.5,
        overflow: false,
    };
    let both = completed(vec![row.clone(), row]);
    assert_eq!(handover::cell(&both), "exact, 88 replayed");
    assert_eq!(handover::cell(&completed(vec![])), "-");
}

#[test]
fn durations_and_sizes_are_short() {
    for (ms, text) in [
        (0, "0 ms"),
        (999, "999 ms"),
        (1050, "1.0 s"),
        (59_999, "59.9 s"),
        (61_000, "1 min 1 s"),
        (90_061_000, "1 d 1 h"),
    ] {
        assert_eq!(duration(ms), text);
    }
    for (size, text) in [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 << 30, "5.0 GiB"),
    ] {
        assert_eq!(bytes(size), text);
    }
    assert!(bytes(u64::MAX).ends_with("TiB"));
}

#[test]
fn status_tells_side_qdisc_and_order_of_a_program() {
    let mut status = example();
    let mut gate = status.ports[0].hooks[0].clone();
    gate.program = "gate".to_owned();
    gate.mode = "filter".to_owned();
    gate.side = "egress".to_owned();
    gate.qdisc = Some("htb 1:".to_owned());
    gate.before = vec!["fw (preference 1)".to_owned()];
    status.uplinks[0].hooks = vec![gate.clone()];
    let text = super::status(&status);
    let expected = "eth0 (gate by filter at egress of htb 1: after fw (preference 1))";
    assert!(text.contains(expected), "{text}");
    assert!(text.contains("problem      vnet1: gate waits"), "{text}");
    gate.is_there = false;
    status.uplinks[0].hooks = vec![gate];
    let text = super::status(&status);
    assert!(text.contains("eth0 (gate taken away)"), "{text}");
}
