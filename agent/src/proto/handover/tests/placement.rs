//! Tests of the placement.

use super::count;
use crate::proto::Timestamp;
use crate::proto::handover::{Counts, Cut, Path, Placement, Reader, Step};

fn at(ms: u64) -> Timestamp {
    Timestamp(ms * 1_000_000)
}

fn counts(taken: u64, dropped: u64) -> Counts {
    Counts {
        taken,
        dropped,
        own: None,
    }
}

/// Returns the counts of a TAP served by vhost-net, of which QEMU itself read `own` frames.
fn counts_of_both(taken: u64, own: u64) -> Counts {
    Counts {
        own: Some(own),
        ..counts(taken, 7)
    }
}

/// Returns a placement that has seen an empty queue after every tenth frame, up to 30. The kernel
/// counted 1000 more frames before.
fn recording() -> Placement {
    let mut placement = Placement::new(1000);
    for n in 0..=3 {
        for ms in [n * 10 - n.min(1), n * 10] {
            let counts = counts(1000 + n * 10, 7);
            placement.sample(at(ms), Reader::Asleep, counts, n * 10);
        }
    }
    placement
}

/// Feeds constant samples until the cut.
fn settle(placement: &mut Placement, mut now: Timestamp, counts: Counts, entered: u64) -> Cut {
    loop {
        match placement.poll(now) {
            Step::SampleAt(due) => {
                now = due.max(now);
                placement.sample(now, Reader::Asleep, counts, entered);
            }
            Step::Cut(cut) => return cut,
            step => panic!("{step:?}"),
        }
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
    let mut placement = recording();
    placement.stopped(at(40));
    placement.sample(at(40), Reader::Asleep, counts(1035, 7), 36);
    placement.injected(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1036, 7), 40),
        count(35)
    );
}

#[test]
fn injected_frame_is_the_last_one_read_when_nothing_else_comes() {
    let mut placement = recording();
    placement.stopped(at(40));
    placement.sample(at(40), Reader::Asleep, counts(1035, 7), 35);
    placement.injected(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1036, 7), 35),
        count(35)
    );
}

#[test]
fn sender_that_keeps_step_with_the_samples_does_not_hide_that_the_queue_is_empty() {
    let us = |us: u64| Timestamp(us * 1000);
    let mut placement = Placement::new(1000);
    // One frame per millisecond, read 100 us later.
    let entered = |now: Timestamp| now.0 / 1_000_000;
    let taken = |now: Timestamp| now.0.saturating_sub(100_000) / 1_000_000;
    let mut now = us(1_000_050);
    while now < us(1_300_000) {
        placement.sample(now, Reader::Asleep, counts(taken(now), 0), entered(now));
        let Step::SampleAt(due) = placement.poll(now) else {
            panic!("no stop yet");
        };
        now = due;
    }
    let now = us(1_300_050);
    placement.stopped(now);
    placement.sample(now, Reader::Asleep, counts(1299, 0), 1300);
    placement.injected(now);
    assert_eq!(
        settle(&mut placement, now, counts(1300, 0), 1300),
        count(1299)
    );
}

#[test]
fn frames_that_always_come_just_before_a_sample_do_not_show_an_empty_queue() {
    let mut placement = Placement::new(1000);
    // Each frame is read when the next one arrives.
    for n in 0..12 {
        placement.sample(at(n * 7), Reader::Asleep, counts(1000 + n, 7), n + 1);
    }
    placement.stopped(at(90));
    placement.sample(at(90), Reader::Asleep, counts(1012, 7), 13);
    placement.injected(at(90));
    let cut = settle(&mut placement, at(90), counts(1013, 7), 13);
    assert_eq!(
        cut,
        Cut::Time(at(72)),
        "one was read after the sample at 77"
    );
}

#[test]
fn stop_that_is_reported_late_is_placed_when_the_vm_read_last() {
    let mut placement = Placement::new(1000);
    for n in 0..12 {
        placement.sample(at(n * 7), Reader::Asleep, counts(1000 + n, 7), n + 1);
    }
    // The VM has stopped; QEMU reads one of the arriving frames.
    for n in 12..40 {
        placement.sample(at(n * 7), Reader::Asleep, counts(1012, 7), n + 1);
    }
    placement.stopped(at(290));
    placement.sample(at(290), Reader::Asleep, counts(1012, 7), 42);
    let cut = settle(&mut placement, at(290), counts(1012, 7), 42);
    assert_eq!(cut, Cut::Time(at(65)));
}

