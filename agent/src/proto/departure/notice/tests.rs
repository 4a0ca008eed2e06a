//! Tests of the source host of a migration that somebody else started in libvirt.

use std::time::Duration;

use common::signal::{
    AgentRequest, AgentResponse, CutBasis, MigrationReady, MigrationRequest, NicCut, PeerMessage,
    Phase, Reason,
};

use super::*;
use crate::proto::tests::fixture::{Bench, MAC, TAP, UUID, config, peer};
use crate::proto::{
    Command, CommandReply, GateCommand, GateEvent, HypervisorEvent, JobStats, Outcome, Output,
    PeerEvent,
};

const NOTICE: u64 = 77;
const FOLLOW: Output = Output::FollowMigration { uuid: UUID };
const CLEAR: Output = Output::Gate(GateCommand::Clear { ifindex: TAP });
const RECORD: Output = Output::Gate(GateCommand::Record {
    ifindex: TAP,
    mac: MAC,
    vhost: false,
});

fn notice() -> ArrivalNotice {
    ArrivalNotice {
        domain_uuid: UUID.0.into(),
        domain_name: "viewer".to_owned(),
    }
}

fn response() -> AgentResponse {
    AgentResponse {
        prefix: [0; 16].into(),
        prefix_length: 64,
        agent_address: [1; 16].into(),
        receptions: vec![],
        copy_tls: false,
    }
}

/// Returns the messages to the peer.
fn frames(outputs: &[Output]) -> Vec<(u64, PeerMessage)> {
    let frame = |output: &Output| match output {
        Output::Frame { bytes, .. } => Some(PeerMessage::decode(bytes).unwrap()),
        _ => None,
    };
    outputs.iter().filter_map(frame).collect()
}

fn request_of(outputs: &[Output]) -> Option<(u64, AgentRequest)> {
    frames(outputs).into_iter().find_map(|frame| match frame {
        (transaction, PeerMessage::AgentRequest(body)) => Some((transaction, body)),
        _ => None,
    })
}

fn abort_reason(outputs: &[Output]) -> Option<String> {
    frames(outputs).into_iter().find_map(|frame| match frame {
        (_, PeerMessage::MigrationAbort(abort)) => Some(abort.0.text),
        _ => None,
    })
}

fn connected() -> Bench {
    let mut bench = Bench::housing();
    bench.peer(PeerEvent::Up { from: None });
    bench.outputs();
    bench
}

/// Returns an agent that looks for a migration by somebody else.
fn awaited() -> Bench {
    let mut bench = connected();
    bench.frame(NOTICE, notice());
    bench.frame(NOTICE, response());
    bench.outputs();
    bench
}

fn outcome(bench: &Bench) -> Option<Outcome> {
    let records: Vec<_> = bench.agent.view().migrations().collect();
    assert_eq!(records.len(), 1, "{records:?}");
    records[0].outcome.clone()
}

fn ended(bench: &mut Bench, result: Result<JobStats, String>) -> Vec<Output> {
    bench.hypervisor(HypervisorEvent::MigrationEnded { uuid: UUID, result });
    bench.outputs()
}

#[test]
fn noticed_move_is_asked_for_recorded_and_followed_but_not_started() {
    let mut bench = connected();
    bench.frame(NOTICE, notice());
    let (transaction, body) = request_of(&bench.outputs()).unwrap();
    assert_eq!((transaction, body.vm_transaction), (NOTICE, None));
    assert_eq!(*body.macs[0], MAC);
    bench.frame(NOTICE, response());
    let outputs = bench.outputs();
    assert!(outputs.contains(&FOLLOW) && outputs.contains(&RECORD));
    let is_start = |output: &Output| matches!(output, Output::StartMigration { .. });
    assert!(!outputs.iter().any(is_start), "{outputs:?}");

    bench.hypervisor(HypervisorEvent::Departing { uuid: UUID });
    let at = bench.now;
    bench.hypervisor(HypervisorEvent::Suspended { uuid: UUID, at });
    let outputs = bench.outputs();
    let cut = Output::Gate(GateCommand::Cut {
        ifindex: TAP,
        migration: 1,
        stopped: at,
    });
    assert!(outputs.contains(&cut));
    let told = frames(&outputs).into_iter().any(|frame| {
        matches!(frame, (NOTICE, PeerMessage::MigrationProgress(told)) if told.phase == Phase::Switching)
    });
    assert!(told, "{outputs:?}");
    let (ifindex, mac) = (TAP, MAC.into());
    let (basis, flows) = (CutBasis::Count, Vec::new());
    let tap_full = None;
    let cut = NicCut {
        mac,
        basis,
        flows,
        tap_full,
    };
    let placed = GateEvent::Cut { ifindex, cut };
    bench.agent.handle_gate(bench.now, placed);
    let outputs = ended(&mut bench, Ok(JobStats::default()));
    let told = frames(&outputs).into_iter().any(|frame| {
        matches!(frame, (NOTICE, PeerMessage::MigrationProgress(told)) if told.phase == Phase::Completed)
    });
    assert!(told && outputs.contains(&CLEAR), "{outputs:?}");
    assert_eq!(outcome(&bench), Some(Outcome::Completed));
}

