//! Tests of libvirt's hook at the destination host.

use common::signal::{ErrorMessage, MigrationAbort, PeerMessage, Reason};

use super::super::tests::{S, active, answers, bench, first_packet, request};
use super::*;
use crate::proto::tests::fixture::{Bench, UUID, config};
use crate::proto::{Command, GateCommand, HypervisorEvent, Output, PeerEvent};

fn hook(bench: &mut Bench, command: u64, source: &str) {
    let prepare = Command::Prepare {
        uuid: UUID,
        domain: "viewer".to_owned(),
        source: source.to_owned(),
    };
    bench.agent.handle_command(bench.now, command, prepare);
}

/// Returns the replies to the hooks, with the numbers of their commands.
fn replies(outputs: &[Output]) -> Vec<(u64, CommandReply)> {
    let reply = |output: &Output| match output {
        Output::Reply { command, reply } => Some((*command, reply.clone())),
        _ => None,
    };
    outputs.iter().filter_map(reply).collect()
}

fn reply(bench: &mut Bench) -> Option<CommandReply> {
    replies(&bench.outputs()).pop().map(|(_, reply)| reply)
}

fn failed(bench: &mut Bench) -> String {
    match reply(bench) {
        Some(CommandReply::Failed(reason)) => reason,
        other => panic!("no failure but {other:?}"),
    }
}

/// Returns the transactions of the sent notices.
fn notices(outputs: &[Output]) -> Vec<u64> {
    let notice = |output: &Output| match output {
        Output::Frame { peer, bytes } => match PeerMessage::decode(bytes).unwrap() {
            (transaction, PeerMessage::ArrivalNotice(notice)) => {
                assert_eq!((peer.as_str(), *notice.domain_uuid), ("vms2", UUID.0));
                Some(transaction)
            }
            _ => None,
        },
        _ => None,
    };
    outputs.iter().filter_map(notice).collect()
}

/// Returns a bench with a waiting hook, and the transaction of its notice.
fn noticed() -> (Bench, u64) {
    let mut bench = bench();
    hook(&mut bench, 1, "vms2");
    let outputs = bench.outputs();
    assert_eq!(replies(&outputs), []);
    let [transaction] = notices(&outputs)[..] else {
        panic!("not one notice: {outputs:?}");
    };
    (bench, transaction)
}

#[test]
fn hook_is_done_when_the_source_that_it_had_noticed_is_answered() {
    let (mut bench, transaction) = noticed();
    bench.frame(transaction, request(UUID, vec![active(1)]));
    assert_eq!(reply(&mut bench), None);
    first_packet(&mut bench, 1, 1);
    let outputs = bench.outputs();
    assert!(matches!(
        answers(&outputs)[..],
        [PeerMessage::AgentResponse(_)]
    ));
    let done = CommandReply::Done { migration: 1 };
    assert_eq!(replies(&outputs), [(1, done)]);
    bench.pass(10 * S);
    assert_eq!(reply(&mut bench), None);
    bench.port(20, "vnet5");
    let hold = Output::Gate(GateCommand::Hold { ifindex: 20 });
    assert!(bench.outputs().contains(&hold));
}

#[test]
fn source_that_is_not_connected_is_noticed_when_it_is() {
    let mut bench = Bench::empty();
    hook(&mut bench, 1, "vms2");
    let peer = "vms2".to_owned();
    assert_eq!(bench.outputs(), [Output::Connect { peer }]);
    bench.peer(PeerEvent::Up { from: None });
    assert_eq!(notices(&bench.outputs()).len(), 1);
}

#[test]
fn hook_of_a_move_that_roamcast_has_started_is_done_at_once() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![]));
    bench.outputs();
    hook(&mut bench, 7, "vms2");
    let reply = CommandReply::Done { migration: 1 };
    assert_eq!(bench.outputs(), [Output::Reply { command: 7, reply }]);
}

#[test]
fn hook_waits_for_probes_that_run_already() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.outputs();
    hook(&mut bench, 7, "vms2");
    hook(&mut bench, 8, "vms2");
    assert_eq!(bench.outputs(), []);
    first_packet(&mut bench, 1, 1);
    let done = CommandReply::Done { migration: 1 };
    let expected = [(7, done.clone()), (8, done)];
    assert_eq!(replies(&bench.outputs()), expected);
}

#[test]
fn source_is_noticed_again_when_what_it_asked_for_has_come_to_nothing() {
    // The TAPs vanish: libvirt could not start QEMU.
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![]));
    bench.port(20, "vnet5");
    bench.unplug(20);
    bench.outputs();
    hook(&mut bench, 7, "vms2");
    assert_eq!(notices(&bench.outputs()).len(), 1);
    bench.frame(1, request(UUID, vec![]));
    assert_eq!(reply(&mut bench), Some(CommandReply::Done { migration: 1 }));
    // The source host aborts, while QEMU waits here.
    bench.port(21, "vnet6");
    let reason = "cancelled".to_owned();
    bench.frame(1, MigrationAbort(Reason::unspecified(reason)));
    bench.outputs();
    hook(&mut bench, 8, "vms2");
    assert_eq!(notices(&bench.outputs()).len(), 1);
}

