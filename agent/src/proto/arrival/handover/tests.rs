//! Tests of gates: recording at the source host, hold and replay at the destination host.

use std::time::Duration;

use common::signal::{
    AgentResponse, CutBasis, FlowCut, HandoverCut, MigrationAbort, MigrationProgress, NicCut,
    PeerMessage, Phase, Reason,
};

use super::super::tests::{S, active, bench, request};
use crate::proto::handover::{ClockOffset, FlowReport, HoldReport, LATEST_CUT, Placed};
use crate::proto::tests::fixture::{Bench, MAC, TAP, UUID, config};
use crate::proto::{
    Command, GateCommand, GateEvent, HypervisorEvent, JobStats, Output, PeerEvent, Timestamp,
    Ungated,
};

const ARRIVING: u32 = 20;
const MS: Duration = Duration::from_millis(1);

fn gates(bench: &mut Bench) -> Vec<GateCommand> {
    let outputs = bench.outputs();
    let gates = outputs.into_iter().filter_map(|output| match output {
        Output::Gate(command) => Some(command),
        _ => None,
    });
    gates.collect()
}

fn cut() -> NicCut {
    NicCut {
        mac: MAC.into(),
        basis: CutBasis::Count,
        flows: vec![],
        tap_full: None,
    }
}

fn hand_over(bench: &mut Bench, clock_ns: u64) {
    let nics = vec![cut()];
    bench.frame(1, HandoverCut { clock_ns, nics });
}

fn progress(bench: &mut Bench, phase: Phase, clock_ns: u64) {
    let progress = MigrationProgress {
        phase,
        processed_bytes: 1,
        total_bytes: 1,
        elapsed_ms: 1,
        vm_pause_ms: None,
        clock_ns: Some(clock_ns),
    };
    bench.frame(1, progress);
}

fn resumed(bench: &mut Bench) {
    let arrived = HypervisorEvent::Resumed {
        uuid: UUID,
        migrated: true,
        at: bench.now,
    };
    bench.hypervisor(arrived);
}

/// Returns an arriving domain whose TAP exists, with its gate.
fn arriving() -> Bench {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.outputs();
    bench.port(ARRIVING, "vnet5");
    bench
}

const HOLD: GateCommand = GateCommand::Hold { ifindex: ARRIVING };
const CLEAR: GateCommand = GateCommand::Clear { ifindex: ARRIVING };

#[test]
fn arriving_tap_is_held_before_the_bridge_sends_it_anything() {
    let mut bench = arriving();
    let outputs = bench.outputs();
    let place = |wanted: &dyn Fn(&Output) -> bool| outputs.iter().position(wanted).unwrap();
    let hold = place(&|output| *output == Output::Gate(HOLD));
    let add = place(&|output| {
        matches!(
            output,
            Output::MdbAdd {
                ifindex: ARRIVING,
                ..
            }
        )
    });
    assert!(hold < add, "{outputs:?}");
}

#[test]
fn tap_without_a_gate_gets_its_mdb_entries_from_the_pause_on() {
    let mut bench = arriving();
    let ifindex = ARRIVING;
    bench
        .agent
        .handle_gate(bench.now, GateEvent::NotHeld { ifindex });
    bench.outputs();
    bench.pass(S);
    let is_add = |output: &Output| matches!(output, Output::MdbAdd { .. });
    assert!(!bench.outputs().iter().any(is_add));
    progress(&mut bench, Phase::Switching, 0);
    assert!(bench.outputs().iter().any(is_add));
    hand_over(&mut bench, 0);
    assert_eq!(gates(&mut bench), []);
}

#[test]
fn nothing_is_held_or_recorded_where_handover_is_switched_off() {
    let mut config = config(0);
    config.handover = false;
    let mut bench = Bench::with(config);
    bench.peer(PeerEvent::Up { from: None });
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.port(ARRIVING, "vnet5");
    assert_eq!(gates(&mut bench), []);
}

#[test]
fn tap_of_a_vm_that_runs_already_is_not_held() {
    let mut bench = bench();
    bench.port(ARRIVING, "vnet5");
    bench.domain("vnet5", true);
    bench.frame(1, request(UUID, vec![active(1)]));
    assert_eq!(gates(&mut bench), []);
}