#[test]
fn notice_is_refused_like_a_request_to_move_there() {
    let refused = |bench: &mut Bench, reason: &str| {
        bench.frame(NOTICE, notice());
        let outputs = bench.outputs();
        assert_eq!(abort_reason(&outputs).as_deref(), Some(reason));
        assert_eq!(bench.agent.view().migrations().count(), 0);
    };
    refused(&mut Bench::empty(), "Agent vms1 has no domain \"viewer\"");
    let mut bench = Bench::empty();
    bench.domain("vnet0", false);
    refused(
        &mut bench,
        "Domain viewer does not run; start it before moving it",
    );
    let mut config = config(0);
    config.policy.departures.clear();
    let mut bench = Bench::with(config.clone());
    bench.house();
    let reason = "The policy of vms1 does not let domain viewer move to vms2 by \"hook\"; a rule \
                  [[policy.depart]] has to allow it";
    refused(&mut bench, reason);
    let mut only_others = crate::proto::tests::fixture::config(0);
    only_others.policy.departures[0].by = vec![Asker::Operator, Asker::Vm];
    let mut bench = Bench::with(only_others);
    bench.house();
    refused(&mut bench, reason);
    config.peers = vec![peer("vms3")];
    let mut bench = Bench::with(config);
    bench.house();
    refused(
        &mut bench,
        "Agent vms1 knows no destination \"vms2\"; name one of its peers (vms3)",
    );
}

#[test]
fn notice_under_another_name_learns_nothing() {
    let mut bench = connected();
    let named = ArrivalNotice {
        domain_name: "tv".to_owned(),
        ..notice()
    };
    bench.frame(NOTICE, named);
    let outputs = bench.outputs();
    assert_eq!(
        abort_reason(&outputs).as_deref(),
        Some("Agent vms1 has no domain \"tv\"")
    );
    assert_eq!(bench.agent.view().migrations().count(), 0);
}

#[test]
fn notice_keeps_neither_operator_nor_vm_from_moving_the_domain() {
    let migrate = Command::Migrate {
        domain: "viewer".to_owned(),
        destination: "vms2".to_owned(),
    };
    for answered in [false, true] {
        let mut bench = connected();
        bench.frame(NOTICE, notice());
        if answered {
            bench.frame(NOTICE, response());
        }
        bench.outputs();
        bench.agent.handle_command(bench.now, 1, migrate.clone());
        let outputs = bench.outputs();
        assert!(
            abort_reason(&outputs)
                .unwrap()
                .contains("An operator is moving")
        );
        let (transaction, _) = request_of(&outputs).unwrap();
        assert_ne!(transaction, NOTICE);
        // A migration that libvirt has started continues.
        let mut bench = awaited();
        bench.hypervisor(HypervisorEvent::Departing { uuid: UUID });
        bench.agent.handle_command(bench.now, 1, migrate.clone());
        let refused = bench.outputs().into_iter().any(|output| {
            matches!(output, Output::Reply { reply: CommandReply::Failed(reason), .. }
                if reason.contains("already being moved"))
        });
        assert!(refused);
        let mut bench = connected();
        bench.frame(NOTICE, notice());
        bench.outputs();
        let destination = "vms2".to_owned();
        bench.vm(
            5,
            MigrationRequest {
                destination,
                domain: None,
            },
        );
        assert!(request_of(&bench.outputs()).is_some());
    }
}

#[test]
fn move_that_never_begins_is_undone_and_the_destination_told() {
    let mut bench = awaited();
    let outputs = ended(&mut bench, Err("nobody has asked".to_owned()));
    assert!(outputs.contains(&CLEAR));
    assert!(abort_reason(&outputs).unwrap().contains("nobody has asked"));
    assert!(matches!(outcome(&bench), Some(Outcome::Failed(_))));
    // The domain can be migrated at once.
    bench.frame(NOTICE + 1, notice());
    assert!(request_of(&bench.outputs()).is_some());
}

