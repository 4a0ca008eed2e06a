//! Tests of the addresses that a VM leaves.

use common::signal::{
    AddressClaim, AddressClaimReply, ClaimState, ErrorMessage, MigrationReady, MigrationRequest,
    PeerMessage,
};
use common::signal::{Code, Reason};

use super::*;
use crate::proto::handover::UnreadReport;
use crate::proto::record::ClaimOutcome;
use crate::proto::tests::fixture::{BRIDGE, Bench, MAC, OTHER_MAC, TAP, UUID, on_link};
use crate::proto::{AddressEvent, GateEvent, HypervisorEvent, JobStats, Output, PeerEvent};

const S: Duration = Duration::from_secs(1);

fn old() -> Ipv6Addr {
    "2001:db8:1::77".parse().unwrap()
}

fn new() -> Ipv6Addr {
    "2001:db8:2::88".parse().unwrap()
}

fn ready(forward: &[Ipv6Addr], forward_s: u32) -> MigrationReady {
    MigrationReady {
        address: Some(new().octets().into()),
        mac: Some(MAC.into()),
        forward: forward.iter().map(|it| it.octets().into()).collect(),
        forward_s,
        translate: true,
    }
}

fn frames(outputs: &[Output]) -> Vec<(u64, PeerMessage)> {
    let frame = |output: &Output| match output {
        Output::Frame { bytes, .. } => Some(PeerMessage::decode(bytes).unwrap()),
        _ => None,
    };
    outputs.iter().filter_map(frame).collect()
}

/// Returns a VM that was told to be ready.
fn prepared() -> Bench {
    let mut bench = Bench::housing();
    bench.peer(PeerEvent::Up { from: None });
    bench.vm(
        5,
        MigrationRequest {
            destination: "vms2".to_owned(),
            domain: None,
        },
    );
    let (transaction, _) = frames(&bench.outputs()).remove(0);
    let prefix: Ipv6Addr = "2001:db8:2::".parse().unwrap();
    let response = common::signal::AgentResponse {
        prefix: prefix.octets().into(),
        prefix_length: 64,
        agent_address: [1; 16].into(),
        receptions: vec![],
        copy_tls: false,
    };
    bench.frame(transaction, response);
    bench.outputs();
    bench
}

/// Like `unanswered`, and the VM has answered for its address. Returns the outputs before the answer
/// and the transaction of the claim.
fn copying(ready: MigrationReady) -> (Bench, Vec<Output>, u64) {
    let (mut bench, outputs, claim) = unanswered(ready);
    heard(&mut bench, Said::Has, MAC);
    (bench, outputs, claim)
}

/// Like `prepared`, with the copy running, but the VM has not answered for its address.
fn unanswered(ready: MigrationReady) -> (Bench, Vec<Output>, u64) {
    let mut bench = prepared();
    bench.vm(5, ready);
    let outputs = bench.outputs();
    let claim = frames(&outputs)
        .into_iter()
        .find(|(_, message)| matches!(message, PeerMessage::AddressClaim(_)));
    (
        bench,
        outputs,
        claim.map_or(0, |(transaction, _)| transaction),
    )
}

fn suspended(bench: &mut Bench) -> Vec<Output> {
    let at = bench.now;
    bench.hypervisor(HypervisorEvent::Suspended { uuid: UUID, at });
    bench.outputs()
}

/// Lets the VM resume: the stop did not belong to a completed migration.
fn resumed(bench: &mut Bench) -> Vec<Output> {
    let (migrated, at) = (false, bench.now);
    bench.hypervisor(HypervisorEvent::Resumed {
        uuid: UUID,
        migrated,
        at,
    });
    bench.outputs()
}

fn heard(bench: &mut Bench, said: Said, by: Mac) -> Vec<Output> {
    let event = AddressEvent::Heard {
        address: old(),
        said,
        by,
    };
    bench.agent.handle_address(bench.now, BRIDGE, event);
    bench.outputs()
}

fn sets(outputs: &[Output]) -> Vec<(Ipv6Addr, Ipv6Addr, Timestamp)> {
    let set = |output: &Output| match output {
        Output::Forward(ForwardCommand::Set {
            leave: left, until, ..
        }) => {
            let known = Leave {
                ifindex: left.ifindex,
                ..leave()
            };
            assert_eq!(*left, known);
            Some((left.address.address, left.to, *until))
        }
        _ => None,
    };
    outputs.iter().filter_map(set).collect()
}

