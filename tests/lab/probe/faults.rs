//! Lists the packets that a row counts as lost, doubled or reordered, and the packets that the
//! guest received around its migration. The lists serve to find the cause.

use serde::{Deserialize, Serialize};

use super::log::Sent;
use super::metrics::{Account, Arrival, Kind, Window};

/// Highest number of packets in the list.
const MOST: usize = 1000;
/// Highest numbers of arrivals in the list before the migration and after it.
const BEFORE: usize = 20;
const AFTER: usize = 100;

/// Fault of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The packet never arrived.
    Lost,
    /// The packet arrived again.
    Doubled,
    /// The packet arrived after a packet of its flow with a higher number.
    Reordered,
}

/// A packet with a fault. Times are milliseconds since the start of the window.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Faulty {
    /// Kind of the fault.
    pub fault: Fault,
    /// Flow of the packet's stamp.
    pub flow: u16,
    /// Sequence number of the packet's stamp.
    pub sequence: u32,
    /// Time of sending.
    pub sent_ms: f64,
    /// Arrival at the application; `None` for a lost packet.
    #[serde(flatten)]
    pub came: Option<Came>,
}

/// Time and place of an arrival.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Came {
    /// Time of the arrival, in milliseconds since the start of the window.
    pub came_ms: f64,
    /// Index of the VM host on which the guest ran.
    pub host: u8,
}

/// A packet that arrived around a migration.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Passed {
    /// Flow of the packet's stamp.
    pub flow: u16,
    /// Sequence number of the packet's stamp.
    pub sequence: u32,
    /// Time and place of the arrival.
    #[serde(flatten)]
    pub came: Came,
}

fn came(arrival: &Arrival, window: Window) -> Came {
    Came {
        came_ms: ms(arrival.host_ns, window),
        host: arrival.host,
    }
}

fn ms(ns: u64, window: Window) -> f64 {
    (ns as f64 - window.from_ns as f64) / 1e6
}

/// Returns the packets of a window that were lost, doubled or reordered, by the rules of
/// [`super::metrics::compute`]; at most a thousand. `sent` and `arrivals` are in the order of time.
pub fn faults(sent: &[Sent], arrivals: &[Arrival], window: Window) -> Vec<Faulty> {
    let mut account = Account::new(sent, window);
    let mut found = Vec::new();
    for arrival in arrivals {
        let (fault, sent_ns) = match account.take(arrival) {
            Some((Kind::Copy, sent_ns)) => (Fault::Doubled, sent_ns),
            Some((Kind::New { is_late: true }, sent_ns)) => (Fault::Reordered, sent_ns),
            Some((Kind::New { is_late: false }, _)) | None => continue,
        };
        found.push(Faulty {
            fault,
            flow: arrival.flow,
            sequence: arrival.sequence,
            sent_ms: ms(sent_ns, window),
            came: Some(came(arrival, window)),
        });
    }
    let lost = account.missing().into_iter();
    found.extend(lost.map(|(flow, sequence, sent_ns)| Faulty {
        fault: Fault::Lost,
        flow,
        sequence,
        sent_ms: ms(sent_ns, window),
        came: None,
    }));
    found.truncate(MOST);
    found
}

/// Returns the last arrivals before the guest's migration within the window, and the first arrivals
/// after it. The list is empty if the guest stayed.
pub fn around_the_move(arrivals: &[Arrival], window: Window) -> Vec<Passed> {
    let inside: Vec<&Arrival> = arrivals
        .iter()
        .filter(|arrival| window.contains(arrival.host_ns))
        .collect();
    let moved = inside.windows(2).position(|it| it[0].host != it[1].host);
    let Some(last) = moved else {
        return Vec::new();
    };
    let first = (last + 1).saturating_sub(BEFORE);
    let end = (last + 1 + AFTER).min(inside.len());
    inside[first..end]
        .iter()
        .map(|arrival| Passed {
            flow: arrival.flow,
            sequence: arrival.sequence,
            came: came(arrival, window),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::metrics;

    const MS: u64 = 1_000_000;
    const WINDOW: Window = Window {
        from_ns: 1000 * MS,
        to_ns: 2000 * MS,
    };

    /// Returns a packet every 10 ms.
    fn sent() -> Vec<Sent> {
        (0..100)
            .map(|sequence| Sent {
                flow: 3,
                sequence,
                sent_ns: (1000 + u64::from(sequence) * 10) * MS,
            })
            .collect()
    }

    fn arrival(sequence: u32, at_ms: u64, host: u8) -> Arrival {
        Arrival {
            flow: 3,
            sequence,
            host_ns: (1000 + at_ms) * MS,
            host,
        }
    }

    #[test]
    fn each_fault_that_a_row_counts_is_listed() {
        let sent = sent();
        // 20 is lost, 31 arrives before 30, 40 twice.
        let mut arrivals: Vec<_> = (0..100)
            .filter(|it| *it != 20)
            .map(|it| arrival(it, u64::from(it) * 10 + 1, u8::from(it >= 35)))
            .collect();
        arrivals.swap(29, 30);
        arrivals.insert(41, arrival(40, 402, 1));
        let found = faults(&sent, &arrivals, WINDOW);
        let brief: Vec<_> = found.iter().map(|it| (it.fault, it.sequence)).collect();
        assert_eq!(
            brief,
            [
                (Fault::Reordered, 30),
                (Fault::Doubled, 40),
                (Fault::Lost, 20)
            ]
        );
        assert_eq!(found[2].sent_ms, 200.0);
        let again = found[1].came.unwrap();
        assert_eq!((again.came_ms, again.host), (402.0, 1));
        let metrics = metrics::compute(&sent, &arrivals, WINDOW);
        assert_eq!(
            (metrics.lost, metrics.duplicated, metrics.reordered),
            (1, 1, 1)
        );
    }

    #[test]
    fn arrivals_before_and_after_the_move_are_listed() {
        let arrivals: Vec<_> = (0..100)
            .map(|it| arrival(it, u64::from(it) * 10, u8::from(it >= 50)))
            .collect();
        let around = around_the_move(&arrivals, WINDOW);
        assert_eq!(around[0].sequence, 30);
        assert_eq!(around[19].came.host, 0);
        assert_eq!((around[20].sequence, around[20].came.host), (50, 1));
        assert_eq!(around.len(), 70);
        assert!(around_the_move(&arrivals[..50], WINDOW).is_empty());
    }
}
