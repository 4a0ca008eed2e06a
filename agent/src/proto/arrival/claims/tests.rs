//! Tests of claimed addresses.

use common::signal::{AgentRequest, MigrationAbort, MigrationProgress, PeerMessage, Phase, Reason};

use super::*;
use crate::proto::arrival::tests::{answers, request};
use crate::proto::tests::fixture::{BRIDGE, Bench, MAC, OTHER_MAC, TAP, UUID, on_link};
use crate::proto::{AddressEvent, Command, Dispute, Output, PeerEvent};

const S: Duration = Duration::from_secs(1);
const MIGRATION: u64 = 9;
const CLAIM: u64 = 77;

fn moa() -> Ipv6Addr {
    "2001:db8:1::77".parse().unwrap()
}

fn asker() -> Ipv6Addr {
    "fe80::fe".parse().unwrap()
}

fn claim(address: Ipv6Addr) -> AddressClaim {
    AddressClaim {
        migration: MIGRATION,
        address: address.octets().into(),
        mac: MAC.into(),
        quarantine_s: 20,
        translate: vec![],
        translate_s: 0,
    }
}

/// Returns an agent that expects `viewer`.
fn expecting() -> Bench {
    let mut bench = Bench::empty();
    bench.peer(PeerEvent::Up { from: None });
    bench.frame(MIGRATION, request(UUID, vec![]));
    bench.outputs();
    bench
}

/// Like `expecting`, with the address claimed; returns the outputs of the claim.
fn claimed() -> (Bench, Vec<Output>) {
    let mut bench = expecting();
    bench.frame(CLAIM, claim(moa()));
    let outputs = bench.outputs();
    (bench, outputs)
}

/// Like `claimed`, with the probe unanswered.
fn unique() -> Bench {
    let (mut bench, _) = claimed();
    bench.pass(S);
    bench.outputs();
    bench
}

fn commands(outputs: &[Output]) -> Vec<AddressCommand> {
    let command = |output: &Output| match output {
        Output::Address(_, command) => Some(command.clone()),
        _ => None,
    };
    outputs.iter().filter_map(command).collect()
}

fn replies(outputs: &[Output]) -> Vec<(ClaimState, String)> {
    let reply = |message: PeerMessage| match message {
        PeerMessage::AddressClaimReply(reply) => Some((reply.state, reply.reason)),
        _ => None,
    };
    answers(outputs).into_iter().filter_map(reply).collect()
}

/// Returns the sentence of the only refusal.
fn refusal(outputs: &[Output]) -> String {
    match replies(outputs).as_slice() {
        [(ClaimState::Refused, reason)] => reason.clone(),
        other => panic!("no refusal but {other:?}"),
    }
}

fn heard(bench: &mut Bench, said: Said, by: Mac) -> Vec<Output> {
    let event = AddressEvent::Heard {
        address: moa(),
        said,
        by,
    };
    bench.agent.handle_address(bench.now, BRIDGE, event);
    bench.outputs()
}

fn holder_of(bench: &mut Bench, uuid: DomainUuid) -> Option<Holder> {
    let machines = &mut bench.agent.machines;
    let (cx, addresses) = (&machines.cx, &mut machines.addresses);
    machines
        .arrivals
        .holder_of(cx, addresses, on_link(moa()), uuid)
}

fn spoke(bench: &mut Bench) -> Vec<Output> {
    let event = AddressEvent::Spoke { address: moa() };
    bench.agent.handle_address(bench.now, BRIDGE, event);
    bench.outputs()
}

fn switching(bench: &mut Bench) {
    let progress = MigrationProgress {
        phase: Phase::Switching,
        processed_bytes: 0,
        total_bytes: 0,
        elapsed_ms: 0,
        vm_pause_ms: None,
        clock_ns: None,
    };
    bench.frame(MIGRATION, progress);
    bench.outputs();
}

fn answer(owner: Mac, overrides: bool, to: Option<(Ipv6Addr, Mac)>) -> AddressCommand {
    AddressCommand::Advertise {
        address: moa(),
        owner: Some(owner),
        overrides,
        to,
    }
}

