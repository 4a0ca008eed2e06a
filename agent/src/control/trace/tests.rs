use super::*;
use crate::control::Reply;
use crate::control::table::{trace_header, trace_line};
use common::counter::Counter;
use time::macros::datetime;

const AT: OffsetDateTime = datetime!(2026-03-04 05:06:07.089_012_345 UTC);

/// An empty datagram.
fn frame() -> Vec<u8> {
    let mut frame = vec![0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0x86, 0xdd];
    frame.extend([0x60, 0, 0, 0, 0, 8, 17, 64]);
    frame.extend("2001:db8::1".parse::<Ipv6Addr>().unwrap().octets());
    frame.extend("ff3e::1234".parse::<Ipv6Addr>().unwrap().octets());
    frame.extend([0x13, 0x88, 0x13, 0x8c, 0, 8, 0, 0]);
    frame
}

fn record(program: Program, decision: Decision, reason: Reason, number: u64) -> Record {
    Record {
        program: program as u8,
        reason: reason.number(),
        ..Record::by_agent(1, 4, decision, number, &frame())
    }
}

fn line(record: &Record) -> TraceLine {
    let row = TraceRow::new(record, "vnet0".to_owned(), AT).unwrap();
    TraceLine::Decision(Box::new(row))
}

#[test]
fn json_names_what_is_known_and_leaves_out_the_rest() {
    let held = record(Program::Gate, Decision::Held, Reason::NONE, 7);
    let json = serde_json::to_value(line(&held)).unwrap();
    let expected = serde_json::json!({
        "time": "2026-03-04T05:06:07.089012345Z",
        "program": "gate",
        "port": "vnet0",
        "decision": "held",
        "number": 7,
        "length_bytes": 62,
        "vlan": 0,
        "source": "2001:db8::1",
        "source_port": 5000,
        "destination": "ff3e::1234",
        "destination_port": 5004,
    });
    assert_eq!(json, expected);
    let mut other = record(
        Program::Leak,
        Decision::Dropped,
        Counter::RelayLeaks.into(),
        0,
    );
    other.copied = 0;
    let json = serde_json::to_value(line(&other)).unwrap();
    assert_eq!(json["reason"], "relay_leaks");
    assert!(json.get("source").is_none() && json.get("number").is_none());
}

#[test]
fn lines_come_back_as_they_were_sent() {
    let copied = record(Program::Replicate, Decision::Copied, Reason::NONE, 0);
    for line in [line(&copied), TraceLine::LeftOut { left_out: 12 }] {
        let reply = Reply::Trace(line);
        let json = serde_json::to_string(&reply).unwrap();
        assert_eq!(serde_json::from_str::<Reply>(&json).unwrap(), reply);
    }
}

#[test]
fn columns_stand_below_their_names() {
    let dropped = record(
        Program::Uplink,
        Decision::Dropped,
        Counter::SecondCopies.into(),
        0,
    );
    let held = record(Program::Gate, Decision::Held, Reason::NONE, 123_456);
    let header = trace_header();
    for (record, words) in [
        (
            &dropped,
            ["05:06:07.089012", "uplink", "dropped", "second_copies"],
        ),
        (&held, ["05:06:07.089012", "gate", "held", "-"]),
    ] {
        let text = trace_line(&line(record));
        for (column, word) in ["time", "program", "decision", "reason"].iter().zip(words) {
            let at = header.find(column).unwrap();
            assert!(text[at..].starts_with(word), "{column}: {text}");
        }
        let at = header.find("source").unwrap();
        assert!(text[at..].starts_with("[2001:db8::1]:5000"), "{text}");
        assert!(text.ends_with("[ff3e::1234]:5004"), "{text}");
    }
    let left_out = trace_line(&TraceLine::LeftOut { left_out: 123 });
    assert_eq!(left_out, "... 123 lines left out");
}

#[test]
fn records_of_another_version_are_no_lines() {
    let mut record = record(Program::Gate, Decision::Held, Reason::NONE, 7);
    record.decision = 200;
    assert_eq!(TraceRow::new(&record, String::new(), AT), None);
}
