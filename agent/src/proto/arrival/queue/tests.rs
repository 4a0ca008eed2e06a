//! Tests of the limited places for arriving domains.

use std::num::NonZeroU16;
use std::time::Duration;

use common::signal::{AgentRequest, MigrationAbort, PeerMessage, Phase, Reason};

use super::super::tests::request;
use crate::proto::tests::fixture::{Bench, config};
use crate::proto::{DomainUuid, Output, PeerEvent};

const S: Duration = Duration::from_secs(1);

fn places(at_once: u16, per_peer: u16) -> Bench {
    let mut config = config(0);
    config.policy.arrivals_at_once = NonZeroU16::new(at_once).unwrap();
    config.policy.arrivals_per_peer = NonZeroU16::new(per_peer);
    config.policy.waiting_per_peer = 2;
    let mut bench = Bench::with(config);
    for peer in ["vms2", "vms3", "vms4"] {
        bench
            .agent
            .handle_peer(bench.now, peer, PeerEvent::Up { from: None });
    }
    bench
}

fn body(number: u8) -> AgentRequest {
    AgentRequest {
        domain_name: format!("tv-{number}"),
        ..request(DomainUuid([number; 16]), vec![])
    }
}

/// Result of a request.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Taken,
    Waits,
    Refused(String),
}

fn say(bench: &mut Bench, peer: &str, number: u8, message: impl Into<PeerMessage>) {
    let frame = PeerEvent::Frame(message.into().encode(u64::from(number)).into());
    bench.agent.handle_peer(bench.now, peer, frame);
}

fn ask(bench: &mut Bench, peer: &str, number: u8) -> Answer {
    bench.outputs();
    say(bench, peer, number, body(number));
    let outputs = bench.outputs();
    let answer = outputs.iter().find_map(|output| match output {
        Output::Frame { peer: to, bytes } if to == peer => {
            Some(PeerMessage::decode(bytes).unwrap())
        }
        _ => None,
    });
    match answer {
        Some((_, PeerMessage::AgentResponse(_))) => Answer::Taken,
        Some((_, PeerMessage::MigrationProgress(told))) if told.phase == Phase::Preparing => {
            Answer::Waits
        }
        Some((_, PeerMessage::MigrationAbort(abort))) => Answer::Refused(abort.0.text),
        other => panic!("{other:?}"),
    }
}

fn take_back(bench: &mut Bench, peer: &str, number: u8) {
    let reason = "cancelled".to_owned();
    say(
        bench,
        peer,
        number,
        MigrationAbort(Reason::unspecified(reason)),
    );
}

#[test]
fn one_peer_does_not_take_the_places_of_others() {
    let mut bench = places(3, 2);
    assert_eq!(ask(&mut bench, "vms2", 1), Answer::Taken);
    assert_eq!(ask(&mut bench, "vms2", 2), Answer::Taken);
    assert_eq!(ask(&mut bench, "vms2", 3), Answer::Waits);
    assert_eq!(ask(&mut bench, "vms2", 4), Answer::Waits);
    let Answer::Refused(reason) = ask(&mut bench, "vms2", 5) else {
        panic!("a place was made");
    };
    assert_eq!(
        reason,
        "Agent vms1 takes in 2 domains from this peer already, and 2 more wait; try again when one \
         has arrived"
    );
    // Domains that wait for the peer's own places delay nobody else.
    assert_eq!(ask(&mut bench, "vms3", 6), Answer::Taken);
    assert_eq!(ask(&mut bench, "vms4", 7), Answer::Waits);
}

#[test]
fn places_are_given_in_the_order_of_the_requests() {
    let mut bench = places(2, 2);
    assert_eq!(ask(&mut bench, "vms2", 1), Answer::Taken);
    assert_eq!(ask(&mut bench, "vms2", 2), Answer::Taken);
    assert_eq!(ask(&mut bench, "vms3", 3), Answer::Waits);
    bench.pass(S);
    assert_eq!(ask(&mut bench, "vms4", 4), Answer::Waits);
    let waiting = bench.agent.view().waiting(bench.now);
    let waiting: Vec<_> = waiting
        .map(|it| (it.domain, it.source, it.waited))
        .collect();
    assert_eq!(
        waiting,
        [("tv-3", "vms3", S), ("tv-4", "vms4", Duration::ZERO)]
    );
    take_back(&mut bench, "vms2", 1);
    assert_eq!(ask(&mut bench, "vms4", 4), Answer::Waits);
    assert_eq!(ask(&mut bench, "vms3", 3), Answer::Taken);
    take_back(&mut bench, "vms2", 2);
    assert_eq!(ask(&mut bench, "vms4", 4), Answer::Taken);
}

#[test]
fn who_does_not_ask_again_loses_the_turn() {
    let mut bench = places(1, 1);
    assert_eq!(ask(&mut bench, "vms2", 1), Answer::Taken);
    assert_eq!(ask(&mut bench, "vms3", 3), Answer::Waits);
    assert_eq!(ask(&mut bench, "vms4", 4), Answer::Waits);
    take_back(&mut bench, "vms3", 3);
    assert_eq!(ask(&mut bench, "vms2", 2), Answer::Waits);
    for _ in 0..3 {
        bench.pass(4 * S);
        assert_eq!(ask(&mut bench, "vms2", 2), Answer::Waits);
    }
    take_back(&mut bench, "vms2", 1);
    assert_eq!(ask(&mut bench, "vms2", 2), Answer::Taken);
}

#[test]
fn place_is_kept_by_a_domain_that_only_its_source_says_has_arrived() {
    let mut bench = places(1, 1);
    assert_eq!(ask(&mut bench, "vms2", 1), Answer::Taken);
    let completed = common::signal::MigrationProgress {
        phase: Phase::Completed,
        processed_bytes: 1,
        total_bytes: 1,
        elapsed_ms: 1,
        vm_pause_ms: None,
        clock_ns: None,
    };
    say(&mut bench, "vms2", 1, completed);
    assert_eq!(ask(&mut bench, "vms2", 2), Answer::Waits);
    let record = bench.agent.view().migrations().next().unwrap();
    assert_eq!(record.outcome, None);
}