fn leave() -> Leave {
    Leave {
        address: on_link(old()),
        to: new(),
        ifindex: TAP,
        uuid: UUID,
    }
}

fn expects(outputs: &[Output]) -> Vec<Leave> {
    let expect = |output: &Output| match output {
        Output::Forward(ForwardCommand::Expect(leave)) => Some(*leave),
        _ => None,
    };
    outputs.iter().filter_map(expect).collect()
}

fn removed(outputs: &[Output]) -> Vec<Ipv6Addr> {
    let remove = |output: &Output| match output {
        Output::Forward(ForwardCommand::Remove { address }) => {
            assert_eq!(address.bridge, BRIDGE);
            Some(address.address)
        }
        _ => None,
    };
    outputs.iter().filter_map(remove).collect()
}

fn refused(state: ClaimState, reason: &str) -> AddressClaimReply {
    AddressClaimReply {
        address: new().octets().into(),
        state,
        reason: reason.to_owned(),
        code: Code::ADDRESS_TAKEN,
    }
}

fn starts(outputs: &[Output]) -> bool {
    let is_start = |it: &Output| matches!(it, Output::StartMigration { .. });
    outputs.iter().any(is_start)
}

#[test]
fn claim_goes_to_the_destination_before_the_copy_begins_and_delays_nothing() {
    let (_, outputs, _) = copying(ready(&[old()], 30));
    let claim = outputs
        .iter()
        .position(|it| matches!(it, Output::Frame { .. }))
        .unwrap();
    let start = outputs
        .iter()
        .position(|it| matches!(it, Output::StartMigration { .. }))
        .unwrap();
    assert!(claim < start);
    let Some((_, PeerMessage::AddressClaim(body))) = frames(&outputs).into_iter().next() else {
        panic!("no claim");
    };
    assert_eq!((*body.address, *body.mac), (new().octets(), MAC));
    assert_eq!(body.quarantine_s, 30);
    assert_eq!(body.translate, [old().octets().into()]);
    assert_eq!(body.translate_s, 30);
    for command in [
        Output::Address(BRIDGE, AddressCommand::Watch { address: old() }),
        Output::Address(BRIDGE, AddressCommand::Probe { address: old() }),
        Output::Forward(ForwardCommand::Resolve { to: new() }),
    ] {
        assert!(outputs.contains(&command), "{command:?}");
    }
}

#[test]
fn copies_are_kept_once_a_nic_of_the_vm_has_answered_for_the_address_and_again_after_a_stop_that_was_none()
 {
    let (mut bench, outputs, _) = unanswered(ready(&[old()], 30));
    assert_eq!(expects(&outputs), [], "which NIC has it is not known yet");
    assert_eq!(expects(&heard(&mut bench, Said::Has, MAC)), [leave()]);
    assert_eq!(expects(&heard(&mut bench, Said::Has, MAC)), [], "once");
    let outputs = suspended(&mut bench);
    assert_eq!(expects(&outputs), []);
    assert_eq!(sets(&outputs).len(), 1);
    let outputs = resumed(&mut bench);
    assert_eq!(removed(&outputs), [old()]);
    assert_eq!(expects(&outputs), [leave()]);
}

#[test]
fn packets_wait_behind_unread_ones_for_half_a_second_after_the_stop() {
    let (mut bench, ..) = copying(ready(&[old()], 30));
    let at = bench.now;
    let outputs = suspended(&mut bench);
    let waits = |output: &Output| match output {
        Output::Forward(ForwardCommand::Set { unread_until, .. }) => Some(*unread_until),
        _ => None,
    };
    let until: Vec<Timestamp> = outputs.iter().filter_map(waits).collect();
    assert_eq!(until, [at + Duration::from_millis(500)]);
}

#[test]
fn what_had_not_been_read_is_added_up_in_the_record() {
    let (mut bench, ..) = copying(ready(&[old()], 30));
    suspended(&mut bench);
    for (packets, dropped) in [(3, 0), (1, 2)] {
        let report = UnreadReport { packets, dropped };
        let migration = 1;
        let event = GateEvent::SentOn { migration, report };
        bench.agent.handle_gate(bench.now, event);
    }
    let unicast = bench
        .agent
        .view()
        .migrations()
        .next()
        .unwrap()
        .unicast
        .clone();
    let unread = unicast.unwrap().unread;
    assert_eq!((unread.packets, unread.dropped), (4, 2));
}

