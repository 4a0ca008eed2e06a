//! Tests of the VMs' datagrams.

use common::signal::{
    AgentSearch, MigrationProgress, MigrationReady, MigrationRequest, Phase, Reason,
};
use proptest::prelude::*;

use super::*;
use crate::proto::tests::fixture::{Bench, TAP, peer, vm_address};
use crate::proto::{Counters, PeerEvent};

fn request(destination: &str) -> MigrationRequest {
    MigrationRequest {
        destination: destination.to_owned(),
        domain: None,
    }
}

#[test]
fn search_is_answered_with_the_domain_behind_the_tap() {
    let mut bench = Bench::housing();
    bench.vm(5, AgentSearch {});
    let reply = AgentSearchReply {
        agent: "vms1".to_owned(),
        domain: "viewer".to_owned(),
        destinations: vec!["vms2".to_owned()],
    };
    assert_eq!(bench.told(), [(5, reply.into())]);
}

#[test]
fn search_reply_with_many_destinations_fits_a_datagram() {
    let mut config = crate::proto::tests::fixture::config(0);
    config.peers = (0..200)
        .map(|number| peer(&format!("vms{number}.example.net")))
        .collect();
    let mut bench = Bench::with(config);
    bench.house();
    bench.vm(5, AgentSearch {});
    match bench.told().pop() {
        Some((5, VmMessage::AgentSearchReply(reply))) => assert!(reply.destinations.len() > 40),
        other => panic!("{other:?}"),
    }
}

#[test]
fn search_is_not_answered_without_a_port_or_a_domain() {
    let mut bench = Bench::housing();
    bench.port(TAP + 1, "vnet1");
    let search = VmMessage::from(AgentSearch {}).encode(5);
    for port in [TAP + 1, 99] {
        bench
            .agent
            .handle_datagram(bench.now, port, vm_address(), &search);
    }
    assert_eq!(bench.told(), []);
    let expected = Counters {
        datagrams_without_domain: 1,
        unknown_port_datagrams: 1,
        ..Counters::default()
    };
    assert_eq!(bench.agent.view().counters(), expected);
}

#[test]
fn datagram_from_a_routed_address_is_counted_and_ignored() {
    let mut bench = Bench::housing();
    let from = SocketAddrV6::new("2001:db8::1".parse().unwrap(), 47411, 0, 0);
    let search = VmMessage::from(AgentSearch {}).encode(5);
    bench.agent.handle_datagram(bench.now, TAP, from, &search);
    assert_eq!(bench.told(), []);
    assert_eq!(bench.agent.view().counters().off_link_datagrams, 1);
}

#[test]
fn other_protocol_version_is_told_so() {
    let mut bench = Bench::housing();
    let bytes = [0x84, 0x02, 0x05, 0x01, 0x80];
    bench
        .agent
        .handle_datagram(bench.now, TAP, vm_address(), &bytes);
    assert_eq!(bench.abort_reason(), "Protocol version 2 is not ours (1)");
}

#[test]
fn vm_cannot_move_another_domain() {
    let mut bench = Bench::housing();
    let request = MigrationRequest {
        destination: "vms2".to_owned(),
        domain: Some("bank".to_owned()),
    };
    bench.vm(5, request);
    let reason = "This VM is domain \"viewer\"; it cannot move domain \"bank\"";
    assert_eq!(bench.abort_reason(), reason);
}

#[test]
fn domain_whose_name_cannot_be_shown_is_told_and_moved_by_nobody() {
    let mut bench = Bench::housing();
    bench.named_domain("a\t\u{1b}[2J", "vnet0", true);
    bench.vm(5, AgentSearch {});
    let told = bench.told();
    let [(5, VmMessage::AgentSearchReply(reply))] = told.as_slice() else {
        panic!("{told:?}");
    };
    assert_eq!(reply.domain, r"a\t\u{1b}[2J");
    bench.vm(6, request("vms2"));
    let reason = bench.abort_reason();
    assert!(reason.contains("cannot be shown"), "{reason}");
}

