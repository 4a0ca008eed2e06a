//! Tests of the placement.

use crate::proto::Timestamp;
use crate::proto::handover::{Counts, Cut, Placement, Step};

fn at(ms: u64) -> Timestamp {
    Timestamp(ms * 1_000_000)
}

fn counts(taken: u64, dropped: u64) -> Counts {
    Counts { taken, dropped }
}

/// A placement that has seen an empty queue after every tenth frame, up to 30; the kernel has
/// counted 1000 more before.
fn recording(vhost: bool) -> Placement {
    let mut placement = Placement::new(vhost, 1000);
    for n in 0..=3 {
        placement.sample(at(n * 10), counts(1000 + n * 10, 7), n * 10);
    }
    placement
}

/// Samples that do not change any more, until the cut.
fn settle(placement: &mut Placement, mut now: Timestamp, counts: Counts, entered: u64) -> Cut {
    loop {
        match placement.poll(now) {
            Step::SampleAt(due) => {
                now = due.max(now);
                placement.sample(now, counts, entered);
            }
            Step::Cut(cut) => return cut,
            step => panic!("{step:?}"),
        }
    }
}

fn count(number: u64) -> Cut {
    Cut::Number {
        number,
        overflow: false,
    }
}

fn overflow(number: u64) -> Cut {
    Cut::Number {
        number,
        overflow: true,
    }
}

#[test]
fn last_frame_read_is_not_delivered() {
    let mut placement = recording(false);
    placement.stopped(at(40));
    placement.sample(at(40), counts(1035, 7), 36);
    placement.injected(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1036, 7), 40),
        count(35)
    );
}

#[test]
fn injected_frame_is_the_last_one_read_when_nothing_else_comes() {
    let mut placement = recording(false);
    placement.stopped(at(40));
    placement.sample(at(40), counts(1035, 7), 35);
    placement.injected(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1036, 7), 35),
        count(35)
    );
}

#[test]
fn vhost_delivers_all_that_it_has_read() {
    let mut placement = recording(true);
    placement.stopped(at(40));
    placement.sample(at(40), counts(1035, 7), 36);
    assert_eq!(
        settle(&mut placement, at(40), counts(1035, 7), 40),
        count(35)
    );
}

#[test]
fn drops_behind_the_cut_do_not_matter() {
    let mut placement = recording(false);
    placement.stopped(at(40));
    placement.sample(at(40), counts(1035, 7), 36);
    placement.injected(at(40));
    placement.sample(at(41), counts(1036, 7), 38);
    assert_eq!(
        settle(&mut placement, at(41), counts(1036, 300), 500),
        count(35)
    );
}

#[test]
fn drops_since_the_anchor_may_be_before_the_cut() {
    let mut placement = recording(false);
    placement.stopped(at(40));
    placement.sample(at(40), counts(1035, 9), 40);
    placement.injected(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1036, 9), 50),
        overflow(35)
    );
}

#[test]
fn queue_that_was_not_seen_empty_often_places_by_time() {
    let mut placement = Placement::new(false, 1000);
    placement.sample(at(10), counts(1010, 7), 10);
    placement.sample(at(20), counts(1020, 7), 20);
    placement.stopped(at(40));
    let cut = settle(&mut placement, at(40), counts(1025, 7), 30);
    assert_eq!(cut, Cut::Time(at(35)));
}

#[test]
fn deadline_ends_the_wait_for_a_frame() {
    let mut placement = recording(false);
    placement.stopped(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1031, 7), 31),
        overflow(30)
    );
}

#[test]
fn late_read_revises_the_cut() {
    let mut placement = recording(false);
    placement.stopped(at(40));
    placement.sample(at(40), counts(1035, 7), 36);
    placement.injected(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1035, 7), 40),
        count(34)
    );
    placement.sample(at(60), counts(1036, 7), 60);
    assert_eq!(placement.poll(at(60)), Step::Revised(count(35)));
    assert!(matches!(placement.poll(at(60)), Step::SampleAt(_)));
    assert_eq!(placement.poll(at(140)), Step::Done);
}

#[test]
fn recording_is_sampled_sparingly() {
    let mut placement = Placement::new(false, 1000);
    let (mut now, mut samples) = (at(0), 0);
    while now < at(10_000) {
        let Step::SampleAt(due) = placement.poll(now) else {
            panic!("not stopped");
        };
        now = due.max(now);
        placement.sample(now, counts(now.0 / 1000, 0), now.0 / 1000);
        samples += 1;
    }
    assert!(samples < 510, "{samples} samples");
}
