//! Leftovers of an agent: the next agent and `roamcast cleanup` find all of them.

use std::fs;

use aya::Ebpf;
use aya::programs::tc::{NlOptions, TcAttachOptions, qdisc_add_clsact};
use aya::programs::{SchedClassifier, TcAttachType};
use roamcast::datapath::cleanup::cleanup;
use roamcast::datapath::{Datapath, DatapathError, Hook, object};
use support::bridged::Bridged;
use support::host::tc_hooks;
use support::limits::Limits;
use support::netns::privileged;

use super::{assert_both_work, config};

/// Returns the qdiscs and filters of the TAP and the uplink, as `tc` shows them.
fn traffic_control(setup: &Bridged) -> String {
    ["vnet0", "up0"]
        .into_iter()
        .flat_map(|tap| {
            let limits = Limits {
                namespace: &setup.host,
                tap,
            };
            [
                "qdisc show dev TAP",
                "filter show dev TAP ingress",
                "filter show dev TAP egress",
            ]
            .map(|what| limits.run(&what.replace("TAP", tap)).unwrap_or_default())
        })
        .collect()
}

#[test]
fn filters_whose_pins_were_removed_are_taken_away() {
    if !privileged() {
        return;
    }
    for hook in tc_hooks() {
        for by_agent in [true, false] {
            let setup = Bridged::new();
            let before = traffic_control(&setup);
            setup.host.run_with_bpffs(|bpffs| {
                let config = config(bpffs, hook);
                let datapath = setup.attach(&config);
                datapath
                    .attach_uplink(setup.host.ifindex("up0"), "up0")
                    .unwrap();
                let running = cleanup(&config.pin_root).unwrap_err();
                assert!(matches!(running, DatapathError::InUse(_)), "{running}");
                drop(datapath);
                fs::remove_dir_all(&config.pin_root).unwrap();
                if by_agent {
                    let datapath = Datapath::load(&config).unwrap();
                    datapath.retain(&[], &[]).unwrap();
                } else {
                    cleanup(&config.pin_root).unwrap();
                }
                assert_eq!(traffic_control(&setup), before);
            });
        }
    }
}

#[test]
fn cleanup_takes_links_maps_and_filters_away() {
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
        let kinds = |text: &str| ["noqueue", "htb", "ingress"].map(|kind| text.contains(kind));
        setup.host.run_with_bpffs(|bpffs| {
            let config = config(bpffs, hook);
            drop(setup.attach(&config));
            cleanup(&config.pin_root).unwrap();
            assert!(!config.pin_root.exists());
            let qdiscs = limits.show("qdisc show dev TAP");
            assert_eq!(
                kinds(&qdiscs),
                [true, false, false],
                "as libvirt made it: {qdiscs}"
            );
            for side in [TcAttachType::Ingress, TcAttachType::Egress] {
                if hook == Hook::Tcx {
                    assert!(
                        SchedClassifier::query_tcx("vnet0", side)
                            .unwrap()
                            .1
                            .is_empty()
                    );
                }
            }
            cleanup(&config.pin_root).unwrap();
        });
    }
}

#[test]
fn filters_of_another_agent_stay() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let config = config(bpffs, Hook::Filter);
        let mut other = config.clone();
        other.pin_root = bpffs.join("other");
        let datapath = setup.attach(&config);
        let second = Datapath::load(&other).unwrap();
        second.retain(&[], &[]).unwrap();
        drop(second);
        cleanup(&other.pin_root).unwrap();
        assert_both_work(&setup, &datapath, 1);
    });
}

#[test]
fn agent_that_comes_back_exchanges_programs_in_the_same_filters() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let config = config(bpffs, Hook::Filter);
        drop(setup.attach(&config));
        let datapath = setup.attach(&config);
        assert!(datapath.attachments().iter().all(|it| it.adopted));
        assert_both_work(&setup, &datapath, 1);
        let limits = Limits {
            namespace: &setup.host,
            tap: "vnet0",
        };
        for side in ["filter show dev TAP ingress", "filter show dev TAP"] {
            let filters = limits.show(side);
            assert_eq!(filters.matches("direct-action").count(), 1, "{filters}");
        }
    });
}

/// Attaches programs like earlier versions, which used `clsact` and gave filters the names of their
/// programs.
fn attach_as_earlier_versions(ebpf: &mut Ebpf) {
    qdisc_add_clsact("vnet0").unwrap();
    for (name, side) in [
        ("snoop", TcAttachType::Ingress),
        ("gate", TcAttachType::Egress),
    ] {
        let program: &mut SchedClassifier = ebpf.program_mut(name).unwrap().try_into().unwrap();
        program.load().unwrap();
        let options = TcAttachOptions::Netlink(NlOptions::default());
        let link = program.attach_with_options("vnet0", side, options).unwrap();
        std::mem::forget(program.take_link(link).unwrap());
    }
}

#[test]
fn clsact_of_earlier_versions_makes_room_for_libvirt() {
    if !privileged() {
        return;
    }
    for by_agent in [true, false] {
        let setup = Bridged::new();
        let before = traffic_control(&setup);
        setup.host.run_with_bpffs(|bpffs| {
            let mut ebpf = Ebpf::load(object::HOST).unwrap();
            attach_as_earlier_versions(&mut ebpf);
            let config = config(bpffs, Hook::Filter);
            if by_agent {
                let datapath = setup.attach(&config);
                assert_both_work(&setup, &datapath, 1);
                let now = traffic_control(&setup);
                assert!(!now.contains("clsact"), "{now}");
                datapath.detach_port(setup.ifindex).unwrap();
            } else {
                cleanup(&config.pin_root).unwrap();
            }
            assert_eq!(traffic_control(&setup), before);
        });
    }
}
