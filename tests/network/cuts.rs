//! Reports of the agent's gate thread about a TAP whose VM leaves.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use common::signal::CutBasis;
use roamcast::clock::now;
use roamcast::config::Handover;
use roamcast::proto::{GateCommand, GateEvent, Mac};
use roamcast::runtime::agent::gates::Gates;
use roamcast::runtime::trace::Replays;
use support::bridged::{Bridged, udp};
use support::host::config;
use support::netns::{DEADLINE, privileged, wait_for};
use support::wire::Wire;
use tokio::time::timeout;

const VM_MAC: Mac = [0x52, 0x54, 0, 0, 0, 7];

#[test]
fn cut_of_a_vm_that_has_stopped_is_told_although_its_tap_goes_first() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&config(bpffs));
        let ifindex = setup.ifindex;
        let mut gates = Gates::start(&datapath, &Handover::default(), Replays::untraced()).unwrap();
        let (mac, vhost) = (VM_MAC, false);
        gates.perform(GateCommand::Record {
            ifindex,
            mac,
            vhost,
        });
        wait_for("the recording", || datapath.gate(ifindex).unwrap());
        Wire::new(ifindex).send(&udp(b"hello"));
        let (migration, stopped) = (1, now());
        gates.perform(GateCommand::Cut {
            ifindex,
            migration,
            stopped,
        });
        // The TAP vanishes long before its reader is known.
        gates.removed(ifindex);
        datapath.detach_port(ifindex).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let told = runtime.block_on(async { timeout(DEADLINE, gates.next()).await });
        match told.unwrap() {
            Some(GateEvent::Cut { cut, .. }) => {
                assert_eq!((cut.basis, cut.flows.len()), (CutBasis::Time, 1), "{cut:?}");
            }
            other => panic!("{other:?}"),
        }
    });
}
