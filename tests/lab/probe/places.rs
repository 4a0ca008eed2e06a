//! Finds where the lost packets of a migration were dropped, as far as a counter shows it.
//!
//! ```text
//! sender -> network -> VM host's NIC -> gate -> TAP -> guest's NIC -> socket -> application
//!               |             |           |      |          |            |
//!          not counted   host_dropped  not_held  tap_full  guest_dropped socket_full
//! ```
//!
//! Kernels and agents count frames of every flow, so a place may show more frames than the streams
//! lost.

use std::iter;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::counters::{self, Counters};

/// Prefix of libvirt's TAP names.
const TAP: &str = "vnet";

/// Packet counters of the kernels during a migration.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Counted {
    /// Counters of the guest.
    pub guest: Counters,
    /// Counters of each VM host.
    pub hosts: Vec<Counters>,
}

impl Counted {
    /// Returns the growth of the counters since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let hosts = before.hosts.iter().zip(&self.hosts);
        Self {
            guest: counters::grown(&before.guest, &self.guest),
            hosts: hosts
                .map(|(before, after)| counters::grown(before, after))
                .collect(),
        }
    }
}

/// A place, in the order of a packet's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// No counter shows the packet: it was lost before the VM host, or between VM host and guest.
    NotCounted,
    /// A VM host dropped the packet before its bridge.
    HostDropped,
    /// The gate had no room for the packet, or the agent dropped it.
    NotHeld,
    /// The TAP's queue at the source was full.
    TapFullAtSource,
    /// The TAP's queue at the destination was full.
    TapFull,
    /// The guest's kernel dropped the packet before the socket.
    GuestDropped,
    /// The application's socket was full.
    SocketFull,
}

impl Place {
    /// Returns the place as text for people; the text follows a number of packets.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotCounted => "counted nowhere: before the VM host, or between both",
            Self::HostDropped => "dropped by a VM host before its bridge",
            Self::NotHeld => "not held by the gate",
            Self::TapFullAtSource => "TAP full at the source",
            Self::TapFull => "TAP full at the destination",
            Self::GuestDropped => "dropped by the guest before the socket",
            Self::SocketFull => "guest's socket full",
        }
    }
}

/// Frames lost at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Place at which the frames were dropped.
    pub place: Place,
    /// Number of frames by the place's counter, which may exceed the packets that the streams lost.
    pub frames: u64,
}

/// Finds places for `lost` packets of a guest that migrated to the VM host with the index `to`.
/// `records` are the records of both agents, if there are agents. The result does not list places
/// without a loss.
#[must_use]
pub fn places(lost: u64, counted: &Counted, to: usize, records: &[Value]) -> Vec<Missing> {
    if lost == 0 {
        return Vec::new();
    }
    let nics = |key: &str| most(records, "nics", key);
    let at_destination = counted.hosts.get(to).map_or(0, |counters| {
        sum(counters, "tx_dropped", |interface| {
            interface.starts_with(TAP)
        })
    });
    let host_dropped = counted.hosts.iter().map(|counters| {
        sum(counters, "rx_dropped", |interface| {
            !interface.starts_with(TAP)
        })
    });
    let socket_full = counted.guest.get("Udp6RcvbufErrors").copied();
    let known = [
        (Place::HostDropped, host_dropped.sum()),
        (
            Place::NotHeld,
            most(records, "handover", "lost") + nics("not_held"),
        ),
        (Place::TapFullAtSource, nics("tap_full_at_source")),
        (Place::TapFull, nics("tap_full").max(at_destination)),
        (
            Place::GuestDropped,
            sum(&counted.guest, "rx_dropped", |interface| interface != "lo"),
        ),
        (Place::SocketFull, socket_full.unwrap_or_default()),
    ];
    let rest = lost.saturating_sub(known.iter().map(|(_, frames)| frames).sum());
    iter::once((Place::NotCounted, rest))
        .chain(known)
        .filter(|(_, frames)| *frames > 0)
        .map(|(place, frames)| Missing { place, frames })
        .collect()
}

/// Returns the sum of a counter over the interfaces that `is_meant` accepts.
fn sum(counters: &Counters, counter: &str, is_meant: impl Fn(&str) -> bool) -> u64 {
    let of = |(name, value): (&String, &u64)| {
        let (interface, column) = name.rsplit_once('.')?;
        (column == counter && is_meant(interface)).then_some(*value)
    };
    counters.iter().filter_map(of).sum()
}

/// Returns the sum of `key` over the rows of a record. If both agents have rows, the greater sum
/// counts.
fn most(records: &[Value], rows: &str, key: &str) -> u64 {
    let of = |record: &Value| {
        let rows = record[rows].as_array().into_iter().flatten();
        rows.filter_map(|row| row[key].as_u64()).sum()
    };
    records.iter().map(of).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn counters(values: &[(&str, u64)]) -> Counters {
        let named = values.iter();
        named
            .map(|(name, value)| ((*name).to_owned(), *value))
            .collect()
    }

    fn found(lost: u64, counted: &Counted, records: &[Value]) -> Vec<(Place, u64)> {
        let places = places(lost, counted, 1, records).into_iter();
        places.map(|it| (it.place, it.frames)).collect()
    }

    #[test]
    fn every_lost_packet_has_a_place() {
        let counted = Counted {
            guest: counters(&[
                ("eth0.rx_dropped", 2),
                ("lo.rx_dropped", 9),
                ("Udp6RcvbufErrors", 3),
            ]),
            hosts: vec![
                counters(&[("vnet3.tx_dropped", 70), ("up0.rx_dropped", 1)]),
                counters(&[("vnet0.tx_dropped", 40), ("vnet0.rx_dropped", 9)]),
            ],
        };
        let records = [
            json!({"handover": [], "nics": []}),
            json!({
                "handover": [{"lost": 5}, {"lost": 1}],
                "nics": [{"not_held": 4, "tap_full": 8, "tap_full_at_source": 6}],
            }),
        ];
        assert_eq!(
            found(100, &counted, &records),
            [
                (Place::NotCounted, 100 - 1 - 10 - 6 - 40 - 2 - 3),
                (Place::HostDropped, 1),
                (Place::NotHeld, 10),
                (Place::TapFullAtSource, 6),
                (Place::TapFull, 40),
                (Place::GuestDropped, 2),
                (Place::SocketFull, 3),
            ]
        );
    }

    #[test]
    fn more_missing_frames_than_lost_packets_leave_none_without_a_place() {
        let counted = Counted {
            guest: counters(&[("Udp6RcvbufErrors", 30)]),
            hosts: Vec::new(),
        };
        assert_eq!(found(10, &counted, &[]), [(Place::SocketFull, 30)]);
    }

    #[test]
    fn a_move_that_lost_nothing_needs_no_place() {
        let counted = Counted {
            guest: counters(&[("Udp6RcvbufErrors", 30)]),
            hosts: Vec::new(),
        };
        assert_eq!(found(0, &counted, &[]), []);
    }
}