#[test]
fn claimed_address_is_asked_for_and_unique_when_nobody_has_answered_in_time() {
    let (mut bench, outputs) = claimed();
    let address = moa();
    assert_eq!(
        commands(&outputs),
        [
            AddressCommand::Watch { address },
            AddressCommand::Probe { address }
        ]
    );
    assert_eq!(replies(&outputs), []);
    bench.pass(S - Duration::from_millis(1));
    assert_eq!(replies(&bench.outputs()), []);
    bench.pass(Duration::from_millis(1));
    let unique = (ClaimState::Unique, String::new());
    assert_eq!(replies(&bench.outputs()).first(), Some(&unique));
    // The source host asks again after a reconnect.
    bench.frame(CLAIM + 1, claim(address));
    assert_eq!(replies(&bench.outputs()), [unique]);
}

#[test]
fn solicitations_are_answered_for_the_vm_as_soon_as_its_address_is_unique() {
    let (mut bench, _) = claimed();
    assert_eq!(heard(&mut bench, Said::Asks(asker()), OTHER_MAC), []);
    bench.pass(S);
    bench.outputs();
    let outputs = heard(&mut bench, Said::Asks(asker()), OTHER_MAC);
    let to = Some((asker(), OTHER_MAC));
    assert_eq!(commands(&outputs), [answer(MAC, true, to)]);
    // Another node's probe comes too late: all nodes get an Advertisement.
    let outputs = heard(&mut bench, Said::Wants, OTHER_MAC);
    assert_eq!(commands(&outputs), [answer(MAC, true, None)]);
    assert_eq!(replies(&outputs), []);
}

#[test]
fn vm_that_has_switched_before_the_probe_is_over_is_answered_for_without_overriding() {
    let (mut bench, _) = claimed();
    switching(&mut bench);
    let outputs = heard(&mut bench, Said::Asks(asker()), OTHER_MAC);
    let to = Some((asker(), OTHER_MAC));
    assert_eq!(commands(&outputs), [answer(MAC, false, to)]);
}

#[test]
fn who_asks_too_early_is_answered_as_soon_as_that_may_be() {
    let to = Some((asker(), OTHER_MAC));
    let (mut bench, _) = claimed();
    for _ in 0..3 {
        assert_eq!(heard(&mut bench, Said::Asks(asker()), OTHER_MAC), []);
    }
    let progress = MigrationProgress {
        phase: Phase::Switching,
        processed_bytes: 0,
        total_bytes: 0,
        elapsed_ms: 0,
        vm_pause_ms: None,
        clock_ns: None,
    };
    bench.frame(MIGRATION, progress.clone());
    assert_eq!(commands(&bench.outputs()), [answer(MAC, false, to)]);
    bench.frame(MIGRATION, progress);
    assert_eq!(commands(&bench.outputs()), []);

    let (mut bench, _) = claimed();
    heard(&mut bench, Said::Asks(asker()), OTHER_MAC);
    bench.pass(S);
    assert_eq!(commands(&bench.outputs()), [answer(MAC, true, to)]);
}

#[test]
fn advertisement_that_anybody_may_have_forged_is_said_and_ends_no_move() {
    for (said, unique_first) in [(Said::Has, false), (Said::Wants, false), (Said::Has, true)] {
        let mut bench = if unique_first { unique() } else { claimed().0 };
        let outputs = heard(&mut bench, said, OTHER_MAC);
        let told = replies(&outputs);
        let [(ClaimState::Disputed, reason)] = told.as_slice() else {
            panic!("{told:?}");
        };
        assert!(reason.contains("taken by 02:00:00:00:00:09"), "{reason}");
        assert_eq!(heard(&mut bench, said, OTHER_MAC), [], "once");
        bench.pass(S);
        assert_eq!(replies(&bench.outputs()), []);
        // The agent answers for the VM, but without the Override flag.
        let outputs = heard(&mut bench, Said::Asks(asker()), OTHER_MAC);
        let to = Some((asker(), OTHER_MAC));
        assert_eq!(commands(&outputs), [answer(MAC, false, to)]);
        let counters = bench.agent.view().counters();
        assert_eq!(
            (counters.claims_refused, counters.addresses_disputed),
            (0, 1)
        );
        let outcome = bench
            .agent
            .view()
            .migrations()
            .next()
            .unwrap()
            .unicast
            .as_ref();
        assert_eq!(outcome.unwrap().claim, ClaimOutcome::Disputed);
    }
}

