use super::*;
use crate::maps::NO_BRIDGE;
use std::collections::HashSet;

fn record(program: Program, ifindex: u32, frame: &[u8]) -> Record {
    Record {
        program: program as u8,
        ..Record::by_agent(1, ifindex, Decision::Passed, 0, frame)
    }
}

/// A UDP datagram with an optional VLAN tag.
fn datagram(tag: Option<u16>) -> std::vec::Vec<u8> {
    let mut frame = std::vec![0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 1];
    if let Some(vlan) = tag {
        frame.extend([0x81, 0]);
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 12, 17, 64]);
    frame.extend([0x20; 16]);
    frame.extend([0xff; 16]);
    frame.extend([0x13, 0x88, 0x13, 0x8c, 0, 12, 0, 0, 1, 2, 3, 4]);
    frame
}

#[test]
fn every_reason_has_a_name_of_its_own() {
    assert_eq!(Reason::NONE.as_str(), None);
    let mut names = HashSet::new();
    let counters = Counter::ALL.iter().map(|counter| Reason::from(*counter));
    let others = Uncounted::ALL.iter().map(|reason| Reason::from(*reason));
    for reason in counters.chain(others) {
        let read = Reason::from_number(reason.number());
        let name = read.as_str().unwrap();
        assert!(names.insert(name), "{name} twice");
    }
    assert_eq!(names.len(), counter::COUNT + Uncounted::ALL.len());
    let beyond = Reason::from_number(names.len() as u16 + 1);
    assert_eq!(beyond.as_str(), None);
}

#[test]
fn programs_and_decisions_are_found_by_name_and_number() {
    for (number, program) in (0..).zip(Program::ALL) {
        assert_eq!(Program::from_number(number), Some(*program));
        assert_eq!(Program::from_name(program.as_str()), Some(*program));
    }
    for (number, decision) in (0..).zip(Decision::ALL) {
        assert_eq!(Decision::from_number(number), Some(*decision));
    }
    assert_eq!(Program::from_name("nonsense"), None);
    assert_eq!(Decision::from_number(200), None);
}

#[test]
fn flow_is_read_from_the_frame() {
    for (tag, vlan) in [(None, 0), (Some(7), 7)] {
        let flow = record(Program::Gate, 1, &datagram(tag)).flow().unwrap();
        assert_eq!(flow.source, [0x20; 16]);
        assert_eq!(flow.destination, [0xff; 16]);
        assert_eq!((flow.source_port, flow.destination_port), (5000, 5004));
        assert_eq!(flow.vlan, vlan);
    }
    let mut of_card = record(Program::Gate, 1, &datagram(None));
    of_card.vlan = 9;
    assert_eq!(of_card.flow().unwrap().vlan, 9);
}

#[test]
fn flow_that_the_program_gave_counts_more_than_the_frame() {
    let mut record = record(Program::Uplink, 1, &datagram(None));
    record.stream = StreamKey {
        multicast_address: [1; 16],
        source: [2; 16],
        source_port: 3,
        destination_port: 4,
        vlan: 0,
        bridge: NO_BRIDGE,
    };
    let flow = record.flow().unwrap();
    assert_eq!((flow.source, flow.destination), ([2; 16], [1; 16]));
    assert_eq!((flow.source_port, flow.destination_port), (3, 4));
}

#[test]
fn frames_without_a_flow_have_none() {
    for frame in [&[][..], &[0; 14], &datagram(None)[..40]] {
        assert_eq!(record(Program::Gate, 1, frame).flow(), None);
    }
    let mut broken = record(Program::Gate, 1, &datagram(None));
    broken.copied = u16::MAX;
    assert_eq!(broken.flow(), None);
}

#[test]
fn filter_asks_for_all_of_its_conditions() {
    let gate = record(Program::Gate, 4, &datagram(None));
    let mut filter = Filter::everything(1);
    assert!(filter.matches(&gate));
    filter.ifindex = 4;
    filter.programs = Program::Gate.bit();
    for address in [[0; 16], [0x20; 16], [0xff; 16]] {
        filter.address = address;
        assert!(filter.matches(&gate), "{address:?}");
    }
    filter.address = [1; 16];
    assert!(!filter.matches(&gate));
    filter.address = [0; 16];
    assert!(!filter.matches(&record(Program::Snoop, 4, &datagram(None))));
    assert!(!filter.matches(&record(Program::Gate, 5, &datagram(None))));
    assert!(!Filter::NOTHING.matches(&gate));
}

#[test]
fn union_tells_what_either_filter_tells() {
    let mut one = Filter::everything(10);
    one.programs = Program::Gate.bit();
    one.ifindex = 4;
    let mut other = Filter::everything(20);
    other.programs = Program::Snoop.bit();
    other.ifindex = 4;
    let union = one.union(&other);
    assert_eq!(union.ifindex, 4);
    assert_eq!(union.programs, Program::Gate.bit() | Program::Snoop.bit());
    assert_eq!(union.rate(), 30);
    other.ifindex = 5;
    other.address = [1; 16];
    let union = one.union(&other);
    assert_eq!((union.ifindex, union.address), (0, [0; 16]));
}

#[test]
fn budget_lets_a_seconds_lines_pass_at_once_and_then_its_rate() {
    let filter = Filter::everything(100);
    let mut budget = Budget::default();
    let start = 5 * NS_PER_SECOND;
    let passed = (0..150).filter(|_| budget.take(start, &filter)).count();
    assert_eq!(passed, 100);
    assert_eq!(budget.left_out, 50);
    let passed = (1..=50)
        .filter(|tenth| budget.take(start + tenth * NS_PER_SECOND / 100, &filter))
        .count();
    assert_eq!(passed, 50, "one each hundredth of a second");
    assert!(!budget.take(start + NS_PER_SECOND / 2, &filter));
}

#[test]
fn rate_of_one_line_a_second_is_kept() {
    let filter = Filter::everything(1);
    let mut budget = Budget::default();
    assert!(budget.take(0, &filter));
    assert!(!budget.take(NS_PER_SECOND - 1, &filter));
    assert!(budget.take(NS_PER_SECOND, &filter));
}
