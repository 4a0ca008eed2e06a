//! Combines the records of a stream's sender and the guest's receiver into a row.

use super::stream::{Placed, Service, StreamKind};
use crate::guest::control::{Control, TransportAt};
use crate::probe::log::Sent;
use crate::probe::metrics::{self, Arrival, Metrics, Window};
use crate::probe::report::{RunRow, StreamRow};

/// Packets of one stream at both ends.
#[derive(Clone, Debug)]
pub(super) struct Tally {
    pub(super) stream: Placed,
    /// Every packet sent; empty for ffmpeg.
    pub(super) sent: Vec<Sent>,
    /// Every arrival at the application, copies included, if the packets are stamped.
    pub(super) arrivals: Vec<Arrival>,
    /// Totals over time, if the stream is MPEG-TS.
    pub(super) transport: Vec<TransportAt>,
}

impl Tally {
    /// Collects the reports of the guest's receiver of a stream.
    pub(super) fn take(stream: Placed, sent: Vec<Sent>, guest: &Control) -> Self {
        let receiver = stream.receiver_number();
        Self {
            stream,
            sent,
            arrivals: guest.arrivals(receiver),
            transport: guest.transport(receiver),
        }
    }

    /// Returns true if any packet has reached the application.
    pub(super) fn has_arrived(&self) -> bool {
        let counted = self.transport.last();
        !self.arrivals.is_empty() || counted.is_some_and(|at| at.totals.datagrams > 0)
    }

    /// Returns the number of datagrams of a transport stream that arrived within a window.
    pub(super) fn counted(&self, window: Window) -> u64 {
        let until = |ns: u64| {
            let before = self.transport.iter().rev().find(|at| at.host_ns < ns);
            before.map_or(0, |at| at.totals.datagrams)
        };
        until(window.to_ns) - until(window.from_ns)
    }

    /// Returns the continuity errors since the start; `None` if the stream has no continuity
    /// counters.
    pub(super) fn continuity_errors(&self) -> Option<u64> {
        let last = self.transport.last()?;
        matches!(self.stream.config.kind, StreamKind::Ffmpeg(_))
            .then_some(last.totals.continuity_errors)
    }

    /// Returns the metrics of a window. `surplus` is the surplus of identical packets between the
    /// two pauses around the window.
    pub(super) fn metrics(&self, window: Window, surplus: Option<i64>) -> Metrics {
        let mut metrics = metrics::compute(&self.sent, &self.arrivals, window);
        if self.stream.config.content() == crate::guest::wire::Content::Stamped {
            return metrics;
        }
        let counts: Vec<_> = self
            .transport
            .iter()
            .map(|at| (at.host_ns, at.totals.datagrams))
            .collect();
        metrics.freeze_ms = metrics::freeze_of_counter(&counts, window);
        metrics.received = self.counted(window);
        metrics.duplicated = 0;
        metrics.lost = 0;
        if let Some(surplus) = surplus {
            let counted = surplus.unsigned_abs();
            (metrics.lost, metrics.duplicated) = match surplus {
                0.. => (0, counted),
                _ => (counted, 0),
            };
            metrics.received = metrics.sent - metrics.lost.min(metrics.sent);
        }
        metrics.loss_ms = metrics.lost as f64 * 1e3 / self.stream.config.packets_per_second();
        metrics
    }
}

/// Fills in the metrics of all streams; `surplus` holds the surplus of each stream of identical
/// packets.
pub(super) fn fill(
    row: RunRow,
    tallies: &[Tally],
    window: Window,
    surplus: &[Option<i64>],
) -> RunRow {
    let surpluses = surplus.iter().copied().chain(std::iter::repeat(None));
    let streams: Vec<(StreamRow, Metrics)> = tallies
        .iter()
        .zip(surpluses)
        .map(|(tally, surplus)| {
            let metrics = tally.metrics(window, surplus);
            (stream_row(&tally.stream, &metrics, surplus), metrics)
        })
        .collect();
    let mut total = Metrics::default();
    for (_, metrics) in &streams {
        total.sent += metrics.sent;
        total.received += metrics.received;
        total.lost += metrics.lost;
        total.duplicated += metrics.duplicated;
        total.reordered += metrics.reordered;
        total.loss_ms = total.loss_ms.max(metrics.loss_ms);
        total.freeze_ms = total.freeze_ms.max(metrics.freeze_ms);
    }
    let known: Vec<i64> = surplus.iter().copied().flatten().collect();
    let errors: Vec<u64> = tallies
        .iter()
        .filter_map(Tally::continuity_errors)
        .collect();
    let rows: Vec<StreamRow> = streams.into_iter().map(|(row, _)| row).collect();
    RunRow {
        rate_mbps: tallies.iter().map(|it| it.stream.config.rate_mbps).sum(),
        surplus: (!known.is_empty()).then(|| known.iter().sum()),
        continuity_errors: (!errors.is_empty()).then(|| errors.iter().sum()),
        streams: if rows.len() > 1 { rows } else { Vec::new() },
        ..row.with_metrics(&total)
    }
}