fn translated_from(outputs: &[Output]) -> Vec<Vec<Ipv6Addr>> {
    let claims = frames(outputs).into_iter();
    let translate = claims.filter_map(|(_, message)| match message {
        PeerMessage::AddressClaim(claim) => Some(claim.translate),
        _ => None,
    });
    translate
        .map(|it| it.iter().map(|old| Ipv6Addr::from(**old)).collect())
        .collect()
}

#[test]
fn destination_translates_once_the_vm_says_that_its_peers_know_the_new_address() {
    let knows_nobody = MigrationReady {
        translate: false,
        ..ready(&[old()], 30)
    };
    let (mut bench, outputs, _) = copying(knows_nobody.clone());
    assert_eq!(translated_from(&outputs), [Vec::<Ipv6Addr>::new()]);
    bench.vm(5, knows_nobody.clone());
    assert!(translated_from(&bench.outputs()).is_empty());
    bench.vm(5, ready(&[old()], 30));
    assert_eq!(translated_from(&bench.outputs()), [vec![old()]]);
    // Neither a repeated nor a late earlier message changes the translation.
    bench.vm(5, ready(&[old()], 30));
    bench.vm(5, knows_nobody);
    assert!(translated_from(&bench.outputs()).is_empty());
    suspended(&mut bench);
}

#[test]
fn vm_without_the_new_fields_moves_as_before() {
    let (_, outputs, claim) = copying(MigrationReady::default());
    assert!(starts(&outputs));
    assert_eq!(claim, 0);
}

#[test]
fn packets_are_sent_on_from_the_pause_on_for_as_long_as_was_asked_for() {
    let (mut bench, _, _) = copying(ready(&[old()], 10));
    bench.pass(S);
    bench.outputs();
    let until = bench.now + 10 * S;
    let outputs = suspended(&mut bench);
    assert_eq!(sets(&outputs), [(old(), new(), until)]);
    bench.unplug(crate::proto::tests::fixture::TAP);
    bench.hypervisor(HypervisorEvent::Gone(UUID));
    let result = Ok(JobStats::default());
    bench.hypervisor(HypervisorEvent::MigrationEnded { uuid: UUID, result });
    assert!(removed(&bench.outputs()).is_empty());
    bench.pass(10 * S - Duration::from_millis(1));
    assert!(removed(&bench.outputs()).is_empty());
    bench.pass(Duration::from_millis(1));
    let outputs = bench.outputs();
    assert_eq!(removed(&outputs), [old()]);
    let release = Output::Forward(ForwardCommand::Release { to: new() });
    assert!(outputs.contains(&release));
    assert_eq!(
        bench.agent.poll_timeout().map(|due| due > bench.now),
        Some(true)
    );
}

#[test]
fn time_that_was_asked_for_is_bounded() {
    let (mut bench, _, _) = copying(ready(&[old()], u32::MAX));
    let until = bench.now + 60 * S;
    assert_eq!(sets(&suspended(&mut bench)), [(old(), new(), until)]);
}

#[test]
fn nothing_is_sent_on_where_no_time_was_asked_for() {
    let (mut bench, _, _) = copying(ready(&[old()], 0));
    assert_eq!(sets(&suspended(&mut bench)), []);
}

#[test]
fn address_that_somebody_else_has_is_never_sent_on() {
    let (mut bench, _, _) = copying(ready(&[old()], 10));
    heard(&mut bench, Said::Has, OTHER_MAC);
    assert_eq!(sets(&suspended(&mut bench)), []);
    assert_eq!(bench.agent.view().counters().addresses_disputed, 1);

    // The same holds for a later claim of the address.
    let (mut bench, _, _) = copying(ready(&[old()], 10));
    suspended(&mut bench);
    let outputs = heard(&mut bench, Said::Has, OTHER_MAC);
    assert_eq!(removed(&outputs), [old()]);
}

