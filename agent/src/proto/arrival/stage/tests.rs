//! Tests of arriving VMs: undo, hold and release.

use common::maps::FilterMode;
use common::signal::{MigrationAbort, MigrationProgress, PeerMessage, Phase, Reason};

use crate::proto::arrival::tests::{S, active, answers, bench, query, request};
use crate::proto::tests::fixture::{Bench, UUID, key};
use crate::proto::{Command, HypervisorEvent, MdbEntry, Outcome, Output, PeerEvent};

const ARRIVING: u32 = 20;

fn arrive(bench: &mut Bench) {
    bench.port(ARRIVING, "vnet5");
    bench.domain("vnet5", false);
    let arrived = HypervisorEvent::Resumed {
        uuid: UUID,
        migrated: true,
        at: bench.now,
    };
    bench.hypervisor(arrived);
}

/// Lets the source report that its VM has stopped.
fn switch(bench: &mut Bench) {
    let progress = MigrationProgress {
        phase: Phase::Switching,
        processed_bytes: 1,
        total_bytes: 1,
        elapsed_ms: 1,
        vm_pause_ms: None,
        clock_ns: None,
    };
    bench.frame(1, progress);
}

fn leaves(outputs: &[Output]) -> usize {
    let is_leave = |output: &&Output| matches!(output, Output::Leave(_));
    outputs.iter().filter(is_leave).count()
}

#[test]
fn abort_before_the_tap_is_there_undoes_join_and_watch_at_once() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.outputs();
    let reason = "cancelled".to_owned();
    bench.frame(1, MigrationAbort(Reason::unspecified(reason)));
    let expected = [Output::Leave(key(1)), Output::Unmanage(key(1))];
    assert_eq!(bench.outputs(), expected);
}

#[test]
fn abort_is_done_when_the_tap_goes() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.port(ARRIVING, "vnet5");
    switch(&mut bench);
    bench.outputs();
    let reason = "cancelled".to_owned();
    bench.frame(1, MigrationAbort(Reason::unspecified(reason)));
    assert_eq!(leaves(&bench.outputs()), 0);
    bench.unplug(ARRIVING);
    let expected = [Output::Leave(key(1)), Output::Unmanage(key(1))];
    assert_eq!(bench.outputs(), expected);
}

#[test]
fn abort_that_finds_the_tap_for_ever_takes_the_mdb_entry_away_too() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.port(ARRIVING, "vnet5");
    switch(&mut bench);
    let reason = "cancelled".to_owned();
    bench.frame(1, MigrationAbort(Reason::unspecified(reason)));
    bench.pass(31 * S);
    let delete = Output::MdbDelete(MdbEntry {
        ifindex: ARRIVING,
        key: key(1),
        source: None,
    });
    let outputs = bench.outputs();
    for undone in [delete, Output::Leave(key(1)), Output::Unmanage(key(1))] {
        assert!(outputs.contains(&undone), "{undone:?} in {outputs:?}");
    }
}

#[test]
fn arrival_whose_tap_goes_ends_soon_with_the_reason_of_its_source_if_that_tells_one() {
    for told in [false, true] {
        let mut bench = bench();
        bench.frame(1, request(UUID, vec![active(1)]));
        bench.port(ARRIVING, "vnet5");
        bench.unplug(ARRIVING);
        assert_eq!(leaves(&bench.outputs()), 0);
        if told {
            let reason = "cancelled".to_owned();
            bench.frame(1, MigrationAbort(Reason::unspecified(reason)));
        }
        bench.pass(3 * S);
        assert_eq!(leaves(&bench.outputs()), 1);
        let record = bench.agent.view().migrations().last().unwrap();
        let Some(Outcome::Failed(reason)) = &record.outcome else {
            panic!("{record:?}");
        };
        assert_eq!(reason.text == "cancelled", told, "{reason}");
    }
}

#[test]
fn abort_that_crosses_the_arrival_does_not_take_the_stream_away() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.port(ARRIVING, "vnet5");
    bench.domain("vnet5", false);
    let reason = "libvirtd is gone".to_owned();
    bench.frame(1, MigrationAbort(Reason::unspecified(reason)));
    assert_eq!(leaves(&bench.outputs()), 0);
    arrive(&mut bench);
    bench.pass(60 * S);
    assert_eq!(leaves(&bench.outputs()), 0);
}

#[test]
fn abort_is_done_in_the_end_if_the_waiting_domain_never_runs() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.domain("", false);
    let reason = "cancelled".to_owned();
    bench.frame(1, MigrationAbort(Reason::unspecified(reason)));
    bench.pass(31 * S);
    assert_eq!(leaves(&bench.outputs()), 1);
}

#[test]
fn domain_gone_before_its_arrival_undoes_and_tells_the_source() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.domain("vnet5", false);
    bench.outputs();
    bench.hypervisor(HypervisorEvent::Gone(UUID));
    let outputs = bench.outputs();
    assert_eq!(leaves(&outputs), 1);
    assert!(matches!(
        answers(&outputs).as_slice(),
        [PeerMessage::MigrationAbort(_)]
    ));
}

