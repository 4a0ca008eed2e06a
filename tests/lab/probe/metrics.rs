//! Compares received packets with sent packets, in host time.

use std::collections::HashMap;

use super::log::Sent;

/// A packet that reached the application in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Flow of the packet's stamp.
    pub flow: u16,
    /// Sequence number of the packet's stamp.
    pub sequence: u32,
    /// Time at which the application got the packet, in nanoseconds of the host's monotonic clock.
    pub host_ns: u64,
    /// Index of the VM host at the arrival, in the order of the control channel's sockets.
    pub host: u8,
}

/// A window: packets sent from `from_ns` on and before `to_ns`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Start, inclusive, in nanoseconds of the host's monotonic clock.
    pub from_ns: u64,
    /// End, exclusive. The last packets of the window must have had time to arrive.
    pub to_ns: u64,
}

impl Window {
    /// Returns true if a time of the host's monotonic clock is within the window.
    #[must_use]
    pub fn contains(self, ns: u64) -> bool {
        (self.from_ns..self.to_ns).contains(&ns)
    }
}

/// Metrics of the packets of a [`Window`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Packets sent.
    pub sent: u64,
    /// Packets that arrived, each counted once.
    pub received: u64,
    /// Packets that never arrived.
    pub lost: u64,
    /// Copies beyond the first.
    pub duplicated: u64,
    /// Packets that arrived after a packet of the same flow with a higher number (RFC 4737 section
    /// 3), without copies.
    pub reordered: u64,
    /// Number of lost packets divided by the packet rate, in milliseconds.
    pub loss_ms: f64,
    /// Longest time without a new packet, in milliseconds. The time from the start of the window to
    /// the first packet and the time from the last packet to the end of the window count too.
    pub freeze_ms: f64,
    /// Start of the freeze, in nanoseconds of the host's monotonic clock.
    pub freeze_start_ns: u64,
}

/// Kind of an arrival among the packets of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// First arrival of a packet.
    New {
        /// True if a packet of the flow with a higher number arrived before.
        is_late: bool,
    },
    /// A further arrival of a packet that arrived before.
    Copy,
}

/// Packets of a window, and whether each has arrived.
pub(super) struct Account {
    /// Time of sending, and whether the packet has arrived, by flow and number.
    packets: HashMap<(u16, u32), (u64, bool)>,
    highest: HashMap<u16, u32>,
}

impl Account {
    pub(super) fn new(sent: &[Sent], window: Window) -> Self {
        let inside = sent.iter().filter(|packet| window.contains(packet.sent_ns));
        Self {
            packets: inside
                .map(|packet| ((packet.flow, packet.sequence), (packet.sent_ns, false)))
                .collect(),
            highest: HashMap::new(),
        }
    }

    /// Accounts for an arrival. Returns its kind and the time of sending; `None` for a packet
    /// outside the window.
    pub(super) fn take(&mut self, arrival: &Arrival) -> Option<(Kind, u64)> {
        let packet = (arrival.flow, arrival.sequence);
        let (sent_ns, has_come) = self.packets.get_mut(&packet)?;
        if std::mem::replace(has_come, true) {
            return Some((Kind::Copy, *sent_ns));
        }
        let highest = self.highest.entry(arrival.flow).or_insert(arrival.sequence);
        let is_late = arrival.sequence < *highest;
        *highest = arrival.sequence.max(*highest);
        Some((Kind::New { is_late }, *sent_ns))
    }

    fn sent(&self) -> u64 {
        self.packets.len() as u64
    }

    /// Returns flow, number and time of sending of the packets that have not arrived.
    pub(super) fn missing(&self) -> Vec<(u16, u32, u64)> {
        let missing = self.packets.iter().filter(|(_, (_, has_come))| !has_come);
        let mut missing: Vec<_> = missing
            .map(|((flow, sequence), (sent_ns, _))| (*flow, *sequence, *sent_ns))
            .collect();
        missing.sort_unstable();
        missing
    }
}

/// Computes the metrics of a window. `arrivals` must be in the order of time.
///
/// The packet rate is the rate of the window over all flows.
pub fn compute(sent: &[Sent], arrivals: &[Arrival], window: Window) -> Metrics {
    let mut account = Account::new(sent, window);
    let mut metrics = Metrics {
        sent: account.sent(),
        ..Metrics::default()
    };
    let mut last_new_ns = window.from_ns;
    let mut freeze_ns = 0;
    let mut note_freeze = |from: u64, to: u64, metrics: &mut Metrics| {
        let silence = to.saturating_sub(from);
        if silence > freeze_ns {
            freeze_ns = silence;
            metrics.freeze_start_ns = from;
        }
    };
    for arrival in arrivals {
        let is_late = match account.take(arrival) {
            None => continue,
            Some((Kind::Copy, _)) => {
                metrics.duplicated += 1;
                continue;
            }
            Some((Kind::New { is_late }, _)) => is_late,
        };
        metrics.received += 1;
        metrics.reordered += u64::from(is_late);
        note_freeze(last_new_ns, arrival.host_ns, &mut metrics);
        last_new_ns = arrival.host_ns.max(last_new_ns);
    }
    note_freeze(last_new_ns, window.to_ns, &mut metrics);
    metrics.lost = metrics.sent - metrics.received;
    metrics.freeze_ms = freeze_ns as f64 / 1e6;
    let window_ms = window.to_ns.saturating_sub(window.from_ns) as f64 / 1e6;
    if metrics.sent > 0 {
        metrics.loss_ms = metrics.lost as f64 * window_ms / metrics.sent as f64;
    }
    metrics
}

