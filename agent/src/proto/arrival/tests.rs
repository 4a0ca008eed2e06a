//! Tests of incoming migrations.

use std::time::Duration;

use common::maps::{FilterMode, Origin, Origins, Querier, QuerierKey, StreamKey, StreamUsage};
use common::signal::Code;
use common::signal::{
    AgentRequest, Flow, Listener, MigrationAbort, PeerMessage, Reason, ReceptionMode,
};

use crate::proto::tests::fixture::{BRIDGE, Bench, MAC, OTHER_UUID, UUID, key};
use crate::proto::{DatapathEvent, DomainUuid, Output, PeerEvent, Stream};

pub(in crate::proto) const S: Duration = Duration::from_secs(1);

pub(in crate::proto) fn flow(silent_ms: u64) -> Flow {
    Flow {
        source: [1; 16].into(),
        source_port: 5004,
        destination_port: 5004,
        rate_mpps: 1_725_000,
        silent_ms,
    }
}

pub(in crate::proto) fn listener(
    number: u16,
    mode: FilterMode,
    sources: &[u8],
    flows: Vec<Flow>,
) -> Listener {
    Listener {
        vlan: 0,
        multicast_address: key(number).multicast_address.into(),
        filter_mode: mode as u8,
        sources: sources.iter().map(|byte| [*byte; 16].into()).collect(),
        mld_version: 2,
        mac: MAC.into(),
        flows,
    }
}

pub(in crate::proto) fn request(uuid: DomainUuid, listeners: Vec<Listener>) -> AgentRequest {
    AgentRequest {
        domain_uuid: uuid.0.into(),
        domain_name: "viewer".to_owned(),
        macs: vec![MAC.into()],
        listeners,
        vm_transaction: Some(5),
    }
}

pub(in crate::proto) fn active(number: u16) -> Listener {
    listener(number, FilterMode::Exclude, &[], vec![flow(0)])
}

pub(in crate::proto) fn bench() -> Bench {
    let mut bench = Bench::empty();
    bench.peer(PeerEvent::Up { from: None });
    bench
}

pub(in crate::proto) fn answers(outputs: &[Output]) -> Vec<PeerMessage> {
    let decode = |output: &Output| match output {
        Output::Frame { bytes, .. } => Some(PeerMessage::decode(bytes).unwrap().1),
        _ => None,
    };
    outputs.iter().filter_map(decode).collect()
}

pub(in crate::proto) fn modes(outputs: &[Output]) -> Vec<ReceptionMode> {
    match answers(outputs).as_slice() {
        [PeerMessage::AgentResponse(response)] => {
            response.receptions.iter().map(|row| row.mode).collect()
        }
        other => panic!("no answer but {other:?}"),
    }
}

pub(in crate::proto) fn first_packet(bench: &mut Bench, number: u16, source: u8) {
    let event = DatapathEvent::FirstPacket {
        key: StreamKey {
            multicast_address: key(number).multicast_address,
            source: [source; 16],
            source_port: 5004,
            destination_port: 5004,
            vlan: 0,
            bridge: BRIDGE,
        },
        origin: Origin::Native,
        at: bench.now,
    };
    bench.datapath(event);
}

pub(in crate::proto) fn query(bench: &mut Bench) {
    let event = DatapathEvent::Query {
        key: QuerierKey {
            ifindex: 2,
            vlan: 0,
            bridge: BRIDGE,
        },
        value: Querier {
            last_query_ns: bench.now.0,
            address: [0xfe; 16],
            query_interval_ms: 125_000,
            query_response_interval_ms: 10_000,
            robustness: 2,
            mld_version: 2,
            pad: [0; 3],
        },
    };
    bench.datapath(event);
}

#[test]
fn request_watches_then_joins_every_address_at_once() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1), active(2)]));
    let outputs = bench.outputs();
    let manage = |number| Output::Manage {
        key: key(number),
        since: bench.now,
        origins: Origins::Native,
    };
    let join = |number| {
        Output::Join(crate::proto::Membership {
            key: key(number),
            filter_mode: FilterMode::Exclude,
            sources: vec![],
        })
    };
    assert_eq!(outputs, [manage(1), join(1), manage(2), join(2)]);
}

