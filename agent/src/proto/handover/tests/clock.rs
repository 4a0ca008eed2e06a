//! Tests of the clock offset.

use super::*;
use crate::proto::Timestamp;
use crate::proto::handover::ClockOffset;

#[test]
fn fastest_message_tells_most() {
    let mut clock = ClockOffset::default();
    assert_eq!((clock.offset(), clock.latest(5)), (None, None));
    clock.observe(1_000_000, Timestamp(9_000_000));
    clock.observe(2_000_000, Timestamp(9_500_000));
    clock.observe(3_000_000, Timestamp(12_000_000));
    assert_eq!(clock.offset(), Some(7_500_000));
    assert_eq!(clock.latest(1_000_000), Some(Timestamp(8_500_000)));
    assert_eq!(clock.earliest(1_000_000), Some(Timestamp(8_500_000)));
    clock.set_round_trip(MS);
    assert_eq!(clock.earliest(1_000_000), Some(Timestamp(7_500_000)));
}

#[test]
fn clock_may_be_behind() {
    let mut clock = ClockOffset::default();
    clock.observe(u64::MAX, Timestamp(1));
    assert_eq!(clock.offset(), Some(i64::MIN));
    assert_eq!(clock.latest(5), Some(Timestamp(0)));
}
