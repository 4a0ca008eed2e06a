//! Several streams to one guest, streams of identical packets, and two guests that swap hosts, as
//! the lab measures them.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use lab::probe::report::RunRow;
use lab::scenario::Testbed;
use lab::scenario::agents::AgentOptions;
use lab::scenario::crossing::Crossing;
use lab::scenario::measure::Mover;
use lab::scenario::shuttle::Shuttle;
use lab::scenario::stream::{Service, StreamConfig, StreamKind, Streams};
use lab::{LabConfig, requirements};

/// Seven TS packets per datagram; all datagrams are identical.
const IDENTICAL: StreamConfig = StreamConfig {
    rate_mbps: 20.0,
    flows: 1,
    kind: StreamKind::Identical,
};

fn print(rows: &[RunRow]) {
    for row in rows {
        eprintln!("{}", serde_json::to_string(row).unwrap());
    }
}

#[test]
fn streams_of_a_guest_that_moves_are_each_accounted_for() {
    if !requirements::met() {
        return;
    }
    let lab = LabConfig::new("streams");
    let mut testbed = Testbed::up(lab, 128, Some(AgentOptions::DEFAULT)).unwrap();
    let streams = Streams::placed(
        0,
        &[
            (StreamConfig::probe(2.0), Service::AnySource),
            (StreamConfig::probe(10.0), Service::SourceSpecific),
            (IDENTICAL, Service::AnySource),
        ],
    )
    .unwrap();
    let mut shuttle = Shuttle::begin(&mut testbed, streams).unwrap();
    shuttle.stay().unwrap();
    shuttle.go(Mover::Operator).unwrap();
    shuttle.go(Mover::Migkick).unwrap();
    let moves = shuttle.finish().unwrap();
    print(&moves.rows);
    let [stayed, there, back] = &moves.rows[..] else {
        panic!("{:?}", moves.rows);
    };
    assert_eq!(
        (stayed.lost, stayed.duplicated, stayed.reordered),
        (0, 0, 0),
        "{stayed:?}"
    );
    assert_eq!(stayed.surplus, Some(0), "{stayed:?}");
    for row in [there, back] {
        assert!(row.ok, "{row:?}");
        assert_eq!(row.mode.as_deref(), Some("native"), "{row:?}");
        let specific: Vec<_> = row.streams.iter().map(|it| it.source_specific).collect();
        assert_eq!(specific, [false, true, false]);
        for stream in &row.streams {
            assert!(stream.sent > 0, "{row:?}");
            match stream.surplus {
                None => assert_eq!(
                    (stream.lost, stream.duplicated, stream.reordered),
                    (0, 0, 0),
                    "{row:?}"
                ),
                // The cut is placed by time: no packet is lost, and up to five milliseconds' worth
                // may be duplicated.
                Some(surplus) => {
                    let most = stream.rate_mbps * 1e6 / (8.0 * 1316.0) * 0.005;
                    assert!(surplus >= 0 && surplus as f64 <= most, "{row:?}");
                }
            }
        }
    }

    let mut crossing = Crossing::begin(
        &mut testbed,
        [0, 1].map(|place| {
            let streams = [(StreamConfig::probe(5.0), Service::AnySource)];
            Streams::placed(place, &streams).unwrap()
        }),
    )
    .unwrap();
    for _ in 0..2 {
        crossing.go(Mover::Operator).unwrap();
    }
    for moves in crossing.finish().unwrap() {
        print(&moves.rows);
        assert_eq!(moves.rows.len(), 2);
        for row in &moves.rows {
            assert!(row.ok && row.sent > 0 && row.vm_pause_ms > 0.0, "{row:?}");
            assert_eq!(
                (row.lost, row.duplicated, row.reordered),
                (0, 0, 0),
                "{row:?}"
            );
        }
    }
}