#[test]
fn destination_that_never_answers_is_given_up_and_told() {
    let mut bench = connected();
    bench.frame(NOTICE, notice());
    bench.outputs();
    bench.pass(Duration::from_secs(16));
    let reason = "Destination vms2 did not answer within 15 s; check its agent's log";
    assert_eq!(abort_reason(&bench.outputs()).as_deref(), Some(reason));
    assert!(matches!(outcome(&bench), Some(Outcome::Failed(_))));
}

#[test]
fn destination_that_undoes_its_joins_ends_only_what_has_not_begun() {
    let undone = || {
        common::signal::MigrationAbort(Reason::unspecified(
            "Domain viewer is gone from vms2 before it has arrived".to_owned(),
        ))
    };
    let mut bench = awaited();
    bench.frame(NOTICE, undone());
    assert!(matches!(outcome(&bench), Some(Outcome::Failed(_))));
    assert_eq!(abort_reason(&bench.outputs()), None);

    let mut bench = awaited();
    bench.hypervisor(HypervisorEvent::Departing { uuid: UUID });
    bench.frame(NOTICE, undone());
    assert_eq!(outcome(&bench), None);
}

#[test]
fn operators_move_that_somebody_else_has_begun_is_followed_for_the_operator() {
    let mut bench = connected();
    let migrate = Command::Migrate {
        domain: "viewer".to_owned(),
        destination: "vms2".to_owned(),
    };
    bench.agent.handle_command(bench.now, 1, migrate);
    let (transaction, _) = request_of(&bench.outputs()).unwrap();
    bench.frame(NOTICE, notice());
    assert_eq!(request_of(&bench.outputs()), None);
    bench.frame(transaction, response());
    assert!(bench.outputs().contains(&FOLLOW));
    let outputs = ended(&mut bench, Ok(JobStats::default()));
    let reply = CommandReply::Done { migration: 1 };
    assert!(outputs.contains(&Output::Reply { command: 1, reply }));
}

#[test]
fn vm_that_prepares_itself_is_not_waited_for_when_somebody_else_moves_it() {
    let mut bench = connected();
    let request = MigrationRequest {
        destination: "vms2".to_owned(),
        domain: None,
    };
    bench.vm(5, request);
    let (transaction, _) = request_of(&bench.outputs()).unwrap();
    bench.frame(transaction, response());
    assert!(!bench.outputs().contains(&FOLLOW));
    bench.frame(NOTICE, notice());
    assert!(bench.outputs().contains(&FOLLOW));
    bench.vm(5, MigrationReady::default());
    let is_start =
        |output: &Output| matches!(output, Output::StartMigration { .. }) || *output == FOLLOW;
    assert!(!bench.outputs().iter().any(is_start));
}

#[test]
fn destination_that_has_forgotten_a_running_move_is_asked_again() {
    let mut bench = awaited();
    bench.frame(NOTICE + 1, notice());
    let outputs = bench.outputs();
    assert_eq!(request_of(&outputs).unwrap().0, NOTICE);
    assert!(!outputs.contains(&FOLLOW));
    bench.frame(NOTICE, response());
    assert!(!bench.outputs().contains(&FOLLOW));
}

#[test]
fn migration_found_running_gets_its_destination_from_the_notice() {
    let mut bench = connected();
    bench.hypervisor(HypervisorEvent::Departing { uuid: UUID });
    bench.frame(NOTICE, notice());
    let outputs = bench.outputs();
    assert_eq!(request_of(&outputs).unwrap().0, NOTICE);
    assert!(outputs.contains(&RECORD) && !outputs.contains(&FOLLOW));
    ended(&mut bench, Ok(JobStats::default()));
    assert_eq!(outcome(&bench), Some(Outcome::Completed));
    assert_eq!(bench.agent.view().migrations().next().unwrap().peer, "vms2");
}

#[test]
fn domain_that_leaves_for_another_host_is_not_followed_to_this_one() {
    let mut config = config(0);
    config.peers.push(peer("vms3"));
    let mut bench = Bench::with(config);
    bench.house();
    bench.frame(NOTICE, notice());
    bench.outputs();
    let bytes = PeerMessage::from(notice()).encode(NOTICE + 1);
    let frame = PeerEvent::Frame(bytes.into());
    bench.agent.handle_peer(bench.now, "vms3", frame);
    let reason = "Domain viewer is already being moved to vms2; wait until that has ended";
    assert_eq!(abort_reason(&bench.outputs()).as_deref(), Some(reason));
    assert_eq!(outcome(&bench), None);
}