fn ungated(bench: &Bench) -> Vec<(crate::proto::Mac, Ungated)> {
    let record = bench.agent.view().migrations().last().unwrap();
    record
        .ungated
        .iter()
        .map(|(mac, why)| (*mac, *why))
        .collect()
}

#[test]
fn record_says_why_a_vm_has_arrived_without_a_gate() {
    let mut bench = arriving();
    let not_held = GateEvent::NotHeld { ifindex: ARRIVING };
    bench.agent.handle_gate(bench.now, not_held);
    assert_eq!(ungated(&bench), [], "it may not come at all");
    resumed(&mut bench);
    assert_eq!(ungated(&bench), [(MAC, Ungated::NotMade)]);

    let mut bench = arriving();
    bench.pass(130 * S);
    resumed(&mut bench);
    assert_eq!(ungated(&bench), [(MAC, Ungated::ClosedTooLong)]);

    let mut bench = super::super::tests::bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    resumed(&mut bench);
    bench.port(ARRIVING, "vnet5");
    assert_eq!(ungated(&bench), [(MAC, Ungated::RanAlready)]);

    let mut bench = arriving();
    resumed(&mut bench);
    assert_eq!(ungated(&bench), []);
}

#[test]
fn cut_is_replayed_once_with_the_least_difference_of_the_clocks() {
    let mut bench = arriving();
    bench.outputs();
    let mut clock = ClockOffset::default();
    for late in [9, 3, 5] {
        let clock_ns = bench.now.0 - late;
        clock.observe(clock_ns, bench.now);
        progress(&mut bench, Phase::Copying, clock_ns);
    }
    let clock_ns = bench.now.0 - 4;
    clock.observe(clock_ns, bench.now);
    hand_over(&mut bench, clock_ns);
    hand_over(&mut bench, clock_ns);
    let replay = GateCommand::Replay {
        ifindex: ARRIVING,
        cut: cut(),
        clock_ns,
        clock,
    };
    assert_eq!(gates(&mut bench), [replay]);
    assert_eq!(clock.offset(), Some(3));
}

#[test]
fn vm_that_runs_without_a_cut_gets_what_came_during_the_pause() {
    let mut bench = arriving();
    progress(&mut bench, Phase::Switching, 0);
    let switching = bench.now;
    bench.pass(50 * MS);
    resumed(&mut bench);
    bench.outputs();
    bench.pass(LATEST_CUT);
    assert_eq!(gates(&mut bench), [], "the source may still tell it");
    bench.pass(S);
    match gates(&mut bench).as_slice() {
        [
            GateCommand::ReplayBlind {
                ifindex: ARRIVING,
                since,
            },
        ] => {
            assert!(
                *since < switching && switching.since(*since) <= S,
                "{since:?}"
            );
        }
        other => panic!("{other:?}"),
    }
    hand_over(&mut bench, 0);
    assert_eq!(gates(&mut bench), [], "too late");
}

#[test]
fn source_whose_vm_stopped_late_is_waited_for_and_one_that_is_gone_is_not() {
    let mut bench = arriving();
    progress(&mut bench, Phase::Switching, 0);
    bench.pass(30 * MS);
    resumed(&mut bench);
    bench.outputs();
    bench.pass(LATEST_CUT);
    hand_over(&mut bench, 0);
    assert!(matches!(
        gates(&mut bench).as_slice(),
        [GateCommand::Replay { .. }]
    ));

    let gone = |bench: &mut Bench| {
        let reason = "broken".to_owned();
        bench.peer(PeerEvent::Down { reason });
    };
    let is_blind = |bench: &mut Bench| {
        bench.pass(100 * MS);
        assert_eq!(gates(bench), [], "it may come back");
        bench.pass(200 * MS);
        matches!(gates(bench).as_slice(), [GateCommand::ReplayBlind { .. }])
    };
    for is_late in [false, true] {
        let mut bench = arriving();
        progress(&mut bench, Phase::Switching, 0);
        if is_late {
            resumed(&mut bench);
            gone(&mut bench);
        } else {
            gone(&mut bench);
            resumed(&mut bench);
        }
        bench.outputs();
        assert!(is_blind(&mut bench), "{is_late}");
    }
}

