//! The agent ends or dies and restarts: pinned objects keep working, and the new agent adopts them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::fs;
use std::process::Command;

use aya::programs::{SchedClassifier, TcAttachType};
use common::maps::{BridgeNumber, LAYOUT_VERSION, ListenerKey, Origins};
use roamcast::datapath::{BridgeLink, Datapath, DatapathError, Hook};
use roamcast::proto::Timestamp;
use support::host::{
    LIMITS, any_source, config, join, key, listener, listeners, managed, pins, tc_hook,
};
use support::netns::{Namespace, privileged};
use support::tap::Guest;

fn host_with_guest() -> (Namespace, Guest) {
    let host = Namespace::new("host");
    host.add_bridge("br0");
    let guest = Guest::start(&host, "br0", "vnet0", 0);
    (host, guest)
}

/// Returns the IDs of the programs on the TAP, `snoop` first.
fn programs() -> Vec<u32> {
    if tc_hook() == Hook::Filter {
        let lists = ["ingress", "parent 7263:"].map(filters);
        return lists.iter().flat_map(|list| ids(list)).collect();
    }
    [TcAttachType::Ingress, TcAttachType::Egress]
        .into_iter()
        .flat_map(|direction| SchedClassifier::query_tcx("vnet0", direction).unwrap().1)
        .map(|program| program.id())
        .collect()
}

