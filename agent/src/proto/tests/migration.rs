//! Complete migrations between two agents.

use std::time::Duration;

use common::signal::ReceptionMode;
use proptest::prelude::*;

use super::pair::{Dice, Pair, Setup, VmState, key};
use crate::proto::*;

/// Longer than every timer and every held join.
pub(super) const LONG: Duration = Duration::from_secs(1200);

fn record(pair: &Pair, host: usize) -> MigrationRecord {
    let agent = pair.hosts[host].agent.as_ref().unwrap();
    agent.view().migrations().last().unwrap().clone()
}

#[test]
fn vm_that_asks_is_moved_and_both_ends_record_it() {
    let mut pair = Pair::new(Setup::default());
    pair.run(LONG, |_| false);
    assert_eq!(pair.vm, VmState::Over(Ok(())));
    assert_eq!(pair.vm_host, 1);
    assert_eq!(pair.starts, 1);
    pair.assert_clean("after a move");
    for host in 0..2 {
        let record = record(&pair, host);
        assert_eq!(record.outcome, Some(Outcome::Completed));
        assert_eq!(record.receptions.len(), 3);
        for reception in &record.receptions {
            assert_eq!(reception.mode, ReceptionMode::Native);
            assert_eq!(reception.waited_ms, 20);
        }
        assert_eq!(record.vm_pause, Some(Duration::from_millis(100)));
        assert!(record.signalling.unwrap() < Duration::from_millis(50));
    }
    let source = record(&pair, 0);
    assert_eq!(source.copy, Some(Duration::from_millis(300)));
    assert!(source.total.unwrap() >= Duration::from_millis(500));
}

#[test]
fn operator_moves_a_domain_without_its_help() {
    let mut pair = Pair::new(Setup {
        by_operator: true,
        ..Setup::default()
    });
    pair.run(LONG, |_| false);
    assert_eq!(
        pair.replies.last(),
        Some(&CommandReply::Done { migration: 1 })
    );
    assert_eq!(pair.vm_host, 1);
    pair.assert_clean("after an operator's move");
}

#[test]
fn move_by_somebody_else_is_recorded_at_both_ends_and_started_by_none() {
    let mut pair = Pair::new(Setup {
        by_hook: true,
        ..Setup::default()
    });
    pair.run(LONG, |_| false);
    assert_eq!(pair.replies, [CommandReply::Done { migration: 1 }]);
    assert_eq!((pair.vm_host, pair.starts), (1, 0));
    pair.assert_clean("after a move by somebody else");
    for host in 0..2 {
        let record = record(&pair, host);
        assert_eq!(record.number, 1);
        assert_eq!(record.outcome, Some(Outcome::Completed));
        assert_eq!(record.peer, format!("vms{}", 2 - host));
        assert_eq!(record.receptions.len(), 3);
        assert_eq!(record.vm_pause, Some(Duration::from_millis(100)));
    }
    let handover = record(&pair, 1).handover;
    assert_eq!(handover.len(), 2, "one of each NIC");
}

#[test]
fn source_prunes_what_nobody_there_listens_to_any_more() {
    let mut pair = Pair::new(Setup::default());
    pair.run(LONG, |_| false);
    let pruned = &pair.hosts[0].kernel.pruned;
    assert_eq!(*pruned, [key(0), key(1), key(2)]);
}

#[test]
fn arriving_tap_has_its_mdb_entries_before_the_vm_runs() {
    let mut pair = Pair::new(Setup::default());
    pair.run(LONG, |pair| !pair.hosts[1].kernel.mdb.is_empty());
    assert!(pair.migrating && pair.vm_host == 0);
    let mdb = &pair.hosts[1].kernel.mdb;
    let addresses: Vec<_> = mdb.iter().map(|(_, key)| *key).collect();
    assert_eq!(addresses, [key(0), key(1), key(2)]);
}

#[test]
fn join_is_left_only_after_the_vm_has_answered_a_query() {
    for refresh_events in [false, true] {
        let mut pair = Pair::new(Setup {
            refresh_events,
            ..Setup::default()
        });
        pair.run(LONG, |pair| pair.answered_at.is_some());
        // The VM reported by itself long before.
        assert_eq!(pair.hosts[1].kernel.listeners.len(), 3);
        if !refresh_events {
            assert_eq!(pair.hosts[1].kernel.joins.len(), 3);
        }
        pair.run(LONG, |_| false);
        let answered = pair.answered_at.unwrap();
        for number in 0..3 {
            let left = pair.left_at[&key(number)];
            assert!(left >= answered, "left before the answer");
            assert!(left.since(answered) <= Duration::from_secs(2));
        }
        pair.assert_clean("after the answer");
    }
}

#[test]
fn site_without_multicast_is_unreachable_after_the_budget_and_the_vm_moves_all_the_same() {
    let mut pair = Pair::new(Setup {
        tree: None,
        ..Setup::default()
    });
    pair.run(LONG, |_| false);
    assert_eq!(pair.vm, VmState::Over(Ok(())));
    let record = record(&pair, 1);
    for reception in &record.receptions {
        assert_eq!(reception.mode, ReceptionMode::Unreachable);
        assert!((2500..2510).contains(&reception.waited_ms));
    }
    pair.assert_clean("after a move to a site without multicast");
}

#[test]
fn thousand_addresses_are_probed_at_once() {
    let mut pair = Pair::new(Setup {
        addresses: 1000,
        ..Setup::default()
    });
    pair.run(LONG, |_| false);
    let record = record(&pair, 0);
    assert_eq!(record.receptions.len(), 1000);
    assert!(record.signalling.unwrap() < Duration::from_millis(50));
    pair.assert_clean("after a move with many addresses");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn migration_ends_well_however_datagrams_fare(
        loss in 0_u64..60, duplication in 0_u64..60, reordering in 0_u64..60, seed in 1_u64..,
    ) {
        let mut pair = Pair::new(Setup {
            loss, duplication, reordering, dice: Dice(seed), ..Setup::default()
        });
        pair.run(LONG, |_| false);
        prop_assert!(pair.starts <= 1);
        prop_assert!(matches!(pair.vm, VmState::Over(Ok(()))), "{:?}", pair.vm);
        pair.assert_clean("after whims of the network");
    }
}