#[test]
fn tap_of_which_the_source_knows_nothing_is_not_kept_waiting() {
    let mut bench = arriving();
    progress(&mut bench, Phase::Switching, 0);
    resumed(&mut bench);
    bench.outputs();
    let nics = Vec::new();
    bench.frame(1, HandoverCut { clock_ns: 0, nics });
    assert!(matches!(
        gates(&mut bench).as_slice(),
        [GateCommand::ReplayBlind { .. }]
    ));
}

#[test]
fn cut_that_comes_in_time_leaves_nothing_to_guess() {
    let mut bench = arriving();
    resumed(&mut bench);
    bench.pass(100 * MS);
    bench.outputs();
    hand_over(&mut bench, 0);
    assert!(matches!(
        gates(&mut bench).as_slice(),
        [GateCommand::Replay { .. }]
    ));
    bench.pass(S);
    assert_eq!(gates(&mut bench), []);
}

#[test]
fn gate_of_an_arrival_that_fails_is_opened() {
    let mut bench = arriving();
    bench.outputs();
    let reason = "cancelled".to_owned();
    bench.frame(1, MigrationAbort(Reason::unspecified(reason)));
    bench.pass(31 * S);
    assert_eq!(gates(&mut bench), [CLEAR]);
}

#[test]
fn gate_that_has_opened_is_left_alone_and_told_of() {
    let mut bench = arriving();
    hand_over(&mut bench, 0);
    let opened = GateEvent::Opened {
        ifindex: ARRIVING,
        report: HoldReport {
            refused: 7,
            ..HoldReport::default()
        },
    };
    bench.agent.handle_gate(bench.now, opened);
    bench.outputs();
    bench.domain("vnet5", false);
    resumed(&mut bench);
    bench.pass(600 * S);
    assert_eq!(gates(&mut bench), []);
    let record = bench.agent.view().migrations().last().unwrap();
    assert_eq!(record.handover.len(), 1);
    assert_eq!(record.handover[&ARRIVING].refused, 7);
}

/// Returns a hold report, and the source host's cut.
fn placed(delivered: u64) -> (HoldReport, NicCut) {
    let flow = FlowCut {
        vlan: 0,
        multicast_address: [0xff; 16].into(),
        source: [0x20; 16].into(),
        source_port: 5000,
        destination_port: 5004,
        delivered,
        last_ns: 0,
        fingerprints: vec![].into(),
    };
    let report = FlowReport {
        stream: Some(flow.stream()),
        placed: Some(Placed::Fingerprint),
        delivered,
        ..FlowReport::default()
    };
    let report = HoldReport {
        flows: vec![report],
        ..HoldReport::default()
    };
    let flows = vec![flow];
    (report, NicCut { flows, ..cut() })
}

#[test]
fn packet_that_the_source_finds_read_late_is_one_that_may_be_doubled() {
    let (report, first) = placed(30);
    let (_, revised) = placed(31);
    let tell = |bench: &mut Bench, cut: &NicCut| {
        let nics = vec![cut.clone()];
        bench.frame(1, HandoverCut { clock_ns: 0, nics });
    };
    let open = |bench: &mut Bench| {
        let (ifindex, report) = (ARRIVING, report.clone());
        let opened = GateEvent::Opened { ifindex, report };
        bench.agent.handle_gate(bench.now, opened);
    };
    let doubled = |bench: &Bench| {
        let record = bench.agent.view().migrations().last().unwrap();
        record.handover[&ARRIVING].flows[0].duplicates
    };
    let mut bench = arriving();
    tell(&mut bench, &first);
    tell(&mut bench, &first);
    open(&mut bench);
    assert_eq!(doubled(&bench), 0, "the same told twice");
    for _ in 0..2 {
        tell(&mut bench, &revised);
        assert_eq!(doubled(&bench), 1, "after the replay");
    }
    let mut bench = arriving();
    tell(&mut bench, &first);
    tell(&mut bench, &revised);
    open(&mut bench);
    assert_eq!(doubled(&bench), 1, "during the replay");
}

