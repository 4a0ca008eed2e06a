//! TAP hooks that others use too: libvirt's limits, foreign programs, and leftovers of an earlier
//! agent. Each test runs with TCX if the kernel has it, and with qdisc filters.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

mod bandwidth;
mod foreign;
mod leftover;
mod taken;

use std::path::Path;

use common::counter::Counter;
use common::maps::{BridgeNumber, ListenerKey};
use common::testing::frame::{Frame, address, record};
use roamcast::datapath::{Datapath, DatapathConfig, Hook};
use support::bridged::{Bridged, udp};
use support::host;
use support::netns::wait_for;
use support::wire::Wire;

/// Multicast address to which only the VM sends.
const OWN_GROUP: &str = "ff3e:1::4321";

fn config(bpffs: &Path, hook: Hook) -> DatapathConfig {
    DatapathConfig {
        hook: Some(hook),
        ..host::config(bpffs)
    }
}

/// Asserts that both programs of the TAP work, each on its own side only.
fn assert_both_work(setup: &Bridged, datapath: &Datapath, number: u8) {
    let ifindex = setup.ifindex;
    let group = format!("ff3e:2::{number:x}");
    setup.transmit(&Frame::report(&[record(4, &group, &[])]).bytes());
    let key = ListenerKey {
        ifindex,
        vlan: 0,
        bridge: BridgeNumber::FIRST,
        multicast_address: address(&group),
    };
    wait_for("the listener", || datapath.listener(&key).unwrap());

    let held = || datapath.counter(Counter::HeldFrames).unwrap();
    let before = held();
    datapath.gate_hold(ifindex).unwrap();
    let frames: Vec<_> = (0..10).map(|each| udp(&[number, each])).collect();
    for frame in &frames {
        setup.sender.send(frame);
    }
    wait_for("the held frames", || (held() - before == 10).then_some(()));
    let n0 = setup.network.ifindex("n0");
    let outside = setup.network.run(|| Wire::listening(n0));
    let own: Vec<_> = (0..5)
        .map(|each| Frame::udp("2001:db8::2a", OWN_GROUP, (6000, 6004), &[number, each]).bytes())
        .collect();
    for frame in &own {
        setup.transmit(frame);
    }
    let mut sent = Vec::new();
    wait_for("what the VM sends", || {
        sent.extend(outside.received().into_iter().filter(|it| own.contains(it)));
        (sent.len() >= own.len()).then_some(())
    });
    assert_eq!(sent, own);
    assert_eq!(held() - before, 10, "what the VM sends is not held");
    let delivered = datapath.delivered(Some(ifindex)).unwrap();
    let is_own = |flow: &[u8; 16]| *flow == address(OWN_GROUP);
    assert!(
        !delivered
            .iter()
            .any(|(key, _)| is_own(&key.stream.multicast_address)),
        "what the VM sends is not what it gets"
    );
    assert!(!setup.received().iter().any(|frame| frames.contains(frame)));
    datapath.gate_clear(ifindex).unwrap();
    let last = udp(&[number, 99]);
    setup.sender.send(&last);
    assert_eq!(setup.received_up_to(&last), [last]);
}