/// Returns `tc`'s output for a filter list; empty if the list does not exist.
fn filters(list: &str) -> String {
    let mut command = Command::new("tc");
    command.args(["filter", "show", "dev", "vnet0"]);
    let output = command.args(list.split(' ')).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn ids(filters: &str) -> Vec<u32> {
    let parts = filters.split(" id ").skip(1);
    parts
        .map(|rest| rest.split(' ').next().unwrap().parse().unwrap())
        .collect()
}

#[test]
fn no_report_is_lost_while_the_agent_is_away() {
    if !privileged() {
        return;
    }
    let (host, guest) = host_with_guest();
    host.run_with_bpffs(|bpffs| {
        let mut sockets = listeners(&guest);
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        datapath
            .attach_port(guest.ifindex, "vnet0", &LIMITS)
            .unwrap();
        join(&guest, &mut sockets, &any_source(1));
        let first = listener(&datapath, &key(&guest, 1), |_| true);
        let before = programs();
        drop(datapath);

        join(&guest, &mut sockets, &any_source(2));
        assert_eq!(programs(), before, "the program runs on");

        let datapath = Datapath::load(&config(bpffs)).unwrap();
        let attachment = datapath
            .attach_port(guest.ifindex, "vnet0", &LIMITS)
            .unwrap();
        assert!(attachment.adopted);
        listener(&datapath, &key(&guest, 2), |_| true);
        let adopted = datapath.listener(&key(&guest, 1)).unwrap().unwrap();
        assert_eq!(adopted.first_report_ns, first.first_report_ns);
        let after = programs();
        assert_eq!(after.len(), 2, "one program each way, not two");
        assert_ne!(after[0], before[0], "the new agent's program");
        assert_ne!(after[1], before[1], "the new agent's program");
        join(&guest, &mut sockets, &any_source(3));
        listener(&datapath, &key(&guest, 3), |_| true);
        assert!(datapath.usage(guest.ifindex).unwrap().listeners >= 3);
    });
}

#[test]
fn ports_that_went_while_the_agent_was_away_are_forgotten() {
    if !privileged() {
        return;
    }
    let (host, guest) = host_with_guest();
    host.run_with_bpffs(|bpffs| {
        let mut sockets = listeners(&guest);
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        datapath
            .attach_port(guest.ifindex, "vnet0", &LIMITS)
            .unwrap();
        join(&guest, &mut sockets, &any_source(1));
        listener(&datapath, &key(&guest, 1), |_| true);
        drop(datapath);
        let links = pins(&config(bpffs)).join("links");
        let pinned = if tc_hook() == Hook::Tcx { 2 } else { 0 };
        assert_eq!(fs::read_dir(&links).unwrap().count(), pinned);
        drop(guest);
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        assert_eq!(fs::read_dir(&links).unwrap().count(), 0);
        assert!(datapath.listeners().unwrap().is_empty());
    });
}

#[test]
fn ports_that_left_the_bridge_are_detached_by_retain() {
    if !privileged() {
        return;
    }
    let (host, guest) = host_with_guest();
    host.run_with_bpffs(|bpffs| {
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        datapath
            .attach_port(guest.ifindex, "vnet0", &LIMITS)
            .unwrap();
        drop(datapath);
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        datapath.retain(&[guest.ifindex], &[]).unwrap();
        assert_eq!(programs().len(), 2);
        datapath.retain(&[], &[]).unwrap();
        assert!(programs().is_empty());
        assert!(matches!(
            datapath.usage(guest.ifindex),
            Err(DatapathError::NoPort(_))
        ));
    });
}

#[test]
fn a_program_is_attached_again_right_after_it_was_detached() {
    if !privileged() {
        return;
    }
    let (host, guest) = host_with_guest();
    host.run_with_bpffs(|bpffs| {
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        for _ in 0..50 {
            let attachment = datapath
                .attach_port(guest.ifindex, "vnet0", &LIMITS)
                .unwrap();
            assert!(!attachment.adopted);
            assert_eq!(programs().len(), 2);
            datapath.detach_port(guest.ifindex).unwrap();
            assert!(programs().is_empty());
        }
    });
}

#[test]
fn maps_in_use_keep_their_capacity_and_other_layouts_are_removed() {
    if !privileged() {
        return;
    }
    let (host, _guest) = host_with_guest();
    host.run_with_bpffs(|bpffs| {
        let mut config = config(bpffs);
        config.capacities.events_bytes = 8192;
        drop(Datapath::load(&config).unwrap());
        let old = config.pin_root.join(format!("v{}", LAYOUT_VERSION - 1));
        fs::create_dir_all(old.join("links")).unwrap();
        fs::rename(pins(&config).join("COUNTERS"), old.join("COUNTERS")).unwrap();
        config.capacities.events_bytes = 1 << 16;
        config.capacities.listeners = 10;
        let datapath = Datapath::load(&config).unwrap();
        assert!(!old.exists());
        assert!(datapath.listeners().unwrap().is_empty());
        let second = Datapath::load(&config).err().expect("a second agent");
        assert!(matches!(second, DatapathError::InUse(_)), "{second}");
    });
}

#[test]
fn a_bridge_keeps_its_number_and_that_of_another_bridge_is_freed_with_its_entries() {
    if !privileged() {
        return;
    }
    let (host, guest) = host_with_guest();
    host.run_with_bpffs(|bpffs| {
        let on = |ifindex: u32, name: &str| {
            let mut config = config(bpffs);
            let name = name.to_owned();
            config.bridge = Some(BridgeLink { ifindex, name });
            Datapath::load(&config).unwrap()
        };
        let mut sockets = listeners(&guest);
        let datapath = on(7, "br0");
        assert_eq!(datapath.bridge(), BridgeNumber(1));
        datapath
            .attach_port(guest.ifindex, "vnet0", &LIMITS)
            .unwrap();
        datapath
            .manage(&managed(1), Timestamp(0), Origins::Native)
            .unwrap();
        join(&guest, &mut sockets, &any_source(1));
        listener(&datapath, &key(&guest, 1), |_| true);
        drop(datapath);

        for ifindex in [7, 8] {
            let datapath = on(ifindex, "renamed");
            assert_eq!(datapath.bridge(), BridgeNumber(1), "as before");
            assert!(datapath.listener(&key(&guest, 1)).unwrap().is_some());
            assert_eq!(datapath.managed().unwrap().len(), 1);
        }

        let datapath = on(9, "br1");
        assert_eq!(datapath.bridge(), BridgeNumber(2));
        let left = datapath.listeners().unwrap();
        assert!(left.iter().all(|(key, _)| key.bridge == BridgeNumber(2)));
        assert_eq!(datapath.managed().unwrap(), []);
        datapath
            .attach_port(guest.ifindex, "vnet0", &LIMITS)
            .unwrap();
        join(&guest, &mut sockets, &any_source(2));
        let other = ListenerKey {
            bridge: BridgeNumber(2),
            ..key(&guest, 2)
        };
        listener(&datapath, &other, |_| true);
        drop(datapath);
        assert_eq!(on(10, "br2").bridge(), BridgeNumber(3));
        assert_eq!(on(11, "br3").bridge(), BridgeNumber(1), "free again");
    });
}

#[test]
fn a_missing_bpf_file_system_is_one_clear_sentence() {
    if !privileged() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let error = Datapath::load(&config(directory.path()))
        .err()
        .expect("no bpffs");
    assert!(matches!(error, DatapathError::NoBpfFs(_)), "{error}");
    assert!(error.to_string().contains("mount -t bpf"), "{error}");
}