#[test]
fn owner_or_another_node_that_wants_it_too_makes_the_claim_refused_where_that_is_wanted() {
    for (said, unique_first) in [(Said::Has, false), (Said::Wants, false), (Said::Has, true)] {
        let mut bench = if unique_first { unique() } else { claimed().0 };
        bench.agent.machines.cx.config.unicast.disputed = Dispute::Refuse;
        let outputs = heard(&mut bench, said, OTHER_MAC);
        let reason = refusal(&outputs);
        assert!(reason.contains("taken by 02:00:00:00:00:09"), "{reason}");
        let forgotten = AddressCommand::Forget {
            address: moa(),
            spoken: false,
        };
        assert_eq!(commands(&outputs), [forgotten]);
        assert_eq!(bench.agent.view().counters().claims_refused, 1);
    }
}

#[test]
fn what_the_vm_itself_says_elsewhere_is_no_conflict() {
    let (mut bench, _) = claimed();
    for said in [Said::Has, Said::Wants] {
        assert_eq!(heard(&mut bench, said, MAC), []);
    }
}

#[test]
fn defence_ends_when_the_vm_speaks() {
    let mut bench = unique();
    bench.port(TAP, "vnet0");
    let outputs = bench.outputs();
    let expected = AddressCommand::Expect {
        address: moa(),
        mac: MAC,
        ifindex: TAP,
    };
    assert_eq!(commands(&outputs), [expected]);
    bench.domain("vnet0", true);
    bench.outputs();
    let forgotten = AddressCommand::Forget {
        address: moa(),
        spoken: true,
    };
    assert_eq!(commands(&spoke(&mut bench)), [forgotten]);
    assert_eq!(heard(&mut bench, Said::Asks(asker()), OTHER_MAC), []);
    bench.pass(60 * S);
    assert_eq!(bench.agent.view().counters().claims_silent, 0);
}

#[test]
fn vm_that_never_speaks_is_not_answered_for_for_ever() {
    let mut bench = unique();
    bench.house();
    bench.pass(29 * S);
    let outputs = heard(&mut bench, Said::Asks(asker()), OTHER_MAC);
    assert_eq!(
        commands(&outputs).last(),
        Some(&answer(MAC, true, Some((asker(), OTHER_MAC))))
    );
    bench.pass(S);
    bench.outputs();
    assert_eq!(heard(&mut bench, Said::Asks(asker()), OTHER_MAC), []);
    assert_eq!(bench.agent.view().counters().claims_silent, 1);
}

#[test]
fn arrival_that_does_not_happen_leaves_nothing_but_the_quarantine() {
    let mut bench = unique();
    let reason = "gone".to_owned();
    bench.frame(MIGRATION, MigrationAbort(Reason::unspecified(reason)));
    let forgotten = AddressCommand::Forget {
        address: moa(),
        spoken: false,
    };
    assert_eq!(commands(&bench.outputs()), [forgotten]);

    let other = AgentRequest {
        domain_name: "other".to_owned(),
        ..request(DomainUuid([8; 16]), vec![])
    };
    bench.frame(MIGRATION, other);
    bench.outputs();
    bench.pass(19 * S);
    bench.frame(CLAIM, claim(moa()));
    let reason = refusal(&bench.outputs());
    assert!(reason.contains("left by another VM"), "{reason}");
    bench.pass(S);
    bench.frame(CLAIM + 1, claim(moa()));
    assert_eq!(replies(&bench.outputs()), []);
}