#[test]
fn drops_behind_the_cut_do_not_matter() {
    let mut placement = recording();
    placement.stopped(at(40));
    placement.sample(at(40), Reader::Asleep, counts(1035, 7), 36);
    placement.injected(at(40));
    placement.sample(at(41), Reader::Asleep, counts(1036, 7), 38);
    assert_eq!(
        settle(&mut placement, at(41), counts(1036, 300), 500),
        count(35)
    );
}

#[test]
fn drops_since_the_anchor_may_be_before_the_cut() {
    let mut placement = recording();
    placement.stopped(at(40));
    placement.sample(at(40), Reader::Asleep, counts(1035, 9), 40);
    placement.injected(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1036, 9), 50),
        overflow(35)
    );
}

#[test]
fn queue_that_was_not_seen_empty_often_places_by_time() {
    let mut placement = Placement::new(1000);
    placement.sample(at(10), Reader::Asleep, counts(1010, 7), 10);
    placement.sample(at(20), Reader::Asleep, counts(1020, 7), 20);
    placement.stopped(at(40));
    let cut = settle(&mut placement, at(40), counts(1025, 7), 30);
    assert_eq!(cut, Cut::Time(at(15)));
}

#[test]
fn drops_of_frames_on_their_way_into_the_queue_count() {
    let mut placement = recording();
    // Some of the last 10 frames may not have reached the queue.
    placement.sample(at(31), Reader::Asleep, counts(1032, 7), 40);
    placement.stopped(at(40));
    placement.sample(at(40), Reader::Asleep, counts(1036, 9), 50);
    placement.injected(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1037, 9), 50),
        overflow(36)
    );
    // One sample later, the frames have reached the queue.
    let mut placement = recording();
    placement.sample(at(31), Reader::Asleep, counts(1032, 7), 40);
    placement.sample(at(32), Reader::Asleep, counts(1033, 7), 41);
    placement.stopped(at(40));
    placement.sample(at(40), Reader::Asleep, counts(1036, 9), 50);
    placement.injected(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1037, 9), 50),
        count(36)
    );
}

#[test]
fn queue_that_nobody_reads_may_hold_frames() {
    let mut placement = Placement::new(1000);
    for n in 0..100 {
        placement.sample(at(n), Reader::Asleep, counts(1000, 7), 5);
    }
    placement.stopped(at(100));
    let cut = settle(&mut placement, at(100), counts(1000, 7), 5);
    assert_eq!(cut, Cut::Time(at(95)));
    // The more frames arrive, the fewer were received.
    let mut placement = Placement::new(1000);
    for n in 0..100 {
        placement.sample(at(n), Reader::Asleep, counts(1000, 7), n);
    }
    placement.stopped(at(100));
    assert_eq!(
        settle(&mut placement, at(100), counts(1000, 7), 100),
        overflow(0)
    );
}

#[test]
fn full_queue_is_not_taken_for_an_empty_one() {
    let mut placement = Placement::new(50);
    // Repeatedly, one frame is read and two arrive, of which one is dropped.
    for n in 0..100 {
        placement.sample(at(n), Reader::Asleep, counts(n, n), 50 + 2 * n);
    }
    placement.stopped(at(100));
    placement.sample(at(100), Reader::Asleep, counts(100, 100), 250);
    placement.injected(at(100));
    let cut = settle(&mut placement, at(100), counts(101, 120), 270);
    // The 100th frame with room was the 150th; the provable number is slightly lower.
    assert_eq!(cut, overflow(145));
}

#[test]
fn guest_that_goes_on_has_had_nothing_after_the_report_of_its_stop() {
    let mut placement = recording();
    placement.stopped(at(40));
    placement.sample(at(40), Reader::Asleep, counts(1035, 7), 36);
    placement.injected(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1060, 7), 70),
        overflow(36)
    );
}

#[test]
fn deadline_ends_the_wait_for_a_frame() {
    let mut placement = recording();
    placement.stopped(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1031, 7), 31),
        overflow(30)
    );
}

