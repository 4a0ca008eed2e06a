//! Invariants of arbitrary streams on arbitrary paths.

use proptest::prelude::*;

use super::paths::{Outcome, Packet, Path, Payloads, Plan, US, plans, run};
use super::*;
use crate::proto::handover::{FlowReport, Placed};

/// Checks the invariants of a plan. If only time places a flow, the delays of its two paths must differ
/// by less than the margin.
fn check(plan: &Plan, outcome: &Outcome) -> Result<(), TestCaseError> {
    for flow in 1..=plan.flows.len() as u16 {
        let packets = outcome.packets.iter().filter(|p| p.flow == flow);
        let packets: Vec<&Packet> = packets.collect();
        let mut reports = outcome.report.flows.iter();
        match reports.find(|report| report.stream == Some(stream(flow))) {
            Some(report) => {
                check_losses(plan, outcome, &packets, report)?;
                check_doubles(plan, outcome, &packets, report)?;
                let count = |of: fn(&Packet) -> bool| packets.iter().filter(|p| of(p)).count();
                prop_assert_eq!(report.held, count(|packet| packet.is_held) as u64);
                prop_assert_eq!(report.replayed, count(|packet| packet.is_replayed) as u64);
                prop_assert_eq!(report.held, report.replayed + report.dropped);
            }
            None => prop_assert!(packets.iter().all(|packet| !packet.is_held)),
        }
    }
    prop_assert!(outcome.report.lost_in_kernel >= outcome.lost_in_kernel);
    Ok(())
}

fn is_close(plan: &Plan) -> bool {
    let is_short = |path: &Path| path.delay + path.jitter <= 1000;
    is_short(&plan.to_source)
        && is_short(&plan.to_destination)
        && (plan.latency <= 1000 || plan.round_trip)
}

/// Returns true if a packet present at both ends placed the flow.
fn is_anchored(report: &FlowReport) -> bool {
    matches!(report.placed, Some(Placed::Fingerprint | Placed::Estimate))
}

/// Checks that all held packets are replayed that the guest would have received after the stop.
fn check_losses(
    plan: &Plan,
    outcome: &Outcome,
    packets: &[&Packet],
    report: &FlowReport,
) -> Result<(), TestCaseError> {
    let is_exact = is_anchored(report);
    let delivered = packets.iter().filter(|packet| packet.is_delivered);
    let last_sent = delivered.map(|packet| packet.sent).max().unwrap_or(0);
    let stopped = outcome.stopped.saturating_sub(plan.to_source.delay * US);
    let (repeated, unique): (Vec<&Packet>, _) = packets
        .iter()
        .filter(|packet| packet.is_held && !packet.is_delivered && !packet.is_replayed)
        // Packets lost on the source's path before the stop are lost, unless both ends know the packet
        // before.
        .filter(|packet| {
            packet.at_source.is_some() || packet.sent > if is_exact { last_sent } else { stopped }
        })
        .partition(|packet| packet.is_repeated);
    if !is_exact && !is_close(plan) {
        return Ok(());
    }
    // Without a packet held before the cut, a repeated packet is mistaken for the one before.
    let has_anchor =
        (packets.iter()).any(|packet| packet.is_claimed && packet.is_held && !packet.is_repeated);
    let has_repeated = packets.iter().any(|packet| packet.is_repeated);
    if has_anchor || !has_repeated {
        prop_assert!(unique.is_empty(), "lost {:?} {:?}", unique.last(), report);
    }
    // A repeated packet that did not reach the destination is mistaken for the next equal one, and so
    // is a packet that overtook the last unique one.
    if plan.to_source.jitter == 0 && plan.to_destination.jitter == 0 {
        let absent = packets
            .iter()
            .filter(|packet| packet.is_claimed && packet.is_repeated && !packet.is_held);
        prop_assert!(
            repeated.len() <= absent.count(),
            "lost {} {:?}",
            repeated.len(),
            report
        );
    }
    Ok(())
}

/// Checks that no packet reported as delivered is replayed, and that unreported packets are estimated.
fn check_doubles(
    plan: &Plan,
    outcome: &Outcome,
    packets: &[&Packet],
    report: &FlowReport,
) -> Result<(), TestCaseError> {
    let is_exact = is_anchored(report);
    let doubled = || {
        packets
            .iter()
            .filter(|packet| packet.is_claimed && packet.is_replayed)
    };
    if is_exact {
        let unique = doubled().find(|packet| !packet.is_repeated);
        prop_assert!(unique.is_none(), "doubled {:?} {:?}", unique, report);
    } else if is_close(plan) {
        let claimed = outcome.packets.iter().filter(|packet| packet.is_claimed);
        let end = claimed.filter_map(|packet| packet.at_source).max();
        for packet in doubled() {
            prop_assert!(packet.at_source.map(|at| at + 5_000 * US) >= end);
        }
    }
    let is_unique = packets.iter().all(|packet| !packet.is_repeated);
    // The destination's lag is known if the destination has the source's last packet.
    let is_lag_known = plan.to_destination.loss == 0.0 && plan.kernel_loss == 0.0;
    if is_exact && is_unique && is_lag_known || !is_exact && is_close(plan) {
        // The source does not know packets from before the recording.
        let doubled = packets
            .iter()
            .filter(|packet| packet.is_delivered && packet.number.is_some() && packet.is_replayed);
        let doubled = doubled.count() as u64;
        prop_assert!(doubled <= report.duplicates, "{:?}", report);
        // A placement reported as exact is exact.
        if report.placed == Some(Placed::Fingerprint) {
            prop_assert_eq!((doubled, report.duplicates), (0, 0), "{:?}", report);
        }
    }
    Ok(())
}

fn payloads() -> impl Strategy<Value = Payloads> + Clone {
    prop_oneof![
        3 => Just(Payloads::Unique),
        2 => (0.0..0.9).prop_map(Payloads::Mixed),
        1 => Just(Payloads::Constant),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn paths_far_apart_lose_and_double_nothing(
        plan in plans(payloads(), (300_000, 5_000, 0.2, 30_000)),
    ) {
        if let Some(outcome) = run(&plan) {
            check(&plan, &outcome)?;
        }
    }

    #[test]
    fn paths_side_by_side_lose_nothing_of_any_payloads(
        plan in plans(payloads(), (500, 500, 0.1, 1_000)),
    ) {
        if let Some(outcome) = run(&plan) {
            check(&plan, &outcome)?;
        }
    }

    #[test]
    fn identical_payloads_lose_nothing(
        plan in plans(Just(Payloads::Constant), (500, 500, 0.1, 1_000)),
    ) {
        if let Some(outcome) = run(&plan) {
            check(&plan, &outcome)?;
        }
    }
}
