//! Tests of the hold.

use common::handover::fingerprint;
use common::maps::{HeldFrame, StreamKey};
use common::signal::{CutBasis, FlowCut, NicCut};

use super::*;
use crate::proto::Timestamp;
use crate::proto::handover::{ClockOffset, Hold, HoldLimits, Placed};

/// A hold whose packets are letters that arrive one per millisecond.
struct Bench {
    hold: Hold,
    now: Timestamp,
    number: u64,
}

impl Bench {
    fn new() -> Self {
        Self {
            hold: Hold::new(LIMITS),
            now: Timestamp(1_000_000_000),
            number: 0,
        }
    }

    fn held(letters: &str) -> Self {
        let mut bench = Self::new();
        bench.push(letters);
        bench
    }

    fn push(&mut self, letters: &str) {
        for letter in letters.bytes() {
            self.push_of(1, letter);
        }
    }

    fn push_of(&mut self, flow: u16, letter: u8) {
        self.now = self.now + MS;
        self.number += 1;
        let frame = datagram(&stream(flow), 1, &[letter; 32]);
        self.hold.push(&self.head(), &frame);
    }

    fn head(&self) -> HeldFrame {
        HeldFrame {
            number: self.number,
            at_ns: self.now.0,
            ifindex: 7,
            length: 0,
            vlan: 0,
            segment_bytes: 0,
            pad: 0,
        }
    }

    /// Passes the cut of one flow whose last packet arrived at `last`.
    fn cut(&mut self, letters: &str, last: Timestamp) {
        self.cut_by(CutBasis::Count, letters, last);
    }

    fn cut_by(&mut self, basis: CutBasis, letters: &str, last: Timestamp) {
        let flows = vec![flow_cut(&stream(1), letters, last)];
        let nic = NicCut {
            basis,
            ..nic(flows)
        };
        let mut clock = ClockOffset::default();
        clock.observe(self.now.0, self.now);
        self.hold.cut(self.now, self.now.0, &nic, &clock);
    }

    fn replay(&mut self) -> String {
        let mut letters = String::new();
        while let Some(packet) = self.hold.next_replay() {
            letters.push(char::from(packet.frame[62]));
            self.hold.replayed(self.now);
        }
        letters
    }

    fn counted(&mut self, held: u64, lost: u64) {
        self.hold.counted(self.now, held, lost);
    }

    fn placed(&self) -> Placed {
        self.hold.report().flows[0].placed.unwrap()
    }
}

fn nic(flows: Vec<FlowCut>) -> NicCut {
    NicCut {
        mac: [2; 6].into(),
        basis: CutBasis::Count,
        flows,
        tap_full: None,
    }
}

fn flow_cut(stream: &StreamKey, letters: &str, last: Timestamp) -> FlowCut {
    let fingerprints = letters.bytes().flat_map(|letter| {
        let payload = [letter; 32];
        fingerprint(&payload[..], 0, 32).unwrap().to_le_bytes()
    });
    FlowCut {
        vlan: stream.vlan,
        multicast_address: stream.multicast_address.into(),
        source: stream.source.into(),
        source_port: stream.source_port,
        destination_port: stream.destination_port,
        delivered: 100,
        last_ns: last.0,
        fingerprints: fingerprints.collect::<Vec<u8>>().into(),
    }
}

const LONG_AGO: Timestamp = Timestamp(1);

#[test]
fn nothing_is_replayed_before_the_cut() {
    let mut bench = Bench::held("abc");
    assert_eq!(bench.replay(), "");
    assert_eq!(bench.hold.done(), None);
}

#[test]
fn what_follows_the_last_delivered_packet_is_replayed() {
    let mut bench = Bench::held("abcdefg");
    bench.cut("abcd", LONG_AGO);
    assert_eq!(bench.hold.done(), Some(4));
    bench.push("h");
    assert_eq!(bench.replay(), "efgh");
    assert_eq!(bench.hold.done(), Some(8));
    assert_eq!(bench.placed(), Placed::Fingerprint);
}

