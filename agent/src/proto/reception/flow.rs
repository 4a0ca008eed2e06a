//! One flow of an address on both paths, and the threshold of silence per path.
//!
//! A path is silent after ten inter-arrival times without a packet, and never before
//! `relay.silence_ms`. The kernel's moving average is too long for a while after a gap. The mean since
//! the flow was first seen is too long after an increase of the rate. So the smaller value counts. If
//! the source itself pauses, and both paths are silent, the flow remembers the longest pause.

use std::time::Duration;

use common::maps::{Origin, StreamUsage};

use crate::proto::{Stream, Timestamp};

/// A path is silent after this number of inter-arrival times.
const SILENT_INTERARRIVALS: u32 = 10;
/// Number of packets before the inter-arrival time is known.
const KNOWN_PACKETS: u64 = 8;
/// Grace period while a path's inter-arrival time is unknown.
const UNKNOWN_PATIENCE: Duration = Duration::from_secs(1);
/// Longest pause of a source that a flow remembers.
const MAX_PAUSE: Duration = Duration::from_secs(5);

/// Packets of one path.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Way {
    pub(super) packets: u64,
    pub(super) last: Timestamp,
    interarrival: Duration,
    /// Packet count and arrival time of the last packet at the start of the mean.
    base: Option<(u64, Timestamp)>,
}

impl Way {
    /// Records a packet from a first-packet event, which carries no packet count.
    pub(super) fn came(&mut self, at: Timestamp) {
        self.last = self.last.max(at);
        self.packets = self.packets.max(1);
    }

    fn read(&mut self, usage: &StreamUsage) {
        let packets = usage.packets;
        if packets < self.packets {
            // The kernel removed the entry meanwhile and counts from 0 again.
            self.base = None;
        }
        self.packets = packets;
        self.last = self.last.max(Timestamp(usage.last_ns));
        if packets == 0 {
            return;
        }
        let (first, since) = *self.base.get_or_insert((packets, self.last));
        let counted = packets.saturating_sub(first);
        let mean = u32::try_from(counted)
            .ok()
            .filter(|_| counted >= KNOWN_PACKETS)
            .map(|counted| self.last.since(since) / counted);
        let moving = Duration::from_nanos(usage.interarrival_ns);
        self.interarrival = mean.map_or(moving, |mean| mean.min(moving));
    }

    /// Restarts the mean, for packets from another sender or after a gap.
    pub(super) fn restart(&mut self) {
        self.base = None;
    }

    /// Returns true if enough packets arrived to judge silence.
    pub(super) fn is_known(&self) -> bool {
        self.packets >= KNOWN_PACKETS && !self.interarrival.is_zero()
    }

    /// Returns the time without a packet that does not yet count as silence.
    pub(super) fn patience(&self, floor: Duration) -> Duration {
        if self.interarrival.is_zero() {
            UNKNOWN_PATIENCE.max(floor)
        } else {
            (self.interarrival * SILENT_INTERARRIVALS).max(floor)
        }
    }
}

/// One flow on both paths.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Flow {
    pub(super) native: Way,
    pub(super) relayed: Way,
    /// The source is silent: neither path brings the flow. The flow's next packet clears the flag.
    pub(super) stopped: bool,
    /// The flow is known to run: packets arrived, or an arriving VM received the flow at the source
    /// host.
    pub(super) active: bool,
    /// An arriving VM received the flow at the source host.
    pub(super) expected: bool,
    /// Packet counts, native and relayed, at the start of the window in which native must be whole.
    pub(super) mark: (u64, u64),
    /// Longest observed pause of the source, at most [`MAX_PAUSE`].
    pause: Duration,
}

impl Flow {
    /// Takes the kernel's counters. `relayed_too` tells whether a relay would have brought the packets
    /// that are missing natively. A flow without packets since `since` does not count as expected.
    pub(super) fn read(
        &mut self,
        stream: &Stream,
        floor: Duration,
        relayed_too: bool,
        since: Timestamp,
    ) {
        let (native, relayed) = (self.native, self.relayed);
        self.native.read(&stream.native);
        self.relayed.read(&stream.relay);
        let first = native.packets + relayed.packets == 0;
        if first && !self.active && self.native.last.max(self.relayed.last) < since {
            self.stopped = true;
            return;
        }
        if self.native.packets > native.packets || self.relayed.packets > relayed.packets {
            self.stopped = false;
            self.active |= self.native.is_known() || self.relayed.is_known();
        }
        for (before, after, other, other_too) in [
            (native, self.native, relayed, relayed_too),
            (relayed, self.relayed, native, true),
        ] {
            let gap = after.last.since(before.last);
            let paused = other_too
                && before.is_known()
                && before.base.is_some()
                && after.packets > before.packets
                && gap > before.patience(floor)
                && other.last <= before.last + floor;
            if paused {
                self.pause = self.pause.max(gap.min(MAX_PAUSE));
            }
        }
        // A mean over a gap stays too long for a long time.
        for (before, way) in [(native, &mut self.native), (relayed, &mut self.relayed)] {
            if way.last.since(before.last) > before.patience(floor) {
                way.restart();
            }
        }
    }

    /// Marks the flow as stopped, since neither path brings it.
    pub(super) fn stop(&mut self) {
        self.stopped = true;
        self.active = false;
        self.expected = false;
    }

    pub(super) fn way(&self, origin: Origin) -> &Way {
        match origin {
            Origin::Native => &self.native,
            Origin::Relay => &self.relayed,
        }
    }

