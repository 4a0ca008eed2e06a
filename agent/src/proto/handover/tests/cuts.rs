//! The placement against a model of a TAP and its readers.

use common::signal::CutBasis;
use proptest::prelude::*;

use super::tap::{Plan, Tap, plans, plans_of_several};
use crate::proto::Timestamp;
use crate::proto::handover::{Cut, Path, Placement, Step};

/// Result of a plan.
struct Outcome {
    tap: Tap,
    cut: Cut,
    stopped: Timestamp,
}

impl Outcome {
    /// Returns the number of the last frame that the guest received.
    fn delivered(&self) -> u64 {
        self.tap.delivered.last().copied().unwrap_or_default()
    }
}

fn run(plan: &Plan) -> Outcome {
    let mut tap = Tap::new(plan.clone());
    let mut placement = Placement::new(plan.capacity as u64);
    let reported = plan.recording + plan.report;
    let mut is_injected = false;
    loop {
        let now = Timestamp(tap.now * 1000);
        if tap.now >= reported {
            placement.stopped(now);
        }
        match placement.poll(now) {
            Step::SampleAt(due) if due <= now => {
                tap.sample(&mut placement);
                if tap.now >= reported && !is_injected {
                    is_injected = true;
                    tap.probe(&mut placement);
                }
            }
            Step::SampleAt(due) => {
                let due = due.0.div_ceil(1000);
                let due = if tap.now < reported {
                    due.min(reported)
                } else {
                    due
                };
                tap.run_until(due);
            }
            Step::Cut(cut) => {
                return Outcome {
                    tap,
                    cut,
                    stopped: Timestamp(plan.recording * 1000),
                };
            }
            step => panic!("{step:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn cut_is_where_the_guest_stopped(plan in plans()) {
        let outcome = run(&plan);
        // Another test below covers queues that were never seen empty.
        prop_assume!(outcome.tap.is_seen_empty);
        match outcome.cut {
            Cut::Number { number, overflow: false } => {
                prop_assert_eq!(number, outcome.delivered());
            }
            Cut::Number { number, overflow: true } => {
                prop_assert!(number <= outcome.delivered());
            }
            Cut::Among { .. } => prop_assert!(false, "one queue has one order"),
            Cut::Time(until) => prop_assert!(until <= outcome.stopped),
        }
    }

    #[test]
    fn nothing_is_lost_where_the_cut_may_be_early(plan in plans()) {
        let outcome = run(&plan);
        let (basis, fault) = outcome.tap.fault(outcome.cut);
        prop_assert!(basis == CutBasis::Time || fault.is_none(), "{:?} {:?}", basis, fault);
    }

    #[test]
    fn flows_of_several_queues_stopped_where_it_is_said(plan in plans_of_several()) {
        let outcome = run(&plan);
        let (basis, fault) = outcome.tap.fault(outcome.cut);
        prop_assert!(basis == CutBasis::Time || fault.is_none(), "{:?} {:?}", basis, fault);
    }
}

/// Returns a plan with 1725 frames per second and `read` microseconds per frame.
fn steady(seed: u64, read: u64) -> Plan {
    Plan {
        seed,
        interval: 580,
        burst: 1 + seed % 5,
        read,
        path: Path::Probed,
        queues: 1,
        flows: 1,
        capacity: 1000,
        queued: seed % 20,
        recording: 1_000_000,
        pause: 0,
        report: 2_000,
        late: 1_000,
        own_reads: 1 + seed % 2,
        is_seen: false,
        held_back: false,
    }
}

#[test]
fn cut_is_exact_where_the_guest_keeps_up_and_its_reader_is_seen() {
    for seed in 0..100 {
        for path in [Path::Probed, Path::Vhost] {
            // QEMU's own reads are not counted otherwise.
            let is_seen = path == Path::Vhost || seed % 2 == 1;
            let outcome = run(&Plan {
                is_seen,
                path,
                ..steady(seed, 30 + seed * 4)
            });
            let expected = Cut::Number {
                number: outcome.delivered(),
                overflow: !is_seen,
            };
            assert_eq!(outcome.cut, expected);
        }
    }
}

#[test]
fn cut_of_several_queues_is_exact_where_the_guest_keeps_up_with_one_flow() {
    let mut exact = 0;
    for seed in 0..100 {
        let outcome = run(&Plan {
            is_seen: true,
            path: Path::Vhost,
            queues: 2 + seed as usize % 3,
            ..steady(seed, 30 + seed * 2)
        });
        let (basis, fault) = outcome.tap.fault(outcome.cut);
        assert_eq!(fault, None, "{seed}");
        exact += u32::from(basis == CutBasis::Count);
    }
    assert!(exact >= 95, "{exact}");
}

#[test]
fn cut_is_no_later_than_the_stop_where_the_guest_does_not_keep_up() {
    for seed in 0..300 {
        for path in [Path::Probed, Path::Vhost, Path::Plain] {
            let outcome = run(&Plan {
                path,
                ..steady(seed, 480 + seed)
            });
            let (basis, fault) = outcome.tap.fault(outcome.cut);
            if basis == CutBasis::Time {
                assert!(outcome.tap.is_seen_empty, "{seed}");
            } else {
                assert_eq!(fault, None, "{seed} {path:?}");
            }
        }
    }
}