/// Returns the longest time, in milliseconds, in which a counter that only grows stood still.
///
/// `samples` holds pairs of host time in nanoseconds and counter, in the order of time, for example
/// the totals of an MPEG-TS receiver.
pub fn freeze_of_counter(samples: &[(u64, u64)], window: Window) -> f64 {
    let (mut last_ns, mut last_count, mut freeze_ns) = (window.from_ns, 0, 0);
    for (host_ns, count) in samples {
        if *count > last_count {
            last_count = *count;
            if window.contains(*host_ns) {
                freeze_ns = freeze_ns.max(host_ns - last_ns);
                last_ns = *host_ns;
            }
        }
    }
    freeze_ns.max(window.to_ns.saturating_sub(last_ns)) as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Returns `count` packets, one per millisecond from time zero.
    fn stream(count: u32) -> Vec<Sent> {
        (0..count)
            .map(|sequence| Sent {
                flow: 0,
                sequence,
                sent_ns: u64::from(sequence) * MS,
            })
            .collect()
    }

    fn arrival(sequence: u32, at_ms: u64) -> Arrival {
        Arrival {
            flow: 0,
            sequence,
            host_ns: at_ms * MS,
            host: 0,
        }
    }

    fn window(to_ms: u64) -> Window {
        Window {
            from_ns: 0,
            to_ns: to_ms * MS,
        }
    }

    #[test]
    fn whole_stream_has_no_faults() {
        let arrivals: Vec<_> = (0..1000).map(|n| arrival(n, u64::from(n))).collect();
        let metrics = compute(&stream(1000), &arrivals, window(1000));
        assert_eq!(
            (metrics.sent, metrics.received, metrics.lost),
            (1000, 1000, 0)
        );
        assert_eq!((metrics.duplicated, metrics.reordered), (0, 0));
        assert_eq!((metrics.loss_ms, metrics.freeze_ms), (0.0, 1.0));
    }

    #[test]
    fn pause_with_buffering_freezes_without_loss() {
        let arrivals: Vec<_> = (0..1000)
            .map(|n| arrival(n, if n < 500 { n } else { n.max(700) }.into()))
            .collect();
        let metrics = compute(&stream(1000), &arrivals, window(1000));
        assert_eq!(
            (metrics.lost, metrics.loss_ms, metrics.freeze_ms),
            (0, 0.0, 201.0)
        );
        assert_eq!(metrics.freeze_start_ns, 499 * MS);
    }

    #[test]
    fn lost_packets_are_an_outage_of_their_time() {
        let arrivals: Vec<_> = (0..1000)
            .filter(|n| !(300..400).contains(n))
            .map(|n| arrival(n, n.into()))
            .collect();
        let metrics = compute(&stream(1000), &arrivals, window(1000));
        assert_eq!(
            (metrics.lost, metrics.loss_ms, metrics.freeze_ms),
            (100, 100.0, 101.0)
        );
    }

    #[test]
    fn copies_are_neither_news_nor_reordering() {
        let mut arrivals: Vec<_> = (0..500).map(|n| arrival(n, n.into())).collect();
        arrivals.extend((400..500).map(|n| arrival(n, u64::from(n) + 200)));
        arrivals.extend((500..1000).map(|n| arrival(n, u64::from(n) + 250)));
        let metrics = compute(&stream(1000), &arrivals, window(1300));
        assert_eq!(
            (metrics.duplicated, metrics.reordered, metrics.lost),
            (100, 0, 0)
        );
        assert_eq!(metrics.freeze_ms, 251.0);
    }

    #[test]
    fn late_packet_is_reordered_once() {
        let arrivals = [
            arrival(0, 0),
            arrival(2, 1),
            arrival(3, 2),
            arrival(1, 3),
            arrival(4, 4),
        ];
        let metrics = compute(&stream(5), &arrivals, window(5));
        assert_eq!((metrics.reordered, metrics.lost), (1, 0));
    }

    #[test]
    fn stream_that_never_comes_back_is_frozen_to_the_end() {
        let arrivals: Vec<_> = (0..100).map(|n| arrival(n, n.into())).collect();
        let metrics = compute(&stream(1000), &arrivals, window(1000));
        assert_eq!((metrics.lost, metrics.freeze_ms), (900, 901.0));
    }

    #[test]
    fn packets_outside_the_window_are_not_looked_at() {
        let arrivals: Vec<_> = (0..1000).map(|n| arrival(n, n.into())).collect();
        let window = Window {
            from_ns: 200 * MS,
            to_ns: 300 * MS,
        };
        let metrics = compute(&stream(1000), &arrivals, window);
        assert_eq!(
            (metrics.sent, metrics.received, metrics.lost),
            (100, 100, 0)
        );
    }

    #[test]
    fn flows_number_their_packets_apart() {
        let sent: Vec<_> = (0..10)
            .map(|n| Sent {
                flow: n % 2,
                sequence: u32::from(n / 2),
                sent_ns: u64::from(n) * MS,
            })
            .collect();
        let arrivals: Vec<_> = sent
            .iter()
            .map(|it| Arrival {
                flow: it.flow,
                ..arrival(it.sequence, it.sent_ns / MS)
            })
            .collect();
        let metrics = compute(&sent, &arrivals, window(10));
        assert_eq!(
            (metrics.received, metrics.duplicated, metrics.reordered),
            (10, 0, 0)
        );
    }

    #[test]
    fn counter_that_stands_still_is_a_freeze() {
        let samples = [(0, 1), (10 * MS, 2), (50 * MS, 2), (90 * MS, 3)];
        assert_eq!(freeze_of_counter(&samples, window(100)), 80.0);
    }
}