#[test]
fn destination_that_lags_drops_what_still_comes() {
    let mut bench = Bench::held("abc");
    bench.cut("abcdef", LONG_AGO);
    assert_eq!(bench.hold.done(), Some(3));
    bench.push("degf");
    assert_eq!(bench.replay(), "g");
    assert_eq!(bench.hold.done(), Some(7));
}

#[test]
fn packets_lost_on_either_path_do_not_matter() {
    // The destination lacks "d" and "f", the source lacks "c" and "e".
    let mut bench = Bench::held("abcegh");
    bench.cut("abdfg", LONG_AGO);
    assert_eq!(bench.replay(), "ceh");
}

#[test]
fn what_the_source_lost_long_before_is_not_replayed() {
    let mut bench = Bench::held("abxcdefghijklmnopqrstuvwyz");
    bench.cut("abcdefghijklmnopqrstuvwy", LONG_AGO);
    assert_eq!(bench.replay(), "z");
}

#[test]
fn repeated_packets_are_counted_behind_the_anchor() {
    let mut bench = Bench::held("0a00b000c0");
    bench.cut("0a00b00", LONG_AGO);
    assert_eq!(bench.replay(), "0c0");
}

#[test]
fn repeated_packets_that_have_not_come_by_a_new_one_are_lost() {
    let mut bench = Bench::held("a00b0c0");
    bench.cut("a00b00", LONG_AGO);
    assert_eq!(bench.replay(), "c0");
}

#[test]
fn packet_that_is_there_once_at_the_source_but_repeated_here_is_no_anchor() {
    let mut bench = Bench::held("ab0c0d0e0");
    bench.cut("ab0c", LONG_AGO);
    assert_eq!(bench.replay(), "0d0e0");
}

#[test]
fn packet_far_behind_the_others_is_another_of_its_like() {
    // The first "0" did not reach the destination.
    let mut bench = Bench::held("abcdefghijklmnopqrstuvwxyz0ABC");
    bench.cut("ab0", LONG_AGO);
    assert_eq!(bench.replay(), "cdefghijklmnopqrstuvwxyz0ABC");
}

#[test]
fn flow_that_begins_after_the_cut_is_placed_by_its_first_packets() {
    let mut bench = Bench::new();
    bench.cut("abcd", LONG_AGO);
    bench.push("cdef");
    assert_eq!(bench.replay(), "ef");
    assert_eq!(bench.placed(), Placed::Fingerprint);
}

#[test]
fn flow_that_begins_behind_the_cut_is_replayed_whole() {
    let mut bench = Bench::new();
    bench.cut("abcd", bench.now);
    bench.push("ghi");
    assert_eq!(bench.replay(), "ghi");
    assert_eq!(bench.placed(), Placed::Time);
}

#[test]
fn identical_payloads_are_placed_by_time() {
    let mut bench = Bench::held("00000");
    let last = bench.now;
    bench.push("000");
    bench.cut("0000000", last);
    // The packets of two milliseconds before, and the last delivered packet itself.
    assert_eq!(bench.replay(), "000000");
    let report = bench.hold.report();
    assert_eq!(report.flows[0].placed, Some(Placed::Time));
    assert_eq!(report.flows[0].duplicates, 4);
}

#[test]
fn unknown_flow_goes_on_where_the_others_do() {
    let mut bench = Bench::held("ab");
    for letter in b"uvwxyz" {
        bench.push_of(2, *letter);
    }
    bench.cut("ab", bench.now);
    assert_eq!(bench.replay(), "xyz");
    assert_eq!(bench.hold.report().flows[1].placed, Some(Placed::Unseen));
}

#[test]
fn blind_cut_replays_all_since() {
    let mut bench = Bench::held("abcd");
    bench.hold.cut_blind(bench.now, bench.now - MS);
    bench.push("e");
    assert_eq!(bench.replay(), "cde");
    assert_eq!(bench.placed(), Placed::Blind);
}