/// Fills in the longest time in a window for which the guest did not run. A thread that sleeps
/// while the guest's clock stands still does not notice the stop, so only the clocks show this
/// time.
pub(super) fn with_stalls(row: RunRow, guest: &Control, window: Window) -> RunRow {
    let longest = |times: Vec<(u64, u64)>| {
        let inside = times
            .into_iter()
            .filter(|(from_ns, _)| window.contains(*from_ns));
        inside.map(|(_, ns)| ns).max().unwrap_or_default() as f64 / 1e6
    };
    let stops = guest.stops();
    let stalls = guest.stalls().into_iter();
    let lengths = stalls.map(|(from, to)| (from, to.saturating_sub(from)));
    RunRow {
        stall_ms: longest(lengths.chain(stops.iter().copied()).collect()),
        clock_stop_ms: longest(stops),
        ..row
    }
}

fn stream_row(stream: &Placed, metrics: &Metrics, surplus: Option<i64>) -> StreamRow {
    StreamRow {
        multicast_address: stream.multicast_address(),
        source_specific: stream.service == Service::SourceSpecific,
        rate_mbps: stream.config.rate_mbps,
        sent: metrics.sent,
        received: metrics.received,
        lost: metrics.lost,
        duplicated: metrics.duplicated,
        reordered: metrics.reordered,
        loss_ms: metrics.loss_ms,
        freeze_ms: metrics.freeze_ms,
        surplus,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::wire::TransportTotals;
    use crate::scenario::stream::StreamConfig;

    const MS: u64 = 1_000_000;
    const WINDOW: Window = Window {
        from_ns: 0,
        to_ns: 1000 * MS,
    };

    fn placed(index: u16, kind: StreamKind) -> Placed {
        Placed {
            config: StreamConfig {
                kind,
                ..StreamConfig::probe(1.0)
            },
            service: Service::AnySource,
            index,
            interface: "eth0",
        }
    }

    fn sent(stream: &Placed) -> Vec<Sent> {
        let packet = |sequence: u32| Sent {
            flow: stream.first_flow(),
            sequence,
            sent_ns: u64::from(sequence) * 10 * MS,
        };
        (0..100).map(packet).collect()
    }

    /// Returns a tally with a packet every 10 ms; `missing` never arrived.
    fn stamped(index: u16, missing: std::ops::Range<u32>) -> Tally {
        let stream = placed(index, StreamKind::Probe);
        let sent = sent(&stream);
        let came = sent.iter().filter(|it| !missing.contains(&it.sequence));
        let arrivals = came.map(|packet| Arrival {
            flow: packet.flow,
            sequence: packet.sequence,
            host_ns: packet.sent_ns,
            host: 0,
        });
        Tally {
            stream,
            arrivals: arrivals.collect(),
            sent,
            transport: Vec::new(),
        }
    }

    #[test]
    fn several_streams_are_summed_and_listed() {
        let tallies = [stamped(0, 0..0), stamped(1, 20..25)];
        let row = fill(RunRow::default(), &tallies, WINDOW, &[None, None]);
        assert_eq!((row.sent, row.received, row.lost), (200, 195, 5));
        assert_eq!((row.rate_mbps, row.freeze_ms), (2.0, 60.0));
        let lost: Vec<u64> = row.streams.iter().map(|stream| stream.lost).collect();
        assert_eq!(lost, [0, 5]);
        assert_eq!(row.surplus, None);
    }

    #[test]
    fn one_stream_is_not_listed() {
        let row = fill(RunRow::default(), &[stamped(0, 0..1)], WINDOW, &[None]);
        assert_eq!((row.lost, row.streams.len()), (1, 0));
    }

    #[test]
    fn surplus_of_identical_packets_is_what_was_at_least_lost_or_doubled() {
        let stream = placed(0, StreamKind::Identical);
        let count = |n: u64| TransportAt {
            host_ns: n * 10 * MS,
            totals: TransportTotals {
                datagrams: n + 1,
                ..TransportTotals::default()
            },
        };
        let tally = Tally {
            stream,
            sent: sent(&stream),
            arrivals: Vec::new(),
            transport: (0..90).map(count).collect(),
        };
        let tallies = [tally];
        let row = |surplus| fill(RunRow::default(), &tallies, WINDOW, &[Some(surplus)]);
        let fewer = row(-10);
        assert_eq!(
            (fewer.lost, fewer.duplicated, fewer.surplus),
            (10, 0, Some(-10))
        );
        let more = row(3);
        assert_eq!((more.lost, more.duplicated, more.surplus), (0, 3, Some(3)));
        // The freeze is the last 110 ms of the window, without a datagram.
        assert_eq!(
            (more.sent, more.received, more.freeze_ms),
            (100, 100, 110.0)
        );
        assert_eq!(fewer.received, 90);
        assert_eq!(more.continuity_errors, None);
    }
}