#[test]
fn address_of_a_vm_that_is_gone_is_kept_for_a_while_and_from_others_only() {
    let mut bench = unique();
    bench.house();
    spoke(&mut bench);
    bench.unplug(TAP);
    bench.hypervisor(crate::proto::HypervisorEvent::Gone(UUID));
    bench.outputs();
    let own = holder_of(&mut bench, UUID);
    assert_eq!(own, None);
    let other = holder_of(&mut bench, DomainUuid([8; 16]));
    assert!(matches!(other, Some(Holder::Left { .. })), "{other:?}");
    bench.pass(20 * S);
    // Any input advances the time.
    bench.peer(PeerEvent::Up { from: None });
    assert_eq!(holder_of(&mut bench, DomainUuid([8; 16])), None);
}

#[test]
fn address_that_cannot_be_the_vms_is_refused_at_once() {
    let own: Ipv6Addr = "2001:db8:1::10".parse().unwrap();
    for (address, expected) in [
        (own, "is that of vms1 itself"),
        ("2001:db8:1::".parse().unwrap(), "is no VM's address"),
        ("2001:db8:2::5".parse().unwrap(), "is no VM's address"),
        ("ff02::1".parse().unwrap(), "is no VM's address"),
    ] {
        let mut bench = expecting();
        bench.frame(CLAIM, claim(address));
        let outputs = bench.outputs();
        let reason = refusal(&outputs);
        assert!(reason.contains(expected), "{reason}");
        assert_eq!(commands(&outputs), []);
    }
    let mut bench = expecting();
    let foreign = AddressClaim {
        mac: OTHER_MAC.into(),
        ..claim(moa())
    };
    bench.frame(CLAIM, foreign);
    assert_eq!(replies(&bench.outputs()).len(), 1);
}

#[test]
fn address_that_another_vm_claims_is_refused_at_once() {
    let (mut bench, _) = claimed();
    let other = AgentRequest {
        domain_name: "other".to_owned(),
        ..request(DomainUuid([8; 16]), vec![])
    };
    bench.frame(MIGRATION + 1, other);
    let theirs = AddressClaim {
        migration: MIGRATION + 1,
        ..claim(moa())
    };
    bench.outputs();
    bench.frame(CLAIM + 1, theirs);
    let reason = refusal(&bench.outputs());
    assert!(reason.contains("that of another VM"), "{reason}");
}

#[test]
fn address_of_this_host_that_the_config_does_not_name_is_refused() {
    let (mut bench, _) = claimed();
    let event = AddressEvent::Own { address: moa() };
    bench.agent.handle_address(bench.now, BRIDGE, event);
    assert_eq!(replies(&bench.outputs()).len(), 1);
}

#[test]
fn claim_of_an_unknown_migration_is_answered_with_an_error() {
    let mut bench = expecting();
    let unknown = AddressClaim {
        migration: 1234,
        ..claim(moa())
    };
    bench.frame(CLAIM, unknown);
    let outputs = bench.outputs();
    assert!(matches!(
        answers(&outputs).as_slice(),
        [PeerMessage::Error(_)]
    ));
    assert_eq!(commands(&outputs), []);
}

#[test]
fn flood_of_solicitations_is_answered_within_the_allowance() {
    let mut bench = unique();
    let mut answered = 0;
    for _ in 0..1000 {
        answered += heard(&mut bench, Said::Asks(asker()), OTHER_MAC).len();
    }
    assert_eq!(answered, 50);
}

#[test]
fn claim_of_a_restarted_source_for_another_address_replaces_the_first() {
    let (mut bench, _) = claimed();
    let other: Ipv6Addr = "2001:db8:1::78".parse().unwrap();
    bench.frame(CLAIM + 1, claim(other));
    let outputs = commands(&bench.outputs());
    let forgotten = AddressCommand::Forget {
        address: moa(),
        spoken: false,
    };
    assert_eq!(outputs[0], forgotten);
    assert_eq!(outputs[1], AddressCommand::Watch { address: other });
    // The operator has nothing left to abort at this end.
    let abort = Command::Abort {
        domain: "viewer".to_owned(),
    };
    bench.agent.handle_command(bench.now, 1, abort);
}