#[test]
fn refused_packet_stays_the_next() {
    let mut bench = Bench::held("abc");
    bench.cut("a", LONG_AGO);
    let next = bench.hold.next_replay().cloned();
    bench.hold.refused();
    assert_eq!(bench.hold.next_replay().cloned(), next);
    assert_eq!(bench.hold.report().refused, 1);
    bench.hold.given_up();
    assert_eq!(bench.replay(), "c");
    assert_eq!(bench.hold.report().flows[0].lost, 1);
}

#[test]
fn newest_packets_are_kept() {
    let mut bench = Bench::new();
    bench.hold = Hold::new(HoldLimits {
        bytes: 2_000,
        ..LIMITS
    });
    bench.push("abcdefghijklmnopqrstuvwxyz");
    assert!(bench.hold.bytes() <= 2_000);
    bench.cut("abcdefghijklmnopqrstuvw", LONG_AGO);
    assert_eq!(bench.replay(), "xyz");
    assert!(!bench.hold.report().flows[0].overflow);
    assert_eq!(bench.hold.bytes(), 0);
}

#[test]
fn packets_grow_old_only_before_the_cut() {
    let mut bench = Bench::held("abc");
    bench.now = bench.now + LIMITS.age;
    bench.push("de");
    bench.cut("bd", LONG_AGO);
    bench.now = bench.now + LIMITS.age * 2;
    bench.push("f");
    assert_eq!(bench.replay(), "ef");
    let report = &bench.hold.report().flows[0];
    assert_eq!((report.held, report.lost), (6, 0));
    assert_eq!(report.longest_held, LIMITS.age * 2 + MS);
}

#[test]
fn overflow_before_the_cut_is_told() {
    let mut bench = Bench::new();
    bench.hold = Hold::new(HoldLimits {
        bytes: 2_000,
        ..LIMITS
    });
    bench.push("abc");
    let last = bench.now;
    bench.push("defghijklmnopqrstuvwxyz");
    bench.cut("abc", last);
    assert!(bench.hold.report().flows[0].overflow);
}

#[test]
fn numbers_that_never_came_are_lost_if_they_are_after_the_cut() {
    let mut bench = Bench::held("ab");
    bench.number += 5;
    bench.push("cdefgh");
    let last = bench.now;
    bench.number += 3;
    bench.push("i");
    bench.cut("abcdefgh", last + MS * 2);
    bench.number += 2;
    bench.push("j");
    assert_eq!(bench.hold.report().lost_in_kernel, 5);
    assert_eq!(bench.replay(), "ij");
    bench.counted(bench.number + 4, 10 + 4);
    assert_eq!(bench.hold.report().lost_in_kernel, 9);
    assert_eq!(bench.hold.done(), Some(bench.number + 4));
}

#[test]
fn frame_on_its_way_through_the_ring_buffer_keeps_the_gate_closed_however_late_it_is() {
    let mut bench = Bench::held("ab");
    bench.cut("a", bench.now - MS);
    assert_eq!(bench.replay(), "b");
    for _ in 0..100 {
        bench.now = bench.now + MS * 100;
        bench.counted(3, 0);
        assert_eq!(bench.hold.done(), Some(2));
    }
    bench.push("c");
    assert_eq!(bench.replay(), "c");
    bench.counted(3, 0);
    assert_eq!(bench.hold.done(), Some(3));
    assert_eq!(bench.hold.report().lost_in_kernel, 0);
    assert_eq!(bench.placed(), Placed::Fingerprint);
}

/// Returns a hold after its cut that has replayed number 4 while number 3 is missing.
fn without_number_three() -> Bench {
    let mut bench = Bench::held("ab");
    bench.cut("a", bench.now - MS);
    bench.number += 1;
    bench.push("d");
    assert_eq!(bench.replay(), "bd");
    bench.counted(4, 0);
    assert_eq!(bench.hold.done(), Some(3));
    bench
}

