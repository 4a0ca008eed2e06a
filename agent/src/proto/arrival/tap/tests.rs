//! Tests of a peer that lies about whose TAP a gate may close, and for how long.

use std::time::Duration;

use common::signal::{AgentRequest, HandoverCut, MigrationAbort, NicCut, Reason};

use super::super::tests::{S, active, bench, request};
use super::*;
use crate::proto::tests::fixture::{Bench, MAC, OTHER_UUID, UUID};
use crate::proto::{DomainUuid, HypervisorEvent, PeerEvent};

const ARRIVING: u32 = 20;
const HOLD: GateCommand = GateCommand::Hold { ifindex: ARRIVING };
const CLEAR: GateCommand = GateCommand::Clear { ifindex: ARRIVING };

fn gates(bench: &mut Bench) -> Vec<GateCommand> {
    let outputs = bench.outputs();
    let gates = outputs.into_iter().filter_map(|output| match output {
        Output::Gate(command) => Some(command),
        _ => None,
    });
    gates.collect()
}

/// Sends a request for a domain that does not exist.
fn lie(bench: &mut Bench, transaction: u64) {
    bench.frame(transaction, named(OTHER_UUID, "nobody"));
}

fn named(uuid: DomainUuid, name: &str) -> AgentRequest {
    AgentRequest {
        domain_name: name.to_owned(),
        ..request(uuid, vec![active(1)])
    }
}

fn says(
    bench: &mut Bench,
    peer: &str,
    transaction: u64,
    message: impl Into<common::signal::PeerMessage>,
) {
    let frame = PeerEvent::Frame(message.into().encode(transaction).into());
    bench.agent.handle_peer(bench.now, peer, frame);
}

#[test]
fn gate_opens_when_libvirt_gives_its_tap_to_another_domain() {
    let mut bench = bench();
    lie(&mut bench, 1);
    bench.port(ARRIVING, "vnet5");
    assert_eq!(gates(&mut bench), [HOLD]);
    bench.domain("vnet5", true);
    assert_eq!(gates(&mut bench), [CLEAR]);
    bench.pass(700 * S);
    assert_eq!(gates(&mut bench), []);
}

#[test]
fn gate_opens_by_itself_whatever_its_peer_says() {
    let mut bench = bench();
    lie(&mut bench, 1);
    bench.port(ARRIVING, "vnet5");
    assert_eq!(gates(&mut bench), [HOLD]);
    let mut cleared = Vec::new();
    for transaction in 2..100 {
        bench.pass(10 * S);
        // A repetition, another domain, and a withdrawal of the first.
        match transaction % 3 {
            0 => bench.frame(transaction, named(UUID, "viewer")),
            1 => lie(&mut bench, transaction),
            _ => {
                let reason = "no".to_owned();
                bench.frame(transaction - 1, MigrationAbort(Reason::unspecified(reason)));
            }
        }
        cleared.extend(gates(&mut bench));
    }
    assert_eq!(cleared.last(), Some(&CLEAR), "{cleared:?}");
    bench.pass(700 * S);
    lie(&mut bench, 200);
    assert_eq!(gates(&mut bench), []);
}

#[test]
fn gate_stays_closed_for_a_vm_whose_qemu_takes_more_than_a_minute_to_start() {
    let mut bench = bench();
    bench.frame(1, named(UUID, "viewer"));
    bench.port(ARRIVING, "vnet5");
    assert_eq!(gates(&mut bench), [HOLD]);
    bench.pass(100 * S);
    bench.hypervisor(HypervisorEvent::Arriving {
        uuid: UUID,
        name: "viewer".to_owned(),
    });
    bench.pass(300 * S);
    assert_eq!(gates(&mut bench), []);
}

#[test]
fn second_peer_that_names_the_mac_does_not_get_the_tap_of_the_first() {
    let mut bench = bench();
    bench.frame(1, named(UUID, "viewer"));
    says(&mut bench, "vms3", 9, named(OTHER_UUID, "nobody"));
    bench.port(ARRIVING, "vnet5");
    assert_eq!(gates(&mut bench), [HOLD]);
    let nics = vec![NicCut {
        mac: MAC.into(),
        basis: common::signal::CutBasis::Count,
        flows: vec![],
        tap_full: None,
    }];
    let cut = HandoverCut { clock_ns: 0, nics };
    says(&mut bench, "vms3", 9, cut.clone());
    assert_eq!(gates(&mut bench), []);
    bench.frame(1, cut);
    assert!(matches!(
        gates(&mut bench)[..],
        [GateCommand::Replay { .. }]
    ));
}

#[test]
fn no_gate_closes_while_nobody_says_whose_the_taps_are() {
    let mut bench = bench();
    let reason = "libvirtd went away".to_owned();
    bench.hypervisor(HypervisorEvent::Disconnected { reason });
    lie(&mut bench, 1);
    bench.port(ARRIVING, "vnet5");
    assert_eq!(gates(&mut bench), []);
    bench.hypervisor(HypervisorEvent::Connected);
    assert_eq!(gates(&mut bench), [HOLD]);
}

#[test]
fn what_a_vm_has_reported_itself_stays_in_the_bridge_when_a_lie_ends() {
    let mut bench = bench();
    lie(&mut bench, 1);
    bench.port(ARRIVING, "vnet5");
    bench.report(
        ARRIVING,
        crate::proto::tests::fixture::key(1),
        common::maps::FilterMode::Exclude,
    );
    bench.outputs();
    let reason = "no".to_owned();
    bench.frame(1, MigrationAbort(Reason::unspecified(reason)));
    bench.pass(Duration::from_secs(60));
    let is_deletion = |output: &Output| matches!(output, Output::MdbDelete(_));
    assert!(!bench.outputs().iter().any(is_deletion));
}