#[test]
fn answer_comes_with_the_last_verdict() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1), active(2)]));
    bench.outputs();
    first_packet(&mut bench, 1, 1);
    assert_eq!(bench.outputs(), []);
    bench.pass(Duration::from_millis(7));
    first_packet(&mut bench, 2, 1);
    assert_eq!(modes(&bench.outputs()), [ReceptionMode::Native; 2]);
}

#[test]
fn flow_that_is_silent_at_the_source_is_idle_at_once() {
    let mut bench = bench();
    let silent = listener(1, FilterMode::Exclude, &[], vec![flow(60_000)]);
    let unknown = listener(2, FilterMode::Exclude, &[], vec![]);
    bench.frame(1, request(UUID, vec![silent, unknown]));
    assert_eq!(modes(&bench.outputs()), [ReceptionMode::Idle; 2]);
    first_packet(&mut bench, 1, 1);
    let view = bench.agent.view().receptions().next().unwrap();
    assert_eq!(view.reception, Some(ReceptionMode::Native));
}

#[test]
fn packet_of_a_source_that_nobody_wants_proves_nothing() {
    let mut bench = bench();
    let wanted = listener(1, FilterMode::Include, &[1], vec![flow(0)]);
    bench.frame(1, request(UUID, vec![wanted]));
    bench.outputs();
    first_packet(&mut bench, 1, 2);
    assert_eq!(bench.outputs(), []);
    bench.pass(3 * S);
    assert_eq!(modes(&bench.outputs()), [ReceptionMode::Unreachable]);
}

#[test]
fn slow_flow_is_given_a_few_interarrival_times_more() {
    let mut bench = bench();
    let mut slow = flow(0);
    slow.rate_mpps = 2_000;
    bench.frame(
        1,
        request(
            UUID,
            vec![listener(1, FilterMode::Exclude, &[], vec![slow])],
        ),
    );
    bench.outputs();
    bench.pass(Duration::from_millis(4400));
    assert_eq!(bench.outputs(), []);
    bench.pass(Duration::from_millis(200));
    assert_eq!(modes(&bench.outputs()), [ReceptionMode::Unreachable]);
}

#[test]
fn repeated_request_gets_the_same_answer_and_joins_nothing_again() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.outputs();
    first_packet(&mut bench, 1, 1);
    let first = bench.outputs();
    bench.frame(1, request(UUID, vec![active(1)]));
    assert_eq!(bench.outputs(), first);
    assert_eq!(bench.agent.view().migrations().count(), 1);
}

#[test]
fn address_received_here_already_is_native_at_once() {
    let mut bench = bench();
    bench.port(9, "vnet9");
    bench.report(9, key(1), FilterMode::Exclude);
    bench.outputs();
    bench.frame(1, request(UUID, vec![active(1)]));
    let token = bench.outputs().into_iter().find_map(|output| match output {
        Output::ReadStreams { token, .. } => Some(token),
        _ => None,
    });
    let stream = Stream {
        native: StreamUsage {
            packets: 9,
            last_ns: bench.now.0 - 1_000_000,
            interarrival_ns: 1_000_000,
            ..StreamUsage::default()
        },
        ..Stream::default()
    };
    let flow = StreamKey {
        multicast_address: key(1).multicast_address,
        source: [1; 16],
        source_port: 1,
        destination_port: 1,
        vlan: 0,
        bridge: BRIDGE,
    };
    bench.datapath(DatapathEvent::Streams {
        token: token.unwrap(),
        streams: vec![(flow, stream)],
    });
    assert_eq!(modes(&bench.outputs()), [ReceptionMode::Native]);
}