#[test]
fn frame_that_another_cpu_delivers_later_keeps_the_gate_closed() {
    let mut bench = without_number_three();
    bench.number -= 2;
    bench.push("c");
    assert_eq!(bench.replay(), "c");
    bench.counted(4, 0);
    assert_eq!(bench.hold.done(), Some(4));
    assert_eq!(bench.hold.report().lost_in_kernel, 0);
}

#[test]
fn number_that_neither_comes_nor_is_counted_as_lost_does_not_keep_the_gate_closed_for_ever() {
    let mut bench = without_number_three();
    bench.now = bench.now + MS * 999;
    bench.counted(4, 0);
    assert_eq!(bench.hold.done(), Some(3));
    bench.now = bench.now + MS;
    bench.counted(4, 0);
    assert_eq!(bench.hold.done(), Some(4));
    assert_eq!(bench.hold.report().lost_in_kernel, 1);
    assert_eq!(bench.placed(), Placed::Estimate);
}

#[test]
fn frames_of_two_cpus_are_put_in_order() {
    let mut bench = Bench::held("ab");
    bench.number += 1;
    bench.push("d");
    bench.number -= 2;
    bench.push("c");
    bench.number += 1;
    bench.push("e");
    bench.cut("ab", LONG_AGO);
    assert_eq!(bench.hold.done(), Some(2));
    assert_eq!(bench.replay(), "cde");
    assert_eq!(bench.hold.done(), Some(5));
    assert_eq!(bench.hold.report().lost_in_kernel, 0);
}

#[test]
fn aggregated_frame_is_several_packets() {
    let mut bench = Bench::held("a");
    bench.number += 1;
    let payload = [[b'b'; 32], [b'c'; 32], [b'd'; 32]].concat();
    let head = HeldFrame {
        segment_bytes: 32,
        vlan: 5,
        ..bench.head()
    };
    let frame = datagram(&stream(1), 1, &payload);
    bench.hold.push(&head, &frame);
    let tagged = StreamKey {
        vlan: 5,
        ..stream(1)
    };
    let nic = nic(vec![flow_cut(&tagged, "b", LONG_AGO)]);
    (bench.hold).cut(bench.now, bench.now.0, &nic, &ClockOffset::default());
    bench.hold.replayed(bench.now);
    let mut letters = Vec::new();
    while let Some(packet) = bench.hold.replayed(bench.now) {
        assert_eq!(packet.stream, Some(tagged));
        letters.push(packet.frame[66]);
    }
    assert_eq!(letters, *b"cd");
}

#[test]
fn forgotten_frames_are_gone() {
    let mut bench = Bench::held("abc");
    bench.cut("a", LONG_AGO);
    bench.hold.forget();
    assert_eq!(bench.hold.done(), None);
    assert_eq!(bench.hold.bytes(), 0);
    assert_eq!(bench.replay(), "");
}

#[test]
fn what_the_source_does_not_know_exactly_is_not_called_exact() {
    let placed = |basis, later: &str| {
        let mut bench = Bench::held("abcd");
        bench.cut_by(basis, "abcd", bench.now);
        bench.now = bench.now + MS * 10;
        bench.push(later);
        bench.replay();
        bench.placed()
    };
    assert_eq!(placed(CutBasis::Count, "e"), Placed::Fingerprint);
    assert_eq!(placed(CutBasis::Time, "e"), Placed::Estimate);
    // The guest cannot have received a packet that arrived so late.
    assert_eq!(placed(CutBasis::Overflow, "e"), Placed::Fingerprint);

    let mut bench = Bench::held("abcd");
    bench.cut_by(CutBasis::Overflow, "ab", bench.now);
    assert_eq!(bench.replay(), "cd");
    let report = bench.hold.report();
    assert_eq!(bench.placed(), Placed::Estimate);
    assert_eq!(report.flows[0].duplicates, 2);
}

#[test]
fn replay_into_a_tap_that_has_changed_is_not_called_exact() {
    let mut bench = Bench::held("abcd");
    bench.cut("ab", LONG_AGO);
    bench.hold.doubt();
    assert_eq!(bench.placed(), Placed::Estimate);
}
