//! A model of streams on two paths, to the source and to the destination. The handover is tested from
//! the source's records to the destination's replayed frames.

use std::collections::BTreeMap;

use common::handover::{fingerprint, flow_hash_of};
use common::maps::{Delivered, GateRecord, HeldFrame};
use proptest::prelude::*;

use super::random::Random;
use super::*;
use crate::proto::Timestamp;
use crate::proto::handover::{ClockOffset, Cut, Hold, HoldLimits, HoldReport, nic_cut};

/// Nanoseconds in a microsecond.
pub(super) const US: u64 = 1_000;
/// Source clock at the first packet, nanoseconds.
const BEGIN: u64 = 20_000_000_000;
/// Duration of sending, nanoseconds.
const SENDING: u64 = 900_000 * US;

/// Payloads of a flow.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Payloads {
    Unique,
    /// The given share of the packets has one and the same payload.
    Mixed(f64),
    Constant,
}

/// A scenario; times in microseconds.
#[derive(Clone, Debug)]
pub(super) struct Path {
    pub(super) delay: u64,
    /// Largest additional delay; delayed packets are overtaken.
    pub(super) jitter: u64,
    pub(super) loss: f64,
}

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    /// Mean time between two packets, and their payloads.
    pub(super) flows: Vec<(u64, Payloads)>,
    pub(super) to_source: Path,
    pub(super) to_destination: Path,
    /// Start of the recording, start of the hold and the guest's last packet, as fractions of the
    /// duration.
    pub(super) recording: f64,
    pub(super) holding: f64,
    pub(super) cut: f64,
    /// Frames or time by which the cut is too early.
    pub(super) claim: Claim,
    /// Delays until the message is sent, and until the message arrives.
    pub(super) message: u64,
    pub(super) latency: u64,
    /// Whether the round-trip time is known.
    pub(super) round_trip: bool,
    /// Destination's clock minus the source's clock, nanoseconds.
    pub(super) offset: i64,
    /// Fraction of frames without room in `HELD`.
    pub(super) kernel_loss: f64,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Claim {
    Exact,
    Frames(u64),
    Time(u64),
}

fn path(delay: u64, jitter: u64, loss: f64) -> impl Strategy<Value = Path> {
    let jitter = prop_oneof![Just(0), 0..=jitter];
    let loss = prop_oneof![Just(0.0), 0.0..loss];
    (0..=delay, jitter, loss).prop_map(|(delay, jitter, loss)| Path {
        delay,
        jitter,
        loss,
    })
}

pub(super) fn plans(
    payloads: impl Strategy<Value = Payloads> + Clone + 'static,
    (delay, jitter, loss, latency): (u64, u64, f64, u64),
) -> impl Strategy<Value = Plan> {
    let flow = (prop_oneof![300..2_000u64, 2_000..40_000u64], payloads);
    let claim = prop_oneof![
        3 => Just(Claim::Exact),
        1 => (1..40u64).prop_map(Claim::Frames),
        1 => (0..8_000u64).prop_map(Claim::Time),
    ];
    (
        (any::<u64>(), prop::collection::vec(flow, 1..5)),
        (path(delay, jitter, loss), path(delay, jitter, loss)),
        (0.0..0.3, 0.0..0.9, 0.4..0.9, claim),
        (10_000..45_000u64, 0..=latency, any::<bool>()),
        (any::<i32>(), prop_oneof![2 => Just(0.0), 1 => 0.0..0.05]),
    )
        .prop_map(|(flows, paths, times, message, rest)| Plan {
            seed: flows.0,
            flows: flows.1,
            to_source: paths.0,
            to_destination: paths.1,
            recording: times.0,
            holding: times.1,
            cut: times.2,
            claim: times.3,
            message: message.0,
            latency: message.1,
            round_trip: message.2,
            offset: rest.0.into(),
            kernel_loss: rest.1,
        })
}

