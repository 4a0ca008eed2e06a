//! Tests of outgoing migrations.

use common::maps::{FilterMode, StreamUsage};
use common::signal::{AgentResponse, MigrationAbort, MigrationReady, PeerMessage, Phase};
use common::signal::{Code, Reason};

use super::*;
use crate::proto::tests::fixture::{BRIDGE, Bench, TAP, UUID, key};
use crate::proto::{Command, HypervisorEvent, Outcome, PeerEvent};

const S: Duration = Duration::from_secs(1);

fn request() -> MigrationRequest {
    MigrationRequest {
        destination: "vms2".to_owned(),
        domain: None,
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

/// Removes the `AgentRequest` from the outputs.
fn sent(bench: &mut Bench) -> Option<(u64, AgentRequest)> {
    bench.outputs().into_iter().find_map(|output| match output {
        Output::Frame { bytes, .. } => match PeerMessage::decode(&bytes).unwrap() {
            (transaction, PeerMessage::AgentRequest(body)) => Some((transaction, body)),
            _ => None,
        },
        _ => None,
    })
}

fn aborts(outputs: &[Output]) -> usize {
    let is_abort = |output: &&Output| match output {
        Output::Frame { bytes, .. } => {
            matches!(
                PeerMessage::decode(bytes),
                Ok((_, PeerMessage::MigrationAbort(_)))
            )
        }
        _ => false,
    };
    outputs.iter().filter(is_abort).count()
}

/// Returns a migration at the VM's request, with the `AgentRequest` sent.
fn requesting() -> (Bench, u64) {
    let mut bench = Bench::housing();
    bench.peer(PeerEvent::Up { from: None });
    bench.vm(5, request());
    let (transaction, _) = sent(&mut bench).unwrap();
    (bench, transaction)
}

/// Like `requesting`, with the migration started.
fn copying() -> (Bench, u64) {
    let (mut bench, transaction) = requesting();
    bench.frame(transaction, response());
    bench.vm(5, MigrationReady::default());
    (bench, transaction)
}

fn command(bench: &mut Bench, domain: &str, destination: &str) -> Option<CommandReply> {
    let command = Command::Migrate {
        domain: domain.to_owned(),
        destination: destination.to_owned(),
    };
    bench.agent.handle_command(bench.now, 1, command);
    bench.outputs().into_iter().find_map(|output| match output {
        Output::Reply { reply, .. } => Some(reply),
        _ => None,
    })
}

#[test]
fn request_carries_filters_and_flows_of_what_means_something_elsewhere() {
    let mut bench = Bench::housing();
    bench.peer(PeerEvent::Up { from: None });
    let wanted = "2001:db8::1".parse().unwrap();
    bench.source(TAP, key(1), wanted, 1);
    bench.report(TAP, key(1), FilterMode::Include);
    bench.report(TAP, key(2), FilterMode::Exclude);
    let mut mdns = key(0);
    mdns.multicast_address = "ff02::fb".parse::<std::net::Ipv6Addr>().unwrap().octets();
    bench.report(TAP, mdns, FilterMode::Exclude);
    bench.outputs();
    bench.vm(5, request());
    let token = bench.outputs().into_iter().find_map(|output| match output {
        Output::ReadStreams { token, keys } => {
            assert_eq!(keys, [key(1), key(2)]);
            Some(token)
        }
        _ => None,
    });
    let stream = |source: std::net::Ipv6Addr| {
        let flow = StreamKey {
            multicast_address: key(1).multicast_address,
            source: source.octets(),
            source_port: 5004,
            destination_port: 5006,
            vlan: 0,
            bridge: BRIDGE,
        };
        let state = Stream {
            native: StreamUsage {
                packets: 10,
                last_ns: bench.now.0 - 3_000_000,
                interarrival_ns: 1_000_000,
                ..StreamUsage::default()
            },
            ..Stream::default()
        };
        (flow, state)
    };
    let streams = vec![stream(wanted), stream("2001:db8::2".parse().unwrap())];
    bench.datapath(crate::proto::DatapathEvent::Streams {
        token: token.unwrap(),
        streams,
    });
    let (_, body) = sent(&mut bench).unwrap();
    assert_eq!(body.vm_transaction, Some(5));
    assert_eq!(body.listeners.len(), 2);
    assert_eq!(body.listeners[0].sources, [wanted.octets().into()]);
    assert_eq!(body.listeners[0].flows.len(), 1);
    assert_eq!(body.listeners[0].flows[0].rate_mpps, 1_000_000);
    assert_eq!(body.listeners[0].flows[0].silent_ms, 3);
    assert_eq!(body.listeners[1].filter_mode, FilterMode::Exclude as u8);
}

#[test]
fn request_goes_out_without_flows_when_the_kernel_does_not_answer() {
    let mut bench = Bench::housing();
    bench.peer(PeerEvent::Up { from: None });
    bench.report(TAP, key(1), FilterMode::Exclude);
    bench.vm(5, request());
    assert_eq!(sent(&mut bench), None);
    bench.pass(S);
    assert!(sent(&mut bench).is_some());
}

#[test]
fn destination_that_does_not_answer_is_given_up_and_told() {
    let (mut bench, _) = requesting();
    bench.pass(16 * S);
    let outputs = bench.outputs();
    assert_eq!(aborts(&outputs), 1);
    bench.vm(5, request());
    let reason = "Destination vms2 did not answer within 15 s; check its agent's log";
    assert_eq!(bench.abort_reason(), reason);
}

#[test]
fn destination_without_a_place_is_asked_again_and_again_and_given_up_at_last() {
    let waits = |bench: &mut Bench, transaction| {
        let told = MigrationProgress {
            phase: Phase::Preparing,
            processed_bytes: 0,
            total_bytes: 0,
            elapsed_ms: 0,
            vm_pause_ms: None,
            clock_ns: None,
        };
        bench.frame(transaction, told);
    };
    let (mut bench, transaction) = requesting();
    waits(&mut bench, transaction);
    for _ in 0..30 {
        bench.outputs();
        bench.pass(2 * S);
        assert_eq!(sent(&mut bench).map(|(again, _)| again), Some(transaction));
        waits(&mut bench, transaction);
    }
    bench.frame(transaction, response());
    bench.outputs();
    bench.pass(5 * S);
    assert_eq!(sent(&mut bench), None, "asked for what it has");

    let (mut bench, transaction) = requesting();
    for _ in 0..310 {
        waits(&mut bench, transaction);
        bench.pass(2 * S);
    }
    let record = bench.agent.view().migrations().next().unwrap();
    let Some(Outcome::Failed(reason)) = &record.outcome else {
        panic!("{record:?}");
    };
    assert!(
        reason
            .text
            .contains("vms2 had no place for the domain within 600 s"),
        "{reason}"
    );
    assert_eq!(reason.code, Code::LIMIT);
}

#[test]
fn one_destination_does_not_take_all_places() {
    let mut config = crate::proto::tests::fixture::config(0);
    config
        .peers
        .push(crate::proto::tests::fixture::peer("vms3"));
    config.policy.departures_at_once = std::num::NonZeroU16::new(3).unwrap();
    config.policy.departures_per_peer = std::num::NonZeroU16::new(2);
    let mut bench = Bench::with(config);
    for number in 1..6_u8 {
        bench.hypervisor(HypervisorEvent::Domain(Domain {
            uuid: DomainUuid([number; 16]),
            name: format!("tv-{number}"),
            running: true,
            interfaces: vec![],
        }));
    }
    let mut ask = |domain: &str, destination: &str| match command(&mut bench, domain, destination) {
        Some(CommandReply::Failed(reason)) => reason,
        _ => String::new(),
    };
    assert_eq!(ask("tv-1", "vms2"), "");
    assert_eq!(ask("tv-2", "vms2"), "");
    let reason = ask("tv-3", "vms2");
    assert!(
        reason.contains("moves 2 domains to this destination already"),
        "{reason}"
    );
    assert_eq!(ask("tv-4", "vms3"), "");
    let reason = ask("tv-5", "vms3");
    assert!(reason.contains("moves 3 domains already"), "{reason}");
}

#[test]
fn refusal_of_the_destination_is_passed_on() {
    let (mut bench, transaction) = requesting();
    let reason = "The policy of vms2 does not let domain viewer come from vms1".to_owned();
    bench.frame(transaction, MigrationAbort(Reason::unspecified(reason)));
    let reason = "Destination vms2 refuses: The policy of vms2 does not let domain viewer come \
                  from vms1";
    assert_eq!(bench.abort_reason(), reason);
}

#[test]
fn broken_connection_before_the_start_fails_and_is_made_again_to_tell() {
    let (mut bench, _) = requesting();
    let reason = "Connection to vms2 was reset".to_owned();
    bench.peer(PeerEvent::Down { reason });
    let reason = "Destination vms2 is down: Connection to vms2 was reset";
    assert_eq!(bench.abort_reason(), reason);
    bench.pass(S);
    let connect = Output::Connect {
        peer: "vms2".to_owned(),
    };
    assert!(bench.outputs().contains(&connect));
    bench.peer(PeerEvent::Up { from: None });
    assert_eq!(aborts(&bench.outputs()), 1);
}

#[test]
fn vm_that_is_never_ready_is_given_up() {
    let (mut bench, transaction) = requesting();
    bench.frame(transaction, response());
    bench.outputs();
    bench.pass(31 * S);
    assert_eq!(aborts(&bench.outputs()), 1);
    bench.vm(5, MigrationReady::default());
    let reason = "The VM did not say within 30 s that it is ready; run migkick again";
    assert_eq!(bench.abort_reason(), reason);
}

#[test]
fn repeated_ready_starts_the_migration_once() {
    let (mut bench, _) = copying();
    for _ in 0..3 {
        bench.vm(5, MigrationReady::default());
    }
    let starts = bench
        .outputs()
        .into_iter()
        .filter(|output| matches!(output, Output::StartMigration { .. }))
        .count();
    assert_eq!(starts, 1);
}

#[test]
fn broken_connection_after_the_start_leaves_the_migration_to_libvirt() {
    let (mut bench, transaction) = copying();
    bench.outputs();
    let reason = "Connection to vms2 was reset".to_owned();
    bench.peer(PeerEvent::Down {
        reason: reason.clone(),
    });
    let mut attempts = 0;
    for _ in 0..20 {
        bench.pass(S);
        for output in bench.outputs() {
            if matches!(output, Output::Connect { .. }) {
                attempts += 1;
                let reason = reason.clone();
                bench.peer(PeerEvent::Down { reason });
            }
        }
    }
    assert!((5..15).contains(&attempts), "{attempts} attempts in 20 s");
    bench.pass(6 * S);
    bench.peer(PeerEvent::Up { from: None });
    assert_eq!(sent(&mut bench).unwrap().0, transaction);
    let result = Ok(JobStats::default());
    bench.hypervisor(HypervisorEvent::MigrationEnded { uuid: UUID, result });
    let record = bench.agent.view().migrations().next().unwrap();
    assert_eq!(record.outcome, Some(Outcome::Completed));
}

#[test]
fn failure_of_libvirt_tells_the_vm_and_the_destination() {
    let (mut bench, _) = copying();
    bench.outputs();
    let result = Err("Connection to the destination was reset".to_owned());
    bench.hypervisor(HypervisorEvent::MigrationEnded { uuid: UUID, result });
    assert_eq!(aborts(&bench.outputs()), 1);
    bench.vm(5, MigrationReady::default());
    let reason = "The migration of domain viewer to vms2 failed and it stays on vms1: Connection \
                  to the destination was reset";
    assert_eq!(bench.abort_reason(), reason);
}

#[test]
fn operator_is_told_of_a_domain_that_is_unknown_or_does_not_run() {
    let mut bench = Bench::empty();
    assert_eq!(
        command(&mut bench, "viewer", "vms2"),
        Some(CommandReply::Failed(
            "Agent vms1 has no domain \"viewer\"".to_owned()
        ))
    );
    bench.domain("", false);
    assert_eq!(
        command(&mut bench, "viewer", "vms2"),
        Some(CommandReply::Failed(
            "Domain viewer does not run; start it before moving it".to_owned()
        ))
    );
}

#[test]
fn abort_before_the_start_ends_at_once_and_after_it_by_libvirt() {
    let abort = Command::Abort {
        domain: "viewer".to_owned(),
    };
    let (mut bench, _) = requesting();
    bench.agent.handle_command(bench.now, 2, abort.clone());
    let reason = "The migration of domain viewer was cancelled by an operator";
    assert_eq!(bench.abort_reason(), reason);

    let (mut bench, _) = copying();
    bench.agent.handle_command(bench.now, 2, abort.clone());
    let outputs = bench.outputs();
    assert!(outputs.contains(&Output::AbortMigration { uuid: UUID }));
    let result = Err("operation aborted".to_owned());
    bench.hypervisor(HypervisorEvent::MigrationEnded { uuid: UUID, result });
    assert_eq!(bench.abort_reason(), reason);

    bench.agent.handle_command(bench.now, 3, abort);
    let refused = CommandReply::Failed("Domain viewer is not being moved".to_owned());
    assert!(bench.outputs().contains(&Output::Reply {
        command: 3,
        reply: refused
    }));
}

#[test]
fn domain_that_is_shut_down_before_the_start_is_not_moved() {
    let (mut bench, _) = requesting();
    bench.hypervisor(HypervisorEvent::Gone(UUID));
    assert_eq!(aborts(&bench.outputs()), 1);
    let record = bench.agent.view().migrations().next().unwrap();
    assert!(matches!(record.outcome, Some(Outcome::Failed(_))));
}