#[test]
fn domain_that_has_arrived_before_is_noticed_when_it_comes_again() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![]));
    let arrived = HypervisorEvent::Resumed {
        uuid: UUID,
        migrated: true,
        at: bench.now,
    };
    bench.hypervisor(arrived);
    bench.outputs();
    hook(&mut bench, 7, "vms2");
    assert_eq!(notices(&bench.outputs()).len(), 1);
}

#[test]
fn hook_is_refused_for_a_source_that_nothing_can_come_from() {
    for (source, reason) in [
        ("", "The request has a field that is out of range: source"),
        (
            "vms1",
            "Domain viewer comes from a host whose agent has not left its name; start the agent \
             there",
        ),
        (
            "vms9",
            "Agent vms1 knows no agent \"vms9\", where domain viewer runs; add it to [[peers]]",
        ),
    ] {
        let mut bench = bench();
        hook(&mut bench, 1, source);
        assert_eq!(failed(&mut bench), reason);
    }
    let mut config = config(0);
    config.policy.arrivals.clear();
    let mut bench = Bench::with(config);
    hook(&mut bench, 1, "vms2");
    let reason = "The policy of vms1 does not let domain viewer come from vms2; a rule \
                  [[policy.arrive]] has to allow it";
    assert_eq!(failed(&mut bench), reason);
}

#[test]
fn hook_is_told_what_the_source_says_also_one_of_an_older_version() {
    let (mut bench, transaction) = noticed();
    let reason = "Domain viewer does not run; start it before moving it".to_owned();
    let told = format!("Source vms2 refuses: {reason}");
    bench.frame(transaction, MigrationAbort(Reason::unspecified(reason)));
    assert_eq!(failed(&mut bench), told);

    let (mut bench, transaction) = noticed();
    let reason = "Unknown message kind 19".to_owned();
    bench.frame(transaction, ErrorMessage(Reason::unspecified(reason)));
    let told = "Source vms2 refuses: Unknown message kind 19";
    assert_eq!(failed(&mut bench), told);
}

#[test]
fn hook_is_told_when_the_source_is_or_goes_down_or_its_request_is_refused() {
    let (mut bench, _) = noticed();
    let reason = "Connection to vms2 was reset".to_owned();
    bench.peer(PeerEvent::Down { reason });
    let told = "Source vms2 is down: Connection to vms2 was reset";
    assert_eq!(failed(&mut bench), told);

    let (mut bench, transaction) = noticed();
    let mut body = request(UUID, vec![]);
    body.domain_name.clear();
    bench.frame(transaction, body);
    let told = "The request has a field that is out of range: domain_name";
    assert_eq!(failed(&mut bench), told);

    let (mut bench, transaction) = noticed();
    bench.frame(transaction, request(UUID, vec![active(1)]));
    let reason = "cancelled".to_owned();
    bench.frame(transaction, MigrationAbort(Reason::unspecified(reason)));
    assert_eq!(failed(&mut bench), "cancelled");
}

#[test]
fn hook_waits_four_seconds_and_what_comes_later_is_used_all_the_same() {
    let (mut bench, transaction) = noticed();
    bench.pass(4 * S - Duration::from_millis(1));
    assert_eq!(reply(&mut bench), None);
    bench.pass(Duration::from_millis(1));
    let reason = "Domain viewer was not prepared for within 4 s; its move goes on, with what is \
                  ready by then";
    assert_eq!(failed(&mut bench), reason);
    bench.frame(transaction, request(UUID, vec![]));
    let outputs = bench.outputs();
    assert_eq!(replies(&outputs), []);
    assert!(matches!(
        answers(&outputs)[..],
        [PeerMessage::AgentResponse(_)]
    ));
}

#[test]
fn stranger_who_asks_for_a_noticed_domain_does_not_end_the_wait_for_it() {
    let (mut bench, transaction) = noticed();
    let lie = common::signal::AgentRequest {
        domain_name: "tv".to_owned(),
        ..request(UUID, vec![active(1)])
    };
    let frame = PeerEvent::Frame(PeerMessage::from(lie).encode(9).into());
    bench.agent.handle_peer(bench.now, "vms3", frame);
    assert_eq!(reply(&mut bench), None);
    bench.frame(transaction, request(UUID, vec![active(1)]));
    first_packet(&mut bench, 1, 1);
    let done = CommandReply::Done { migration: 1 };
    assert_eq!(reply(&mut bench), Some(done));
}
