//! Probes on a real TAP behind a bridge: what the hypervisor reads while the agent records a VM.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use common::handover::{PROBE_ETHER_TYPE, PROBE_MAC};
use roamcast::datapath::{DatapathConfig, Hook};
use support::bridged::{Bridged, udp};
use support::host::{config, tc_hooks};
use support::netns::privileged;

/// Returns true if the frame is a probe, which no guest accepts.
fn is_probe(frame: &[u8]) -> bool {
    frame[..6] == PROBE_MAC && frame[12..14] == PROBE_ETHER_TYPE.to_be_bytes()
}

#[test]
fn each_recorded_frame_has_a_probe_before_it_and_is_not_changed() {
    if !privileged() {
        return;
    }
    for hook in tc_hooks() {
        let setup = Bridged::new();
        if hook == Hook::Filter {
            // Without clsact, the gate sits on the root qdisc, where it cannot redirect into the
            // TAP itself.
            setup.host.tc("qdisc add dev vnet0 clsact");
        }
        setup.host.run_with_bpffs(|bpffs| {
            let datapath = setup.attach(&DatapathConfig {
                hook: Some(hook),
                ..config(bpffs)
            });
            let ifindex = setup.ifindex;
            assert!(datapath.takes_probes(ifindex));
            let slot = datapath.gate_record(ifindex, true).unwrap();
            let frames: Vec<_> = (0..3).map(|number| udp(&[number; 1000])).collect();
            for frame in &frames {
                setup.sender.send(frame);
            }
            let received = setup.received_up_to(&frames[2]);
            assert_eq!(received.len(), 6, "{received:02x?}");
            for (pair, frame) in received.chunks(2).zip(&frames) {
                assert!(is_probe(&pair[0]), "{:02x?}", pair[0]);
                assert_eq!(&pair[1], frame);
            }
            let (_, usage) = datapath.gate(ifindex).unwrap().unwrap();
            assert_eq!((usage.entered, usage.recorded), (6, 3));
            let records = datapath.gate_records(slot, &usage).unwrap();
            let numbers: Vec<u64> = records.iter().map(|record| record.number).collect();
            assert_eq!(
                numbers,
                [2, 4, 6],
                "probes have numbers, but are not recorded"
            );
            let delivered = datapath.delivered(Some(ifindex)).unwrap();
            assert_eq!(delivered.len(), 1);
            assert_eq!(delivered[0].1.packets, 3);

            datapath.gate_record(ifindex, false).unwrap();
            setup.sender.send(&frames[0]);
            assert_eq!(setup.received_up_to(&frames[0]), [frames[0].clone()]);
        });
    }
}
