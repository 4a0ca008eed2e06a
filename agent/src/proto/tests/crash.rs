//! Crashes of either agent, broken connections and failures of the hypervisor at every step.

use std::time::Duration;

use super::migration::LONG;
use super::pair::{Pair, START, Setup, VmState};
use crate::proto::Outcome;

/// Repeats a migration with one accident before each of its steps.
///
/// `forgets` tells whether the accident makes the destination host forget an arrived VM. The VM then
/// gets a denial, although the VM was migrated.
fn at_every_step(what: &str, setup: &Setup, forgets: bool, accident: impl Fn(&mut Pair)) {
    let mut pair = Pair::new(setup.clone());
    pair.run(LONG, |pair| pair.vm_host == 1 && !pair.migrating);
    // Some steps after the switch, so that accidents while joins are held are included.
    let steps = pair.steps + 30;
    for step in 0..steps {
        let mut pair = Pair::new(setup.clone());
        pair.run(LONG, |pair| pair.steps >= step);
        accident(&mut pair);
        pair.run(LONG, |_| false);
        let context = format!("{what} at step {step} of {steps}");
        pair.assert_clean(&context);
        assert!(pair.starts <= 1, "{context}: started {} times", pair.starts);
        match (&pair.vm, pair.vm_host) {
            (VmState::Over(Ok(())), 1) => {}
            (VmState::Over(Err(_)), 0) => {}
            (VmState::Over(Err(_)), 1) if forgets => {}
            (VmState::Over(Ok(())), 0) if setup.by_operator || setup.by_hook => {}
            (state, host) => panic!("{context}: VM on host {host} was told {state:?}"),
        }
    }
}

#[test]
fn crash_of_the_source_agent_leaves_nothing_behind() {
    at_every_step("source agent crashes", &Setup::default(), true, |pair| {
        pair.crash(0);
    });
}

#[test]
fn crash_of_the_destination_agent_leaves_nothing_behind() {
    at_every_step(
        "destination agent crashes",
        &Setup::default(),
        true,
        |pair| {
            pair.crash(1);
        },
    );
}

#[test]
fn crash_of_both_agents_leaves_nothing_behind() {
    at_every_step("both agents crash", &Setup::default(), true, |pair| {
        pair.crash(0);
        pair.crash(1);
    });
}

#[test]
fn broken_connection_leaves_nothing_behind() {
    at_every_step(
        "connection breaks",
        &Setup::default(),
        false,
        Pair::break_link,
    );
}

#[test]
fn failure_of_the_hypervisor_leaves_the_vm_at_the_source_and_nothing_behind() {
    at_every_step(
        "hypervisor fails",
        &Setup::default(),
        false,
        Pair::fail_migration,
    );
}

#[test]
fn crash_of_the_source_agent_during_an_operators_move_leaves_nothing_behind() {
    let setup = Setup {
        by_operator: true,
        ..Setup::default()
    };
    at_every_step("source agent crashes", &setup, false, |pair| {
        pair.crash(0);
    });
}

#[test]
fn accidents_during_a_move_by_somebody_else_leave_nothing_behind() {
    let setup = Setup {
        by_hook: true,
        ..Setup::default()
    };
    at_every_step("source agent crashes", &setup, false, |pair| pair.crash(0));
    at_every_step("destination agent crashes", &setup, false, |pair| {
        pair.crash(1);
    });
    at_every_step("connection breaks", &setup, false, Pair::break_link);
    at_every_step("hypervisor fails", &setup, false, Pair::fail_migration);
}

#[test]
fn crash_while_datagrams_are_lost_leaves_nothing_behind() {
    let setup = Setup {
        loss: 30,
        duplication: 30,
        reordering: 30,
        ..Setup::default()
    };
    at_every_step("destination agent crashes", &setup, true, |pair| {
        pair.crash(1);
    });
}

#[test]
fn crash_while_a_site_without_multicast_is_probed_leaves_nothing_behind() {
    let setup = Setup {
        tree: None,
        ..Setup::default()
    };
    at_every_step("source agent crashes", &setup, false, |pair| {
        pair.crash(0);
    });
}

#[test]
fn restarted_destination_agent_takes_the_joins_up_again() {
    let mut pair = Pair::new(Setup::default());
    pair.run(LONG, |pair| pair.migrating);
    pair.crash(1);
    assert!(pair.hosts[1].kernel.joins.is_empty());
    pair.run(Duration::from_secs(2), |_| false);
    assert_eq!(pair.vm_host, 1);
    assert_eq!(pair.hosts[1].kernel.joins.len(), 3);
    assert_eq!(pair.hosts[1].kernel.mdb.len(), 3);
    assert_eq!(pair.vm, VmState::Over(Ok(())));
}

#[test]
fn restarted_source_agent_follows_the_migration_to_its_end() {
    let mut pair = Pair::new(Setup::default());
    pair.run(LONG, |pair| pair.migrating);
    pair.crash(0);
    let running = |pair: &Pair| {
        let agent = pair.hosts[0].agent.as_ref();
        agent.and_then(|agent| agent.view().migrations().last().cloned())
    };
    pair.run(LONG, |pair| running(pair).is_some());
    assert_eq!(running(&pair).unwrap().outcome, None);
    pair.run(LONG, |pair| !pair.migrating);
    pair.run(LONG, |_| false);
    assert_eq!(pair.vm_host, 1);
    let record = running(&pair).unwrap();
    assert_eq!(record.outcome, Some(Outcome::Completed));
    assert_eq!(record.peer, "an unknown host");
    pair.assert_clean("after the source agent's restart");
}

#[test]
fn destination_keeps_what_a_coming_vm_needs_while_its_source_agent_is_away() {
    let mut pair = Pair::new(Setup::default());
    pair.run(LONG, |pair| !pair.hosts[1].kernel.ports.is_empty());
    pair.stall();
    pair.crash(0);
    let long = pair.now.since(START) + Duration::from_secs(120);
    pair.run(long, |_| false);
    assert_eq!(pair.hosts[1].kernel.joins.len(), 3);
    pair.fail_migration();
    let soon = pair.now.since(START) + Duration::from_secs(3);
    pair.run(soon, |_| false);
    assert!(pair.hosts[1].kernel.joins.is_empty());
    let agent = pair.hosts[1].agent.as_ref().unwrap();
    let Some(Outcome::Failed(reason)) = agent.view().migrations().last().unwrap().outcome.clone()
    else {
        panic!("the arrival has not failed");
    };
    assert!(reason.text.contains("gone from vms2"), "{reason}");
}