#[test]
fn unknown_destination_is_refused_with_the_known_ones() {
    let mut bench = Bench::housing();
    bench.vm(5, request("mars"));
    let reason = "Agent vms1 knows no destination \"mars\"; name one of its peers (vms2)";
    assert_eq!(bench.abort_reason(), reason);
}

#[test]
fn destination_that_is_this_host_is_refused() {
    let mut bench = Bench::housing();
    bench.vm(5, request("vms1"));
    let reason = "Domain viewer is on vms1 already; name another destination";
    assert_eq!(bench.abort_reason(), reason);
}

#[test]
fn policy_that_forbids_is_named() {
    let mut config = crate::proto::tests::fixture::config(0);
    config.policy.departures.clear();
    let mut bench = Bench::with(config);
    bench.house();
    bench.vm(5, request("vms2"));
    let reason = "The policy of vms1 does not let domain viewer move to vms2 by \"vm\"; a rule \
                  [[policy.depart]] has to allow it";
    assert_eq!(bench.abort_reason(), reason);
}

#[test]
fn vm_may_not_ask_where_only_an_operator_may() {
    let mut config = crate::proto::tests::fixture::config(0);
    config.policy.departures[0].by = vec![Asker::Operator, Asker::Hook];
    let mut bench = Bench::with(config);
    bench.house();
    bench.vm(4, AgentSearch {});
    let Some((4, VmMessage::AgentSearchReply(reply))) = bench.told().pop() else {
        panic!("no reply");
    };
    assert_eq!(reply.destinations, Vec::<String>::new());
    bench.vm(5, request("vms2"));
    assert!(bench.abort_reason().contains("by \"vm\""));
    assert_eq!(bench.agent.view().migrations().count(), 0);
}

/// Returns a VM whose migration libvirt has started.
fn moving(pause_s: u32) -> Bench {
    let mut config = crate::proto::tests::fixture::config(0);
    config.policy.vm_pause_s = pause_s;
    let mut bench = Bench::with(config);
    bench.house();
    bench.peer(PeerEvent::Up { from: None });
    bench.vm(5, request("vms2"));
    let transaction = bench.outputs().into_iter().find_map(|output| match output {
        Output::Frame { bytes, .. } => Some(common::signal::PeerMessage::decode(&bytes).unwrap().0),
        _ => None,
    });
    let response = common::signal::AgentResponse {
        prefix: [0; 16].into(),
        prefix_length: 64,
        agent_address: [1; 16].into(),
        receptions: vec![],
        copy_tls: false,
    };
    bench.frame(transaction.unwrap(), response);
    bench.vm(5, MigrationReady::default());
    bench
}

fn fail(bench: &mut Bench) {
    let result = Err("Connection reset".to_owned());
    let uuid = crate::proto::tests::fixture::UUID;
    bench.hypervisor(crate::proto::HypervisorEvent::MigrationEnded { uuid, result });
    bench.outputs();
}

#[test]
fn vm_waits_between_two_moves_that_it_asks_for_and_an_operator_does_not() {
    let mut bench = moving(60);
    bench.pass(Duration::from_secs(100));
    fail(&mut bench);
    bench.pass(Duration::from_secs(20));
    bench.vm(6, request("vms2"));
    let reason = "Domain viewer has been moved just now; it may ask for another move in 41 s";
    assert_eq!(bench.abort_reason(), reason);
    let migrate = crate::proto::Command::Migrate {
        domain: "viewer".to_owned(),
        destination: "vms2".to_owned(),
    };
    bench.agent.handle_command(bench.now, 1, migrate);
    assert_eq!(bench.agent.view().migrations().count(), 2);
    let abort = crate::proto::Command::Abort {
        domain: "viewer".to_owned(),
    };
    bench.agent.handle_command(bench.now, 2, abort);
    bench.pass(Duration::from_secs(41));
    bench.vm(7, request("vms2"));
    assert_eq!(bench.agent.view().migrations().count(), 3);
}