#[test]
fn reader_that_comes_late_is_waited_for_and_one_that_sleeps_is_not() {
    let stopped = || {
        let mut placement = recording();
        placement.stopped(at(40));
        placement.sample(at(40), Reader::Busy, counts(1035, 7), 36);
        placement.injected(at(40));
        placement
    };
    let mut late = stopped();
    for ms in 41..600 {
        late.sample(at(ms), Reader::Busy, counts(1035, 7), 40);
        assert!(matches!(late.poll(at(ms)), Step::SampleAt(_)), "{ms}");
    }
    late.sample(at(600), Reader::Asleep, counts(1036, 7), 40);
    assert_eq!(late.poll(at(600)), Step::Cut(count(35)));

    let mut prompt = stopped();
    prompt.sample(at(41), Reader::Asleep, counts(1036, 7), 40);
    assert_eq!(prompt.poll(at(41)), Step::Cut(count(35)));

    // The wait is bounded.
    assert_eq!(stopped().poll(at(1040)), Step::Cut(overflow(34)));
}

#[test]
fn cut_is_not_proven_if_nobody_saw_the_reader_sleep() {
    let mut placement = recording();
    placement.stopped(at(40));
    placement.sample(at(40), Reader::Unknown, counts(1035, 7), 36);
    placement.injected(at(40));
    for ms in [42, 62] {
        placement.sample(at(ms), Reader::Unknown, counts(1036, 7), 40);
    }
    assert_eq!(placement.poll(at(62)), Step::Cut(overflow(35)));
}

#[test]
fn sample_that_this_host_delays_still_settles_the_cut() {
    let mut placement = recording();
    placement.stopped(at(40));
    placement.sample(at(40), Reader::Asleep, counts(1035, 7), 35);
    placement.injected(at(40));
    assert!(matches!(placement.poll(at(200)), Step::SampleAt(_)));
    placement.sample(at(200), Reader::Asleep, counts(1036, 7), 35);
    assert_eq!(placement.poll(at(200)), Step::Cut(count(35)));
}

#[test]
fn sleep_beside_an_empty_queue_says_nothing() {
    let mut placement = recording();
    placement.stopped(at(40));
    // The reader sleeps because nothing is there to read.
    placement.sample(at(40), Reader::Asleep, counts(1035, 7), 35);
    assert!(matches!(placement.poll(at(40)), Step::SampleAt(_)));
    placement.injected(at(40));
    assert!(matches!(placement.poll(at(40)), Step::SampleAt(_)));
    placement.sample(at(42), Reader::Asleep, counts(1036, 7), 35);
    assert_eq!(placement.poll(at(42)), Step::Cut(count(35)));
}

#[test]
fn tap_that_is_gone_after_the_stop_gives_what_is_known_at_once() {
    let mut placement = recording();
    placement.stopped(at(40));
    placement.sample(at(40), Reader::Busy, counts(1035, 7), 36);
    placement.lost();
    assert_eq!(placement.poll(at(41)), Step::Cut(overflow(34)));
    assert_eq!(placement.poll(at(41)), Step::Done);
}

#[test]
fn late_read_revises_the_cut() {
    let mut placement = recording();
    placement.stopped(at(40));
    placement.sample(at(40), Reader::Asleep, counts(1035, 7), 36);
    placement.injected(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1035, 7), 40),
        count(34)
    );
    placement.sample(at(60), Reader::Asleep, counts(1036, 7), 60);
    assert_eq!(placement.poll(at(60)), Step::Revised(count(35)));
    assert!(matches!(placement.poll(at(60)), Step::SampleAt(_)));
    assert_eq!(placement.poll(at(1040)), Step::Done);
}

/// Returns the number of samples in 10 s, if a frame arrives every `interval_ms`.
fn samples(interval_ms: u64) -> u32 {
    let mut placement = Placement::new(1000);
    let (mut now, mut samples) = (at(0), 0);
    while now < at(10_000) {
        let Step::SampleAt(due) = placement.poll(now) else {
            panic!("not stopped");
        };
        now = due.max(now);
        let frames = now.0 / (interval_ms * 1_000_000);
        placement.sample(now, Reader::Asleep, counts(frames, 0), frames);
        samples += 1;
    }
    samples
}