#[test]
fn address_for_which_the_vm_does_not_answer_is_asked_for_and_not_sent_on() {
    let probe = Output::Address(BRIDGE, AddressCommand::Probe { address: old() });
    let (mut bench, outputs, _) = unanswered(ready(&[old()], 10));
    assert!(outputs.contains(&probe));
    bench.pass(S);
    assert!(bench.outputs().contains(&probe), "once more");
    let outputs = suspended(&mut bench);
    assert_eq!(sets(&outputs), []);
    assert_eq!(removed(&outputs), [old()]);
    assert_eq!(bench.agent.view().counters().forwards_refused, 1);

    let (mut bench, ..) = copying(ready(&[old()], 10));
    bench.pass(S);
    assert!(!bench.outputs().contains(&probe), "it has answered");
}

#[test]
fn addresses_that_are_no_vms_of_this_link_are_never_sent_on() {
    let others = [
        "2001:db8:1::10",
        "2001:db8:1::",
        "2001:db8:9::1",
        "fe80::1",
        "ff02::1",
    ]
    .map(|text| text.parse().unwrap());
    let (mut bench, _, _) = copying(ready(&others, 10));
    assert_eq!(sets(&suspended(&mut bench)), []);
    assert_eq!(bench.agent.view().counters().forwards_refused, 5);
}

#[test]
fn vm_that_names_an_address_off_the_destinations_link_or_a_foreign_nic_moves_without() {
    let off_link = MigrationReady {
        address: Some([0x20; 16].into()),
        ..ready(&[old()], 10)
    };
    let foreign = MigrationReady {
        mac: Some(OTHER_MAC.into()),
        ..ready(&[old()], 10)
    };
    for wrong in [off_link, foreign] {
        let (mut bench, outputs, claim) = copying(wrong);
        assert!(starts(&outputs));
        assert_eq!(claim, 0);
        assert_eq!(sets(&suspended(&mut bench)), []);
    }
}

#[test]
fn bridge_answers_for_the_vm_that_has_left_and_takes_it_back_when_the_vm_stays() {
    let (mut bench, _, _) = copying(ready(&[old()], 10));
    heard(&mut bench, Said::Has, MAC);
    let asker: Ipv6Addr = "fe80::fe".parse().unwrap();
    assert_eq!(heard(&mut bench, Said::Asks(asker), OTHER_MAC), []);
    suspended(&mut bench);
    let answer = AddressCommand::Advertise {
        address: old(),
        owner: None,
        overrides: true,
        to: Some((asker, OTHER_MAC)),
    };
    let outputs = heard(&mut bench, Said::Asks(asker), OTHER_MAC);
    assert_eq!(outputs, [Output::Address(BRIDGE, answer)]);

    let outputs = resumed(&mut bench);
    assert_eq!(removed(&outputs), [old()]);
    let back = AddressCommand::Advertise {
        address: old(),
        owner: Some(MAC),
        overrides: true,
        to: None,
    };
    assert!(
        outputs.contains(&Output::Address(BRIDGE, back)),
        "{outputs:?}"
    );
    // The VM may stop again.
    assert_eq!(sets(&suspended(&mut bench)).len(), 1);
}

#[test]
fn failed_move_undoes_all_of_it() {
    let (mut bench, _, _) = copying(ready(&[old()], 10));
    suspended(&mut bench);
    let result = Err("reset".to_owned());
    bench.hypervisor(HypervisorEvent::MigrationEnded { uuid: UUID, result });
    let outputs = bench.outputs();
    assert_eq!(removed(&outputs), [old()]);
    let forgotten = AddressCommand::Forget {
        address: old(),
        spoken: false,
    };
    assert!(outputs.contains(&Output::Address(BRIDGE, forgotten)));
}

#[test]
fn refused_claim_stops_the_move_and_the_vm_is_told_why() {
    let (mut bench, _, claim) = copying(ready(&[old()], 10));
    bench.frame(claim, refused(ClaimState::Refused, "Address X is taken"));
    let outputs = bench.outputs();
    assert!(outputs.contains(&Output::AbortMigration { uuid: UUID }));
    let result = Err("cancelled by client".to_owned());
    bench.hypervisor(HypervisorEvent::MigrationEnded { uuid: UUID, result });
    let abort = bench.abort();
    assert_eq!(
        abort.text,
        "Destination vms2 refuses the VM's address: Address X is taken"
    );
    assert_eq!(abort.code, Code::ADDRESS_TAKEN, "the code is passed on");
}

