//! Smoke test of the benches: the relay benches run, every path delivers with correct UDP
//! checksums, and the migration bench moves a guest by each method.
#![allow(clippy::panic, reason = "a test that cannot go on panics")]

use lab::bench::migration::{self, Way, figures};
use lab::requirements;
use lab::scenario::agents::AgentOptions;
use support::bench_relay::{self, Options};
use support::netns;

#[test]
fn every_way_delivers_packets_with_right_checksums() {
    if !netns::privileged() {
        return;
    }
    let report = bench_relay::relay(&Options::quick()).unwrap_or_else(|error| panic!("{error:?}"));
    let [setting] = &report.settings[..] else {
        panic!("{report:?}");
    };
    for way in &setting.ways {
        // All packets of an unmeasured part, and some of the measured parts.
        assert!(way.checked >= 256 * setting.taps as u64, "{way:?}");
        assert_eq!(way.wrong, 0, "{way:?}");
        // A stream's CPU time excludes the pacing, which can be all of a short measurement.
        assert_eq!(way.stream_cpu_ns.rounds.len(), 1, "{way:?}");
        assert!(
            way.burst_cpu_ns.median > 0.0 && way.full_per_second.median > 0.0,
            "{way:?}"
        );
        let in_userspace = ["recvmmsg/sendmmsg", "socat"].contains(&way.way.as_str());
        assert_eq!(way.original_source, !in_userspace, "{way:?}");
    }
}

#[test]
fn every_copy_reaches_its_subscriber() {
    if !netns::privileged() {
        return;
    }
    let report =
        bench_relay::replicate(&Options::quick()).unwrap_or_else(|error| panic!("{error:?}"));
    let [setting] = &report.settings[..] else {
        panic!("{report:?}");
    };
    for way in &setting.ways {
        assert!(way.full_per_second.median > 0.0, "{way:?}");
        assert!(way.sent > 0 && way.lost == 0, "{way:?}");
    }
}

#[test]
fn every_way_moves_a_guest() {
    if !requirements::met() {
        return;
    }
    let options = migration::Options {
        loads: migration::Options::loads(&[128], &[2.0]),
        runs: 1,
        ways: Way::ALL.to_vec(),
        agents: AgentOptions::DEFAULT,
    };
    let mut told = Vec::new();
    let report = migration::run(&options, &mut |progress| told.push(progress.done));
    let report = report.unwrap_or_else(|error| panic!("{error:?}"));
    assert!(report.failures.is_empty(), "{report:?}");
    assert_eq!(told.last(), Some(&options.moves()));
    let [setting] = &report.settings[..] else {
        panic!("{report:?}");
    };
    for way in Way::ALL {
        let Some(moves) = setting.way(way) else {
            panic!("no move by {}", way.name());
        };
        let [row] = &moves.runs[..] else {
            panic!("{moves:?}");
        };
        assert!(row.flows && row.sent > 0 && row.received > 0, "{row:?}");
        assert!(row.freeze_ms > 0.0 && row.vm_pause_ms > 0.0, "{row:?}");
        // The pause that the guest's clock shows, and the pause that its threads notice.
        assert!(row.clock_stop_ms > 0.0, "{row:?}");
        assert!(row.stall_ms >= row.clock_stop_ms, "{row:?}");
        assert_eq!(row.signalling_ms > 0.0, way == Way::Glm, "{row:?}");
        eprintln!("{way:?} {row:?}");
    }
    let numbers = figures::draw(&report).into_iter().map(|it| it.number);
    // Fig. 8 of the paper uses 20 Mbit/s.
    assert_eq!(numbers.collect::<Vec<_>>(), [9, 10, 11]);
}