#[test]
fn filters_of_several_domains_are_joined_as_one_and_narrowed_again() {
    let mut bench = bench();
    let other = DomainUuid([9; 16]);
    bench.frame(
        1,
        request(UUID, vec![listener(1, FilterMode::Include, &[1], vec![])]),
    );
    bench.frame(
        2,
        named(
            other,
            "other",
            vec![listener(1, FilterMode::Include, &[2], vec![])],
        ),
    );
    let joined = |bench: &mut Bench| {
        let joins: Vec<_> = bench
            .outputs()
            .into_iter()
            .filter_map(|output| match output {
                Output::Join(membership) => Some(membership.sources.len()),
                Output::Leave(_) => Some(0),
                _ => None,
            })
            .collect();
        joins
    };
    assert_eq!(joined(&mut bench), [1, 2]);
    let reason = "cancelled".to_owned();
    bench.frame(1, MigrationAbort(Reason::unspecified(reason.clone())));
    assert_eq!(joined(&mut bench), [1]);
    bench.frame(2, MigrationAbort(Reason::unspecified(reason)));
    assert_eq!(joined(&mut bench), [0]);
    assert_eq!(bench.agent.view().receptions().count(), 0);
}

#[test]
fn policy_of_the_destination_is_named() {
    let mut config = crate::proto::tests::fixture::config(0);
    config.policy.arrivals.clear();
    let mut bench = Bench::with(config);
    bench.peer(PeerEvent::Up { from: None });
    bench.frame(1, request(UUID, vec![active(1)]));
    let reason = "The policy of vms1 does not let domain viewer come from vms2; a rule \
                  [[policy.arrive]] has to allow it";
    let refused = MigrationAbort(Reason::new(Code::NOT_PERMITTED, reason));
    assert_eq!(answers(&bench.outputs()), [refused.into()]);
    assert_eq!(bench.agent.view().receptions().count(), 0);
}

#[test]
fn addresses_over_the_limits_are_refused_one_by_one() {
    let mut config = crate::proto::tests::fixture::config(0);
    config.limits.joins = 1;
    let mut bench = Bench::with(config);
    bench.peer(PeerEvent::Up { from: None });
    let idle = |number| listener(number, FilterMode::Exclude, &[], vec![]);
    let mut link_local = idle(3);
    link_local.multicast_address = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xfb].into();
    bench.frame(1, request(UUID, vec![idle(1), idle(2), link_local]));
    assert_eq!(
        modes(&bench.outputs()),
        [
            ReceptionMode::Idle,
            ReceptionMode::Refused,
            ReceptionMode::Refused
        ]
    );
}

#[test]
fn request_of_the_same_domain_with_another_transaction_takes_the_joins_over() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1), active(2)]));
    bench.outputs();
    bench.frame(2, request(UUID, vec![active(1)]));
    let outputs = bench.outputs();
    assert!(outputs.contains(&Output::Leave(key(2))));
    assert!(!outputs.contains(&Output::Leave(key(1))));
    assert_eq!(bench.agent.view().receptions().count(), 1);
}

#[test]
fn peer_joins_no_more_than_its_share() {
    let mut config = crate::proto::tests::fixture::config(0);
    config.limits.joins_per_peer = 1;
    let mut bench = Bench::with(config);
    bench.peer(PeerEvent::Up { from: None });
    let idle = |number| listener(number, FilterMode::Exclude, &[], vec![]);
    bench.frame(1, request(UUID, vec![idle(1)]));
    bench.outputs();
    bench.frame(2, named(OTHER_UUID, "other", vec![idle(2), idle(1)]));
    assert_eq!(
        modes(&bench.outputs()),
        [ReceptionMode::Refused, ReceptionMode::Idle]
    );
    let frame = PeerMessage::from(named(DomainUuid([9; 16]), "third", vec![idle(3)])).encode(3);
    let peer = "vms3";
    bench
        .agent
        .handle_peer(bench.now, peer, PeerEvent::Up { from: None });
    bench
        .agent
        .handle_peer(bench.now, peer, PeerEvent::Frame(frame.into()));
    assert_eq!(modes(&bench.outputs()), [ReceptionMode::Idle]);
}

fn refused(bench: &mut Bench) -> String {
    match answers(&bench.outputs()).as_slice() {
        [PeerMessage::MigrationAbort(abort)] => abort.0.text.clone(),
        other => panic!("no refusal but {other:?}"),
    }
}

fn named(uuid: DomainUuid, name: &str, listeners: Vec<Listener>) -> AgentRequest {
    AgentRequest {
        domain_name: name.to_owned(),
        ..request(uuid, listeners)
    }
}