#[test]
fn joins_of_a_lost_source_end_soon_before_the_vm_begins_to_come_and_late_after() {
    for begun in [false, true] {
        let mut bench = bench();
        bench.frame(1, request(UUID, vec![active(1)]));
        let reason = "Connection to vms2 was reset".to_owned();
        bench.peer(PeerEvent::Down { reason });
        if begun {
            bench.domain("vnet5", false);
        }
        bench.pass(31 * S);
        assert_eq!(leaves(&bench.outputs()), usize::from(!begun));
        bench.pass(600 * S);
        assert_eq!(leaves(&bench.outputs()), usize::from(begun));
    }
}

#[test]
fn silent_source_is_told_when_its_joins_expire() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.pass(599 * S);
    assert_eq!(leaves(&bench.outputs()), 0);
    bench.pass(2 * S);
    let outputs = bench.outputs();
    assert_eq!(leaves(&outputs), 1);
    assert_eq!(answers(&outputs).len(), 1);
}

#[test]
fn report_by_itself_does_not_end_the_join_but_the_answer_to_a_query_does() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    query(&mut bench);
    bench.pass(S);
    arrive(&mut bench);
    bench.pass(S);
    bench.report(ARRIVING, key(1), FilterMode::Exclude);
    assert_eq!(leaves(&bench.outputs()), 0);
    bench.pass(S);
    query(&mut bench);
    assert_eq!(leaves(&bench.outputs()), 0);
    bench.pass(S);
    bench.report(ARRIVING, key(1), FilterMode::Exclude);
    let outputs = bench.outputs();
    assert_eq!(leaves(&outputs), 1);
    // The VM listens itself, so the address stays managed.
    assert!(!outputs.contains(&Output::Unmanage(key(1))));
}

#[test]
fn vm_that_leaves_the_address_after_its_arrival_ends_the_join() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    arrive(&mut bench);
    bench.report(ARRIVING, key(1), FilterMode::Exclude);
    bench.outputs();
    bench.leave(ARRIVING, key(1));
    assert_eq!(leaves(&bench.outputs()), 1);
}

#[test]
fn entry_that_is_read_but_was_never_there_ends_nothing() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    arrive(&mut bench);
    bench.outputs();
    bench.leave(ARRIVING, key(1));
    assert_eq!(leaves(&bench.outputs()), 0);
}

#[test]
fn vm_that_never_answers_is_held_for_one_listening_interval() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    arrive(&mut bench);
    bench.outputs();
    bench.pass(269 * S);
    assert_eq!(leaves(&bench.outputs()), 0);
    bench.pass(2 * S);
    let outputs = bench.outputs();
    assert_eq!(leaves(&outputs), 1);
    let delete = Output::MdbDelete(MdbEntry {
        ifindex: ARRIVING,
        key: key(1),
        source: None,
    });
    assert!(outputs.contains(&delete));
}

#[test]
fn mdb_entries_of_a_tap_that_is_not_up_yet_are_made_again_soon_and_then_rarely() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    switch(&mut bench);
    bench.outputs();
    bench.port(ARRIVING, "vnet5");
    let added = |bench: &mut Bench, time| {
        bench.pass(time);
        let is_add = |output: &&Output| matches!(output, Output::MdbAdd { ifindex: ARRIVING, membership } if membership.key == key(1));
        bench.outputs().iter().filter(is_add).count()
    };
    assert_eq!(added(&mut bench, S / 1000), 1);
    assert_eq!(added(&mut bench, S / 20), 1);
    assert!((3..6).contains(&added(&mut bench, S)));
    // The gate of a TAP without a domain opens after two minutes; the entries are then added again.
    added(&mut bench, 210 * S);
    let rarely = added(&mut bench, 180 * S);
    assert!((2..4).contains(&rarely), "{rarely}");
}

#[test]
fn mdb_entries_are_renewed_when_the_vm_runs() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1)]));
    bench.port(ARRIVING, "vnet5");
    bench.domain("vnet5", false);
    bench.outputs();
    bench.domain("vnet5", true);
    let is_add = |output: &Output| matches!(output, Output::MdbAdd { .. });
    assert!(bench.outputs().iter().any(is_add));
}

#[test]
fn domain_that_moves_on_before_it_has_reported_takes_its_listeners_along() {
    let mut bench = bench();
    bench.frame(1, request(UUID, vec![active(1), active(2)]));
    arrive(&mut bench);
    bench.domain("vnet5", true);
    bench.report(ARRIVING, key(2), FilterMode::Exclude);
    bench.outputs();
    let command = Command::Migrate {
        domain: "viewer".to_owned(),
        destination: "vms2".to_owned(),
    };
    bench.agent.handle_command(bench.now, 1, command);
    bench.pass(S);
    let mut addresses = match answers(&bench.outputs()).as_slice() {
        [PeerMessage::AgentRequest(body)] => body
            .listeners
            .iter()
            .map(|listener| *listener.multicast_address)
            .collect::<Vec<_>>(),
        other => panic!("no request but {other:?}"),
    };
    addresses.sort_unstable();
    assert_eq!(
        addresses,
        [1, 2].map(|number| key(number).multicast_address)
    );
}