#[test]
fn recording_is_sampled_sparingly() {
    assert!(samples(1) < 550);
    assert!(samples(100) < 1200);
    // No frame ever arrives.
    assert!(samples(100_000) < 3000);
}

#[test]
fn full_queue_has_what_vhost_net_has_taken_ahead_behind_it() {
    let mut placement = Placement::new(50);
    placement.read_by(Path::Vhost, 1);
    // Repeatedly, one frame is read and two arrive, of which one is dropped.
    for n in 0..200 {
        placement.sample(at(n), Reader::Asleep, counts(n, n), 114 + 2 * n);
    }
    placement.stopped(at(200));
    placement.sample(at(200), Reader::Asleep, counts(200, 200), 514);
    placement.injected(at(200));
    let cut = settle(&mut placement, at(200), counts(201, 220), 534);
    // The 200th frame with room was the 313th or earlier; the provable number is slightly lower.
    assert_eq!(cut, overflow(279));
}

/// Returns a placement of two queues that were found empty after every tenth frame, up to 30, and whose
/// VM has stopped.
fn of_two_queues() -> Placement {
    let mut placement = Placement::new(1000);
    for n in 0..=16 {
        placement.read_by(Path::Vhost, 2);
        let counts = counts_of_both(1000 + n * 10, 5);
        placement.sample(at(n * 10), Reader::Asleep, counts, n * 10);
    }
    placement.stopped(at(170));
    placement.sample(at(170), Reader::Busy, counts_of_both(1160, 5), 166);
    placement.injected(at(170));
    placement.injected(at(170));
    placement
}

/// Returns the cut after `taken` reads, of which QEMU itself made `own`.
fn cut_of_two_queues(mut placement: Placement, taken: u64, own: u64) -> Cut {
    placement.sample(at(171), Reader::Asleep, counts_of_both(taken, 5 + own), 166);
    match placement.poll(at(171)) {
        Step::Cut(cut) => cut,
        step => panic!("{step:?}"),
    }
}

#[test]
fn several_queues_that_were_empty_before_the_last_reads_are_cut_there() {
    let mut placement = of_two_queues();
    placement.probed();
    assert_eq!(cut_of_two_queues(placement, 1162, 2), count(160));
}

#[test]
fn what_was_read_of_several_queues_since_they_were_empty_is_for_the_flows_to_say() {
    let mut placement = of_two_queues();
    placement.probed();
    let among = Cut::Among {
        after: 160,
        had: 3,
        until: 166,
    };
    assert_eq!(cut_of_two_queues(placement, 1165, 2), among);
    // It is unknown whether each queue had a frame to read.
    assert_eq!(cut_of_two_queues(of_two_queues(), 1165, 2), overflow(160));
}

#[test]
fn sample_after_which_too_few_were_read_is_of_a_vm_that_had_stopped() {
    let mut placement = of_two_queues();
    placement.probed();
    let among = Cut::Among {
        after: 150,
        had: 9,
        until: 166,
    };
    assert_eq!(cut_of_two_queues(placement, 1161, 2), among);
}

#[test]
fn queue_that_goes_takes_what_is_known_with_it() {
    let mut placement = of_two_queues();
    placement.probed();
    placement.read_by(Path::Vhost, 1);
    assert_eq!(cut_of_two_queues(placement, 1165, 2), Cut::Time(at(165)));
}

/// Returns a placement of a TAP served by vhost-net, of which QEMU had read 5 frames before. Every
/// tenth frame found the queue empty, and the VM stopped after frame 165 of 166.
fn of_vhost() -> Placement {
    let mut placement = Placement::new(1000);
    for n in 0..=16 {
        placement.read_by(Path::Vhost, 1);
        let counts = counts_of_both(1000 + n * 10, 5);
        placement.sample(at(n * 10), Reader::Asleep, counts, n * 10);
    }
    placement.stopped(at(170));
    placement.sample(at(170), Reader::Busy, counts_of_both(1165, 5), 166);
    placement.injected(at(170));
    placement
}