/// A packet, with times of the source's clock, nanoseconds.
#[derive(Clone, Debug)]
pub(super) struct Packet {
    pub(super) flow: u16,
    pub(super) payload: Vec<u8>,
    pub(super) is_repeated: bool,
    pub(super) sent: u64,
    pub(super) at_source: Option<u64>,
    pub(super) at_destination: Option<u64>,
    /// Number in the source's TAP; `None` if the packet did not enter during the recording.
    pub(super) number: Option<u64>,
    /// Whether the guest received the packet at the source, and the source reports so.
    pub(super) is_delivered: bool,
    pub(super) is_claimed: bool,
    /// Whether the packet came out of `HELD`, and entered the destination's TAP.
    pub(super) is_held: bool,
    pub(super) is_replayed: bool,
}

fn send(plan: &Plan, random: &mut Random) -> Vec<Packet> {
    let mut packets = Vec::new();
    for (flow, (interval, payloads)) in (1..).zip(&plan.flows) {
        let mut sent = BEGIN;
        while sent < BEGIN + SENDING {
            sent += random.exponential((interval * US) as f64) as u64 + 1;
            let is_repeated = match payloads {
                Payloads::Unique => false,
                Payloads::Mixed(part) => random.chance(*part),
                Payloads::Constant => true,
            };
            let word = if is_repeated { u64::MAX } else { sent };
            // No two packets arrive at the same time.
            let number = packets.len() as u64 % 4096;
            let mut arrive = |path: &Path| {
                let jitter = random.below((path.jitter * US).max(1));
                let at = (sent + path.delay * US + jitter) / 4096 * 4096 + number;
                (!random.chance(path.loss)).then_some(at)
            };
            packets.push(Packet {
                flow,
                payload: [word.to_ne_bytes(), [7; 8]].concat(),
                is_repeated,
                sent,
                at_source: arrive(&plan.to_source),
                at_destination: arrive(&plan.to_destination),
                number: None,
                is_delivered: false,
                is_claimed: false,
                is_held: false,
                is_replayed: false,
            });
        }
    }
    packets
}

/// Returns the indices of packets, ordered by a time.
fn ordered(packets: &[Packet], time: impl Fn(&Packet) -> Option<u64>) -> Vec<(u64, usize)> {
    let mut order: Vec<_> = packets
        .iter()
        .enumerate()
        .filter_map(|(index, packet)| Some((time(packet)?, index)))
        .collect();
    order.sort_unstable();
    order
}

/// Result of a plan.
pub(super) struct Outcome {
    pub(super) packets: Vec<Packet>,
    pub(super) report: HoldReport,
    /// Arrival of the last packet that the guest received at the source.
    pub(super) stopped: u64,
    pub(super) lost_in_kernel: u64,
}

