//! Where the lost packets of a move went, as far as somebody counted them.
//!
//! ```text
//! sender -> network -> VM host's NIC -> gate -> TAP -> guest's NIC -> socket -> application
//!               |             |           |      |          |            |
//!          not counted   host_dropped  not_held  tap_full  guest_dropped socket_full
//! ```
//!
//! The kernels and the agents count frames of every flow, so a place may be given more than were lost of
//! the streams.

use std::iter;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::counters::{self, Counters};

/// What libvirt calls TAPs.
const TAP: &str = "vnet";

/// What the kernels have counted of packets while a guest moved.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Counted {
    /// The guest's.
    pub guest: Counters,
    /// Each VM host's.
    pub hosts: Vec<Counters>,
}

impl Counted {
    /// What has been counted since.
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

/// A place, in the order in which a packet comes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// Nobody counted it: it did not reach the VM host, or was lost on its way between both.
    NotCounted,
    /// A VM host dropped it before its bridge had it.
    HostDropped,
    /// The gate had no room for it, or the agent let it go.
    NotHeld,
    /// It found the queue of the TAP full at the source.
    TapFullAtSource,
    /// The same at the destination.
    TapFull,
    /// The guest's kernel dropped it before the socket.
    GuestDropped,
    /// The application's socket was full.
    SocketFull,
}

impl Place {
    /// The place for a person, after a number of packets.
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

/// Frames that went missing at a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Missing {
    /// Where.
    pub place: Place,
    /// How many.
    pub frames: u64,
}

/// Finds places for `lost` packets of a guest that went to the VM host `to`. `records` are what the
/// agents of both ends have recorded of it, if there are agents. A place where nothing went missing is
/// not listed.
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

/// The sum of a counter over some interfaces.
fn sum(counters: &Counters, counter: &str, is_meant: impl Fn(&str) -> bool) -> u64 {
    let of = |(name, value): (&String, &u64)| {
        let (interface, column) = name.rsplit_once('.')?;
        (column == counter && is_meant(interface)).then_some(*value)
    };
    counters.iter().filter_map(of).sum()
}

/// The sum of a number over the rows of a record; both ends may have it, so the greater one.
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