#[test]
fn frames_that_qemu_reads_beside_vhost_net_are_not_delivered_however_many() {
    for own in 1..4 {
        let mut placement = of_vhost();
        let counts = counts_of_both(1165 + own, 5 + own);
        placement.sample(at(171), Reader::Asleep, counts, 180);
        assert_eq!(placement.poll(at(171)), Step::Cut(count(165)), "{own}");
        // QEMU reads no more; a further read would change nothing.
        let counts = counts_of_both(1166 + own, 6 + own);
        placement.sample(at(175), Reader::Asleep, counts, 190);
        assert!(matches!(placement.poll(at(175)), Step::SampleAt(_)));
    }
}

#[test]
fn reads_of_qemu_that_are_not_counted_may_be_two() {
    // The number of the thread belongs to another thread, so no read is seen.
    let mut placement = of_vhost();
    placement.sample(at(171), Reader::Asleep, counts_of_both(1167, 5), 180);
    assert_eq!(placement.poll(at(171)), Step::Cut(overflow(165)));
    // QEMU's reads cannot be counted.
    let mut placement = recording();
    placement.read_by(Path::Vhost, 1);
    placement.stopped(at(40));
    placement.sample(at(40), Reader::Busy, counts(1035, 7), 36);
    placement.injected(at(40));
    placement.sample(at(41), Reader::Asleep, counts(1036, 7), 36);
    assert_eq!(placement.poll(at(41)), Step::Cut(overflow(34)));
}

#[test]
fn tap_that_qemu_has_read_and_given_back_is_not_cut_exactly() {
    let mut placement = Placement::new(1000);
    placement.read_by(Path::Vhost, 1);
    for n in 0..=16 {
        // The guest's driver restarts after the tenth sample.
        let own = if n < 10 { 5 } else { 6 };
        let counts = counts_of_both(1000 + n * 10, own);
        placement.sample(at(n * 10), Reader::Asleep, counts, n * 10);
    }
    placement.stopped(at(170));
    placement.sample(at(170), Reader::Busy, counts_of_both(1165, 6), 166);
    placement.injected(at(170));
    placement.sample(at(171), Reader::Asleep, counts_of_both(1166, 7), 180);
    assert_eq!(placement.poll(at(171)), Step::Cut(overflow(164)));
}

#[test]
fn without_a_probe_two_frames_may_have_been_read_that_nobody_got() {
    let mut placement = recording();
    placement.stopped(at(40));
    placement.read_by(Path::Plain, 1);
    placement.sample(at(40), Reader::Asleep, counts(1035, 7), 36);
    placement.injected(at(40));
    assert_eq!(
        settle(&mut placement, at(40), counts(1036, 7), 40),
        overflow(34)
    );
}

/// Returns the bound for a stopped VM with vhost-net that is about to resume: `entered` frames had
/// entered by the stop, vhost-net read `taken` of them, and QEMU read `own` since.
fn runs_on(entered: u64, taken: u64, own: u64) -> u64 {
    let mut placement = Placement::new(1000);
    for n in 0..=3 {
        for ms in [n * 10 - n.min(1), n * 10] {
            placement.read_by(Path::Vhost, 1);
            let counts = counts_of_both(1000 + n * 10, 5);
            placement.sample(at(ms), Reader::Asleep, counts, n * 10);
        }
    }
    placement.stopped(at(40));
    let read = 1000 + taken + own;
    placement.sample(
        at(40),
        Reader::Asleep,
        counts_of_both(1000 + taken, 5),
        entered,
    );
    placement.injected(at(40));
    for ms in [42, 44] {
        placement.sample(
            at(ms),
            Reader::Asleep,
            counts_of_both(read, 5 + own),
            entered,
        );
    }
    placement.thrown_away_at_most()
}

#[test]
fn vm_that_runs_on_loses_what_qemu_has_read_since_the_stop() {
    assert_eq!(runs_on(35, 35, 0), 0, "nothing was read");
    assert_eq!(runs_on(35, 35, 1), 0, "the frame that was sent for it");
    assert_eq!(runs_on(36, 35, 1), 1);
    assert_eq!(runs_on(36, 35, 2), 1, "and the frame that was sent for it");
    assert_eq!(runs_on(40, 35, 2), 2);
}

#[test]
fn vm_that_runs_on_without_a_stop_loses_nothing() {
    assert_eq!(recording().thrown_away_at_most(), 0);
}