#[test]
fn vm_that_has_just_come_waits_before_it_may_go_on() {
    let mut config = crate::proto::tests::fixture::config(0);
    config.policy.vm_pause_s = 60;
    let mut bench = Bench::with(config);
    bench.house();
    let resumed = crate::proto::HypervisorEvent::Resumed {
        uuid: crate::proto::tests::fixture::UUID,
        migrated: true,
        at: bench.now,
    };
    bench.hypervisor(resumed);
    bench.outputs();
    bench.vm(5, request("vms2"));
    assert!(bench.abort_reason().contains("in 61 s"));
}

#[test]
fn vm_may_try_a_few_times_in_a_pause_if_nothing_is_moved() {
    let mut config = crate::proto::tests::fixture::config(0);
    config.policy.vm_pause_s = 60;
    let mut bench = Bench::with(config);
    bench.house();
    for transaction in 1..100 {
        bench.vm(transaction, request("vms2"));
        bench.vm(
            transaction,
            common::signal::MigrationAbort(Reason::unspecified(String::new())),
        );
        bench.outputs();
        bench.pass(Duration::from_millis(100));
    }
    assert_eq!(bench.agent.view().migrations().count(), 4);
    bench.pass(Duration::from_secs(15));
    bench.vm(100, request("vms2"));
    assert_eq!(bench.agent.view().migrations().count(), 5);
}

#[test]
fn second_move_during_the_first_is_refused() {
    let mut bench = Bench::housing();
    bench.vm(5, request("vms2"));
    bench.vm(6, request("vms2"));
    let reason = "Domain viewer is already being moved to vms2; wait until that has ended";
    assert_eq!(bench.abort_reason(), reason);
}

#[test]
fn repeated_request_is_told_that_it_is_being_prepared_and_begins_nothing() {
    let mut bench = Bench::housing();
    bench.vm(5, request("vms2"));
    bench.outputs();
    bench.pass(Duration::from_millis(200));
    bench.vm(5, request("vms2"));
    let progress = MigrationProgress {
        phase: Phase::Preparing,
        processed_bytes: 0,
        total_bytes: 0,
        elapsed_ms: 200,
        vm_pause_ms: None,
        clock_ns: None,
    };
    assert_eq!(bench.told(), [(5, progress.into())]);
    assert_eq!(bench.agent.view().migrations().count(), 1);
}

#[test]
fn refused_transaction_gets_the_same_answer_again() {
    let mut bench = Bench::housing();
    bench.vm(5, request("mars"));
    let first = bench.told();
    bench.vm(5, request("vms2"));
    assert_eq!(bench.told(), first);
    assert_eq!(bench.agent.view().migrations().count(), 0);
}

#[test]
fn destination_that_is_down_is_named_with_the_reason() {
    let mut bench = Bench::housing();
    bench.vm(5, request("vms2"));
    let reason = "Connection to vms2 was refused".to_owned();
    bench.peer(PeerEvent::Down { reason });
    let reason = "Destination vms2 is down: Connection to vms2 was refused";
    assert_eq!(bench.abort_reason(), reason);
}

#[test]
fn unknown_transaction_is_denied_only_when_the_agent_has_run_for_a_while() {
    let mut bench = Bench::housing();
    bench.vm(5, MigrationReady::default());
    assert_eq!(bench.told(), []);
    bench.pass(Duration::from_secs(11));
    bench.vm(5, MigrationReady::default());
    let reason = "Agent vms1 knows of no such migration, perhaps because it was restarted; run \
                  migkick again";
    assert_eq!(bench.abort_reason(), reason);
}

proptest! {
    #[test]
    fn garbage_of_a_vm_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..1500)) {
        let mut bench = Bench::housing();
        bench.agent.handle_datagram(bench.now, TAP, vm_address(), &bytes);
    }

    #[test]
    fn garbage_of_a_peer_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..1500)) {
        let mut bench = Bench::housing();
        bench.peer(PeerEvent::Up { from: None });
        bench.peer(PeerEvent::Frame(bytes.into()));
    }
}