/// Returns an agent that is copying `viewer` to `vms2`.
fn copying() -> (Bench, u64) {
    let mut bench = Bench::housing();
    bench.peer(PeerEvent::Up { from: None });
    let command = Command::Migrate {
        domain: "viewer".to_owned(),
        destination: "vms2".to_owned(),
    };
    bench.agent.handle_command(bench.now, 1, command);
    let requests = frames(&mut bench);
    let [(transaction, PeerMessage::AgentRequest(_))] = requests.as_slice() else {
        panic!("{requests:?}");
    };
    let response = AgentResponse {
        prefix: [0; 16].into(),
        prefix_length: 64,
        agent_address: [1; 16].into(),
        receptions: vec![],
        copy_tls: false,
    };
    bench.frame(*transaction, response);
    (bench, *transaction)
}

fn frames(bench: &mut Bench) -> Vec<(u64, PeerMessage)> {
    let outputs = bench.outputs();
    let frames = outputs.into_iter().filter_map(|output| match output {
        Output::Frame { bytes, .. } => Some(PeerMessage::decode(&bytes).unwrap()),
        _ => None,
    });
    frames.collect()
}

fn cuts(bench: &mut Bench) -> Vec<(u64, HandoverCut)> {
    let of = |(transaction, message)| match message {
        PeerMessage::HandoverCut(cut) => Some((transaction, cut)),
        _ => None,
    };
    frames(bench).into_iter().filter_map(of).collect()
}

fn suspended(bench: &mut Bench) -> Timestamp {
    let at = bench.now;
    let uuid = UUID;
    bench.hypervisor(HypervisorEvent::Suspended { uuid, at });
    at
}

fn place(bench: &mut Bench) {
    let cut = GateEvent::Cut {
        ifindex: TAP,
        cut: cut(),
    };
    bench.agent.handle_gate(bench.now, cut);
}

const RECORD: GateCommand = GateCommand::Record {
    ifindex: TAP,
    mac: MAC,
    vhost: false,
};

#[test]
fn departing_tap_is_recorded_before_the_copy_starts() {
    let (mut bench, _) = copying();
    let outputs = bench.outputs();
    let place = |wanted: &dyn Fn(&Output) -> bool| outputs.iter().position(wanted).unwrap();
    let record = place(&|output| *output == Output::Gate(RECORD));
    let start = place(&|output| matches!(output, Output::StartMigration { .. }));
    assert!(record < start, "{outputs:?}");
}

#[test]
fn cut_is_told_when_it_is_placed_and_again_to_a_peer_that_was_away() {
    let (mut bench, transaction) = copying();
    bench.outputs();
    let stopped = suspended(&mut bench);
    let ifindex = TAP;
    let asked = GateCommand::Cut {
        ifindex,
        migration: 1,
        stopped,
    };
    assert_eq!(gates(&mut bench), [asked]);
    place(&mut bench);
    let told = cuts(&mut bench);
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].0, &told[0].1.nics), (transaction, &vec![cut()]));
    let reason = "broken".to_owned();
    bench.peer(PeerEvent::Down { reason });
    bench.pass(S);
    bench.outputs();
    bench.peer(PeerEvent::Up { from: None });
    assert_eq!(cuts(&mut bench).len(), 1);
}

#[test]
fn tap_that_cannot_be_recorded_is_left_out_of_the_cut() {
    let (mut bench, _) = copying();
    let ifindex = TAP;
    bench
        .agent
        .handle_gate(bench.now, GateEvent::NotRecorded { ifindex });
    bench.outputs();
    assert!(cuts(&mut bench).is_empty(), "the VM runs");
    suspended(&mut bench);
    let told = cuts(&mut bench);
    assert_eq!(told.len(), 1);
    assert!(told[0].1.nics.is_empty());
}

