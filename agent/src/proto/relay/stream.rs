//! Known multicast addresses, their flows and the subscribers of the flows.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::maps::{MAX_SUBSCRIBERS, RelayStream, StreamKey};

use super::Timestamp;
use crate::proto::Stream;
use crate::proto::filter::Filter;

/// Shortest interval for computing a rate.
const MIN_MEASURE: Duration = Duration::from_millis(500);

/// A multicast address with at least one session.
#[derive(Debug)]
pub(super) struct Group {
    /// Filter of the kernel membership: the union of the sessions' filters.
    pub(super) filter: Filter,
    /// Time from which first packets of flows raise events.
    pub(super) since: Timestamp,
    pub(super) sessions: BTreeSet<u64>,
    /// Known flows: seen, or named by an agent.
    pub(super) streams: BTreeMap<StreamKey, StreamState>,
}

impl Group {
    pub(super) fn new(filter: Filter, since: Timestamp) -> Self {
        Self {
            filter,
            since,
            sessions: BTreeSet::new(),
            streams: BTreeMap::new(),
        }
    }

    /// Returns the rate of a flow at the last measurement.
    pub(super) fn bits_per_second(&self, stream: &StreamKey) -> u64 {
        self.streams
            .get(stream)
            .map_or(0, |state| state.bits_per_second)
    }
}

/// A known flow.
#[derive(Debug)]
pub(super) struct StreamState {
    /// A packet arrived; false if an agent only named the flow.
    pub(super) seen: bool,
    /// Arrival of the last packet. Before the first packet, the time of the naming.
    pub(super) last_seen: Timestamp,
    pub(super) bits_per_second: u64,
    /// Time and byte count of the last measurement.
    measured: Option<(Timestamp, u64)>,
    /// Entry of the flow in the maps; `None` without subscribers.
    pub(super) served: Option<Served>,
}

impl StreamState {
    pub(super) fn new(last_seen: Timestamp, seen: bool) -> Self {
        Self {
            seen,
            last_seen,
            bits_per_second: 0,
            measured: None,
            served: None,
        }
    }

    /// Takes the kernel's counters.
    pub(super) fn measure(&mut self, now: Timestamp, stream: &Stream) {
        self.last_seen = self.last_seen.max(Timestamp(stream.native.last_ns));
        self.bits_per_second = match self.measured {
            // The kernel counts a recreated entry from zero.
            Some((at, bytes)) if stream.native.bytes >= bytes => {
                let elapsed = now.since(at);
                if elapsed < MIN_MEASURE {
                    return;
                }
                rate(stream.native.bytes - bytes, elapsed)
            }
            _ => rate(
                stream.native.bytes / stream.native.packets.max(1),
                Duration::from_nanos(stream.native.interarrival_ns),
            ),
        };
        self.measured = Some((now, stream.native.bytes));
    }
}

/// Returns bits per second; 0 for an empty interval.
fn rate(bytes: u64, time: Duration) -> u64 {
    let bits = u128::from(bytes) * 8 * 1_000_000_000;
    bits.checked_div(time.as_nanos())
        .map_or(0, |rate| u64::try_from(rate).unwrap_or(u64::MAX))
}

/// Entry of a flow in the maps.
#[derive(Debug)]
pub(super) struct Served {
    /// Number of the flow, the key of its subscribers.
    pub(super) flow: u32,
    /// Sessions by index; `None` is a gap. The last element is never a gap.
    pub(super) subscribers: Vec<Option<u64>>,
}

impl Served {
    pub(super) fn value(&self) -> RelayStream {
        RelayStream {
            flow: self.flow,
            subscribers: u32::try_from(self.subscribers.len()).unwrap_or(MAX_SUBSCRIBERS),
        }
    }

    /// Assigns the lowest free index to a session; `None` if no index is free.
    pub(super) fn add(&mut self, session: u64) -> Option<u32> {
        let index = self
            .subscribers
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.subscribers.len());
        let number = u32::try_from(index)
            .ok()
            .filter(|index| *index < MAX_SUBSCRIBERS)?;
        match self.subscribers.get_mut(index) {
            Some(gap) => *gap = Some(session),
            None => self.subscribers.push(Some(session)),
        }
        Some(number)
    }

    pub(super) fn remove(&mut self, index: u32) {
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        if let Some(subscriber) = self.subscribers.get_mut(index) {
            *subscriber = None;
        }
        self.trim();
    }

    fn trim(&mut self) {
        while self.subscribers.last().is_some_and(Option::is_none) {
            self.subscribers.pop();
        }
    }
}

/// Flow numbers; the lowest free number is assigned first.
#[derive(Debug, Default)]
pub(super) struct FlowNumbers {
    /// All numbers from here on are free, except `adopted`.
    next: u32,
    /// Free numbers below `next`.
    free: BTreeSet<u32>,
    /// Numbers from `next` on that an earlier relay assigned.
    adopted: BTreeSet<u32>,
}

impl FlowNumbers {
    pub(super) fn take(&mut self) -> u32 {
        if let Some(number) = self.free.pop_first() {
            return number;
        }
        loop {
            let number = self.next;
            self.next = self.next.wrapping_add(1);
            if !self.adopted.remove(&number) {
                return number;
            }
        }
    }

    pub(super) fn release(&mut self, number: u32) {
        if number < self.next {
            self.free.insert(number);
        } else {
            self.adopted.remove(&number);
        }
    }

    /// Starts with the numbers that an earlier relay assigned.
    pub(super) fn adopted(used: BTreeSet<u32>) -> Self {
        Self {
            adopted: used,
            ..Self::default()
        }
    }
}