#[test]
fn refusal_that_comes_after_the_pause_has_begun_stops_nothing() {
    let (mut bench, _, claim) = copying(ready(&[old()], 10));
    suspended(&mut bench);
    bench.frame(claim, refused(ClaimState::Refused, "Address X is taken"));
    let outputs = bench.outputs();
    assert!(!outputs.contains(&Output::AbortMigration { uuid: UUID }));
}

#[test]
fn vm_that_changes_its_mind_all_the_time_is_listened_to_a_few_times() {
    let (mut bench, _, _) = copying(ready(&[old()], 10));
    let mut claims = 0;
    for number in 1..100_u16 {
        let address = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 1, number);
        let other = MigrationReady {
            address: Some(address.octets().into()),
            ..ready(&[old()], 10)
        };
        bench.pass(Duration::from_millis(50));
        bench.outputs();
        bench.vm(5, other);
        let is_claim = |it: &(u64, PeerMessage)| matches!(it.1, PeerMessage::AddressClaim(_));
        claims += frames(&bench.outputs())
            .iter()
            .filter(|it| is_claim(it))
            .count();
    }
    assert_eq!(claims, 4);
}

#[test]
fn older_destination_that_does_not_know_claims_changes_nothing() {
    let (mut bench, _, claim) = copying(ready(&[old()], 10));
    let reason = "Unknown message kind 20".to_owned();
    bench.frame(claim, ErrorMessage(Reason::unspecified(reason)));
    assert_eq!(bench.outputs(), []);
    assert_eq!(sets(&suspended(&mut bench)).len(), 1);
    let record = bench.agent.view().migrations().last().unwrap();
    let unicast = record.unicast.as_ref().unwrap();
    assert_eq!(unicast.claim, ClaimOutcome::Unknown);
}

#[test]
fn claim_is_told_again_when_the_connection_is_made_anew() {
    let (mut bench, _, claim) = copying(ready(&[old()], 10));
    let reason = "closed".to_owned();
    bench.peer(PeerEvent::Down { reason });
    bench.outputs();
    bench.peer(PeerEvent::Up { from: None });
    let again = frames(&bench.outputs());
    let is_claim = |(transaction, message): &(u64, PeerMessage)| {
        *transaction == claim && matches!(message, PeerMessage::AddressClaim(_))
    };
    assert!(again.iter().any(is_claim));
}

#[test]
fn pinned_forwards_are_adopted_and_end_by_themselves_or_when_the_vm_turns_out_to_be_here() {
    for stays in [false, true] {
        let mut bench = Bench::empty();
        let key = ForwardKey {
            address: old().octets(),
            vlan: 0,
            bridge: BRIDGE,
        };
        let value = Forward {
            until_ns: (bench.now + 5 * S).0,
            destination: new().octets(),
            domain_uuid: UUID.0,
            ..Forward::default()
        };
        let over = Forward {
            until_ns: bench.now.0,
            ..value
        };
        let other_key = ForwardKey {
            address: [9; 16],
            ..key
        };
        let pinned = vec![(key, value), (other_key, over)];
        bench.agent.handle_forwards(bench.now, pinned);
        let outputs = bench.outputs();
        assert_eq!(removed(&outputs), [Ipv6Addr::from([9; 16])]);
        let replace = AddressCommand::Replace { address: old() };
        assert!(outputs.contains(&Output::Address(BRIDGE, replace)));
        if stays {
            bench.house();
        } else {
            bench.pass(5 * S);
        }
        assert_eq!(removed(&bench.outputs()), [old()]);
    }
}

#[test]
fn vm_that_comes_back_to_an_address_that_it_has_left_is_sent_nothing_on() {
    let (mut bench, _, _) = copying(ready(&[old()], 60));
    suspended(&mut bench);
    bench.unplug(crate::proto::tests::fixture::TAP);
    bench.hypervisor(HypervisorEvent::Gone(UUID));
    let result = Ok(JobStats::default());
    bench.hypervisor(HypervisorEvent::MigrationEnded { uuid: UUID, result });
    bench.outputs();
    let request = crate::proto::arrival::tests::request(UUID, vec![]);
    bench.frame(31, request);
    let claim = AddressClaim {
        migration: 31,
        address: old().octets().into(),
        mac: MAC.into(),
        quarantine_s: 60,
        translate: vec![],
        translate_s: 0,
    };
    bench.frame(32, claim);
    assert_eq!(removed(&bench.outputs()), [old()]);
}
