//! libvirt's `<bandwidth>`: set before and after the start of the agent, changed, and cleared.

use common::maps::{BridgeNumber, ListenerKey};
use common::testing::frame::{Frame, address, record};
use roamcast::datapath::{Hook, HookView, Program};
use roamcast::runtime::agent::hooks::Role;
use support::bridged::{Bridged, udp};
use support::host::tc_hooks;
use support::limits::{Bandwidth, Limits};
use support::netns::{privileged, wait_for};
use support::tended::Tended;

use super::{OWN_GROUP, assert_both_work, config};

const NONE: Bandwidth = Bandwidth {
    inbound: None,
    outbound: None,
};

/// Returns every combination of limits, at a rate that the frames of a test stay below.
fn combinations() -> [Bandwidth; 3] {
    [
        (None, Some(2000)),
        (Some(2000), None),
        (Some(2000), Some(2000)),
    ]
    .map(|(inbound, outbound)| Bandwidth { inbound, outbound })
}

/// Checks that `status` shows the side of each program and the current qdiscs.
fn assert_views(
    agent: &Tended,
    limits: &Limits<'_>,
    hook: Hook,
    bandwidth: Bandwidth,
    ifindex: u32,
) {
    let views = agent.views(ifindex);
    let [snoop, gate] = [Program::Snoop, Program::Gate].map(|program| &views[&program]);
    let sides = [snoop, gate].map(|view| view.side.as_str());
    assert_eq!(sides, ["ingress", "egress"]);
    assert!(
        [snoop, gate]
            .iter()
            .all(|view| view.is_there && view.hook == hook)
    );
    assert_eq!(snoop.before, Vec::<String>::new());
    let qdisc = |view: &HookView| view.qdisc.clone();
    match hook {
        Hook::Filter => {
            assert_eq!(qdisc(snoop).as_deref(), Some("ingress"));
            let root = if bandwidth.inbound.is_some() {
                "htb 1:"
            } else {
                "htb 726"
            };
            assert!(
                qdisc(gate).is_some_and(|it| it.starts_with(root)),
                "{gate:?}"
            );
            let has_fw = limits.show("filter show dev TAP").contains("fw");
            let before: &[&str] = if has_fw { &["fw (preference 1)"] } else { &[] };
            assert_eq!(gate.before, before);
        }
        _ => {
            assert_eq!((qdisc(snoop), qdisc(gate)), (None, None));
            assert_eq!(gate.before, Vec::<String>::new());
        }
    }
}

/// Checks that libvirt's qdiscs exist and that the agent has not changed them.
fn assert_limits(limits: &Limits<'_>, bandwidth: Bandwidth) {
    let qdiscs = limits.show("qdisc show dev TAP");
    assert_eq!(
        qdiscs.contains("htb 1: root"),
        bandwidth.inbound.is_some(),
        "{qdiscs}"
    );
    let filters = limits.show("filter show dev TAP ingress");
    assert_eq!(
        filters.contains("u32"),
        bandwidth.outbound.is_some(),
        "{filters}"
    );
}

#[test]
fn limits_of_a_domain_can_be_set_changed_and_cleared_at_any_time() {
    if !privileged() {
        return;
    }
    for hook in tc_hooks() {
        for first in combinations() {
            let setup = Bridged::new();
            let limits = Limits {
                namespace: &setup.host,
                tap: "vnet0",
            };
            limits.no_queue();
            // The first limits precede the agent. All changes that `virsh domiftune` can make
            // follow while the agent runs.
            limits.set(first);
            setup.host.run_with_bpffs(|bpffs| {
                let mut agent = Tended::start(&config(bpffs, hook));
                agent.add(Role::Tap, "vnet0", true);
                let changes = combinations().into_iter().flat_map(|next| [next, NONE]);
                let all: Vec<_> = [first].into_iter().chain(changes).collect();
                for (number, bandwidth) in (1..).zip(all) {
                    if number > 1 {
                        limits.set(bandwidth);
                    }
                    agent.catch_up();
                    agent.until_attached();
                    assert_both_work(&setup, &agent.datapath, number);
                    assert_views(&agent, &limits, hook, bandwidth, setup.ifindex);
                    assert_limits(&limits, bandwidth);
                }
                let [(_, lost), ..] = agent.hooks.counters();
                assert_eq!(
                    lost > 0,
                    hook == Hook::Filter,
                    "each that was taken away is counted"
                );
            });
        }
    }
}