    /// Returns the time without a packet after which a path counts as silent.
    pub(super) fn threshold(&self, origin: Origin, floor: Duration) -> Duration {
        self.way(origin).patience(floor).max(self.pause * 2)
    }

    /// Returns true if a path brought a packet since `since` and is not silent.
    pub(super) fn is_fresh(
        &self,
        origin: Origin,
        since: Timestamp,
        now: Timestamp,
        floor: Duration,
    ) -> bool {
        let way = self.way(origin);
        !self.stopped
            && way.packets > 0
            && way.last >= since
            && now.since(way.last) <= self.threshold(origin, floor)
    }

    /// Returns the time that a relay has to bring the flow's first packet.
    pub(super) fn quiet(&self, floor: Duration) -> Duration {
        /// Value for a flow without any packet.
        const QUIET: Duration = Duration::from_secs(1);
        let ways = [Origin::Native, Origin::Relay].into_iter();
        let seen = ways.filter(|origin| self.way(*origin).packets > 0);
        let longest = seen.map(|origin| self.threshold(origin, floor)).max();
        longest.unwrap_or_default().max(QUIET)
    }

    /// Returns true if a relay brought the flow after `since` and no longer does.
    pub(super) fn is_given_up(&self, since: Timestamp, now: Timestamp, floor: Duration) -> bool {
        self.relayed.last >= since && self.is_silent(Origin::Relay, now, floor)
    }

    /// Returns true if a path that was known to bring the flow is silent.
    pub(super) fn is_silent(&self, origin: Origin, now: Timestamp, floor: Duration) -> bool {
        self.is_judged(origin) && now.since(self.way(origin).last) > self.threshold(origin, floor)
    }

    /// Returns true if silence of a path is meaningful.
    pub(super) fn is_judged(&self, origin: Origin) -> bool {
        let way = self.way(origin);
        way.is_known() || self.expected && way.packets > 0
    }

    /// Returns true if the native path is behind the relay by more than the silence threshold.
    pub(super) fn lags(&self, floor: Duration) -> bool {
        self.relayed.last.since(self.native.last) > self.threshold(Origin::Native, floor)
    }

    /// Returns true if at least 99 % of the packets that the relay brought since the mark arrived
    /// natively too.
    pub(super) fn is_whole(&self) -> bool {
        /// Packets that may be in flight.
        const SLACK: u64 = 2;
        let native = self.native.packets.saturating_sub(self.mark.0) + SLACK;
        let relayed = self.relayed.packets.saturating_sub(self.mark.1);
        native.saturating_mul(100) >= relayed.saturating_mul(99)
    }

    pub(super) fn set_mark(&mut self) {
        self.mark = (self.native.packets, self.relayed.packets);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Origin::Native;

    const FLOOR: Duration = Duration::from_millis(200);
    const MS: u64 = 1_000_000;

    fn stream(packets: u64, last_ms: u64, interarrival_ms: u64) -> Stream {
        Stream {
            native: StreamUsage {
                packets,
                last_ns: last_ms * MS,
                interarrival_ns: interarrival_ms * MS,
                ..StreamUsage::default()
            },
            ..Stream::default()
        }
    }

    fn at(ms: u64) -> Timestamp {
        Timestamp(ms * MS)
    }

    #[test]
    fn fast_flow_is_silent_after_the_floor_and_a_slow_one_after_ten_packets_times() {
        let mut fast = Flow::default();
        fast.read(&stream(10, 100, 1), FLOOR, true, at(0));
        fast.read(&stream(110, 200, 1), FLOOR, true, at(0));
        assert!(!fast.is_silent(Native, at(400), FLOOR));
        assert!(fast.is_silent(Native, at(401), FLOOR));
        let mut slow = Flow::default();
        slow.read(&stream(1, 0, 0), FLOOR, true, at(0));
        slow.read(&stream(11, 1000, 100), FLOOR, true, at(0));
        assert!(!slow.is_silent(Native, at(2000), FLOOR));
        assert!(slow.is_silent(Native, at(2001), FLOOR));
    }

    #[test]
    fn flow_of_a_few_packets_is_never_silent() {
        let mut flow = Flow::default();
        flow.read(&stream(1, 100, 0), FLOOR, true, at(0));
        flow.read(&stream(7, 200, 10), FLOOR, true, at(0));
        assert!(!flow.is_silent(Native, at(100_000), FLOOR));
    }

    #[test]
    fn gap_in_the_moving_average_does_not_blind() {
        let mut flow = Flow::default();
        flow.read(&stream(10, 10_000, 1250), FLOOR, true, at(0));
        flow.read(&stream(60, 10_050, 1000), FLOOR, true, at(0));
        flow.read(&stream(110, 10_100, 900), FLOOR, true, at(0));
        assert!(flow.is_silent(Native, at(10_301), FLOOR));
    }

    #[test]
    fn source_that_pauses_by_itself_is_given_twice_its_pause() {
        let mut flow = Flow::default();
        flow.read(&stream(10, 100, 1), FLOOR, true, at(0));
        flow.read(&stream(110, 200, 1), FLOOR, true, at(0));
        assert!(flow.is_silent(Native, at(500), FLOOR));
        flow.read(&stream(111, 600, 50), FLOOR, true, at(0));
        flow.read(&stream(112, 601, 1), FLOOR, true, at(0));
        flow.read(&stream(122, 611, 1), FLOOR, true, at(0));
        assert!(!flow.is_silent(Native, at(1411), FLOOR));
        assert!(flow.is_silent(Native, at(1412), FLOOR));
    }
}
