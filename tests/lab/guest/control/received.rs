//! Packets and stalls that the guest reported, in host time.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{
    Control, TransportAt,
    state::{Stamped, State},
};
use crate::{
    guest::wire::{Command, Record},
    probe::{
        metrics::Arrival,
        timeline::{Moment, Timeline},
    },
    wait,
};

impl Control {
    /// Returns every packet that a receiver has reported so far, in the order in which the receiver
    /// got the packets.
    pub fn arrivals(&self, receiver: u16) -> Vec<Arrival> {
        let (timeline, stamped) = {
            let state = self.inner.lock();
            let stamped = state.arrivals.get(&receiver).cloned();
            (Timeline::new(&state.reports), stamped.unwrap_or_default())
        };
        let arrival = |(moment, record): (Moment, Record)| Arrival {
            flow: record.flow,
            sequence: record.sequence,
            host_ns: moment.host_ns,
            host: moment.host,
        };
        placed(&timeline, stamped).map(arrival).collect()
    }

    /// Makes the guest watch for stalls from now on.
    ///
    /// # Errors
    ///
    /// When the guest does not answer.
    pub fn watch_stalls(&self) -> Result<()> {
        self.request(Command::WatchStalls).map(drop)
    }

    /// Returns the stalls of a thread in the guest that was ready to run, longer than 5 ms: start
    /// and end in nanoseconds of the host's monotonic clock.
    pub fn stalls(&self) -> Vec<(u64, u64)> {
        let state = self.inner.lock();
        let timeline = Timeline::new(&state.reports);
        let at = |guest_ns| timeline.at(guest_ns).host_ns;
        let stalls = state.stalls.iter();
        stalls.map(|(from, to)| (at(*from), at(*to))).collect()
    }

    /// Returns time and duration of each stop of the guest's clock so far, as [`Timeline::stops`]
    /// does.
    pub fn stops(&self) -> Vec<(u64, u64)> {
        Timeline::new(&self.inner.lock().reports).stops()
    }

    /// Waits until a receiver has reported at least `count` packets.
    ///
    /// # Errors
    ///
    /// When the receiver has not reported them within `deadline`.
    pub fn wait_arrivals(&self, receiver: u16, count: usize, deadline: Duration) -> Result<()> {
        let deadline = wait::end_after(deadline);
        let has_count = |state: &mut State| {
            (state.arrivals.get(&receiver).map_or(0, Vec::len) >= count).then_some(())
        };
        self.inner.wait_until(deadline, has_count).with_context(|| {
            let arrived = self.arrivals(receiver).len();
            format!("Only {arrived} of {count} packets reached receiver {receiver} in time")
        })
    }

    /// Returns the totals that an MPEG-TS receiver has reported so far.
    pub fn transport(&self, receiver: u16) -> Vec<TransportAt> {
        let (timeline, stamped) = {
            let state = self.inner.lock();
            let stamped = state.transport.get(&receiver).cloned();
            (Timeline::new(&state.reports), stamped.unwrap_or_default())
        };
        let at = |(moment, totals): (Moment, _)| TransportAt {
            host_ns: moment.host_ns,
            totals,
        };
        placed(&timeline, stamped).map(at).collect()
    }
}

/// Sorts reported values in the guest's order and adds host time and VM host.
fn placed<T>(
    timeline: &Timeline,
    mut stamped: Vec<Stamped<T>>,
) -> impl Iterator<Item = (Moment, T)> {
    // Frames that the host requested again arrived out of order.
    stamped.sort_by_key(|it| it.number);
    stamped
        .into_iter()
        .map(|it| (timeline.at(it.guest_ns), it.what))
}