#[test]
fn limits_hold_while_the_programs_are_there() {
    if !privileged() {
        return;
    }
    for hook in tc_hooks() {
        let setup = Bridged::new();
        let limits = Limits {
            namespace: &setup.host,
            tap: "vnet0",
        };
        limits.no_queue();
        setup.host.run_with_bpffs(|bpffs| {
            let mut agent = Tended::start(&config(bpffs, hook));
            agent.add(Role::Tap, "vnet0", true);
            agent.until_attached();
            limits.set(Bandwidth {
                inbound: Some(2),
                outbound: Some(2),
            });
            agent.catch_up();
            agent.until_attached();
            for each in 0..50 {
                setup.sender.send(&udp(&[each; 1000]));
                let own = Frame::udp("2001:db8::2a", OWN_GROUP, (6000, 6004), &[each; 1000]);
                setup.transmit(&own.bytes());
            }
            let shaped = limits.show("-s qdisc show dev TAP root");
            assert!(!shaped.contains("overlimits 0 "), "{shaped}");
            let policed = limits.show("-s filter show dev TAP ingress");
            if policed.contains("police") {
                assert!(!policed.contains("dropped 0,"), "{policed}");
            } else {
                println!("skipped: this kernel cannot police");
            }
            // `gate` counts packets before the queue; `snoop` sees Reports before the policer.
            let delivered = agent.datapath.delivered(Some(setup.ifindex)).unwrap();
            let packets: u64 = delivered.iter().map(|(_, value)| value.packets).sum();
            assert_eq!(packets, 50);
            setup.transmit(&Frame::report(&[record(4, "ff3e:2::1", &[])]).bytes());
            let key = ListenerKey {
                ifindex: setup.ifindex,
                vlan: 0,
                bridge: BridgeNumber::FIRST,
                multicast_address: address("ff3e:2::1"),
            };
            wait_for("the listener", || agent.datapath.listener(&key).unwrap());
        });
    }
}

#[test]
fn new_tap_gets_no_qdisc_of_ours_while_libvirt_sets_it_up() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    let limits = Limits {
        namespace: &setup.host,
        tap: "vnet0",
    };
    setup.host.run_with_bpffs(|bpffs| {
        let mut agent = Tended::start(&config(bpffs, Hook::Filter));
        assert!(!agent.add(Role::Tap, "vnet0", false), "it waits");
        assert!(agent.hooks.problems()[0].starts_with("vnet0: its programs wait"));
        agent.catch_up();
        // Each of these commands fails if the TAP has a qdisc of the agent.
        limits.no_queue();
        agent.catch_up();
        limits.must("qdisc del dev TAP root");
        limits.must("qdisc add dev TAP ingress");
        agent.catch_up();
        let views = agent.views(setup.ifindex);
        assert!(
            views.contains_key(&Program::Snoop),
            "on libvirt's qdisc at once"
        );
        assert!(!views.contains_key(&Program::Gate));
        agent.until_attached();
        assert_both_work(&setup, &agent.datapath, 1);
    });
}

#[test]
fn new_tap_of_a_domain_that_is_set_up_does_not_wait() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let mut agent = Tended::start(&config(bpffs, Hook::Filter));
        assert!(!agent.add(Role::Tap, "vnet0", false));
        let now = roamcast::clock::now();
        assert!(agent.hooks.handle_settled(now, |_| false).is_empty());
        let attached = agent.hooks.handle_settled(now, |tap| tap == "vnet0");
        assert_eq!(attached.len(), 1);
        assert_both_work(&setup, &agent.datapath, 1);
    });
}
