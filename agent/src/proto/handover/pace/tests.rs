use std::time::Duration;

use super::*;

const MS: Duration = Duration::from_millis(1);

fn at(ms: u32) -> Timestamp {
    Timestamp(1_000_000_000) + MS * ms
}

/// Sends the allowed part of `backlog` into the TAP; returns the number of frames.
fn send(pace: &mut Pace, backlog: &mut usize) -> usize {
    let before = *backlog;
    while *backlog > 0 && pace.allows() {
        pace.sent();
        *backlog -= 1;
    }
    before - *backlog
}

/// Returns the burst sizes for a guest that reads at once from `runs_at` on, while `arriving` frames
/// arrive per millisecond.
fn bursts(mut backlog: usize, arriving: usize, runs_at: u32, limit: u32) -> Vec<usize> {
    let mut pace = Pace::new(at(0), 7);
    let mut bursts = Vec::new();
    for ms in 0..limit {
        backlog += arriving;
        let read = if ms >= runs_at { pace.expected() } else { 7 };
        pace.look(at(ms), Some(read), backlog);
        bursts.push(send(&mut pace, &mut backlog));
        if backlog == 0 {
            break;
        }
    }
    assert_eq!(backlog, 0, "{bursts:?}");
    bursts
}

#[test]
fn paused_guest_gets_a_first_burst_only() {
    let sizes = bursts(5, 0, 100, 200);
    assert_eq!(sizes[..100].iter().sum::<usize>(), 1);
    assert_eq!(sizes[100], 2);
}

#[test]
fn bursts_double_up_to_what_an_application_can_hold() {
    let sizes = bursts(300, 0, 0, 100);
    let sizes: Vec<usize> = sizes.into_iter().filter(|size| *size > 0).collect();
    assert_eq!(sizes, [1, 2, 4, 8, 16, 32, 64, 64, 64, 45]);
}

#[test]
fn stream_faster_than_the_bursts_is_caught_up_with() {
    let sizes = bursts(1000, 100, 0, 500);
    assert!(sizes.iter().any(|size| *size > 100), "{sizes:?}");
    assert!(sizes.len() < 400, "{sizes:?}");
}

#[test]
fn nothing_more_comes_until_the_last_burst_was_read() {
    let mut pace = Pace::new(at(0), 0);
    let mut backlog = 100;
    assert_eq!(send(&mut pace, &mut backlog), 1);
    for ms in 1..50 {
        pace.look(at(ms), Some(0), backlog);
        assert_eq!(send(&mut pace, &mut backlog), 0, "{ms}");
    }
    pace.look(at(50), Some(1), backlog);
    assert_eq!(send(&mut pace, &mut backlog), 2);
}

#[test]
fn guest_that_does_not_keep_up_gets_the_rest_in_one_piece_after_a_second() {
    let mut pace = Pace::new(at(0), 0);
    let mut backlog = 5000;
    send(&mut pace, &mut backlog);
    pace.look(at(10), Some(1), backlog);
    send(&mut pace, &mut backlog);
    pace.look(at(1009), Some(2), backlog);
    assert_eq!(send(&mut pace, &mut backlog), 0);
    pace.look(at(1010), Some(2), backlog);
    assert_eq!((send(&mut pace, &mut backlog), backlog), (4997, 0));
}

#[test]
fn bursts_go_by_time_where_nothing_is_counted() {
    let mut pace = Pace::new(at(0), 0);
    let mut backlog = 100;
    send(&mut pace, &mut backlog);
    pace.look(at(1), None, backlog);
    pace.look(at(1), None, backlog);
    assert_eq!(send(&mut pace, &mut backlog), 2);
}
