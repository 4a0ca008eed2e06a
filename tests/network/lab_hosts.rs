//! The lab's VM hosts: they reach each other's libvirtd, and a domain moves between them.

#![allow(
    clippy::unwrap_used,
    reason = "a test panics rather than returning an error"
)]

use std::fs;

use lab::{Lab, LabConfig};

#[test]
fn domain_moves_live_between_the_hosts() {
    if !lab::requirements::met() {
        return;
    }
    let lab = Lab::up(LabConfig::new("testmove")).unwrap();
    let (source, destination) = (lab.vms1(), lab.vms2());
    // Without a disk, the firmware runs forever, which suffices for a migration.
    let domain = lab.vms1().shared_directory().join("domain.xml");
    let xml = "<domain type='qemu'><name>idle</name><memory unit='MiB'>64</memory>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os>\
         <devices><interface type='bridge'><source bridge='br0'/><model type='virtio'/>\
         </interface></devices></domain>";
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
    // The guest outlives its libvirtd, which finds the guest again.
    destination.kill_libvirtd().unwrap();
    destination.wait_libvirtd().unwrap();
    let state = destination
        .output(destination.virsh().args(["domstate", "idle"]))
        .unwrap();
    assert_eq!(state.trim(), "running");
}

#[test]
fn hosts_reach_each_others_libvirtd_and_a_killed_one_comes_back() {
    if !lab::requirements::met() {
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