#[test]
fn domain_under_another_name_than_libvirts_is_refused() {
    let uuid = OTHER_UUID;
    let mut bench = bench();
    bench.port(9, "vnet9");
    bench.domain("vnet9", true);
    bench.frame(1, named(UUID, "tv", vec![active(1)]));
    assert!(refused(&mut bench).contains("is viewer on vms1, not \"tv\""));
    bench.frame(2, request(uuid, vec![active(1)]));
    assert!(refused(&mut bench).contains("another domain \"viewer\""));
    // A domain that libvirt is receiving.
    let name = "bank".to_owned();
    bench.hypervisor(crate::proto::HypervisorEvent::Arriving { uuid, name });
    bench.frame(3, named(uuid, "tv", vec![active(1)]));
    assert!(refused(&mut bench).contains("is bank on vms1, not \"tv\""));
    assert_eq!(bench.agent.view().receptions().count(), 0);
}

#[test]
fn arrival_ends_when_libvirt_says_another_name_than_its_source() {
    let bank = || "bank".to_owned();
    let told: [fn(&mut Bench, String); 3] = [
        |bench, name| {
            let arriving = crate::proto::HypervisorEvent::Arriving { uuid: UUID, name };
            bench.hypervisor(arriving);
        },
        |bench, name| {
            bench.hypervisor(crate::proto::HypervisorEvent::Domain(
                crate::proto::Domain {
                    uuid: UUID,
                    name,
                    running: true,
                    interfaces: vec![],
                },
            ));
        },
        |bench, domain| {
            let prepare = crate::proto::Command::Prepare {
                uuid: UUID,
                domain,
                source: "vms2".to_owned(),
            };
            bench.agent.handle_command(bench.now, 1, prepare);
        },
    ];
    for tell in told {
        let mut bench = bench();
        bench.frame(1, request(UUID, vec![active(1)]));
        bench.outputs();
        tell(&mut bench, bank());
        let outputs = bench.outputs();
        assert!(outputs.contains(&Output::Leave(key(1))), "{outputs:?}");
        let reason = answers(&outputs)
            .into_iter()
            .find_map(|answer| match answer {
                PeerMessage::MigrationAbort(abort) => Some(abort.0.text),
                _ => None,
            });
        assert!(reason.unwrap().contains("is bank on vms1"));
    }
}

#[test]
fn domain_that_has_run_here_for_long_is_nobodys_to_announce() {
    let mut bench = bench();
    bench.port(9, "vnet9");
    bench.domain("vnet9", true);
    bench.pass(100 * S);
    bench.outputs();
    bench.frame(1, request(UUID, vec![active(1)]));
    assert_eq!(refused(&mut bench), "Domain viewer runs on vms1 already");
    let came = crate::proto::HypervisorEvent::Resumed {
        uuid: UUID,
        migrated: true,
        at: bench.now,
    };
    bench.hypervisor(came);
    bench.frame(2, request(UUID, vec![active(1)]));
    assert_eq!(bench.agent.view().receptions().count(), 1);
}

#[test]
fn peer_that_asks_on_and_on_is_refused_for_a_while() {
    let mut config = crate::proto::tests::fixture::config(0);
    config.policy.requests_per_minute = std::num::NonZeroU32::new(3).unwrap();
    let mut bench = Bench::with(config);
    bench.peer(PeerEvent::Up { from: None });
    let ask = |bench: &mut Bench, transaction| {
        bench.frame(transaction, request(UUID, vec![]));
        let outputs = bench.outputs();
        matches!(answers(&outputs)[..], [PeerMessage::AgentResponse(_)])
    };
    assert_eq!(
        [1, 2, 3, 4].map(|number| ask(&mut bench, number)),
        [true, true, true, false]
    );
    bench.frame(5, request(UUID, vec![]));
    assert!(refused(&mut bench).contains("too many requests of vms2"));
    bench.pass(20 * S);
    assert!(ask(&mut bench, 6));
}

#[test]
fn join_that_the_kernel_refuses_is_told_as_refused() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.outputs();
    let reason = "Too many memberships".to_owned();
    bench.datapath(DatapathEvent::Failed {
        key: key(1),
        reason,
    });
    assert_eq!(modes(&bench.outputs()), [ReceptionMode::Refused]);
}