pub(super) fn run(plan: &Plan) -> Option<Outcome> {
    let mut random = Random(plan.seed);
    let mut packets = send(plan, &mut random);
    let part = |part: f64| BEGIN + (SENDING as f64 * part) as u64;

    // At the source.
    let arrivals = ordered(&packets, |packet| packet.at_source);
    let recording = part(plan.recording);
    let stop = part(plan.cut);
    let stopped = arrivals.iter().map(|(at, _)| *at).rfind(|at| *at <= stop)?;
    let sent_at = stopped + plan.message * US;
    let mut records = Vec::new();
    for (at, index) in arrivals {
        let packet = &mut packets[index];
        packet.is_delivered = at <= stopped;
        if (recording..sent_at).contains(&at) {
            let number = records.len() as u64 + 1;
            packet.number = Some(number);
            records.push(GateRecord {
                number,
                flow: flow_hash_of(&stream(packet.flow)),
                fingerprint: fingerprint(&packet.payload[..], 0, 16).unwrap(),
                at_ns: at,
            });
        }
    }
    let last = records
        .iter()
        .rfind(|record| record.at_ns <= stopped)?
        .number;
    let cut = match plan.claim {
        Claim::Exact => Cut::Number {
            number: last,
            overflow: false,
        },
        Claim::Frames(frames) => Cut::Number {
            number: last.saturating_sub(frames),
            overflow: true,
        },
        Claim::Time(time) => Cut::Time(Timestamp(stopped - time * US)),
    };
    for packet in &mut packets {
        packet.is_claimed = packet.number.is_some_and(|claimed| match cut {
            Cut::Number { number, .. } | Cut::Among { after: number, .. } => claimed <= number,
            Cut::Time(until) => packet.at_source.is_some_and(|at| at <= until.0),
        });
    }
    let flows: Vec<_> = (1..=plan.flows.len() as u16)
        .map(|flow| (stream(flow), Delivered::default()))
        .collect();
    let reach = nic_cut([2; 6], &cut, &records, &read(&flows, Timestamp(sent_at)));

    // At the destination, by the destination's clock.
    let ours = |theirs: u64| Timestamp(theirs.checked_add_signed(plan.offset).unwrap());
    let latency = plan.latency * US;
    let came = ours(sent_at + latency);
    let mut clock = ClockOffset::default();
    clock.observe(recording, ours(recording + latency));
    clock.observe(recording, ours(recording + 2 * latency));
    if plan.round_trip {
        clock.set_round_trip(Duration::from_nanos(2 * latency));
    }
    let holding = part(plan.holding);
    let mut hold = Hold::new(HoldLimits {
        bytes: usize::MAX,
        age: Duration::from_secs(100),
    });
    let (mut number, mut lost, mut lost_in_kernel, mut is_cut) = (0, 0, 0, false);
    let mut by_time = BTreeMap::new();
    for (at, index) in ordered(&packets, |packet| packet.at_destination) {
        let (packet, at) = (&mut packets[index], ours(at));
        if at >= came && !is_cut {
            is_cut = true;
            hold.cut(came, sent_at, &reach.cut, &clock);
        }
        if at < ours(holding) {
            continue;
        }
        number += 1;
        if random.chance(plan.kernel_loss) {
            lost += 1;
            lost_in_kernel += u64::from(is_cut);
            continue;
        }
        packet.is_held = true;
        assert!(by_time.insert((packet.flow, at), index).is_none());
        let frame = datagram(&stream(packet.flow), 1, &packet.payload);
        let head = HeldFrame {
            number,
            at_ns: at.0,
            ifindex: 7,
            length: frame.len() as u32,
            vlan: 0,
            segment_bytes: 0,
            pad: 0,
        };
        hold.push(&head, &frame);
        hold.counted(at, number, lost);
        // The TAP takes some packets, and is then full for a while.
        while is_cut && random.chance(0.6) {
            replay(&mut hold, at, &by_time, &mut packets);
        }
    }
    if !is_cut {
        hold.cut(came, sent_at, &reach.cut, &clock);
    }
    hold.counted(came, number, lost);
    while hold.next_replay().is_some() {
        replay(&mut hold, came, &by_time, &mut packets);
    }
    assert_eq!(hold.done(), Some(number));
    assert_eq!(hold.bytes(), 0);
    Some(Outcome {
        packets,
        report: hold.report(),
        stopped,
        lost_in_kernel,
    })
}

fn replay(
    hold: &mut Hold,
    now: Timestamp,
    by_time: &BTreeMap<(u16, Timestamp), usize>,
    packets: &mut [Packet],
) {
    let done = hold.done();
    let Some(packet) = hold.replayed(now) else {
        return;
    };
    assert!(hold.done() > done);
    let stream = packet.stream.unwrap();
    let index = by_time[&(stream.destination_port - 6000, packet.at)];
    assert_eq!(packet.frame[62..], packets[index].payload);
    assert!(!packets[index].is_replayed, "replayed twice");
    packets[index].is_replayed = true;
}
