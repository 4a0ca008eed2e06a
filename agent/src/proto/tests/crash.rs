//! Crashes of either agent, broken connections and failures of the hypervisor at every step.

use std::time::Duration;

use super::migration::LONG;
use super::pair::{Pair, Setup, VmState};

/// Repeats a migration with one accident before each of its steps.
///
/// `forgets` is whether the accident makes the destination forget a VM that has arrived: then the
/// VM that asks it is told so, although it was moved.
fn at_every_step(what: &str, setup: &Setup, forgets: bool, accident: impl Fn(&mut Pair)) {
    let mut pair = Pair::new(setup.clone());
    pair.run(LONG, |pair| pair.vm_host == 1 && !pair.migrating);
    // Until well after the switch, so that accidents while joins are held are among them.
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
            (VmState::Over(Ok(())), 0) if setup.by_operator => {}
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