#[test]
fn vm_that_runs_on_is_recorded_anew_and_its_cut_void() {
    let (mut bench, _) = copying();
    suspended(&mut bench);
    bench.outputs();
    let resumed = HypervisorEvent::Resumed {
        uuid: UUID,
        migrated: false,
        at: bench.now,
    };
    bench.hypervisor(resumed);
    assert_eq!(gates(&mut bench), [RECORD]);
    for thrown_away_at_most in [0, 2] {
        let event = GateEvent::RunsOn {
            migration: 1,
            thrown_away_at_most,
        };
        bench.agent.handle_gate(bench.now, event);
    }
    let mut records = bench.agent.view().migrations();
    assert_eq!(records.next().unwrap().thrown_away_at_most, 2);
}

#[test]
fn recording_ends_with_the_migration() {
    for result in [Ok(JobStats::default()), Err("cancelled".to_owned())] {
        let (mut bench, _) = copying();
        bench.outputs();
        let uuid = UUID;
        bench.hypervisor(HypervisorEvent::MigrationEnded { uuid, result });
        assert_eq!(gates(&mut bench), [GateCommand::Clear { ifindex: TAP }]);
    }
}

/// Lets libvirt complete the migration of the stopped `viewer` before the cut is placed.
fn left_early() -> (Bench, u64) {
    let (mut bench, transaction) = copying();
    suspended(&mut bench);
    bench.pass(100 * MS);
    bench.outputs();
    let (uuid, result) = (UUID, Ok(JobStats::default()));
    bench.hypervisor(HypervisorEvent::MigrationEnded { uuid, result });
    (bench, transaction)
}

const CLEAR_LEFT: GateCommand = GateCommand::Clear { ifindex: TAP };

#[test]
fn cut_that_is_placed_after_libvirt_is_done_is_told_and_ends_the_recording() {
    let (mut bench, transaction) = left_early();
    assert_eq!(gates(&mut bench), []);
    bench.pass(100 * MS);
    place(&mut bench);
    let outputs = bench.outputs();
    assert!(outputs.contains(&Output::Gate(CLEAR_LEFT)), "{outputs:?}");
    let is_told = outputs.iter().any(|output| match output {
        Output::Frame { bytes, .. } => match PeerMessage::decode(bytes).unwrap() {
            (of, PeerMessage::HandoverCut(told)) => of == transaction && told.nics == [cut()],
            _ => false,
        },
        _ => false,
    });
    assert!(is_told, "{outputs:?}");
    bench.pass(S);
    assert_eq!(gates(&mut bench), []);
}

#[test]
fn destination_is_told_in_the_end_that_no_cut_of_a_vm_that_has_left_was_placed() {
    let (mut bench, _) = left_early();
    bench.outputs();
    bench.pass(S);
    let outputs = bench.outputs();
    assert!(outputs.contains(&Output::Gate(CLEAR_LEFT)), "{outputs:?}");
    let (mut bench, transaction) = left_early();
    bench.outputs();
    bench.pass(S);
    let told = cuts(&mut bench);
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].0, told[0].1.nics.len()), (transaction, 0));
}

#[test]
fn cut_that_comes_after_the_end_of_the_migration_is_replayed() {
    let mut bench = arriving();
    progress(&mut bench, Phase::Switching, 0);
    resumed(&mut bench);
    progress(&mut bench, Phase::Completed, 0);
    bench.outputs();
    bench.pass(LATEST_CUT);
    hand_over(&mut bench, 0);
    assert!(matches!(
        gates(&mut bench).as_slice(),
        [GateCommand::Replay { .. }]
    ));
}

#[test]
fn replay_without_a_cut_begins_when_the_source_last_saw_the_vm_run() {
    let mut bench = arriving();
    bench.pass(S);
    let ran = bench.now;
    progress(&mut bench, Phase::Copying, ran.0);
    bench.pass(400 * MS);
    let clock_ns = bench.now.0;
    progress(&mut bench, Phase::Switching, clock_ns);
    resumed(&mut bench);
    bench.outputs();
    bench.frame(
        1,
        HandoverCut {
            clock_ns,
            nics: Vec::new(),
        },
    );
    match gates(&mut bench).as_slice() {
        [GateCommand::ReplayBlind { since, .. }] => {
            let earlier = ran.since(*since);
            assert!(*since < ran && earlier <= 100 * MS, "{earlier:?}");
        }
        other => panic!("{other:?}"),
    }
}
